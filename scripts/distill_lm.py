"""Train a smaller causal language model by a larger one: the teacher's distribution at each position, and the text.

    accelerate launch scripts/distill_lm.py --config examples/distil-lm.yaml
    accelerate launch scripts/distill_lm.py --config examples/distil-lm.yaml seed=1 output=second

docs/methods/distillation.md has all keys. KEY=VALUE after the file says otherwise than the file. Several processes, on
CPUs or GPUs: `accelerate launch --multi_gpu --num_processes 2 …` or torchrun. The same command resumes a killed run.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llmcomp import CompressResult, distill
from llmcomp.cli.scripting import script
from llmcomp.progress import Progress
from llmcomp.training.distill_plan import read_distill_plan


def work(config: Path, settings: Sequence[str], progress: Progress) -> CompressResult:
    return distill(read_distill_plan(config, settings, method="logits"), progress)


def main(argv: Sequence[str] | None = None) -> int:
    return script("distill_lm", __doc__, work, argv)


if __name__ == "__main__":
    sys.exit(main())
