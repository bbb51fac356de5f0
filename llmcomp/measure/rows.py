"""Quality and divergence of all but language models: classifiers, taggers, extractors, encoders of sentences
and bare ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcomp.errors import BadCheckpoint, BadData, NumericalError
from llmcomp.feeds import call
from llmcomp.losses import kl_divergence
from llmcomp.measure import similarity, summaries
from llmcomp.measure.embeddings import Sentences
from llmcomp.measure.positions import Subject, TokenBatch, real_positions
from llmcomp.progress import Progress
from llmcomp.report.schema import Divergence, Quality

Found = tuple[Quality | None, Quality | None, Divergence | None]


def measure(
    models: list[nn.Module], batches: Sequence[TokenBatch], subject: Subject, progress: Progress
) -> Found:
    """Before, after and divergence of [original, compressed], or only `after` of [model].

    Raises:
        BadData: a task that nothing is known of.
        BadCheckpoint: models with different classes.
        NumericalError: outputs that are not finite.
    """
    if subject.task in ("sequence-classification", "image-classification"):
        return _sequences(models, batches, subject, progress)
    if subject.task == "token-classification":
        return _distributions(models, batches, subject, progress, _token_logs)
    if subject.task == "question-answering":
        return _distributions(models, batches, subject, progress, _span_logs)
    if subject.sentences is not None:
        return _sentences(models, batches, subject, subject.sentences, progress)
    if subject.task == "encoder":
        return _encoders(models, batches, subject, progress)
    raise BadData(
        f"Evaluation knows no task '{subject.task}'; use --no-evaluate, or measure it with --lm-eval."
    )


def _outputs(
    models: list[nn.Module], batches: Sequence[TokenBatch], progress: Progress
) -> Iterator[tuple[TokenBatch, list[Any]]]:
    for batch in batches:
        outputs = []
        for model in models:
            device = next(model.parameters()).device
            inputs = call(model, batch.input_ids, batch.attention_mask, batch.context)
            with torch.inference_mode():
                outputs.append(model(**{name: value.to(device) for name, value in inputs.items()}))
        yield batch, outputs
        progress.step(len(batch.input_ids))


def _sequences(
    models: list[nn.Module], batches: Sequence[TokenBatch], subject: Subject, progress: Progress
) -> Found:
    found: list[list[Tensor]] = [[] for _ in models]
    for _, outputs in _outputs(models, batches, progress):
        for kept, output in zip(found, outputs, strict=True):
            kept.append(output.logits.float().cpu())
    logits = [torch.cat(kept) for kept in found]
    _check(logits)
    config: Any = models[-1].config
    if config.problem_type == "multi_label_classification":
        return (None, None, _multi_label_divergence(logits, subject) if len(logits) == 2 else None)
    if config.problem_type == "regression" or logits[-1].shape[-1] == 1:
        return _regression(logits, subject)
    qualities: list[Quality | None] = [None for _ in logits]
    if subject.labels is not None:
        qualities = [summaries.classes(x.numpy(), subject.labels, subject.data, subject.seed) for x in logits]
    if len(logits) == 1:
        return None, qualities[0], None
    logs = [x.log_softmax(-1) for x in logits]
    return qualities[0], qualities[1], _divergence(logs, torch.arange(len(logs[0])), subject)


def _regression(logits: list[Tensor], subject: Subject) -> Found:
    """Scores have no distribution, so no divergence; without labels the original's are the reference."""
    values = [x[:, 0].double().numpy() for x in logits]
    if subject.labels is not None:
        found = [summaries.scores(x, subject.labels, subject.data, subject.seed) for x in values]
        return (found[0] if len(found) == 2 else None), found[-1], None
    if len(values) == 1:
        return None, None, None
    data = f"{subject.data}; against the original's scores"
    return None, summaries.scores(values[1], values[0], data, subject.seed), None


def _multi_label_divergence(logits: list[Tensor], subject: Subject) -> Divergence:
    """Labels are independent decisions: KL summed over them, agreement where all are the same."""
    pairs = [F.logsigmoid(torch.stack([x, -x], -1).double()) for x in logits]
    kl = kl_divergence(pairs[0], pairs[1]).sum(-1)
    same = ((logits[0] > 0) == (logits[1] > 0)).all(-1).long()
    return summaries.divergence(
        kl.numpy(), np.ones(len(same), dtype=np.int64), same.numpy(), np.arange(len(same)), subject.seed
    )


