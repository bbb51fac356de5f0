"""A checkpoint as OpenVINO's IR, `openvino_model.xml` and `.bin`, through OpenVINO's own converter.

The converter reads an ONNX file in which every packed linear is a MatMulNBits, and keeps its integers: a u4 or u8
constant, converted, shifted by its zero point and scaled in front of each product, which OpenVINO's CPU plugin leaves
packed in memory (16 weights of 2048 × 2048 and what else a process needs: 131 and 198 MB of u4 and u8, where float32
alone is 268 MB). Fewer bits are written in the space of 4: the plugin (2026.4) multiplies with u2 on CPUs with AVX2 and
"could not create a primitive descriptor" with AVX512. That nothing was decoded is checked in what was written, and the
model is run and compared as the ONNX file is: computed in float32, closely; and as the plugin runs it by default.

Inputs are never rounded in the graph: the plugin does so by itself where it is faster (dynamic quantization), so of
`--activations` nothing remains but the weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.errors import UnknownArchitecture, VerificationFailed
from llmcomp.exports import onnx as onnx_export
from llmcomp.exports.compare import (
    Run,
    answers,
    describe,
    difference,
    expected,
    import_or_explain,
    require_close,
)
from llmcomp.exports.packed_modules import AS_STORED, DECODED, NBitsEmbedding, NBitsLinear, Read, blocks_of
from llmcomp.exports.signatures import Signature, signature_of
from llmcomp.exports.traceable import require_known
from llmcomp.formats.opening import Opened
from llmcomp.formats.reading import first_line
from llmcomp.measure.load import task_of
from llmcomp.schemes import Scheme

FILE = "openvino_model.xml"
PACKED_TYPES = ("u2", "u4", "u8", "i4", "i8")
IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def export(opened: Opened, out: Path) -> list[str]:
    """Write `out`/openvino_model.xml and .bin; what they hold and how far they are from the checkpoint, in sentences.

    Raises:
        UserError: a model that cannot be represented, or a package that is not installed.
        VerificationFailed: an IR that does not compute what the checkpoint holds, or no longer packed.
    """
    import_or_explain(onnx_export.PACKAGES, "onnx")
    (openvino,) = import_or_explain(("openvino",), "openvino")
    require_known(opened, "OpenVINO")
    task = task_of(opened.directory)
    signature = signature_of(opened, task)
    model, dense = onnx_export.build(opened, signature, task, choose)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        onnx_export.write(model, signature, Path(folder) / "model.onnx")
        try:
            converted = openvino.convert_model(Path(folder) / "model.onnx")
        except Exception as error:  # the classes of its frontends have no other base
            raise UnknownArchitecture(f"OpenVINO cannot convert this model: {first_line(error)}") from error
        openvino.save_model(converted, out / FILE, compress_to_fp16=False)
        del converted
    (out / "config.json").write_text(json.dumps(dict(opened.config), indent=2) + "\n", encoding="utf-8")
    kept = _require_packed(openvino, model, out / FILE)
    notes = [kept, *_rounding(opened), *onnx_export.left_dense(dense)]
    return [*notes, *_compared(openvino, model, signature, out / FILE)]


def choose(_: Scheme) -> Callable[[Read, Tensor | None], nn.Module]:
    """MatMulNBits for every scheme, of 4 bits at least."""

    def make(read: Read, bias: Tensor | None) -> nn.Module:
        return NBitsLinear(read, bias, blocks_of(read(), least_bits=4))

    return make


def _rounding(opened: Opened) -> list[str]:
    if not any(scheme.activations for scheme in opened.schemes.values()):
        return []
    return ["Inputs are not rounded by the model itself; OpenVINO does so where its plugin finds it faster."]


def _require_packed(openvino: Any, model: nn.Module, path: Path) -> str:
    """How many bytes of the IR's weights are packed integers.

    Raises:
        VerificationFailed: fewer than the checkpoint's packed weights have.
    """
    sizes: dict[str, int] = {}
    for node in openvino.Core().read_model(path).get_ordered_ops():
        if node.get_type_name() == "Constant":
            name = node.get_element_type().to_string()
            sizes[name] = sizes.get(name, 0) + node.get_byte_size()
    packed = {name: size for name, size in sizes.items() if name in PACKED_TYPES}
    modules = [module for module in model.modules() if isinstance(module, (NBitsLinear, NBitsEmbedding))]
    wanted = sum({module.blocks.packed.data_ptr(): module.blocks.packed.nbytes for module in modules}.values())
    if sum(packed.values()) < wanted:
        raise VerificationFailed(
            f"OpenVINO's converter has written {sum(packed.values())} bytes of packed integers, and the checkpoint has "
            f"{wanted}: it decoded some."
        )
    held = ", ".join(f"{size / 1e6:.1f} MB of {name}" for name, size in sorted(packed.items()))
    whole = path.with_suffix(".bin").stat().st_size / 1e6
    return f"The IR keeps the integers ({held or 'none'}) in {whole:.1f} MB of weights; what is not packed is float32."


def _compared(openvino: Any, model: nn.Module, signature: Signature, path: Path) -> list[str]:
    """Compare with float32 products and with the plugin's defaults."""
    decoded, stored = expected(model, signature, DECODED), expected(model, signature, AS_STORED)
    closely = difference(answers(_runner(openvino, path, IN_FLOAT32), signature), decoded, signature)
    require_close(closely, onnx_export.CLOSE, "Outputs of the OpenVINO model, computed in float32,")
    found = difference(answers(_runner(openvino, path, {}), signature), stored, signature)
    require_close(found, onnx_export.ROUNDED, "Outputs of the OpenVINO model")
    version = openvino.__version__.split("-")[0]
    return [
        f"Run in OpenVINO {version} on {len(stored)} batches and compared with the decoded model: products in float32 "
        f"differ by {describe(closely)} ({onnx_export.CLOSE:g} is allowed).",
        f"With the CPU plugin's defaults it differs by {describe(found)} ({onnx_export.ROUNDED:g} is allowed).",
    ]


def _runner(openvino: Any, path: Path, settings: Mapping[str, str]) -> Run:
    compiled = openvino.Core().compile_model(path, "CPU", dict(settings))
    names = [output.get_any_name() for output in compiled.outputs]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = compiled({name: value.numpy() for name, value in inputs.items()})
        # A later call may use the same memory.
        return {name: torch.from_numpy(found[n].copy()) for n, name in enumerate(names)}

    return run
