"""FORMATS: what a compressed checkpoint can be written as."""

from __future__ import annotations

from llmcomp.formats import bitsandbytes, compressed_tensors, dense, packed
from llmcomp.formats.base import Entry, Format, Layout, Ref, broken_ties, dense_tensors
from llmcomp.kinds import Kind

FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors.layout,
    "llmcomp": packed.layout,
    "dense": dense.layout,
    "bnb-nf4": bitsandbytes.nf4,
    "bnb-int8": bitsandbytes.int8,
}

__all__ = ["FORMATS", "Entry", "Format", "Kind", "Layout", "Ref", "broken_ties", "dense_tensors"]
