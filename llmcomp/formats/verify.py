"""Is the written checkpoint the model that was compressed? Asked in a fresh process, as a user would load it.

`verify` starts `python -m llmcomp.formats.verify DIRECTORY WITNESS`, which loads the directory by plain
transformers (no part of llmcomp decodes anything there) and compares it with the witness: files against
index, loading report, modules stored compressed, names, shapes and dtypes, every dense tensor's digest, and
the outputs. A model that does not fit into memory is decoded tensor by tensor by its format's own library,
without the outputs, and the result says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from llmcomp import bnb, lora, native, remote_code
from llmcomp.errors import BadCheckpoint, LlmcompError, VerificationFailed
from llmcomp.experts import split_experts
from llmcomp.formats import witness as witnesses
from llmcomp.formats.reading import (
    Place,
    Stored,
    auto_class,
    config_of,
    decoded,
    first_line,
    require_same,
    rounding,
    skeleton_of,
    stored_modules,
    stored_tensors,
)
from llmcomp.formats.witness import Digest, Pruned, Witness, digest, dtype_name, model_output
from llmcomp.matmul import WideProducts
from llmcomp.packed import Packed
from llmcomp.packed_kinds import PackedLowRank
from llmcomp.report.schema import Verification
from llmcomp.schemes import ACTIVATIONS
from llmcomp.weights import INPUT_SCALE

# Root mean square of the outputs' difference over the outputs' standard deviation. The parameters are equal
# to the bit, so what is left is the order of summation: units in the last place, grown through the blocks.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# At least this where a GPU has computed the witness: rounded inputs and choices of experts that lie near an edge go the
# other way on the CPU.
_OF_ANOTHER_DEVICE = 1e-2

def verify(directory: Path, witness: Path, timeout: float | None = None) -> Verification:
    """Run `check` in a fresh process.

    Args:
        directory: the checkpoint.
        witness: directory that `formats.witness` wrote.
        timeout: seconds until it counts as failed, None waits.

    Raises:
        VerificationFailed: the checkpoint differs, cannot be loaded, or the process died.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "llmcomp.formats.verify", str(directory), str(witness)]
    command += ["trusted"] if remote_code.trusts(directory) else []
    pipes: dict[str, Any] = {"capture_output": True, "stdin": subprocess.DEVNULL, "text": True}
    try:
        child = subprocess.run(command, env=environment, timeout=timeout, check=False, **pipes)
    except subprocess.TimeoutExpired as error:
        raise VerificationFailed(f"Verifying {directory} took longer than {timeout:.0f} s.") from error
    lines = child.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerificationFailed(
            f"The process that reloaded {directory} died with status {child.returncode}: {last}"
        ) from error
    if "failure" in answer:
        raise VerificationFailed(answer["failure"])
    return Verification(**answer)


def check(directory: Path, witness: Path, stream: bool | None = None) -> Verification:
    """Compare a checkpoint with its witness in this process.

    Args:
        directory, witness: as for `verify`.
        stream: decode tensor by tensor; None decides by the memory that is free.

    Raises:
        VerificationFailed: the first difference, named.
        RunError: the witness is incomplete.
    """
    known = witnesses.load(witness)
    tensors = stored_tensors(directory)
    _same_dtype(directory, known)
    stored = stored_modules(directory, tensors)
    require_same(set(stored), set(known.compressed), "stored compressed", "planned to be")
    read = rounding(stored)
    for way, label in ACTIVATIONS.items():
        planned = {name for name, said in known.compressed.items() if said.endswith(f" {label}")}
        rounded = {name for name, found in read.items() if found == way}
        require_same(rounded, planned, f"read with inputs rounded by {way}", "planned to be")
    files = len({place.path for place in tensors.values()})
    checks = [f"{files} files complete, {len(stored)} modules stored compressed as planned"]
    if stream is None:
        sizes = (math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in known.source.values())
        stream = sum(sizes) > 0.8 * psutil.virtual_memory().available
    if stream:
        _compare_streamed(directory, tensors, stored, known)
        checks.append(f"{len(known.digests)} tensors equal to the bit, decoded one by one")
        checks.append("outputs not compared: the dense model does not fit into memory")
        return Verification(True, checks, None, len(stored), streamed=True)
    model = _load(directory)
    own = native.is_native(config_of(directory))
    opener = "from_pretrained after import llmcomp.hf" if own else "plain from_pretrained"
    checks.append(f"{opener}: nothing missing, unexpected or mismatched")
    kernels = max((one.tolerance for one in stored.values()), default=0.0)
    if kernels:  # what stays packed may be laid out anew by a forward, what does not is decoded by one
        _compare_model(model, stored, known)
    output = _run(model, known)
    if not kernels:
        _compare_model(model, stored, known)
    checks.append(f"{len(known.digests)} tensors equal to the bit, names, shapes and dtypes as in the source")
    if known.pruned:
        zeros = sum(_count_zeros(name, model.get_parameter(name), one) for name, one in known.pruned.items())
        checks.append(f"{zeros:,} zeros counted in {len(known.pruned)} matrices, as many in each as its mask removes")
    if known.adapter:
        _compare_adapter(model, directory, known)
        checks.append(f"the adapter beside them: {len(known.adapter)} tensors equal to the bit, on all its modules")
        output = _run(model, known)
    largest, spread, allowed = _compare_output(output, known, kernels)
    checks.append(
        f"outputs differ by {largest:.1e} at most, {spread:.1e} of their standard deviation "
        f"(allowed {allowed:.0e})"
    )
    return Verification(True, checks, largest, len(stored))


