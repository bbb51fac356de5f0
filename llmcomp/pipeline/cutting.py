"""The smaller model, made block by block, as a checkpoint of its own that what comes after reads like any source.

    influence of the blocks → those that stay → (inputs of an output projection → which units stay, its other columns
    refitted → installed) * → sliced tensors of the block, shard

While it is made, the model is as wide as before: an output projection has zeros where units are gone, so lanes compute
what the smaller model computes, and no module has to be rebuilt. At the end the smaller model, loaded from the file,
computes the witness too and must agree: that is what proves the slices of an architecture nobody has tried.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcomp.adapters.base import Block
from llmcomp.adapters.units import Part, spread
from llmcomp.calibration.capture import Lane, Stop, advance_all, stopping
from llmcomp.calibration.parking import Parking
from llmcomp.calibration.stats import GramAccumulator, InputStats
from llmcomp.devices import computing_on
from llmcomp.errors import RunError
from llmcomp.formats import witness
from llmcomp.formats.save import ShardWriter, checkpoint_config, writing
from llmcomp.matmul import WideProducts
from llmcomp.methods.structured import most_important, prune, prune_by_size
from llmcomp.pipeline.job import Outcome, Source, open_source
from llmcomp.pipeline.journal import Journal
from llmcomp.pipeline.memory import keep_large_blocks_apart, return_freed_memory
from llmcomp.pipeline.narrowed import Renumbered, gone, narrowed, with_cut
from llmcomp.pipeline.pruning import Reduction, Smaller
from llmcomp.pipeline.residency import Residency
from llmcomp.pipeline.scoring import Scoring
from llmcomp.pipeline.streaming import streamed
from llmcomp.progress import Progress
from llmcomp.report.schema import LayerReport, Removed

_AGREEING = 0.05  # of the outputs' standard deviation: 16-bit products of other shapes are rounded differently
_OUTSIDE, _WITNESS = "outside", "witness.safetensors"


@dataclass(frozen=True)
class Cut:
    """The smaller model.

    Attributes:
        source: as a checkpoint in the partial directory. layers: what was narrowed. removed: what is gone.
        phases: seconds by phase. resumed: blocks that an earlier run had finished. spilled: bytes of activations that
            went to files.
    """

    source: Source
    layers: list[LayerReport]
    removed: list[Removed]
    phases: dict[str, float]
    resumed: int
    spilled: int

    def before(self, outcome: Outcome) -> Outcome:
        """What was done in all, once what follows has been done to the smaller model."""
        phases = {name: seconds + self.phases.get(name, 0.0) for name, seconds in outcome.phases.items()}
        return replace(
            outcome, layers=with_cut(outcome.layers, self.layers), phases=phases,
            resumed=outcome.resumed + self.resumed, spilled=outcome.spilled + self.spilled,
        )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a cut runs with, as in `pipeline.job.Job`; `partial` is its own directory, `fingerprint` of all that decides
    the result, `trust_remote_code` what the source was opened with, `labels` [rows] of each batch of a classifier."""

    batches: Sequence[Mapping[str, Tensor]]
    witness: Mapping[str, Tensor]
    partial: Path
    fingerprint: str
    activation_memory: int
    device: torch.device
    trust_remote_code: bool = False
    labels: Sequence[Tensor] | None = None


def cut(source: Source, reduction: Reduction, setting: Setting, progress: Progress) -> Cut:
    """Make the smaller model, or go on where an earlier run was killed.

    Raises:
        NumericalError: NaN or Inf in weights or activations.
        RunError: a block that could not be run, a full disk, or a smaller model that computes something else.
        BadRecipe: blocks without which transformers cannot build the model.
    """
    keep_large_blocks_apart()
    with writing(setting.partial):
        setting.partial.mkdir(parents=True, exist_ok=True)
    journal = Journal(setting.partial, setting.fingerprint)
    run = _Cutting(source, reduction, setting, journal, progress)
    return run.run()


