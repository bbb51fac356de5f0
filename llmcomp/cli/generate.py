"""`llmcomp generate`: talk to what one has made."""

from __future__ import annotations

import json as json_module
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcomp.cli import options as o
from llmcomp.errors import UserError

if TYPE_CHECKING:
    from llmcomp.generation import Sampling, Stream

_CHOICE = "How tokens are chosen"


def generate(
    directory: Annotated[str, typer.Argument(help="A language model: directory, sample, alias or Hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to go on from; '-' reads it from stdin.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many.", show_default="as generation_config.json says, else 256"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 is --greedy.", show_default="the model's own", rich_help_panel=_CHOICE),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Draw among the most probable that sum up to this.",
            show_default="the model's own", rich_help_panel=_CHOICE,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Draw among so many of the most probable.", show_default="the model's own",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, help="Of the draws.", show_default="another each time", rich_help_panel=_CHOICE
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The most probable token each time.", rich_help_panel=_CHOICE)
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Put the prompt into the tokenizer's chat template.",
            show_default="where it has one",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.", show_default="all cores")] = None,
    json: o.Json = False,
) -> None:
    """Let a language model write on from a prompt; text streams to stdout, its speed goes to stderr.

    Examples:

        llmcomp generate sample:lm "Return the sum of" --greedy --max-new-tokens 40

        llmcomp generate ./my-chat-model-w4 "Why is the sky blue?" --temperature 0.7 --seed 1

        llmcomp generate ./my-model-w4 - --no-chat --threads 4
    """  # fmt: skip
    drawing = {"--temperature": temperature, "--top-p": top_p, "--top-k": top_k}
    if greedy and (others := [flag for flag, value in drawing.items() if value is not None]):
        raise UserError(f"--greedy draws nothing, so {' and '.join(others)} would have no effect; give one of the two.")
    text = sys.stdin.read() if prompt == "-" else prompt
    from llmcomp.cli.progress import listener
    from llmcomp.hub import resolve

    with listener(json) as progress:
        path = resolve(directory, progress=progress).path

    from llmcomp.generation import Sampling

    drawn = time.time_ns() % 2**32 if seed is None else seed
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, greedy, drawn)
    prompt_tokens, stream = _answer(path, text, chat, sampling, threads, json)
    if json:
        typer.echo(json_module.dumps(_as_json(directory, text, prompt_tokens, sampling, stream), ensure_ascii=False))


def _answer(
    path: Path, text: str, chat: bool | None, sampling: Sampling, threads: int | None, json: bool
) -> tuple[int, Stream]:
    """Write on from a text with the model in a directory; the prompt's tokens, and what was written."""
    import torch

    from llmcomp import api
    from llmcomp.generation import Stream, check_prompt, encode, open_writer

    check_prompt(text)
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer = open_writer(path, api.load)
    ids = encode(model, tokenizer, text, chat)
    stream = Stream(tokenizer, (lambda piece: None) if json else _show)
    _write(model, tokenizer, ids, sampling, stream, json)
    return ids.shape[1], stream


def _show(piece: str) -> None:
    """At once: a reader of a pipe sees it come, too."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def _write(model: Any, tokenizer: Any, ids: Any, sampling: Sampling, stream: Stream, json: bool) -> None:
    """Also where it is interrupted, the last line of text is ended and its speed is told."""
    from llmcomp.generation import write

    try:
        write(model, tokenizer, ids, sampling, stream)
    finally:
        if stream.tokens:
            if not json:
                _show("\n")
            typer.echo(speed(stream), err=True)


def speed(stream: Stream) -> str:
    """'40 tokens, 13.5 tokens/s after the first, which took 210 ms'."""
    from llmcomp.report import words

    count = "1 token" if stream.tokens == 1 else f"{stream.tokens} tokens"
    first = words.seconds(stream.moments[0] - stream.began)
    rate = stream.tokens_per_second
    return f"{count}, the first after {first}" if rate is None else (
        f"{count}, {words.number(rate)} tokens/s after the first, which took {first}"
    )


def _as_json(model: str, prompt: str, prompt_tokens: int, sampling: Sampling, stream: Stream) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "text": stream.text,
        "tokens": stream.tokens,
        "first_token_seconds": stream.moments[0] - stream.began if stream.tokens else None,
        "tokens_per_second": stream.tokens_per_second,
        "seed": sampling.seed,
    }
