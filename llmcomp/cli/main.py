"""The app: one file a verb, and the single place where errors become one sentence and an exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from llmcomp.cli.bench import bench
from llmcomp.cli.card import card
from llmcomp.cli.compress import compress
from llmcomp.cli.distill import distill
from llmcomp.cli.evaluate import evaluate
from llmcomp.cli.export import export
from llmcomp.cli.factorize import factorize
from llmcomp.cli.generate import generate
from llmcomp.cli.inspect import inspect
from llmcomp.cli.models import models
from llmcomp.cli.plan import plan
from llmcomp.cli.prune import prune
from llmcomp.cli.push import push
from llmcomp.cli.quantize import quantize
from llmcomp.cli.recover import recover
from llmcomp.cli.report import report
from llmcomp.cli.sparsify import sparsify
from llmcomp.errors import EndedElsewhere, LlmcompError, UserError
from llmcomp.ranks import joined, launched

INTERRUPTED, TERMINATED = 130, 143
# By one process or several, and resumed by the same command.
_COMPRESSING = ("quantize", "prune", "sparsify", "factorize", "compress", "recover", "distill")

app = typer.Typer(
    help="Make Hugging Face models smaller, see what it cost, get a checkpoint that other software loads.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_VERBS = (
    quantize, prune, sparsify, factorize, compress, recover, distill, inspect, plan, evaluate, export, bench, generate,
    report, card, push, models,
)  # fmt: skip
for _verb in _VERBS:
    app.command(no_args_is_help=_verb is not models)(_verb)


class Interrupted(BaseException):
    """Ctrl-C. Not KeyboardInterrupt, which typer would turn into its own exit status."""

    exit_code = INTERRUPTED


class Terminated(BaseException):
    """SIGTERM, which a launcher sends to all ranks when one has ended."""

    exit_code = TERMINATED


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"llmcomp {version('llmcomp')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works after any verb, too.")] = False,
) -> None:
    """Options of the app itself act by callbacks; `--debug` is read by `main`."""
    if context.invoked_subcommand not in _COMPRESSING and (size := launched().size) > 1:
        raise UserError(
            f"llmcomp {context.invoked_subcommand} works in one process, and {size} were started; call it without a "
            "launcher."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the CLI.

    Returns:
        The exit status: 0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C; of several ranks the same.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    received: list[int] = []
    before = signal.signal(signal.SIGINT, partial(_stop, received))
    terminated: Any = signal.getsignal(signal.SIGTERM)
    try:
        if launched().size > 1:
            signal.signal(signal.SIGTERM, partial(_stop, received))
        with joined() as world, _talking(world.first):
            app(args=arguments, prog_name="llmcomp")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:
        return _ended_by(error, received, debug, resumes=arguments[:1] in ([verb] for verb in _COMPRESSING))
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, terminated or signal.SIG_DFL)
    return 0


def _ended_by(error: BaseException, received: Sequence[int], debug: bool, *, resumes: bool) -> int:
    """Say why the command ends; its exit status.

    Args:
        received: signals that asked it to stop. Where one arrives in code that is not ours, that code may make an error
            of its own of what `_stop` raises.
        resumes: whether the same command goes on where this one ends.
    """
    if isinstance(error, EndedElsewhere):
        return error.exit_code
    if signal.SIGINT in received:
        again = "; the same command resumes where it stopped." if resumes else "."
        return _say(f"Interrupted{again}", INTERRUPTED, debug)
    if signal.SIGTERM in received:
        sentence = "Stopped from outside, or because another process has ended; the same command resumes."
        return _say(sentence, TERMINATED, debug)
    if isinstance(error, LlmcompError):
        return _say(str(error), error.exit_code, debug)
    if isinstance(error, BrokenPipeError):  # the reader of our stdout went away, as `| head` does
        return 0
    if not isinstance(error, Exception):
        raise error
    sentence = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return _say(f"Unexpected failure, please report it with --debug's output: {sentence}", 1, debug)


def run() -> None:
    """The `llmcomp` command."""
    sys.exit(main())


@contextlib.contextmanager
def _talking(wanted: bool) -> Iterator[None]:
    """What is said on the way is said by one rank of all."""
    if wanted:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _stop(received: list[int], number: int, frame: FrameType | None) -> None:
    received.append(number)
    _ignore_signals()
    raise Interrupted if number == signal.SIGINT else Terminated


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not tear the clean-up
        signal.signal(number, signal.SIG_IGN)


def _say(sentence: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    typer.secho(f"llmcomp: {sentence}", fg=typer.colors.RED if status != INTERRUPTED else None, err=True)
    return status
