"""Train a smaller BERT, RoBERTa or ModernBERT by a larger one as DistilBERT was: soft targets, labels, a cosine.

    accelerate launch scripts/distill_bert.py --config examples/distilbert-sst2.yaml
    accelerate launch scripts/distill_bert.py --config examples/distilbert-sst2.yaml seed=1 output=second

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
    return distill(read_distill_plan(config, settings, method="distilbert"), progress)


def main(argv: Sequence[str] | None = None) -> int:
    return script("distill_bert", __doc__, work, argv)


if __name__ == "__main__":
    sys.exit(main())
