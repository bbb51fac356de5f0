"""How good a language model is, and how far a compressed one is from its original, in one pass over both.

Both models see the same batch; per chunk of positions each head gives its logits (`forward.SplitModel`), from
which come negative log-likelihood, KL(original || compressed) and top-1 agreement. What is kept is one number
per position. Everything else (classifiers, encoders) is in `rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llmcomp.errors import BadCheckpoint, BadData, NumericalError
from llmcomp.losses import kl_divergence
from llmcomp.measure import rows, summaries
from llmcomp.measure.forward import SplitModel
from llmcomp.measure.positions import Scored, Subject, TokenBatch, count_rows, scored
from llmcomp.progress import Progress, Silent
from llmcomp.report.schema import Divergence, Quality

LANGUAGE_TASKS = ("causal-lm", "masked-lm", "seq2seq-lm", "speech-seq2seq", "image-text-to-text")
NAMES = ("the original", "the compressed model")


class Comparison(NamedTuple):
    """What `compare` found; None where the task, or missing labels, leave nothing to measure."""

    before: Quality | None
    after: Quality | None
    divergence: Divergence | None


def window_nll(
    model: nn.Module, batches: Sequence[TokenBatch], subject: Subject
) -> tuple[np.ndarray, np.ndarray]:
    """Summed negative log-likelihood of each window, and how many tokens were scored in it.

    Returns:
        nll float64 [windows], nats; tokens int64 [windows].

    Raises:
        NumericalError: logits that are not finite.
    """
    found = _positions([model], batches, subject, Silent())
    return _window_sums(found.nll[0], found.windows, count_rows(batches))


def compare(
    original: nn.Module,
    compressed: nn.Module,
    batches: Sequence[TokenBatch],
    subject: Subject,
    progress: Progress | None = None,
) -> Comparison:
    """Both models on the same inputs, side by side.

    Raises:
        BadData: nothing to score.
        BadCheckpoint: the two models do not predict the same tokens or classes.
        NumericalError: outputs that are not finite.
    """
    return _measure([original, compressed], batches, subject, progress or Silent())


def assess(
    model: nn.Module, batches: Sequence[TokenBatch], subject: Subject, progress: Progress | None = None
) -> Quality | None:
    """One model alone; None where its task needs labels, or another model to compare with, and there is none.

    Raises:
        as `compare`.
    """
    return _measure([model], batches, subject, progress or Silent()).after


def _measure(
    models: list[nn.Module], batches: Sequence[TokenBatch], subject: Subject, progress: Progress
) -> Comparison:
    if not batches:
        raise BadData("There is nothing to evaluate on: the evaluation data gave no window or row.")
    if subject.task not in LANGUAGE_TASKS:
        return Comparison(*rows.measure(models, batches, subject, progress))
    found = _positions(models, batches, subject, progress)
    if not len(found.windows):
        raise BadData("There is nothing to score: every window has fewer than two tokens.")
    quality: list[Quality | None] = []
    for nll in found.nll:
        sums, tokens = _window_sums(nll, found.windows, count_rows(batches))
        used = tokens > 0
        quality.append(summaries.language(sums[used], tokens[used], subject.data, subject.seed))
    if len(models) == 1:
        return Comparison(None, quality[0], None)
    divergence = summaries.divergence(
        found.kl, found.choices[0], found.choices[1], found.windows, subject.seed
    )
    return Comparison(quality[0], quality[1], divergence)


class _Positions(NamedTuple):
    """One number per scored position; lists by model."""

    windows: np.ndarray
    nll: list[np.ndarray]
    choices: list[np.ndarray]
    kl: np.ndarray


@torch.inference_mode()
def _positions(
    models: list[nn.Module], batches: Sequence[TokenBatch], subject: Subject, progress: Progress
) -> _Positions:
    runners = [SplitModel(model, subject.positions_at_once) for model in models]
    windows: list[Tensor] = [torch.zeros(0, dtype=torch.long)]
    values: list[Tensor] = [torch.zeros(len(models) + 1, 0, dtype=torch.float64)]
    choices: list[Tensor] = [torch.zeros(len(models), 0, dtype=torch.long)]
    first = 0
    for batch, wanted in scored(batches, subject.task, subject.masking):
        for value, choice in _chunks(runners, batch, wanted):
            values.append(value.cpu())
            choices.append(choice.cpu())
        windows.append(wanted.rows.cpu() + first)
        first += len(batch.input_ids)
        progress.step(len(batch.input_ids))
    table = torch.cat(values, 1).numpy()
    _require_finite(table)
    chosen = list(torch.cat(choices, 1).numpy())
    return _Positions(torch.cat(windows).numpy(), list(table[:-1]), chosen, table[-1])


def _chunks(runners: list[SplitModel], batch: TokenBatch, wanted: Scored) -> Iterator[tuple[Tensor, Tensor]]:
    """Per chunk: each model's NLL, then the KL (0 for one model), [models + 1, positions]; each model's
    choice, [models, positions]."""
    device = next(runners[0].model.parameters()).device
    ids, rows, columns = (x.to(device) for x in (wanted.input_ids, wanted.rows, wanted.columns))
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    context = {name: value.to(device) for name, value in batch.context.items()}
    hidden = [runner.hidden(ids, mask, context)[rows, columns] for runner in runners]
    tokens, targets = ids[rows, columns], wanted.targets.to(device)
    at_once = min(runner.positions_at_once for runner in runners)
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        logs = [
            _log_probabilities(r.logits(h[part], tokens[part])) for r, h in zip(runners, hidden, strict=True)
        ]
        _require_same_classes(logs)
        nll = [-log.gather(-1, targets[part, None])[:, 0].double() for log in logs]
        kl = kl_divergence(logs[0], logs[1]).double() if len(logs) == 2 else torch.zeros_like(nll[0])
        yield torch.stack([*nll, kl]), torch.stack([log.argmax(-1) for log in logs])


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _require_same_classes(logs: list[Tensor]) -> None:
    sizes = {log.shape[-1] for log in logs}
    if len(sizes) > 1:
        raise BadCheckpoint(
            f"The models predict over {logs[0].shape[-1]} and {logs[1].shape[-1]} tokens; compare a "
            "compressed model with the model that it was made from."
        )


def _require_finite(values: np.ndarray) -> None:
    """values: [models + 1, positions], the last row the KL."""
    names = NAMES if len(values) == 3 else ("the model",)
    for name, row in zip((*names, "the divergence of the two models"), values, strict=True):
        if not np.isfinite(row).all():
            raise NumericalError(
                f"Evaluation of {name} gave {int((~np.isfinite(row)).sum())} values that are not finite."
            )


def _window_sums(nll: np.ndarray, windows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.bincount(windows, weights=nll, minlength=count), np.bincount(windows, minlength=count)
