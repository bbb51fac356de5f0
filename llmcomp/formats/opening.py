"""A checkpoint opened for others to write anew: its compressed weights as integers and scales, the rest as it lies.

Whoever converts (`llmcomp export`) or keeps weights packed (`llmcomp.load`) starts here, so that nobody needs to know
two formats. Read are llmcomp's own layout, compressed-tensors' `pack-quantized` and `int-quantized` of any tool, and
dense safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmcomp import bnb, native, native_kinds
from llmcomp.errors import BadCheckpoint, BadRecipe, VerificationFailed
from llmcomp.experts import file_renaming
from llmcomp.formats.reading import (
    Packed,
    Place,
    config_of,
    rounding,
    skeleton_of,
    stored_modules,
    stored_tensor,
    stored_tensors,
)
from llmcomp.kinds import Kind, LowRank, integers_of
from llmcomp.schemes import GROUP_SIZES, Scheme
from llmcomp.weights import CompressedWeight, QuantizedWeight


@dataclass(frozen=True)
class PackedRef:
    """A packed module, as `formats.base.Ref` wants it. `role`: 'embeddings', 'head' or 'linear'."""

    name: str
    role: str
    out_features: int
    in_features: int
    transposed: bool


@dataclass(frozen=True)
class Opened:
    """One checkpoint.

    Attributes:
        directory: where it lies.
        config: the model's own config.json, without `quantization_config`.
        kinds: {packed module: its kind}, in the order of the modules.
        tensors: {tensor in the model: its place}, of all tensors.
    """

    directory: Path
    config: Mapping[str, Any]
    kinds: Mapping[str, Kind]
    tensors: Mapping[str, Place]

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on meta, experts apart."""
        return skeleton_of(self.directory)

    @cached_property
    def schemes(self) -> Mapping[str, Scheme]:
        """{packed module: the scheme of its integers}, of all that are integers on a grid, sparse or not."""
        found = {module: integers_of(kind) for module, kind in self.kinds.items()}
        return {module: scheme for module, scheme in found.items() if scheme is not None}

    def require_integers(self, target: str) -> None:
        """Refuse to be written as `target` ('GGUF'), which holds integers and dense weights alone.

        Raises:
            BadRecipe: a weight of low rank, or a sparse one that is not quantized.
        """
        if (module := next((module for module in self.kinds if module not in self.schemes), None)) is not None:
            what = "low-rank" if isinstance(self.kinds[module], LowRank) else "sparse"
            raise BadRecipe(
                f"{target} has no form for {what} weights such as {module}; `llmcomp export --format dense` writes "
                "them dense."
            )

    @cached_property
    def plain(self) -> list[str]:
        """Names of the tensors that belong to no packed weight: norms, biases, dense weights."""
        packed = {f"{module}.{part}" for module, kind in self.kinds.items() for part in self._parts(kind)}
        return [name for name in self.tensors if name not in packed]

    def ref(self, module: str) -> PackedRef:
        """What formats want to know of a packed module."""
        found: Any = self.skeleton.get_submodule(module)
        if getattr(getattr(found, "weight", None), "ndim", 0) != 2:
            raise BadCheckpoint(f"{self.directory} names {module} as packed, which has no matrix of weights.")
        transposed = type(found).__name__ == "Conv1D"
        shape = found.weight.shape[::-1] if transposed else found.weight.shape
        role = "embeddings" if isinstance(found, nn.Embedding) else "linear"
        head = getattr(self.skeleton, "get_output_embeddings", lambda: None)()
        return PackedRef(module, "head" if found is head else role, shape[0], shape[1], transposed)

    @staticmethod
    def _parts(kind: Kind) -> tuple[str, ...]:
        return native.PARTS if isinstance(kind, Scheme) else native_kinds.names_of(kind)

    def quantized(self, module: str) -> QuantizedWeight:
        """A packed weight [out, in] of `schemes`, its removed integers included; raises as `weight`."""
        weight = self.weight(module)
        assert isinstance(weight, QuantizedWeight)  # it has a scheme
        return weight

    def weight(self, module: str) -> CompressedWeight:
        """A packed weight [out, in], as a Linear holds it, of a Conv1D, too.

        Raises:
            BadCheckpoint: tensors that are missing or of wrong shapes.
        """
        ref, kind = self.ref(module), self.kinds[module]
        names = {part: f"{module}.{part}" for part in self._parts(kind)}
        state = {part: stored_tensor(self.tensors[name]) for part, name in names.items() if name in self.tensors}
        weight: CompressedWeight
        try:
            if isinstance(kind, Scheme):
                weight = native.read(state, kind, ref.transposed)
            else:
                weight = native_kinds.from_tensors(state, kind)
        except (BadCheckpoint, RuntimeError, ValueError) as error:
            raise BadCheckpoint(f"{self.directory} holds a weight that cannot be read: {module}: {error}.") from error
        if tuple(weight.shape) != (ref.out_features, ref.in_features):
            wanted = [ref.out_features, ref.in_features]
            raise BadCheckpoint(f"{self.directory} holds {module} as {list(weight.shape)}, its config says {wanted}.")
        return weight

    def tensor(self, name: str) -> Tensor:
        """A tensor as it lies in its file."""
        return stored_tensor(self.tensors[name])

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer of the files by its name in the model, decoded, one at a time."""
        for module in self.kinds:
            weight = self.weight(module).dense()
            yield f"{module}.weight", (weight.t().contiguous() if self.ref(module).transposed else weight)
        for name in self.plain:
            yield name, self.tensor(name)


def open_checkpoint(directory: Path) -> Opened:
    """Open a checkpoint; reads headers and config only.

    Raises:
        BadCheckpoint: files that are not whole, or a format whose weights are no integers in groups.
    """
    try:
        config = config_of(directory)
        if bnb.is_bnb(config):
            raise BadCheckpoint(
                f"{directory} holds bitsandbytes' own codes, which are no integers in groups; start from the model it "
                "was made of."
            )
        tensors = stored_tensors(directory)
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict | None):
            raise BadCheckpoint(f"{directory} has a quantization_config that is no object.")
        method = (quantization or {}).get("quant_method")
        if native.is_native(config):
            kinds = native.kinds_of(quantization)
            own = native.unwrap(config)
        elif method in (None, "compressed-tensors"):
            if (quantization or {}).get("transform_config"):
                raise BadCheckpoint(f"{directory} wants its inputs rotated (transform_config), which is not done here.")
            kinds = dict[str, Kind](_foreign_schemes(directory, tensors))
            own = {key: value for key, value in config.items() if key != "quantization_config"}
        else:
            raise BadCheckpoint(
                f"{directory} is in the format '{method}'; compressed-tensors, llmcomp's own and dense checkpoints "
                "can be opened."
            )
        return _with_models_names(Opened(directory, own, kinds, tensors))
    except VerificationFailed as error:
        raise BadCheckpoint(f"{directory} cannot be opened: {error}") from error


def _with_models_names(opened: Opened) -> Opened:
    """The same with every tensor by its name in the model: files may hold older ones (GPT-NeoX's `embed_out`)."""
    modules = {name for name, _ in opened.skeleton.named_modules()}
    modules |= {f"{name}.{part}" for name, kind in opened.kinds.items() if isinstance(kind, LowRank)
                for part in native_kinds.PARTS}  # fmt: skip
    if all(name.rpartition(".")[0] in modules for name in opened.tensors):
        return opened
    rename = file_renaming(opened.skeleton)
    here = {name: name.rpartition(".")[0] in modules for name in opened.tensors}
    tensors = {name if here[name] else rename(name): place for name, place in opened.tensors.items()}
    return replace(opened, tensors=tensors)


def _foreign_schemes(directory: Path, tensors: Mapping[str, Place]) -> dict[str, Scheme]:
    """The schemes of a compressed-tensors checkpoint."""
    stored = stored_modules(directory, tensors)
    if not stored:
        return {}
    activations, skeleton = rounding(stored), skeleton_of(directory)
    found = {}
    for module, one in stored.items():
        args: Any = one.scheme.weights if isinstance(one, Packed) else None
        held: Any = skeleton.get_submodule(module)
        columns = held.weight.shape[0 if type(held).__name__ == "Conv1D" else 1]
        problem = "has no scheme of its weights" if args is None else _unfit(args, columns)
        if f"{module}.weight_g_idx" in tensors:
            problem = "has its columns in another order than its groups"
        if problem is None:
            try:
                found[module] = Scheme(args.num_bits, _group(args, columns), args.symmetric, activations.get(module))
            except BadRecipe as error:
                problem = f"has a scheme that llmcomp does not know: {error}"
        if problem is not None:
            raise BadCheckpoint(f"{directory} cannot be opened packed: {module} {problem}.")
    return found


def _unfit(args: Any, columns: int) -> str | None:
    """What of a scheme's weights is not integers in groups along the input."""
    kind, strategy = (getattr(value, "value", value) for value in (args.type, args.strategy))
    if kind != "int":
        return f"is stored as {kind} of {args.num_bits} bits"
    if strategy not in ("channel", "group", "block", "tensor"):
        return f"has scales by {strategy}"
    if strategy == "block" and min(args.block_structure) != 1:
        return f"has scales by blocks of {list(args.block_structure)}"
    if (group := _group(args, columns)) is not None and group not in GROUP_SIZES:
        return f"has groups of {group}; those of {', '.join(map(str, GROUP_SIZES))} are known"
    return None


def _group(args: Any, columns: int) -> int | None:
    strategy = getattr(args.strategy, "value", args.strategy)
    size = {"group": args.group_size, "block": max(args.block_structure or (columns,))}.get(strategy, columns)
    return None if size == columns else int(size)
