"""Whether an exported file computes what the checkpoint holds: its outputs beside those of the decoded model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.errors import BadRecipe, VerificationFailed
from llmcomp.exports.packed_modules import set_mode
from llmcomp.exports.signatures import Signature

# A file as a function of its inputs by name.
Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Difference:
    """Of outputs at tokens that are not padding: the largest, and the root mean square over the standard deviation."""

    largest: float
    relative: float


@torch.no_grad()
def expected(model: nn.Module, signature: Signature, mode: str) -> list[dict[str, Tensor]]:
    """What torch computes for each batch of the signature; a decoder all tokens at once."""
    set_mode(model, mode)
    empty = [(torch.zeros(1, h, 0, k), torch.zeros(1, h, 0, v)) for h, k, v in signature.cache]
    found = []
    for batch in signature.batches():
        if signature.cache:
            rows = len(batch["input_ids"])
            past = [(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)) for key, value in empty]
            found.append({"logits": model(**batch, past_key_values=past)[0]})
        else:
            found.append(dict(zip(signature.outputs, model(**batch), strict=True)))
    return found


def answers(run: Run, signature: Signature) -> list[dict[str, Tensor]]:
    """What the file computes for each batch; a decoder first a prompt, then two tokens one by one with its cache."""
    return [_generate(run, signature, batch) if signature.cache else run(batch) for batch in signature.batches()]


def _generate(run: Run, signature: Signature, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows, tokens = batch["input_ids"].shape
    sizes = [(heads, size) for heads, key, value in signature.cache for size in (key, value)]
    past = {name: torch.zeros(rows, h, 0, d) for name, (h, d) in zip(signature.past, sizes, strict=True)}
    logits = []
    for start, end in ((0, tokens - 2), (tokens - 2, tokens - 1), (tokens - 1, tokens)):
        part = {name: batch[name][:, start:end].contiguous() for name in ("input_ids", "position_ids")}
        found = run({**part, "attention_mask": batch["attention_mask"][:, :end].contiguous(), **past})
        logits.append(found["logits"])
        past = {name: found[present] for name, present in zip(signature.past, signature.present, strict=True)}
        if past[signature.past[0]].shape[2] != end:
            raise VerificationFailed(
                f"After {end} tokens the file's cache holds {past[signature.past[0]].shape[2]}: it is not a cache."
            )
    return {"logits": torch.cat(logits, 1)}


def difference(
    found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]], signature: Signature
) -> Difference:
    """Of all outputs on all batches.

    Raises:
        VerificationFailed: an output of another shape, or one that is not finite.
    """
    largest, squares, count, values = 0.0, 0.0, 0, []
    for one, other, batch in zip(found, wanted, signature.batches(), strict=True):
        for name, reference in other.items():
            if one[name].shape != reference.shape:
                raise VerificationFailed(
                    f"{name} of the file is {list(one[name].shape)}, expected {list(reference.shape)}."
                )
            mask = batch["attention_mask"].bool()
            per_token = reference.shape[:2] == mask.shape
            ours, theirs = (t[mask] if per_token else t for t in (one[name].double(), reference.double()))
            if not bool(torch.isfinite(ours).all()):
                raise VerificationFailed(f"{name} of the file is NaN or Inf for some inputs.")
            gap = ours - theirs
            largest = max(largest, gap.abs().max().item())
            squares, count = squares + gap.square().sum().item(), count + gap.numel()
            values.append(theirs.flatten())
    deviation = torch.cat(values).std().item()
    return Difference(largest, (squares / count) ** 0.5 / max(deviation, torch.finfo(torch.float32).tiny))


def require_close(found: Difference, limit: float, what: str) -> None:
    """Nothing, where a file is close enough.

    Raises:
        VerificationFailed: a root mean square beyond `limit`; `what` begins the sentence.
    """
    if not found.relative <= limit:
        raise VerificationFailed(
            f"{what} differ from those of the decoded checkpoint by {found.relative:.1e} of their standard deviation "
            f"(root mean square; {limit:.0e} is allowed), so nothing was written."
        )


def describe(found: Difference) -> str:
    return f"{found.largest:.1e} at most, root mean square {found.relative:.1e} of the outputs' standard deviation"


def import_or_explain(names: tuple[str, ...], extra: str) -> list[Any]:
    """The named packages, which come with `pip install llmcomp[extra]`.

    Raises:
        BadRecipe: one that is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise BadRecipe(
            f"An export to {extra} needs the package {error.name or names[0]}: pip install 'llmcomp[{extra}]'."
        ) from error
