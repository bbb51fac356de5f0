"""Train a model while weights are removed: gradual magnitude pruning, movement pruning, lottery tickets.

    accelerate launch scripts/prune_in_training.py --config examples/movement-sst2.yaml
    accelerate launch scripts/prune_in_training.py --config examples/gradual-2of4-lm.yaml seed=1 output=second

docs/methods/training-time-pruning.md has all keys. KEY=VALUE after the file says otherwise than the file. Several
processes, on CPUs or GPUs: `accelerate launch --multi_gpu --num_processes 2 …` or torchrun. The same command resumes a
killed run.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llmcomp import CompressResult, prune_in_training
from llmcomp.cli.scripting import script
from llmcomp.progress import Progress
from llmcomp.training.pruning_plan import read_plan


def work(config: Path, settings: Sequence[str], progress: Progress) -> CompressResult:
    return prune_in_training(read_plan(config, settings), progress)


def main(argv: Sequence[str] | None = None) -> int:
    return script("prune_in_training", __doc__, work, argv)


if __name__ == "__main__":
    sys.exit(main())
