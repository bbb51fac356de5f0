"""What a student learns from a teacher, put together: one weighted sum of losses that is an `Objective` of the Trainer.

A teacher is a function from what the student reads to `Targets`, so several of them, the student's own past, another
student, or what was said before are functions around functions (`training.guides`, `training.remembered`); nothing here
knows which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp import inner_losses, losses
from llmcomp.errors import BadRecipe
from llmcomp.feeds import PIXELS
from llmcomp.kept import Kept
from llmcomp.training.data import Batch
from llmcomp.training.taps import EMBEDDINGS, Inside, Taps
from llmcomp.training.trainer import Objective

PROJECTIONS = "llmcomp_projections"  # the module of a student that holds them while it is trained
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward": losses.soft_targets, "reverse": losses.reverse_targets, "jsd": losses.jensen_shannon,
}  # fmt: skip
_RELATED = ("query", "key", "value")


@dataclass(frozen=True)
class Weights:
    """How much each loss counts; what counts nothing is not computed.

    Attributes:
        hard: labels, or what comes next or was masked. soft: the teacher's distribution.
        cosine: of the last hidden states. embedding, hidden, attention: squared errors of TinyBERT's.
        relation: of queries, keys and values of MiniLM's. transfer: of where activations are large.
    """

    hard: float = 0.0
    soft: float = 0.0
    cosine: float = 0.0
    embedding: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    relation: float = 0.0
    transfer: float = 0.0

    @property
    def taught(self) -> bool:
        """Whether anything is learned from a teacher."""
        return any(value for name, value in asdict(self).items() if name != "hard")

    @property
    def inside(self) -> tuple[str, ...]:
        """Losses that want more of a teacher than its logits."""
        return tuple(name for name, value in asdict(self).items() if value and name not in ("hard", "soft"))


METHODS: dict[str, Weights] = {
    "logits": Weights(hard=0.5, soft=0.5),  # Hinton et al., arXiv:1503.02531
    "distilbert": Weights(hard=2.0, soft=5.0, cosine=1.0),  # its authors' weights, arXiv:1910.01108
    "tinybert": Weights(soft=1.0, embedding=1.0, hidden=1.0, attention=1.0),  # arXiv:1909.10351
    "minilm": Weights(hard=0.5, soft=0.5, relation=1.0),  # arXiv:2012.15828, with the task's own losses
    "fitnets": Weights(hard=0.5, soft=0.5, hidden=1.0),  # arXiv:1412.6550, hints of all mapped layers
    "attention-transfer": Weights(hard=0.5, soft=0.5, transfer=1.0),  # arXiv:1612.03928
    "labels": Weights(hard=1.0),  # no teacher at all
}


@dataclass(frozen=True)
class Targets:
    """What a teacher says of a batch: logits [..., classes] or what was `kept` of them at the scored positions, and
    what was asked for of its inside."""

    logits: Tensor | Kept
    inside: Inside = field(default_factory=Inside)


Guide = Callable[[Mapping[str, Tensor]], Targets]  # what the student reads → what it is to learn


@dataclass(frozen=True)
class Layers:
    """Which layers are compared, student's and teacher's, counted from 0.

    Attributes:
        pairs: of hidden states, attention scores and transfer. last: of the cosine and of relations.
        heads: of the teacher, for each head of the student.
        relation_heads: into how many all channels are split.
    """

    pairs: tuple[tuple[int, int], ...]
    last: tuple[int, int]
    heads: Sequence[int] = ()
    relation_heads: int = 12

    def hidden(self, weights: Weights, side: int) -> list[int]:
        """Layers whose outputs are read, of the student (0) or the teacher (1)."""
        found = {pair[side] for pair in self.pairs} if weights.hidden or weights.transfer else set[int]()
        found |= {self.last[side]} if weights.cosine else set()
        return sorted(found | ({EMBEDDINGS} if weights.embedding else set()))

    def attention(self, weights: Weights, side: int) -> list[int]:
        """Layers whose attention is read."""
        found = {pair[side] for pair in self.pairs} if weights.attention else set[int]()
        return sorted(found | ({self.last[side]} if weights.relation else set()))


def project(student: nn.Module, weights: Weights, widths: tuple[int, int]) -> Callable[[], None]:
    """Put learned projections of hidden states and embeddings on a student that is narrower than its teacher, as W_h
    and W_e of TinyBERT: one for all layers, one for the embeddings. They are trained with it and then left out.

    Args:
        widths: of the student's and the teacher's hidden states.

    Returns:
        What takes them off again.
    """
    own, its = widths
    named = {"hidden": weights.hidden, "embedding": weights.embedding}
    if own == its or not any(named.values()):
        return lambda: None
    made = nn.ModuleDict({name: nn.Linear(own, its, bias=False) for name, weight in named.items() if weight})
    for matrix in made.parameters():
        nn.init.orthogonal_(matrix)  # keeps lengths, so that errors start at the size of the states
    student.add_module(PROJECTIONS, made)

    def reach(module: nn.Module, given: Any, output: Any) -> Any:
        """DDP takes for unused what the forward's outputs do not depend on."""
        output["logits"] = output["logits"] + 0.0 * torch.stack([one.sum() for one in made.parameters()]).sum()
        return output

    handle = student.register_forward_hook(reach)

    def leave() -> None:
        handle.remove()
        delattr(student, PROJECTIONS)

    return leave


