"""Pure functions of what lies inside two models: hidden states, attention scores, relations. No module, no state.

Shapes: B rows, L tokens, C channels, H heads, D channels of a head. `tokens` is bool [B, L], False at padding. Each is
a sum over tokens divided by n, by default the tokens here; where a batch is a part of a step, n is that of the step,
so parts and processes add up to what one batch would give. Teachers' tensors are constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcomp.errors import BadRecipe

LAYER_MAPS = ("uniform", "last", "skip")


def cosine(student: Tensor, teacher: Tensor, tokens: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Angle between hidden states, L = 1/n Σ (1 - cos(h, h')) (DistilBERT, arXiv:1910.01108).

    Args:
        student, teacher: h, h' [B, L, C], equally wide.

    Returns:
        A scalar in float32.

    >>> h = torch.ones(1, 2, 3)
    >>> cosine(h, -h, torch.ones(1, 2, dtype=torch.bool))
    tensor(2.)
    """
    h, other = student[tokens].float(), teacher[tokens].detach().float()
    return (1 - torch.nn.functional.cosine_similarity(h, other, dim=-1)).sum() / _n(tokens, count)


def states(student: Tensor, teacher: Tensor, tokens: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Squared error of hidden states or embeddings, L = 1/(n C) Σ ||h W - h'||² (TinyBERT, arXiv:1909.10351, eq. 8
    and 9; of a middle layer the hint of FitNets, arXiv:1412.6550).

    Args:
        student: h W [B, L, C], projected already where widths differ. teacher: h' [B, L, C].

    Returns:
        A scalar in float32.

    >>> h = torch.zeros(1, 2, 4)
    >>> states(h, h + 3, torch.ones(1, 2, dtype=torch.bool))
    tensor(9.)
    """
    error = (student[tokens].float() - teacher[tokens].detach().float()).square().mean(-1)
    return error.sum() / _n(tokens, count)


def attention_scores(
    student: Tensor, teacher: Tensor, seen: Tensor, tokens: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Squared error of attention scores before the softmax, q·k/√d (TinyBERT, eq. 7):
    L = 1/n Σ_query 1/H Σ_head 1/|keys| Σ_key (a - a')², over the keys that a query sees.

    Args:
        student, teacher: a, a' [B, H, L, L]. seen: bool, broadcast to them, the keys that a query may attend to.

    Returns:
        A scalar in float32.

    >>> a, every = torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    >>> attention_scores(a, a + 2, every, every[:, 0, 0])
    tensor(4.)
    """
    seen = seen & tokens[:, None, None, :]  # what a pad attends to counts nowhere, nor what attends to it
    error = torch.where(seen, student.float() - teacher.detach().float(), 0).square()
    by_query = (error.sum(-1) / seen.sum(-1).clamp_min(1)).mean(1)  # [B, L]
    return (by_query * tokens).sum() / _n(tokens, count)


