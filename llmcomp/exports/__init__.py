"""EXPORTS: what `llmcomp export` turns a checkpoint into, from its integers, without the model that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmcomp.exports import checkpoint, gguf, onnx, openvino
from llmcomp.formats.opening import Opened

# (the opened checkpoint, an empty directory that gets the files) → sentences for the user. The caller copies the
# tokenizer's files and makes the directory appear. What a format cannot represent is a UserError that names it.
Export = Callable[[Opened, Path], list[str]]

EXPORTS: dict[str, Export] = {
    "compressed-tensors": checkpoint.compressed_tensors,
    "llmcomp": checkpoint.own,
    "dense": checkpoint.dense,
    "gguf": gguf.export,
    "onnx": onnx.export,
    "openvino": openvino.export,
}
