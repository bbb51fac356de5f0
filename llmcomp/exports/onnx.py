"""A checkpoint as ONNX for onnxruntime: `model.onnx`, with `model.onnx.data` where it is large, and config.json.

    weights                                                       become
    8 bits, one scale a row; encoders, or inputs rounded, too     QuantizeLinear + MatMulInteger (`RoundedLinear`)
    all other linears                                             MatMulNBits (`NBitsLinear`)
    embeddings                                                    looked up packed, then decoded (`NBitsEmbedding`)

from the checkpoint's own integers; what is not packed is float32. After writing, the file is run and compared with the
decoded model twice: with the rounding of inputs taken out, closely; and as it is.

The exporter is torch's (`torch.onnx.export`, dynamo), which fails on transformers' cache objects; `signatures.Decoder`
is what it traces instead. The names of inputs and outputs are optimum's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp.errors import UnknownArchitecture
from llmcomp.exports.compare import (
    Run,
    answers,
    describe,
    difference,
    expected,
    import_or_explain,
    require_close,
)
from llmcomp.exports.packed_modules import (
    AS_STORED,
    DECODED,
    PACKED_MODULES,
    TRACE,
    NBitsEmbedding,
    NBitsLinear,
    RoundedLinear,
    set_mode,
)
from llmcomp.exports.signatures import Signature, signature_of, wrapped
from llmcomp.exports.traceable import Choose, choose_fastest, require_known, traceable
from llmcomp.formats.opening import Opened
from llmcomp.formats.reading import first_line
from llmcomp.measure.load import task_of

FILE, EXACT, LAST_AXIS = "model.onnx", "exact.onnx", "llmcomp_last_axis"
OPSET = 20  # the oldest with Gelu and LayerNormalization in one operator each: onnxruntime 1.17 and later
# Bytes of weights that go into the file itself. protobuf ends at 2 GiB; what lies outside is mapped, not copied.
ONE_FILE = 1 << 27
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Root mean square over the outputs' standard deviation: of products in float32, and of the file as it is beside what
# readers of the checkpoint compute, who round decoded weights to bfloat16 where it is in that.
CLOSE, ROUNDED = 1e-3, 2e-1


def export(opened: Opened, out: Path) -> list[str]:
    """Write `out`/model.onnx; what it holds and how far it is from the checkpoint, in sentences.

    Memory: the packed weights, what is not packed as float32, one decoded weight at a time, and onnxruntime's own copy.

    Raises:
        UserError: a model that cannot be represented, or a package that is not installed.
        VerificationFailed: a file that does not compute what the checkpoint holds.
    """
    import_or_explain(PACKAGES, "onnx")
    require_known(opened, "ONNX")
    task = task_of(opened.directory)
    signature = signature_of(opened, task)
    model, dense = build(opened, signature, task, choose_fastest(encoder=not signature.cache))
    write(model, signature, out / FILE)
    (out / "config.json").write_text(json.dumps(dict(opened.config), indent=2) + "\n", encoding="utf-8")
    return [*kinds(model), *left_dense(dense), *_compared(model, signature, out)]


def build(opened: Opened, signature: Signature, task: str, choose: Choose) -> tuple[nn.Module, list[str]]:
    """The model as its signature says, and names of packed modules that are dense in it."""
    model, dense = traceable(opened, choose)
    return wrapped(model, signature, task), dense


def write(model: nn.Module, signature: Signature, path: Path) -> None:
    """Trace the model and write it as ONNX.

    Raises:
        UnknownArchitecture: torch cannot trace it.
    """
    set_mode(model, TRACE)
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                model, (), kwargs=signature.example(), dynamic_shapes=signature.dynamic_shapes(), dynamo=True,
                input_names=signature.inputs + signature.past, output_names=signature.outputs + signature.present,
                opset_version=OPSET, verbose=False,
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError) as error:
            raise UnknownArchitecture(
                f"{type(getattr(model, 'model', model)).__name__} cannot be written as ONNX; torch's exporter says: "
                f"{first_line(error.__cause__ or error)}"
            ) from error
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with paths of this machine, of the size of a small model
        size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
        program.save(path, external_data=size > ONE_FILE)


def kinds(model: nn.Module) -> list[str]:
    """What packed weights became, and how many are stored in more bits than they have."""
    modules = [module for module in model.modules() if isinstance(module, PACKED_MODULES)]
    counts = Counter(_kind(module) for module in modules)
    notes = [f"{what}: {count}." for what, count in counts.items()]
    wider = sum(not isinstance(m, RoundedLinear) and m.blocks.bits != m.scheme.bits for m in modules)
    return [*notes, f"Of them {wider} hold 3 bits in the space of 4, as onnxruntime reads no 3."] if wider else notes


def _kind(module: NBitsLinear | RoundedLinear | NBitsEmbedding) -> str:
    if isinstance(module, RoundedLinear):
        by = "token" if module.input_scale is None else "the checkpoint's scales"
        unasked = "" if module.scheme.activations else ", which the checkpoint leaves open"
        return f"Linears as products of 8-bit integers, inputs rounded by {by}{unasked}"
    if isinstance(module, NBitsEmbedding):
        return f"Embeddings packed in {module.blocks.bits} bits"
    return f"Linears as MatMulNBits of {module.blocks.bits} bits (onnxruntime rounds their inputs to 8 bits)"


def left_dense(names: list[str]) -> list[str]:
    """A sentence on packed modules that are written dense."""
    if not names:
        return []
    listed = ", ".join(names)
    return [f"{len(names)} packed weights are float32 here, as their modules do more than multiply: {listed}."]


def _compared(model: nn.Module, signature: Signature, out: Path) -> list[str]:
    """Compare without the rounding of inputs, and as it is."""
    onnx, ort = import_or_explain(("onnx", "onnxruntime"), "onnx")
    decoded, stored = expected(model, signature, DECODED), expected(model, signature, AS_STORED)
    exact = onnx.load(out / FILE, load_external_data=False)
    _without_rounding(onnx, exact.graph)
    onnx.save(exact, out / EXACT)
    del exact
    try:
        closely = difference(answers(_runner(ort, out / EXACT), signature), decoded, signature)
    finally:
        (out / EXACT).unlink()
    require_close(closely, CLOSE, "Outputs of the ONNX file, inputs not rounded,")
    found = difference(answers(_runner(ort, out / FILE), signature), stored, signature)
    require_close(found, ROUNDED, "Outputs of the ONNX file")
    how = "a prompt, then two tokens with its cache, against one pass over all" if signature.cache else "padded, too"
    return [
        f"Run in onnxruntime {ort.__version__} on {len(stored)} batches ({how}) and compared with the decoded model: "
        f"without rounded inputs they differ by {describe(closely)} ({CLOSE:g} is allowed).",
        f"As it is, the file differs by {describe(found)} ({ROUNDED:g} is allowed).",
    ]


def _without_rounding(onnx: Any, graph: Any) -> None:
    """Let the same integers, scales and zero points be multiplied by inputs that are not rounded.

    MatMulNBits at level 0 computes in float32. QuantizeLinear becomes a division by its scale, MatMulInteger a product
    of floats.
    """
    make, nodes = onnx.helper.make_node, []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
        out = node.output[0]
        if node.op_type == "QuantizeLinear":
            tokens, scale, _ = node.input
            nodes.append(make("Unsqueeze", [scale, LAST_AXIS], [f"{out}_scale"]))
            nodes.append(make("Div", [tokens, f"{out}_scale"], [out]))
        elif node.op_type == "MatMulInteger":
            rounded, weight, _, zero = node.input
            floats = [make("Cast", [name], [f"{out}_{name}"], to=onnx.TensorProto.FLOAT) for name in (weight, zero)]
            shifted = make("Sub", [floats[0].output[0], floats[1].output[0]], [f"{out}_shifted"])
            nodes += [*floats, shifted, make("MatMul", [rounded, shifted.output[0]], [out])]
        else:
            nodes.append(node)
    graph.initializer.append(onnx.helper.make_tensor(LAST_AXIS, onnx.TensorProto.INT64, [1], [-1]))
    del graph.value_info[:]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # `del` below ends the graph's own
    del graph.node[:]
    graph.node.extend(kept)


def _runner(ort: Any, path: Path) -> Run:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no other base
        raise UnknownArchitecture(
            f"onnxruntime {ort.__version__} cannot run what torch's exporter makes of this model: {first_line(error)}"
        ) from error
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter tells of operators of torchvision and of what it tries; errors come as exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
