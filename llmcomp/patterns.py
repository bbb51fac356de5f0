"""Which weights of a linear are removed: n kept of every m consecutive inputs, or any of them up to a share.

A mask is a bool tensor [out, in], True where a weight is kept. It is exact: an N:M mask keeps n of every m in each
row, or it is an error.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmcomp.errors import BadRecipe, RunError

if TYPE_CHECKING:
    from torch import Tensor

UNSTRUCTURED = "unstructured"
_DEFAULT_SPARSITY = 0.5  # of an unstructured pattern that names none: what 2:4 removes, too


@dataclass(frozen=True)
class Pattern:
    """`kept` of every `of` consecutive inputs of a row, or a share `removed` of a weight wherever it lies.

    >>> Pattern.parse("2:4"), Pattern.parse("2:4").sparsity
    (Pattern(kept=2, of=4, removed=None), 0.5)
    >>> Pattern.parse("unstructured", 0.7).label
    'unstructured 70%'
    >>> Pattern.parse("2:4").fits(6)
    False

    Raises:
        BadRecipe: counts or a share that leave nothing or remove nothing.
    """

    kept: int | None = None
    of: int | None = None
    removed: float | None = None

    def __post_init__(self) -> None:
        if self.kept is None or self.of is None:
            if self.removed is None or not 0 < self.removed < 1:
                raise BadRecipe(f"--sparsity {self.removed} cannot be: it is a share between 0 and 1, such as 0.5.")
            return
        if not 1 <= self.kept < self.of:
            raise BadRecipe(
                f"--pattern {self.kept}:{self.of} cannot be: N:M keeps N of every M weights, N at least 1 and below M, "
                "such as 2:4."
            )

    @classmethod
    def parse(cls, text: str, sparsity: float | None = None) -> Pattern:
        """The pattern of '2:4', any 'N:M' or 'unstructured'.

        Args:
            text: as a user writes it.
            sparsity: share removed by an unstructured pattern, by default a half; for N:M it may only repeat what
                the pattern says.

        Raises:
            BadRecipe: a pattern or sparsity that cannot be, or the two contradict each other.
        """
        if text == UNSTRUCTURED:
            return cls(removed=_DEFAULT_SPARSITY if sparsity is None else sparsity)
        counts = re.fullmatch(r"(\d+):(\d+)", text)
        if counts is None:
            raise BadRecipe(f"--pattern {text} cannot be: it is 2:4, 4:8, any other N:M, or {UNSTRUCTURED}.")
        pattern = cls(int(counts[1]), int(counts[2]))
        if sparsity is not None and not math.isclose(sparsity, pattern.sparsity, abs_tol=1e-6):
            raise BadRecipe(
                f"--pattern {text} removes {pattern.sparsity:.4g} of the weights, not --sparsity {sparsity}: leave "
                f"--sparsity out, or take --pattern {UNSTRUCTURED}."
            )
        return pattern

    @property
    def group(self) -> int | None:
        """M of N:M; None where unstructured."""
        return self.of

    @property
    def sparsity(self) -> float:
        """Share of the weights that is removed."""
        if self.kept is not None and self.of is not None:
            return 1 - self.kept / self.of
        assert self.removed is not None  # of the two forms it is the other
        return self.removed

    @property
    def label(self) -> str:
        """Short text for tables, such as '2:4' or 'unstructured 50%'."""
        if self.of is not None:
            return f"{self.kept}:{self.of}"
        return f"{UNSTRUCTURED} {100 * self.sparsity:.4g}%"

    @property
    def index_bits(self) -> int:
        """Bits that say where in its group a kept weight stands; 0 where unstructured."""
        return 0 if self.of is None else (self.of - 1).bit_length()

    def fits(self, in_features: int) -> bool:
        """Whether groups divide a row of `in_features` weights."""
        return self.of is None or in_features % self.of == 0

    def check_width(self, in_features: int, name: str = "a weight") -> None:
        """Refuse a width that the groups do not divide.

        Raises:
            BadRecipe: naming the weight and what would work.
        """
        if not self.fits(in_features):
            raise BadRecipe(
                f"--pattern {self.label} does not fit {name} of {in_features} inputs, which {self.of} does not divide: "
                f"take a pattern whose M divides it, --pattern {UNSTRUCTURED}, or leave it out."
            )

    def removes(self, count: int) -> int:
        """How many of `count` weights an unstructured pattern removes, to the nearest."""
        return math.floor(self.sparsity * count + 0.5)

    def kept_in_row(self, in_features: int) -> int:
        """Weights that N:M keeps in a row of `in_features`."""
        assert self.kept is not None and self.of is not None  # only N:M has such a number
        return in_features // self.of * self.kept


def holds(pattern: Pattern, mask: Tensor) -> bool:
    """Whether the mask, bool [out, in], keeps exactly N of every M; of an unstructured one nothing is asked."""
    if pattern.of is None or pattern.kept is None:
        return True
    if not pattern.fits(mask.shape[1]):
        return False
    kept = mask[:, :: pattern.of].short()
    for first in range(1, pattern.of):
        kept += mask[:, first :: pattern.of]
    return bool(kept.eq(pattern.kept).all())


def check_mask(pattern: Pattern, mask: Tensor) -> None:
    """Refuse a mask that does not keep exactly N of every M.

    Raises:
        RunError: it does not.
    """
    if not holds(pattern, mask):
        raise RunError(f"A mask does not keep exactly {pattern.kept} of every {pattern.of} weights of a row.")