@dataclass(frozen=True)
class Distillation(Objective):
    """L = Σ λ L, every loss of `Weights`; losses of layers are summed over the pairs.

    Attributes:
        guide: the teacher, None where nothing is learned from one. student: taps on the model that is trained.
        weights: λ, without `hard` where there are no labels.
        divergence: name in `DIVERGENCES`.
        beside: what else is added to the loss, of the same arguments, such as that of a second student.
    """

    guide: Guide | None = None
    student: Taps | None = None
    weights: Weights = METHODS["logits"]
    layers: Layers = Layers((), (0, 0))
    divergence: str = "forward"
    beside: Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor] | None = None

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], counts: Tensor | None = None) -> Tensor:
        """The loss of a batch; the student's forward on it was the last.

        Args:
            logits: of the student, aligned with the batch's labels.
            counts: [4], labels, scored positions, tokens and rows of the whole step; None for the batch's own.
        """
        labelled, scored, tokens, rows = (None,) * 4 if counts is None else counts
        weights, total = self.weights, 0.0 * logits.float().sum()  # of every parameter there is a gradient
        if weights.hard:
            hard = losses.scores if self.regression else losses.hard_targets
            total = total + weights.hard * hard(logits, batch["labels"], labelled)
        if self.beside is not None:
            total = total + self.beside(logits, batch, counts)
        if self.guide is None:
            return total
        inside = Inside() if self.student is None else self.student.take()
        targets = self.guide({name: value for name, value in batch.items() if name not in ("labels", "scored")})
        if weights.soft:
            total = total + weights.soft * self._soft(logits, targets.logits, batch["scored"], scored)
        there = _tokens(batch, inside, targets.inside)
        if PIXELS in batch and tokens is not None:
            tokens = tokens * there.shape[1]  # patches of the whole step: all images are cut into as many
        return total + self._inner(inside, targets.inside, there, tokens, rows)

    def _soft(self, logits: Tensor, targets: Tensor | Kept, scored: Tensor, count: Tensor | None) -> Tensor:
        if self.regression:
            assert isinstance(targets, Tensor)
            return losses.scores(logits, targets[..., 0], count)
        return DIVERGENCES[self.divergence](logits, targets, scored, self.temperature, count)

    def _inner(
        self, own: Inside, its: Inside, tokens: Tensor, count: Tensor | None, rows: Tensor | None
    ) -> Tensor | float:
        weights, (last, other) = self.weights, self.layers.last
        total: Tensor | float = 0.0
        if weights.cosine:
            total += weights.cosine * inner_losses.cosine(own.hidden[last], its.hidden[other], tokens, count)
        if weights.embedding:
            made = self._projected("embedding", own.hidden[EMBEDDINGS])
            total += weights.embedding * inner_losses.states(made, its.hidden[EMBEDDINGS], tokens, count)
        if weights.relation:
            total += weights.relation * self._relations(own, its, tokens, count)
        for one, two in self.layers.pairs:
            if weights.hidden:
                made = self._projected("hidden", own.hidden[one])
                total += weights.hidden * inner_losses.states(made, its.hidden[two], tokens, count)
            if weights.transfer:
                found = inner_losses.attention_transfer(own.hidden[one], its.hidden[two], tokens, rows)
                total += weights.transfer * found
            if weights.attention:
                mine, wanted = own.attended[one], its.attended[two]
                heads = torch.tensor(list(self.layers.heads), device=tokens.device)
                query, key = (one.index_select(1, heads) for one in wanted.products())
                both = mine.seen & wanted.seen
                found = inner_losses.attention_scores(mine.products(), (query, key), both, tokens, count)
                total += weights.attention * found
        return total

    def _relations(self, own: Inside, its: Inside, tokens: Tensor, count: Tensor | None) -> Tensor:
        mine, wanted = own.attended[self.layers.last[0]], its.attended[self.layers.last[1]]
        both = mine.seen & wanted.seen
        found = [
            inner_losses.relations(
                getattr(mine, name), getattr(wanted, name), tokens, self.layers.relation_heads, count, both
            )
            for name in _RELATED
        ]
        return torch.stack(found).sum()

    def _projected(self, name: str, states: Tensor) -> Tensor:
        assert self.student is not None
        projections = getattr(self.student.model, PROJECTIONS, None)
        return states if projections is None else projections[name](states)

    def counts(self, batches: list[Batch]) -> Tensor:
        """Labels, scored positions, tokens (images, where those are read) and rows of some batches, [4]."""
        tokens = sum(int(_there(batch).sum()) for batch in batches)
        rows = sum(len(_there(batch)) for batch in batches)
        known = super().counts(batches)
        return torch.cat([known, torch.tensor([tokens, rows], device=known.device)])


def _there(batch: Mapping[str, Tensor]) -> Tensor:
    """bool [B, L], the tokens that are no padding; of images, which are one each before a model cuts them, [B, 1]."""
    if PIXELS in batch:
        return torch.ones_like(batch["scored"])[:, None]
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _tokens(batch: Mapping[str, Tensor], own: Inside, its: Inside) -> Tensor:
    """bool [B, L], what of all that is compared is no padding.

    Raises:
        BadRecipe: what lies inside the models is not of the same tokens.
    """
    there = _there(batch)
    lengths = {states.shape[1] for one in (own, its) for states in one.hidden.values()}
    lengths |= {attended.query.shape[2] for one in (own, its) for attended in one.attended.values()}
    if PIXELS in batch:
        if len(lengths) > 1:
            raise BadRecipe(
                f"The layers that are compared cut an image into {' and '.join(map(str, sorted(lengths)))} parts, so "
                "their states cannot be compared; give --method logits."
            )
        return there.expand(-1, max(lengths, default=1))
    if lengths - {there.shape[1]}:
        raise BadRecipe("The hidden states are not of the tokens that the model read, so they cannot be compared.")
    return there
