"""Train a model while weights are removed: gradual magnitude pruning, movement pruning, lottery tickets.

    accelerate launch scripts/prune_in_training.py --config examples/movement-sst2.yaml
    accelerate launch scripts/prune_in_training.py --config examples/gradual-2of4-lm.yaml seed=1 output=second

docs/training-time-pruning.md has all keys. KEY=VALUE after the file says otherwise than the file. Several processes, on
CPUs or GPUs: `accelerate launch --multi_gpu --num_processes 2 …` or torchrun. The same command resumes a killed run.
"""

import argparse
import re
import sys
import traceback
from pathlib import Path

from llmcomp.errors import EndedElsewhere, LlmcompError

_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)")  # sentences of the library name flags, which are keys here


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="said otherwise than in the file")
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except EndedElsewhere as error:
        return error.exit_code
    except LlmcompError as error:
        if arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"prune_in_training: {_FLAG.sub(_key, str(error))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("prune_in_training: Interrupted; the same command resumes where it stopped.\n")
        return 130
    return 0


def run(arguments: argparse.Namespace) -> None:
    from llmcomp import prune_in_training
    from llmcomp.cli.progress import listener
    from llmcomp.cli.running import show
    from llmcomp.ranks import joined
    from llmcomp.training.pruning_plan import read_plan

    with joined() as world, listener(arguments.json) as progress:
        result = prune_in_training(read_plan(arguments.config, arguments.settings), progress)
        if world.first:
            show(result, arguments.json)


def _key(flag: re.Match[str]) -> str:
    return flag[0] if flag[1] == "config" else flag[1].replace("-", "_")


if __name__ == "__main__":
    sys.exit(main())