class _Cutting:
    def __init__(
        self, source: Source, reduction: Reduction, setting: Setting, journal: Journal, progress: Progress
    ) -> None:
        self._source, self._reduction, self._setting = source, reduction, setting
        self._journal, self._progress = journal, progress
        self._writer = ShardWriter(setting.partial)
        self._spill = setting.partial / "activations"
        self._spill.mkdir(parents=True, exist_ok=True)
        self._parking = Parking(self._spill, setting.activation_memory, setting.device)
        self._scoring = Scoring(
            source, reduction, setting.batches, setting.labels, setting.partial, setting.activation_memory,
            setting.device,
        )  # fmt: skip
        self._phases = dict.fromkeys(("read", "forward", "solve", "save"), 0.0)
        self._layers: list[LayerReport] = []
        self._removed: list[Removed] = []
        self._resumed = 0

    def run(self) -> Cut:
        smaller = self._reduction.of(self._blocks())
        self._values = Renumbered.of(self._source.binding, smaller)
        self._adapter, self._params = smaller.full, Residency(smaller.full, self._values, self._setting.device)
        if _OUTSIDE in self._journal.done:
            self._resumed = len([self._note(block) for block in self._adapter.blocks])
        else:
            self._walk()
        source = self._opened(smaller)
        self._agree(source)
        return Cut(source, self._layers, self._removed, self._phases, self._resumed, self._parking.spilled)

    # --- which blocks stay ---

    def _blocks(self) -> list[int]:
        """Those of the source that stay, in order."""
        names = [block.name for block in self._source.adapter.blocks]
        all_stay = self._reduction.blocks == len(names)
        if all_stay and not self._reduction.taylor:
            return list(range(len(names)))
        with self._timed("forward"):
            self._progress.phase("look at blocks")
            scores = self._scoring.of_blocks()
        if all_stay:
            return list(range(len(names)))
        kept = most_important(torch.tensor(scores, dtype=torch.float64), self._reduction.blocks).tolist()
        for index, score in enumerate(scores):
            if index not in kept:
                self._removed.append(Removed(names[index], "block", 1, 1, [index], score))
        return kept

    # --- block by block ---

    def _walk(self) -> None:
        """All blocks, the witness to its output, and the rest."""
        setting, model = self._setting, self._adapter.model
        parts = {block.name: self._reduction.parts(block) for block in self._adapter.blocks}
        outputs = {part.output.name: part for some in parts.values() for part in some}
        blocks = {block.name: model.get_submodule(block.name) for block in self._adapter.blocks}
        linears = {name: model.get_submodule(name) for name in outputs}
        self._pending: dict[str, Part] = {}
        batches = setting.batches if self._reduction.calibrated and outputs else ()
        self._lanes = [Lane(model, batch, device=setting.device) for batch in batches]
        self._lanes.append(Lane(model, setting.witness, counted=False, device=setting.device))
        self._progress.phase("prune", len(blocks))
        try:
            with (
                writing(setting.partial),
                computing_on(setting.device),
                stopping(model, blocks, linears, self._pending.__contains__),
            ):
                self._params.settle()
                self._read(self._params.outside)
                self._advance(None)
                for block in self._adapter.blocks:
                    self._block(block, parts[block.name])
                    self._progress.step()
                self._end()
        finally:
            for lane in self._lanes:
                lane.close()

    def _block(self, block: Block, parts: Sequence[Part]) -> None:
        key, names = _key(block), self._params.inside(block.name)
        self._read(names)
        if key in self._journal.done:
            kept = self._note(block)
            for part in parts:
                with safe_open(self._writer.path(key), framework="pt") as file:
                    stored = file.get_tensor(self._values.file_name(f"{part.output.name}.weight"))
                self._install(part, kept[part.what], stored.t() if part.output.transposed else stored)
            self._resumed += 1
        else:
            solved = self._solved(parts)
            with self._timed("save"):
                self._write(block, names, parts, solved)
        if block is self._adapter.blocks[-1]:
            for lane in self._lanes[:-1]:
                lane.close()
            del self._lanes[:-1]
        else:
            self._advance(None)
            self._params.release(names)
        self._source.checkpoint.release()
        return_freed_memory()

    def _solved(self, parts: Sequence[Part]) -> dict[str, tuple[Tensor, LayerReport]]:
        """{what: (the units that stay, the report of the output projection)}, as lanes come to the parts."""
        found: dict[str, tuple[Tensor, LayerReport]] = {}
        if not self._reduction.calibrated:
            for part in parts:
                found[part.what] = self._cut(part, None)
            return found
        self._pending.update({part.output.name: part for part in parts})
        while self._pending:
            accumulator = GramAccumulator()
            reached = self._advance(accumulator)
            if reached is None or reached.name not in self._pending:
                unseen = next(iter(self._pending))
                raise RunError(f"{unseen} was never computed in the calibration run; prune by --method magnitude.")
            part = self._pending[reached.name]
            found[part.what] = self._cut(part, accumulator.finish(reached.name))
            del self._pending[reached.name]
        return found

    def _cut(self, part: Part, stats: InputStats | None) -> tuple[Tensor, LayerReport]:
        """Choose the units of a part that stay, refit what they are multiplied with, and install that."""
        began, keep, config = time.perf_counter(), self._reduction.keep[part.what], self._reduction.config
        with self._timed("solve"):
            weight = self._params.weight(part.output)  # [out, in]
            if stats is None:
                found = prune_by_size(self._weights(part), keep)
            else:
                assert stats.gram is not None  # nothing has been made of it
                units = torch.arange(weight.shape[1], device=weight.device).reshape(-1, part.size)
                scores = self._scoring.of_units(self._values.smaller.original(part.output.name))
                found = prune(weight, stats.gram, units, keep, config, scores)
            self._install(part, found.kept, found.weight)
        layer = narrowed(part, part.output, keep, weight.element_size(), self._reduction.step.method)
        return found.kept, replace(layer, error=found.error, seconds=time.perf_counter() - began)

    def _weights(self, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """All weights that go with units, units in columns."""
        weight = self._params.weight(part.output)
        units = torch.arange(part.units, device=weight.device)
        yield weight, torch.stack([spread(unit, part.size) for unit in units.split(1)])
        for ref, _ in part.producers:
            weight = self._params.weight(ref).t()
            yield weight, torch.stack([part.rows(ref, unit) for unit in units.split(1)])

    def _install(self, part: Part, kept: Tensor, made: Tensor) -> None:
        """Zeros where units are gone. made: [out, columns that stay]."""
        whole = torch.zeros_like(self._params.weight(part.output), memory_format=torch.contiguous_format)
        whole[:, spread(kept.to(whole.device), part.size)] = made.to(whole.device)
        self._params.install(part.output, whole)

    def _write(
        self, block: Block, names: Sequence[str], parts: Sequence[Part],
        solved: Mapping[str, tuple[Tensor, LayerReport]],
    ) -> None:
        """The block's shard, which units stay, and the entry in the journal, in this order."""
        values = {name: self._params.value(name) for name in names}
        layers: list[LayerReport] = []
        for part in parts:
            kept, layer = solved[part.what]
            for name, (dimension, where) in part.slices(kept.cpu()).items():
                if name in values:
                    values[name] = values[name].index_select(dimension, where.to(values[name].device))
            for ref, _ in part.producers:
                size = self._params.value(f"{ref.name}.weight").element_size()
                layers.append(narrowed(part, ref, len(kept), size, layer.method))
            layers.append(layer)
        stays = {what: kept.tolist() for what, (kept, _) in solved.items()}
        path = self._kept(block)
        path.with_suffix(".tmp").write_text(json.dumps(stays), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
        self._shard(_key(block), values, layers)
        self._note(block)

    def _shard(self, key: str, values: Mapping[str, Tensor], layers: list[LayerReport]) -> None:
        ties = self._adapter.ties
        tensors = {self._values.file_name(name): value for name, value in values.items() if name not in ties}
        self._journal.add(key, self._writer.write(key, tensors), layers)

    def _note(self, block: Block) -> dict[str, Tensor]:
        """Take a finished block's part of the report; {what: the units that stay}."""
        layers = self._journal.done[_key(block)].layers
        self._layers += layers
        stays = json.loads(self._kept(block).read_text(encoding="utf-8"))
        for part in self._reduction.parts(block):
            output = next(layer for layer in layers if layer.name == part.output.name)
            name = self._values.smaller.original(part.output.name)
            self._removed.append(gone(part, name, stays[part.what], output.error))
        return {what: torch.tensor(units, dtype=torch.int64) for what, units in stays.items()}

    def _end(self) -> None:
        """The witness to its output, and what lies outside of the blocks."""
        (last,) = self._lanes
        with self._timed("forward"):
            while last.output is None:
                self._parking.fetch(last.waiting())
                if last.advance() is None:
                    break
        with self._timed("save"):
            output = witness.model_output(last.output).cpu().contiguous()
            path = self._setting.partial / _WITNESS
            save_file({"output": output}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            self._shard(_OUTSIDE, {name: self._params.value(name) for name in self._params.outside}, [])
        self._params.release([*self._params.outside, *self._params.inside(self._adapter.blocks[-1].name)])

    # --- the smaller model ---

    def _opened(self, smaller: Smaller) -> Source:
        """Its checkpoint, put together and opened like any other."""
        checkpoint, model = self._source.checkpoint, self._source.adapter.model
        dtype: Any = model.dtype
        config = checkpoint_config(
            {**checkpoint.config, **smaller.changes}, self._source.adapter.architecture, witness.dtype_name(dtype), None
        )
        order = [*(_key(block) for block in self._adapter.blocks), _OUTSIDE]
        with self._timed("save"):
            path = self._writer.finish(order, config, checkpoint.copied_files(), root=checkpoint.path)
        return open_source(path, trust_remote_code=self._setting.trust_remote_code)

    def _agree(self, source: Source) -> None:
        """Compare what the smaller model computes with what was computed while it was made.

        Raises:
            RunError: they differ by more than rounding does.
        """
        smaller, release = source.adapter, source.checkpoint.release
        with self._timed("forward"), streamed(smaller, source.binding, release), WideProducts():
            output = witness.model_output(smaller.model(**self._setting.witness)).float()
        wanted = load_file(self._setting.partial / _WITNESS)["output"].float()
        spread_of = float((output - wanted).square().mean().sqrt() / wanted.std().clamp_min(1e-12))
        if not spread_of <= _AGREEING:
            raise RunError(
                f"The smaller {source.adapter.architecture} does not compute what was computed while it was pruned "
                f"({spread_of:.2g} of the outputs' standard deviation); please report this model."
            )

    # --- small things ---

    def _read(self, names: Sequence[str]) -> None:
        with self._timed("read"):
            self._params.read(names)

    def _advance(self, accumulator: GramAccumulator | None) -> Stop | None:
        def visit(lane: Lane, stop: Stop) -> None:
            if accumulator is not None and stop.inputs is not None and lane.counted:
                accumulator.add(lane.tokens(stop.inputs))
            self._parking.park(lane.held())

        with self._timed("forward"):
            reached = advance_all(self._lanes, visit, lambda lane: self._parking.fetch(lane.waiting()))
            return_freed_memory()
        return reached

    def _kept(self, block: Block) -> Path:
        return self._setting.partial / f"{_key(block)}.json"

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with torch.no_grad():
                yield
        finally:
            self._phases[phase] += time.perf_counter() - began


def _key(block: Block) -> str:
    return f"block-{block.index:05d}"