def relations(
    student: Tensor, teacher: Tensor, tokens: Tensor, heads: int, count: Tensor | int | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """How tokens relate to each other by queries, keys or values (MiniLMv2, arXiv:2012.15828, eq. 5 to 7):
    L = 1/(n A) Σ_query Σ_head KL(softmax(X' X'ᵀ/√d') || softmax(X Xᵀ/√d)), nats. All heads' channels are split
    anew into A relation heads, so neither width nor number of heads must be equal.

    Args:
        student, teacher: X, X' [B, H, L, D] of one kind, queries, keys or values. heads: A.
        seen: bool [B, 1, L, L], the keys that count for a query, such as those before it; None for all tokens.

    Raises:
        BadRecipe: channels that A does not divide.
    """
    allowed = tokens[:, None, None, :] if seen is None else seen & tokens[:, None, None, :]
    alone = ~allowed.any(-1, keepdim=True)  # rows of padding, which the sum leaves out
    log_q = _relation(student, heads).masked_fill(~(allowed | alone), -torch.inf).log_softmax(-1)
    log_p = _relation(teacher.detach(), heads).masked_fill(~(allowed | alone), -torch.inf).log_softmax(-1)
    both = torch.where(allowed | alone, log_p - log_q, 0)
    divergence = (log_p.exp() * both).sum(-1).mean(1)  # [B, L]
    return torch.where(tokens, divergence, 0).sum() / _n(tokens, count)


def attention_transfer(student: Tensor, teacher: Tensor, tokens: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Where activations are large, L = 1/n Σ_row ||s/||s|| - s'/||s'||||² with s_l = mean_c h_lc² over the tokens of a
    row (arXiv:1612.03928, eq. 2 with p = 2): no projection, whatever the widths.

    Args:
        student, teacher: h, h' [B, L, C], of any two widths. count: n, by default the rows.

    Returns:
        A scalar in float32.
    """
    one, other = (_where(value.float(), tokens) for value in (student, teacher.detach()))
    total = (one - other).square().sum()
    return total / (len(tokens) if count is None else count)


def layer_map(rule: str, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Which layer of a teacher each layer of a student learns from, counted from 0.

    Args:
        rule: 'uniform', the last of equal parts of the teacher; 'last', the teacher's last layers; 'skip', as uniform
            but for the last layer, which the logits teach (both PKD, arXiv:1908.09355); or pairs '0:1,1:3'.
        student, teacher: how many layers they have.

    Raises:
        BadRecipe: a rule that is none, layers that are not there.

    >>> layer_map("uniform", 3, 6), layer_map("last", 2, 6), layer_map("skip", 3, 6)
    (((0, 1), (1, 3), (2, 5)), ((0, 4), (1, 5)), ((0, 1), (1, 3)))
    """
    if rule in LAYER_MAPS and student > teacher:
        raise BadRecipe(
            f"--layer-map {rule} is for a student of at most its teacher's {teacher} layers, and this one has "
            f"{student}; give pairs such as 0:0,{student - 1}:{teacher - 1}."
        )
    if rule == "last":
        return tuple((layer, teacher - student + layer) for layer in range(student))
    if rule in LAYER_MAPS:
        made = tuple((layer, round((layer + 1) * teacher / student) - 1) for layer in range(student))
        return made[:-1] if rule == "skip" else made
    return _given(rule, student, teacher)


def _given(rule: str, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    parts = [pair.partition(":") for pair in rule.split(",")]
    if not all(one.strip().isdigit() and other.strip().isdigit() for one, _, other in parts):
        raise BadRecipe(
            f"--layer-map {rule} cannot be: give {', '.join(LAYER_MAPS)} or pairs of layers, student's:teacher's, "
            "counted from 0, such as 0:1,1:3."
        )
    pairs = tuple((int(one), int(other)) for one, _, other in parts)
    for own, its in pairs:
        if own >= student or its >= teacher:
            raise BadRecipe(
                f"--layer-map {rule} has {own}:{its}, which is out of range: the student has layers 0 to {student - 1} "
                f"and the teacher 0 to {teacher - 1}."
            )
    if len({own for own, _ in pairs}) < len(pairs):
        raise BadRecipe(f"--layer-map {rule} names a layer of the student twice; give each one teacher's layer.")
    return pairs


def head_map(heads: Sequence[int], student: int, teacher: int) -> list[int]:
    """Which head of a teacher each head of a student learns from.

    Args:
        heads: one for each of the student's; none at all where both have as many.

    Raises:
        BadRecipe: numbers of heads that differ, or heads that are not there.
    """
    if not heads and student == teacher:
        return list(range(student))
    if not heads:
        raise BadRecipe(
            f"Attention scores are compared head by head, and the student has {student} heads where the teacher has "
            f"{teacher}: give --head-map, one of the teacher's for each, or --method minilm, which wants no such thing."
        )
    if len(heads) != student or not all(0 <= head < teacher for head in heads):
        raise BadRecipe(
            f"--head-map {','.join(map(str, heads))} cannot be: give {student} numbers from 0 to {teacher - 1}."
        )
    return list(heads)


def _relation(value: Tensor, heads: int) -> Tensor:
    """X Xᵀ/√d [B, A, L, L] in float32."""
    rows, _, length, _ = value.shape
    channels = value.transpose(1, 2).reshape(rows, length, -1).float()
    if channels.shape[-1] % heads:
        raise BadRecipe(
            f"--relation-heads {heads} does not divide {channels.shape[-1]} channels; give a number that divides both "
            "models'."
        )
    split = channels.reshape(rows, length, heads, -1).transpose(1, 2)
    return split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5


def _where(value: Tensor, tokens: Tensor) -> Tensor:
    size = value.square().mean(-1) * tokens  # [B, L]
    return size / size.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _n(tokens: Tensor, count: Tensor | int | None) -> Tensor | int:
    count = tokens.sum() if count is None else count
    return count.clamp_min(1) if isinstance(count, Tensor) else max(1, count)
