"""The app: one file a verb, and the single place where errors become one sentence and an exit status."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from llmcomp.cli.evaluate import evaluate
from llmcomp.cli.inspect import inspect
from llmcomp.cli.models import models
from llmcomp.cli.plan import plan
from llmcomp.cli.quantize import quantize
from llmcomp.cli.report import report
from llmcomp.errors import LlmcompError

INTERRUPTED = 130

app = typer.Typer(
    help="Make Hugging Face models smaller, see what it cost, get a checkpoint that other software loads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _verb in (quantize, inspect, plan, evaluate, report, models):
    app.command(no_args_is_help=_verb is not models)(_verb)


class Interrupted(BaseException):
    """Ctrl-C. Not KeyboardInterrupt, which typer would turn into its own exit status."""


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"llmcomp {version('llmcomp')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works after any verb, too.")] = False,
) -> None:
    """Options of the app itself act by callbacks; `--debug` is read by `main`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the CLI.

    Returns:
        The exit status: 0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        app(args=arguments, prog_name="llmcomp")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Interrupted:
        return _say("Interrupted; the same command resumes where it stopped.", INTERRUPTED, debug)
    except LlmcompError as error:
        return _say(str(error), error.exit_code, debug)
    except BrokenPipeError:  # the reader of our stdout went away, as `| head` does
        return 0
    except Exception as error:
        sentence = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return _say(f"Unexpected failure, please report it with --debug's output: {sentence}", 1, debug)
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def run() -> None:
    """The `llmcomp` command."""
    sys.exit(main())


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not tear the clean-up
    raise Interrupted


def _say(sentence: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    typer.secho(f"llmcomp: {sentence}", fg=typer.colors.RED if status != INTERRUPTED else None, err=True)
    return status
