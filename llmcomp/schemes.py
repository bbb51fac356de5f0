"""Frozen value types that say *how* a linear is quantized, apart from any weight.

Integers are signed, as compressed-tensors stores them: b bits span [-2^(b-1), 2^(b-1) - 1], for symmetric
and asymmetric schemes alike, so a zero_point is an int8 in the same range and decoding is always
`(values - zero_point) * scale`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmcomp.errors import BadRecipe

BITS = (2, 3, 4, 8)
INT8_DYNAMIC, INT8_STATIC = "int8-dynamic", "int8-static"
# Ways to round inputs (`llmcomp.activations`), and what tables call them.
ACTIVATIONS = {INT8_DYNAMIC: "a8", INT8_STATIC: "a8 static"}
GROUP_SIZES = (32, 64, 128)
_LABEL = re.compile(r"\bint(\d) (?:g(\d+)|channel)( asym)?(?: (a8(?: static)?))?$")


@dataclass(frozen=True)
class Scheme:
    """Bits, granularity and symmetry of one quantized weight [out, in].

    `group_size=None` means per channel: one scale for each output row. `activations`, one of `ACTIVATIONS`: the
    linear also rounds its inputs; kernels for that want weights of 8 bits per channel.

    >>> Scheme(4, 128).groups(512)
    4
    >>> Scheme(4).groups(512), Scheme(4).label
    (1, 'int4 channel')
    >>> Scheme(4, 128).fits(100)
    False

    Raises:
        BadRecipe: bits or group size that no format here can store, or activations that no reader computes.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadRecipe(f"--bits {self.bits} cannot be: choose one of {', '.join(map(str, BITS))}.")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise BadRecipe(f"--group-size {self.group_size} cannot be: choose one of {sizes} or 'channel'.")
        if self.activations is not None and self.activations not in ACTIVATIONS:
            ways = ", ".join(ACTIVATIONS)
            raise BadRecipe(f"--activations {self.activations} cannot be: it is one of {ways}, or left out.")
        if self.activations is not None and (self.bits, self.group_size, self.symmetric) != (8, None, True):
            raise BadRecipe(
                f"--activations {self.activations} needs symmetric weights of 8 bits per channel, not {self._stored}; "
                "take --bits 8 without --group-size and --asymmetric."
            )

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def label(self) -> str:
        """Short text for tables, such as 'int4 g128 asym' or 'int8 channel a8 static'."""
        return self._stored + ("" if self.activations is None else f" {ACTIVATIONS[self.activations]}")

    @classmethod
    def of_label(cls, label: str) -> Scheme | None:
        """The scheme of integers that a label says, be it with a mask before it; None where it says no single one.

        >>> Scheme.of_label("2:4 + int3 g64 asym") == Scheme(3, 64, symmetric=False), Scheme.of_label("rank 8")
        (True, None)
        """
        found = _LABEL.search(label)
        if found is None or "rank" in label.split():
            return None
        bits, group, asymmetric, activations = found.groups()
        rounded = next((way for way, said in ACTIVATIONS.items() if said == activations), None)
        return cls(int(bits), None if group is None else int(group), asymmetric is None, rounded)

    @property
    def _stored(self) -> str:
        granularity = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {granularity}" + ("" if self.symmetric else " asym")

    def fits(self, in_features: int) -> bool:
        """Whether groups divide a row of `in_features` weights."""
        return self.group_size is None or in_features % self.group_size == 0

    def groups(self, in_features: int) -> int:
        """Number of scales in a row of `in_features` weights."""
        return 1 if self.group_size is None else in_features // self.group_size
