"""What a weight is made, apart from any weight: integers on a grid (`Scheme`), N of every M weights, or two factors.

Formats are asked with a kind for each weight, and llmcomp's own layout writes it into config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmcomp.errors import BadRecipe
from llmcomp.patterns import Pattern
from llmcomp.schemes import Scheme


@dataclass(frozen=True)
class Sparse:
    """A weight of which a pattern removes some (`SparseWeight`, or `QuantizedWeight` with a mask).

    Attributes:
        values: how what is kept is rounded, None where it stays floating. Groups are counted in the columns of the
            whole weight.

    >>> Sparse(Pattern.parse("2:4"), Scheme(4, 128)).label
    '2:4 + int4 g128'
    """

    pattern: Pattern
    values: Scheme | None = None

    @property
    def label(self) -> str:
        """Short text for tables."""
        return self.pattern.label if self.values is None else f"{self.pattern.label} + {self.values.label}"


@dataclass(frozen=True)
class LowRank:
    """A weight [out, in] as left [out, rank] times right [rank, in], on top of a base or not (`LowRankWeight`).

    Attributes:
        left, right: how the factors are rounded, None where they stay floating.
        base: how the matrix is rounded that the factors correct, None where there is none.

    >>> LowRank(64).label, LowRank(16, Scheme(8), Scheme(8), Scheme(4, 128)).label
    ('rank 64', 'int4 g128 + rank 16 of int8 channel')

    Raises:
        BadRecipe: no rank, or a part that rounds inputs, which the others would not.
    """

    rank: int
    left: Scheme | None = None
    right: Scheme | None = None
    base: Scheme | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadRecipe(f"A rank of {self.rank} cannot be: it is at least 1.")
        if any(part is not None and part.activations for part in (self.left, self.right, self.base)):
            raise BadRecipe("Inputs of low-rank weights stay as they are; leave --activations out there.")

    @property
    def label(self) -> str:
        """Short text for tables."""
        under = "" if self.base is None else f"{self.base.label} + "
        parts = dict.fromkeys("floating" if part is None else part.label for part in (self.left, self.right))
        of = "" if list(parts) == ["floating"] else f" of {' and '.join(parts)}"
        return f"{under}rank {self.rank}{of}"


Kind = Scheme | Sparse | LowRank


def integers_of(kind: Kind) -> Scheme | None:
    """The scheme of a weight that can be written as integers, removed ones included; None for one that cannot."""
    if isinstance(kind, Scheme):
        return kind
    return kind.values if isinstance(kind, Sparse) else None


def without_inputs(kind: Kind) -> Kind:
    """The kind of the weight alone: how inputs are rounded is no part of it."""
    if isinstance(kind, Sparse) and kind.values is not None:
        return replace(kind, values=replace(kind.values, activations=None))
    return replace(kind, activations=None) if isinstance(kind, Scheme) else kind


def check_ratio(ratio: float) -> None:
    """Raises BadRecipe where a ratio of low-rank factors saves nothing or keeps nothing."""
    if not 0 < ratio < 1:
        raise BadRecipe(f"--ratio {ratio} cannot be: it is the share of bytes kept, above 0 and below 1, such as 0.8.")
