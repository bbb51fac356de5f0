"""A compressed checkpoint made ready to be trained, and written again in the form that it had.

What each compressed linear is, is read off config.json where it is packed, else off the report beside it: dense
safetensors do not say which of their zeros are a mask, nor that their weights lie on a grid.

    floating     trained as they are; sparse ones under the mask of what is zero; two factors as two factors
    integers     trained as what is rounded to their grid on the way, or not: then an adapter is, beside them
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcomp import bnb, lora, native_kinds
from llmcomp.checkpoint import Checkpoint
from llmcomp.errors import BadCheckpoint, BadRecipe, RunError
from llmcomp.experts import split_experts
from llmcomp.formats.opening import Opened, open_checkpoint
from llmcomp.formats.reading import stored_tensor
from llmcomp.kinds import Kind, LowRank, Sparse, integers_of
from llmcomp.loading import load_opened
from llmcomp.packed_kinds import PackedSparse
from llmcomp.patterns import UNSTRUCTURED, Pattern
from llmcomp.report.schema import Report
from llmcomp.training.grids import Grids
from llmcomp.training.qat import Latent
from llmcomp.training.settings import LORA, QAT, Lora
from llmcomp.weights import LowRankWeight, SparseWeight

INTEGERS, SPARSE, FACTORS, PRODUCT, PLAIN = "integers", "sparse", "factors", "low rank stored dense", "dense"
_PATTERN = re.compile(r"(\d+:\d+|unstructured)\b")


@dataclass
class Subject:
    """One compressed checkpoint, open for training.

    Attributes:
        report: what compressed it wrote.
        forms: {compressed module: one of the five above}, in the order of the report.
        roles: {compressed module: its role}.
        masks: {module of a sparse weight: bool of the weight's shape as the module holds it, True where kept}.
        patterns: {the same module: its pattern}.
        dtypes: {parameter or buffer: its dtype in the checkpoint}, of a model that trains in float32.
        grids: of integers that are trained.
    """

    checkpoint: Checkpoint
    opened: Opened
    report: Report
    model: Any
    forms: Mapping[str, str]
    roles: Mapping[str, str]
    masks: dict[str, Tensor] = field(default_factory=dict)
    patterns: dict[str, Pattern] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    grids: Grids | None = None

    @property
    def beside(self) -> bool:
        """Whether an adapter must stay beside the weights: merged, they would not be what they are."""
        return any(form in (INTEGERS, PRODUCT) for form in self.forms.values())

    def role(self, tensor: str) -> str:
        """The role of the module that a stored tensor belongs to."""
        module = tensor.rpartition(".")[0]
        return self.roles.get(module) or self.roles.get(module.rpartition(".")[0], "other")

    def require(self, method: str) -> None:
        """Refuse a method that cannot train these weights.

        Raises:
            BadRecipe: naming one that can.
        """
        if method == LORA:
            return
        integers = [name for name, form in self.forms.items() if form == INTEGERS]
        if method == QAT and not integers:
            where = self.checkpoint.path
            raise BadRecipe(f"--method {QAT} trains integers, and {where} holds none; take --method full.")
        for name, form in self.forms.items():
            kind = self.opened.kinds.get(name)
            trained = kind is not None and integers_of(kind) is not None  # in the places of their own
            if form == PRODUCT:
                what, instead = "the product of two factors, which would not stay one", LORA
            elif form == INTEGERS and not trained:
                what = "dense weights, which do not say their grid" if kind is None else "factors of integers"
                instead = LORA
            elif form == INTEGERS and method != QAT:
                what, instead = "integers, which have no gradients", f"{QAT} or {LORA}"
            else:
                continue
            raise BadRecipe(f"--method {method} cannot train {name}: it holds {what}; take --method {instead}.")

    def put_on_grids(self, source: Path | None, learn_scales: bool) -> int:
        """Make latent weights of integers, before all others are widened; how many start from a dense model's weights.

        Args:
            source: that dense model, None where it is gone.

        Raises:
            BadCheckpoint: integers that lie otherwise than llmcomp writes them, or off the grid of the report.
        """
        self.grids = Grids.of(self.opened, self.report)
        pruned = {layer.name: _pattern(layer.scheme) for layer in self.report.layers if _PATTERN.match(layer.scheme)}
        dense = None if source is None else open_checkpoint(source)
        return self.grids.put(self.model, dense, pruned, learn_scales)

    def widen(self) -> None:
        """Make all weights float32 parameters, sparse ones dense under their masks, but integers, which are
        `put_on_grids` before that. Not for an adapter beside them.

        Raises:
            BadCheckpoint: weights that are not as sparse as the report says.
        """
        for name, kind in self.opened.kinds.items():
            if isinstance(kind, Sparse) and kind.values is None:
                self._spread(name, self.model.get_submodule(name), kind)
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        own = {name for name, module in self.model.named_modules() if isinstance(module, Latent)}
        for name in [name for name in state if name.rpartition(".")[0] in own and not name.endswith(".bias")]:
            del state[name]  # scales stay as the file holds them: rounding is to their dtype
        self.dtypes = {name: value.dtype for name, value in state.items()}
        for name, form in self.forms.items():
            if form == SPARSE and name not in self.masks:
                self._read_mask(name)
        for value in state.values():  # not by `float`, which transformers refuses of whatever was packed once
            if value.is_floating_point():
                value.data = value.data.float()
        self.model.is_quantized = False  # nothing is, any more

    def _spread(self, name: str, module: Any, kind: Sparse) -> None:
        assert isinstance(module, PackedSparse)
        dense = module.decoded()
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(dense.clone()), module.bias
        indices = module.get_buffer(native_kinds.INDICES)
        self.masks[name] = native_kinds.mask_of(indices, kind.pattern, module.in_features)
        self.patterns[name] = kind.pattern
        self.model.set_submodule(name, linear)

    def _read_mask(self, name: str) -> None:
        held = self.model.get_submodule(name)
        pattern, mask = self.patterns[name], held.weight.detach() != 0
        if not _within(pattern, mask.t() if type(held).__name__ == "Conv1D" else mask):
            raise BadCheckpoint(
                f"{self.checkpoint.path} holds {name} with more weights than {pattern.label} keeps, which its report "
                "says it is; compress the model again."
            )
        self.masks[name] = mask

    def parameters_under_masks(self) -> dict[nn.Parameter, Tensor]:
        """{weight: its mask}."""
        return {self.model.get_submodule(name).weight: mask for name, mask in self.masks.items()}

    def narrow(self) -> None:
        """Round to the dtypes of the checkpoint: the model then computes what a reader of it will.

        Raises:
            RunError: a mask that has not held.
        """
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if name in self.dtypes:
                value.data = value.data.to(self.dtypes[name])
        if self.grids is not None:
            self.grids.settle(self.model)
        for name, mask in self.masks.items():
            if bool((self.model.get_submodule(name).weight != 0).logical_and_(~mask).any()):
                raise RunError(f"Weights of {name} that its mask removes are no longer zero.")

    def targets(self, settings: Lora) -> list[str]:
        """Names of the modules that get factors.

        Raises:
            BadRecipe: targets that match nothing, or a rank that none of them is wide enough for.
        """
        names = [name for name in self.forms if self.roles[name] != "embeddings"]
        if settings.targets:
            wanted = set(settings.targets)
            names = [name for name in names if wanted & {name, name.rpartition(".")[2], self.roles[name]}]
        if not names:
            said = ", ".join(settings.targets) or "the compressed linears"
            raise BadRecipe(f"--target {said} matches no compressed linear; leave it out for all of them.")
        widest = max(min(layer.shape) for layer in self.report.layers if layer.name in names)
        if settings.rank > widest:
            raise BadRecipe(f"--rank {settings.rank} is above the widths of all linears; take 1 to {widest}.")
        if self.beside:
            return names
        return [part for name in names for part in self._parts(name)]

    def _parts(self, name: str) -> list[str]:
        """Factors are merged into each of two factors: into their product they could not be."""
        return [f"{name}.left", f"{name}.right"] if self.forms[name] == FACTORS else [name]

    # --- the way back ---

    def stored(self) -> dict[Path, dict[str, Tensor]]:
        """{file of the checkpoint: what it holds now, by the names in it}, of a model after `narrow`."""
        state, files = self._state(), dict[Path, dict[str, Tensor]]()
        for name, place in self.opened.tensors.items():
            value = state.get(name)
            files.setdefault(place.path, {})[place.key] = stored_tensor(place) if value is None else value
        return files

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {name: value.detach() for name, value in self.model.state_dict().items()}
        for name, kind in self.opened.kinds.items():
            if isinstance(kind, Sparse) and name in self.masks:
                weight = SparseWeight(state.pop(f"{name}.weight"), self.masks[name], kind.pattern)
                made = native_kinds.to_tensors(weight, kind)
                state |= {f"{name}.{part}": value for part, value in made.items()}
        return state if self.grids is None else state | self.grids.tensors(self.model)

    def dense(self) -> dict[str, Tensor]:
        """Every parameter by its name in the dense model, as a reader decodes it, tied ones under each name."""
        found: dict[str, Tensor] = {}
        packed = self.opened.kinds
        for full, value in self.model.named_parameters(remove_duplicate=False):
            if ".lora_" in full:
                continue
            name = full.replace(".base_layer.", ".")
            owner, _, leaf = name.rpartition(".")
            if (owner not in packed and owner.rpartition(".")[0] not in packed) or leaf == "bias":
                found[name] = value.detach()
        for name, kind in packed.items():
            module = self.model.get_submodule(name)
            found[f"{name}.weight"] = self._dense(getattr(module, "base_layer", module), kind)
        return found

    @staticmethod
    def _dense(module: Any, kind: Kind) -> Tensor:
        if isinstance(kind, LowRank) and kind.left is None and kind.right is None and kind.base is None:
            weight = LowRankWeight(module.left.weight.detach(), module.right.weight.detach()).dense()
            return weight.t() if module.transposed else weight
        if isinstance(module, nn.Linear):  # a sparse weight that was spread
            return module.weight.detach()
        if isinstance(module, Latent):
            return module.dense()
        dense: Tensor = module.dense()
        return dense


def open_subject(path: Path) -> Subject:
    """Open a compressed checkpoint for training.

    Raises:
        BadCheckpoint: nothing that llmcomp has compressed, in a format whose weights cannot be trained or stand beside
            an adapter, or with an adapter already.
    """
    checkpoint = Checkpoint.open(path)
    report = Report.read(path)
    if bnb.is_bnb(checkpoint.config):
        raise BadCheckpoint(
            f"{path} holds bitsandbytes' own codes, which llmcomp does not train beside; peft does, by itself."
        )
    if lora.beside(path) is not None:
        raise BadCheckpoint(f"{path} has an adapter already; recover the checkpoint that it was made of.")
    if not report.layers:
        raise BadCheckpoint(f"{path} is not compressed by its report; give a directory that llmcomp has compressed.")
    opened = open_checkpoint(path)
    forms = {layer.name: _form(layer.name, layer.scheme, opened.kinds) for layer in report.layers}
    patterns = {layer.name: _pattern(layer.scheme) for layer in report.layers if forms[layer.name] == SPARSE}
    model = load_opened(opened)
    split_experts(model)
    modules = {name for name, _ in model.named_modules()}
    if lost := [name for name in forms if name not in modules]:
        raise BadCheckpoint(f"{path} has no module {lost[0]}, which its report says was compressed.")
    roles = {layer.name: layer.role for layer in report.layers}
    return Subject(checkpoint, opened, report, model, forms, roles, patterns=patterns)


def _form(name: str, scheme: str, kinds: Mapping[str, Kind]) -> str:
    if (kind := kinds.get(name)) is not None:
        if integers_of(kind) is not None:
            return INTEGERS
        if isinstance(kind, LowRank):
            floating = kind.left is None and kind.right is None and kind.base is None
            return FACTORS if floating else INTEGERS
        return SPARSE
    if re.search(r"\bint\d", scheme):
        return INTEGERS
    if _PATTERN.match(scheme):
        return SPARSE
    return PRODUCT if "rank" in scheme.split() else PLAIN


def _pattern(scheme: str) -> Pattern:
    """Of a label such as '2:4 stored dense' or 'unstructured 60%'."""
    found = _PATTERN.match(scheme)
    assert found is not None  # its form is sparse
    if found[1] != UNSTRUCTURED:
        return Pattern.parse(found[1])
    share = re.search(r"([\d.]+)%", scheme)
    return Pattern.parse(UNSTRUCTURED, None if share is None else float(share[1]) / 100)


def _within(pattern: Pattern, mask: Tensor) -> bool:
    """Whether a mask [out, in] keeps at most N of every M; a kept weight may be zero by itself."""
    if pattern.of is None or pattern.kept is None:
        return True
    return pattern.fits(mask.shape[1]) and int(mask.reshape(len(mask), -1, pattern.of).sum(-1).max()) <= pattern.kept
