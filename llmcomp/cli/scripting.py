"""What a script under scripts/ does with its YAML file: read it, run it, say in one sentence what cannot be."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmcomp.errors import EndedElsewhere, LlmcompError

if TYPE_CHECKING:
    from llmcomp.progress import Progress
    from llmcomp.run_options import CompressResult

Work = Callable[[Path, Sequence[str], "Progress"], "CompressResult"]  # file, KEY=VALUE said after it, who listens
# Sentences of the library name flags, which are keys here; those of launchers, with underscores, are none.
_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)(?![a-z_-])")
_KEPT = ("config", "cpu")


def script(name: str, about: str, work: Work, argv: Sequence[str] | None = None) -> int:
    """A script's main function.

    Args:
        name: of the script, before its sentences. about: its help.
        work: what it does.

    Returns:
        The exit status: 0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="said otherwise than in the file")
    arguments = parser.parse_args(argv)
    try:
        _run(arguments, work)
    except EndedElsewhere as error:
        return error.exit_code
    except LlmcompError as error:
        if arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"{name}: {_FLAG.sub(_key, str(error))}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: Interrupted; the same command resumes where it stopped.\n")
        return 130
    return 0


def _run(arguments: argparse.Namespace, work: Work) -> None:
    from llmcomp.cli.progress import listener
    from llmcomp.cli.running import show
    from llmcomp.ranks import joined

    with joined() as world, listener(arguments.json) as progress:
        result = work(arguments.config, arguments.settings, progress)
        if world.first:
            show(result, arguments.json)


def _key(flag: re.Match[str]) -> str:
    return flag[0] if flag[1] in _KEPT else flag[1].replace("-", "_")