def _token_logs(batch: TokenBatch, output: Any) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities [positions, classes] of the real tokens, and the row of each position."""
    rows, columns = real_positions(batch)
    return [output.logits.float().cpu()[rows, columns].log_softmax(-1)], rows


def _span_logs(batch: TokenBatch, output: Any) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities of start and end over each row's real positions: two distributions a row."""
    real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    logs = []
    for row, kept in enumerate(real.bool()):
        for logits in (output.start_logits, output.end_logits):
            logs.append(logits[row].float().cpu()[kept].log_softmax(-1)[None])
    return logs, torch.arange(len(real)).repeat_interleave(2)


def _distributions(
    models: list[nn.Module],
    batches: Sequence[TokenBatch],
    subject: Subject,
    progress: Progress,
    read: Callable[[TokenBatch, Any], tuple[list[Tensor], Tensor]],
) -> Found:
    """Divergence only: no labels are read for these tasks."""
    if len(models) == 1:
        return None, None, None
    kl, choices, rows, first = [], [], [], 0
    for batch, outputs in _outputs(models, batches, progress):
        (original, where), (compressed, _) = read(batch, outputs[0]), read(batch, outputs[1])
        for pair in zip(original, compressed, strict=True):
            _check(list(pair))
            kl.append(kl_divergence(*pair))
            choices.append(torch.stack([x.argmax(-1) for x in pair]))
        rows.append(where + first)
        first += len(batch.input_ids)
    chosen = torch.cat(choices, 1).numpy()
    return (
        None,
        None,
        summaries.divergence(
            torch.cat(kl).double().numpy(), chosen[0], chosen[1], torch.cat(rows).numpy(), subject.seed
        ),
    )


def _encoders(
    models: list[nn.Module], batches: Sequence[TokenBatch], subject: Subject, progress: Progress
) -> Found:
    """Cosine similarity of the two last hidden states at each real position."""
    if len(models) == 1:
        return None, None, None
    cosines, rows, first = [], [], 0
    for batch, outputs in _outputs(models, batches, progress):
        where, columns = real_positions(batch)
        hidden = [output.last_hidden_state[where, columns].double().cpu() for output in outputs]
        _check(hidden)
        cosines.append(torch.cosine_similarity(hidden[0], hidden[1], dim=-1))
        rows.append(where + first)
        first += len(batch.input_ids)
    values = torch.cat(cosines).numpy()
    data = f"{subject.data}; last hidden states against the original's"
    return None, summaries.cosine(values, torch.cat(rows).numpy(), data, subject.seed), None


def _sentences(
    models: list[nn.Module],
    batches: Sequence[TokenBatch],
    subject: Subject,
    sentences: Sentences,
    progress: Progress,
) -> Found:
    """Embeddings, which have no distribution: they are held against scores and against the original's."""
    if len(models) == 1 and sentences.scores is None:
        return None, None, None
    found: list[list[Tensor]] = [[] for _ in models]
    for batch, outputs in _outputs(models, batches, progress):
        for kept, head, output in zip(found, sentences.heads, outputs, strict=True):
            kept.append(head.embed(output.last_hidden_state.cpu(), batch.attention_mask))
    embeddings = [torch.cat(kept) for kept in found]
    _check(embeddings)
    by_text = np.argsort(sentences.order)
    in_order = [one.double().numpy()[by_text] for one in embeddings]
    before, after = similarity.qualities(
        in_order, sentences.pairs, sentences.scores, subject.data, subject.seed
    )
    return before, after, None


def _divergence(logs: list[Tensor], rows: Tensor, subject: Subject) -> Divergence:
    kl = kl_divergence(logs[0], logs[1]).double().numpy()
    chosen = [x.argmax(-1).numpy() for x in logs]
    return summaries.divergence(kl, chosen[0], chosen[1], rows.numpy(), subject.seed)


def _check(values: list[Tensor]) -> None:
    names = ("the original", "the compressed model") if len(values) == 2 else ("the model",)
    for name, value in zip(names, values, strict=True):
        if not torch.isfinite(value).all():
            raise NumericalError(f"Evaluation of {name} gave outputs that are not finite.")
    if len({value.shape[-1] for value in values}) > 1:
        raise BadCheckpoint(
            f"The models have {values[0].shape[-1]} and {values[1].shape[-1]} outputs; compare a compressed "
            "model with the model that it was made from."
        )