def _same_dtype(directory: Path, known: Witness) -> None:
    """transformers casts what it loads to config.json's dtype."""
    said = native.unwrap(config_of(directory)).get("dtype")
    dtypes = sorted({dtype for _, dtype in known.source.values()})
    if said not in dtypes:
        raise VerificationFailed(f"config.json says {said}, the source's tensors are {', '.join(dtypes)}.")


def _load(directory: Path) -> nn.Module:
    """Load plainly and look at the loading report."""
    from transformers import AutoConfig

    try:
        native.register(config_of(directory))
        auto = auto_class(AutoConfig.from_pretrained(directory))
        place = bnb.placement(config_of(directory))
        model, info = auto.from_pretrained(directory, dtype="auto", output_loading_info=True, **place)
    except Exception as error:  # any library may raise anything here; the user needs one sentence
        raise VerificationFailed(f"from_pretrained fails on the checkpoint: {first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := info.get(kind):
            first = sorted(str(item) for item in found)[0]
            raise VerificationFailed(f"from_pretrained reports {kind.replace('_', ' ')}: {first}.")
    loaded: nn.Module = model.eval()
    return loaded


def _run(model: nn.Module, known: Witness) -> Tensor:
    """The outputs for the witness's inputs."""
    rows = {len(value) for value in known.inputs.values()}
    outputs = []
    with torch.inference_mode(), WideProducts():
        if len(rows) > 1:  # one sample, of which some tensors count patches
            return model_output(model(**known.inputs)).float()
        for row in range(*rows):  # one by one: the logits of a large vocabulary decide the peak
            result = model(**{name: value[row : row + 1] for name, value in known.inputs.items()})
            outputs.append(model_output(result).float())
    return torch.cat(outputs)


def _compare_model(model: nn.Module, stored: Mapping[str, Stored], known: Witness) -> None:
    split_experts(model)
    state = model.state_dict()
    for owner, one in stored.items():  # the weight's scales and the like are kept beside it
        for part in one.names(owner):
            if part != f"{owner}.weight":
                state.pop(part, None)
        state.setdefault(f"{owner}.weight", torch.empty(0))  # of one that stays packed, decoded when its turn comes
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    loaded = {name for name in state if name in parameters or name in known.digests}
    require_same(loaded, set(known.digests), "in the loaded model", "in the compressed one")
    _complete(state, known)
    for name, expected in sorted(known.digests.items()):
        tensor, module = state[name], model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and bnb.holds(module):
            tensor = bnb.dense_of(module, getattr(torch, expected.dtype))
        if name.endswith(".weight") and isinstance(module, Packed | PackedLowRank):
            tensor = module.dense()
        _compare_tensor(name, tensor, expected, known)


def _count_zeros(name: str, weight: Tensor, known: Pruned) -> int:
    zero = weight.detach() == 0
    if int(zero.sum()) != known.zeros:
        raise VerificationFailed(f"{name} has {int(zero.sum()):,} zeros, where {known.zeros:,} were made.")
    if known.of is not None and known.kept is not None:
        rows = zero.t() if known.transposed else zero
        if int(rows.reshape(len(rows), -1, known.of).sum(-1).min()) < known.of - known.kept:
            raise VerificationFailed(f"{name} has more than {known.kept} of {known.of} weights of a row in some place.")
    return known.zeros


def _compare_adapter(model: nn.Module, directory: Path, known: Witness) -> None:
    """Put the adapter on and look at what it has become."""
    folder = lora.beside(directory)
    if folder is None:
        raise VerificationFailed(f"{directory} has no adapter beside its weights.")
    try:
        lora.attach(model, folder)
    except BadCheckpoint as error:
        raise VerificationFailed(str(error)) from error
    found = lora.factors(model)
    require_same(set(found), set(known.adapter), "in the loaded adapter", "in the trained one")
    if differ := [name for name, tensor in found.items() if digest(tensor) != known.adapter[name]]:
        raise VerificationFailed(f"{differ[0]} of the adapter has other values than what was trained.")


def _compare_tensor(name: str, tensor: Tensor, expected: Digest, known: Witness) -> None:
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    wanted_by = {"witness": (expected.shape, expected.dtype)}
    if not name.endswith(f".{INPUT_SCALE}"):
        if name not in known.source:
            raise VerificationFailed(f"{name} is not a tensor of the source model.")
        wanted_by = {"source": known.source[name], **wanted_by}
    for where, wanted in wanted_by.items():
        if (shape, dtype) != wanted:
            raise VerificationFailed(
                f"{name} is {dtype} {list(shape)}, but {wanted[1]} {list(wanted[0])} in the {where}."
            )
    if digest(tensor).sha256 != expected.sha256:
        raise VerificationFailed(f"{name} has other values than the model that was compressed.")


def _compare_output(output: Tensor, known: Witness, kernels: float) -> tuple[float, float, float]:
    """(largest difference, root mean square over the deviation, what is allowed), over unpadded positions.

    Args:
        kernels: what is allowed at least, for a reader that computes with packed weights (`Stored.tolerance`).
    """
    wanted = known.output.float()
    if output.shape != wanted.shape:
        raise VerificationFailed(f"Outputs have shape {list(output.shape)}, expected {list(wanted.shape)}.")
    mask = known.inputs.get("attention_mask")
    if mask is not None and mask.shape == output.shape[:2]:
        output, wanted = output[mask.bool()], wanted[mask.bool()]
    if not bool(output.isfinite().all()):
        raise VerificationFailed("The reloaded model's outputs are not finite.")
    if not bool(wanted.isfinite().all()):
        raise VerificationFailed("The compressed model's own outputs are not finite.")
    difference = (output - wanted).abs()
    spread = float(difference.square().mean().sqrt() / wanted.std().clamp_min(1e-12))
    dtypes = {known.source[name][1] for name in known.digests if name in known.source} & set(TOLERANCE)
    allowed = max(kernels, *(TOLERANCE[dtype] for dtype in dtypes or ("float32",)))
    if known.device != "cpu":
        allowed = max(allowed, _OF_ANOTHER_DEVICE)
    if spread > allowed:
        raise VerificationFailed(
            f"The reloaded model's outputs differ by {spread:.2g} of their standard deviation, "
            f"{allowed:.0e} is allowed."
        )
    return float(difference.max()), spread, allowed


def _compare_streamed(
    directory: Path, tensors: dict[str, Place], stored: Mapping[str, Stored], known: Witness
) -> None:
    """Compare with the witness one tensor at a time, decoded as the reader would."""
    ties: dict[str, str] = getattr(skeleton_of(directory), "all_tied_weights_keys", {})
    seen: set[str] = set()
    for name, tensor in decoded(tensors, stored):
        if name not in known.digests:
            raise VerificationFailed(f"{name} is in the files, but not in the compressed model.")
        _compare_tensor(name, tensor, known.digests[name], known)
        seen.add(name)
    for one, other in [*ties.items(), *((source, target) for target, source in ties.items())]:
        if one not in seen and other in seen and known.digests.get(one) == known.digests[other]:
            seen.add(one)
    require_same(seen, set(known.digests), "in the files", "in the compressed model")
    _complete(seen, known)


def _complete(names: Iterable[str], known: Witness) -> None:
    if absent := sorted(set(known.source) - set(names)):
        raise VerificationFailed(f"{absent[0]} of the source model is missing ({len(absent)} such).")


def _main(arguments: list[str]) -> int:
    """The fresh process: its last line is a JSON object, a Verification or {'failure': sentence}."""
    directory, witness = (Path(argument) for argument in arguments[:2])
    try:
        if arguments[2:] == ["trusted"]:
            remote_code.register(directory)
        answer = dataclasses.asdict(check(directory, witness))
    except LlmcompError as error:
        answer = {"failure": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
