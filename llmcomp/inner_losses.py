"""Pure functions of what lies inside two models: hidden states, attention scores, relations. No module, no state.

Shapes: B rows, L tokens, C channels, H heads, D channels of a head. `tokens` is bool [B, L], False at padding. Each is
a sum over tokens divided by n, by default the tokens here; where a batch is a part of a step, n is that of the step,
so parts and processes add up to what one batch would give. Teachers' tensors are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], seen: Tensor, tokens: Tensor,
    count: Tensor | int | None = None,
) -> Tensor:  # fmt: skip
    """Squared error of attention scores before the softmax, q·k/√d (TinyBERT, eq. 7):
    L = 1/n Σ_query 1/H Σ_head 1/|keys| Σ_key (a - a')², over the keys that a query sees.

    Scores themselves are not held, only those of a block of heads at a time (`_Blocks`).

    Args:
        student, teacher: queries q/√d and keys k [B, H, L, D], of which a = q·k/√d. D may differ.
        seen: bool [B or 1, 1, L, L], the keys that a query may attend to.

    Returns:
        A scalar in float32.

    >>> q, every = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    >>> attention_scores((q, q), (q / 2, q), every, every[:, 0, 0])
    tensor(4.)
    """
    seen = seen & tokens[:, None, None, :]  # what a pad attends to counts nowhere, nor what attends to it
    weights = (seen / seen.sum(-1, keepdim=True).clamp_min(1)) * tokens[:, None, :, None]  # [B, 1, L, L]
    there = tokens[:, None, :, None]
    query, key, its_query, its_key = (torch.where(there, one.detach(), 0) for one in (*student, *teacher))
    left, right = torch.cat([query, -its_query], -1), torch.cat([key, its_key], -1)  # one product gives a - a'

    def work(rows: slice, heads: slice, wanted: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        error = (left[rows, heads] @ right[rows, heads].transpose(-1, -2)).float()
        weighted = error * weights[rows]
        loss = torch.dot(error.flatten(), weighted.flatten())
        if not wanted:
            return loss, ()
        slope = (2 * weighted).to(query.dtype)
        return loss, (slope @ key[rows, heads], slope.transpose(-1, -2) @ query[rows, heads])

    total: Tensor = _Blocks.apply(work, query.shape[1], *student)
    return total / (query.shape[1] * _n(tokens, count))


def relations(
    student: Tensor, teacher: Tensor, tokens: Tensor, heads: int, count: Tensor | int | None = None,
    seen: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
    allowed = allowed | ~allowed.any(-1, keepdim=True)  # rows of padding, which the sum leaves out
    hidden = (~allowed).expand(len(tokens), 1, -1, -1)
    split = _split(student, heads)
    own, other = (torch.where(tokens[:, None, :, None], one, 0)
                  for one in (split.detach(), _split(teacher.detach(), heads)))  # fmt: skip

    def work(rows: slice, part: slice, wanted: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        mine, its, there = own[rows, part], other[rows, part], tokens[rows, None, :, None]
        log_q, log_p = (_relation(one).masked_fill_(hidden[rows], -torch.inf).log_softmax(-1) for one in (mine, its))
        p = log_p.exp()
        loss = torch.where(there, p * (log_p - log_q).masked_fill_(hidden[rows], 0), 0).sum()
        if not wanted:
            return loss, ()
        slope = torch.where(there, log_q.exp() - p, 0) / mine.shape[-1] ** 0.5
        return loss, (slope @ mine + slope.transpose(-1, -2) @ mine,)

    total: Tensor = _Blocks.apply(work, heads, split)
    return total / (heads * _n(tokens, count))


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


def _split(value: Tensor, heads: int) -> Tensor:
    """All channels split anew, [B, A, L, channels / A] in float32."""
    rows, _, length, _ = value.shape
    channels = value.transpose(1, 2).reshape(rows, length, -1).float()
    if channels.shape[-1] % heads:
        raise BadRecipe(
            f"--relation-heads {heads} does not divide {channels.shape[-1]} channels; give a number that divides both "
            "models'."
        )
    return channels.reshape(rows, length, heads, -1).transpose(1, 2)


def _relation(split: Tensor) -> Tensor:
    """X Xᵀ/√d [B, A, L, L]."""
    return split @ (split / split.shape[-1] ** 0.5).transpose(-1, -2)


# Scores of one block, as numbers: on a CPU they stay in its cache, on a GPU they keep it busy.
_BLOCK = {"cpu": 2**18}
_BLOCK_ELSEWHERE = 2**26

Work = Callable[[slice, slice, bool], tuple[Tensor, tuple[Tensor, ...]]]


class _Blocks(torch.autograd.Function):
    """A sum over blocks of rows and heads, whose gradients are computed with it: what is as large as [L, L] lives no
    longer than its block, where autograd would hold it for all layers until the way back.

    The work of a block gives its part of the sum and, where wanted, the gradient by the block of each tensor.
    """

    @staticmethod
    def forward(ctx: Any, work: Work, heads: int, *tensors: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        rows, length, device = len(tensors[0]), tensors[0].shape[2], tensors[0].device
        at_once = max(1, _BLOCK.get(device.type, _BLOCK_ELSEWHERE) // length**2)
        few, many = min(heads, at_once), max(1, at_once // heads)
        gradients = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in tensors if wanted]
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):  # what is compared has its dtype already
            for row in range(0, rows, many):
                for head in range(0, heads, few):
                    block = slice(row, row + many), slice(head, head + few)
                    loss, found = work(*block, wanted)
                    total += loss
                    for gradient, part in zip(gradients, found, strict=True):
                        gradient[block] = part
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(above * gradient for gradient in ctx.saved_tensors)


def _where(value: Tensor, tokens: Tensor) -> Tensor:
    size = value.square().mean(-1) * tokens  # [B, L]
    return size / size.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _n(tokens: Tensor, count: Tensor | int | None) -> Tensor | int:
    count = tokens.sum() if count is None else count
    return count.clamp_min(1) if isinstance(count, Tensor) else max(1, count)
