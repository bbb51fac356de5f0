"""A format that transformers makes itself, from the whole model in memory: load quantized, look, save, let go.

    from_pretrained quantizes → digests and errors → save_pretrained → the witness, on decoded weights

Nothing is resumed: a killed run starts afresh. Saving comes before any forward of that model. The witness's output
is of the dense model with the decoded weights, streamed block by block, so that bitsandbytes' kernels are compared
with plain products when the checkpoint is verified.
"""

from __future__ import annotations

import importlib
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from llmcomp import bnb
from llmcomp.adapters.base import Adapter, LinearRef
from llmcomp.errors import NumericalError, RunError, UserError
from llmcomp.formats import witness
from llmcomp.formats.bitsandbytes import BnbLayout, load, save
from llmcomp.formats.save import ShardWriter, writing
from llmcomp.matmul import WideProducts
from llmcomp.pipeline.footprint import converting
from llmcomp.pipeline.job import Outcome, Plan, Source
from llmcomp.pipeline.memory import return_freed_memory
from llmcomp.pipeline.plan import bytes_after
from llmcomp.pipeline.residency import check_finite
from llmcomp.pipeline.streaming import streamed
from llmcomp.progress import Progress
from llmcomp.recipe import FIXED
from llmcomp.report.schema import LayerReport


class Conversion:
    """One conversion. Shards, digests and the witness lie in `partial` after `run`, as the loop leaves them.

    Args:
        inputs: of the model, for verification. allow_pickle: as the source was opened with.
    """

    def __init__(
        self, source: Source, plan: Plan, inputs: dict[str, Tensor], partial: Path, progress: Progress,
        *, allow_pickle: bool = False,
    ) -> None:  # fmt: skip
        assert isinstance(plan.layout, BnbLayout)
        self._source, self._plan, self._layout = source, plan, plan.layout
        self._inputs, self._partial, self._progress = inputs, partial, progress
        self._allow_pickle = allow_pickle
        self._outcome = Outcome(phases=dict.fromkeys(("read", "solve", "save", "forward"), 0.0))

    def run(self) -> Outcome:
        """Convert, write and gather evidence.

        Raises:
            UserError: a directory that cannot be written to.
            NumericalError: NaN or Inf in a weight.
            RunError: transformers cannot convert the model, or a full disk.
        """
        self._progress.phase("compress", len(self._plan.assignment.tasks))
        with writing(self._partial):
            shutil.rmtree(self._partial, ignore_errors=True)
            writer = ShardWriter(self._partial)
        with self._timed("read"), quiet():
            model = self._load()
        with self._timed("solve"):
            digests = self._look(model)
        with self._timed("save"), quiet():
            self._outcome.order = writer.adopt(partial(save, model))
        with self._timed("forward"):
            output = self._output(model)
        evidence = self._partial / "witness"
        witness.record(evidence, "whole", {}, digests)
        witness.save(
            evidence,
            compressed=dict.fromkeys(self._plan.assignment.tasks, self._layout.kind.label),
            source=self._outcome.source,
            inputs=self._inputs,
            output=output,
        )
        return self._outcome

    def _load(self) -> Any:
        adapter, checkpoint = self._source.adapter, self._source.checkpoint
        kind: Any = type(adapter.model)
        try:
            model = load(kind, checkpoint.path, self._layout, adapter.model, allow_pickle=self._allow_pickle)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RunError(f"transformers cannot load {checkpoint.path} by bitsandbytes: {reason}") from error
        made = {name for name, module in model.named_modules() if bnb.holds(module)}
        if wrong := sorted(made ^ set(self._plan.assignment.tasks)):
            raise RunError(
                f"transformers made {len(made)} weights of bitsandbytes where {len(self._plan.assignment.tasks)} "
                f"were planned; the first that differs is {wrong[0]}."
            )
        return model

    def _look(self, model: Any) -> dict[str, witness.Digest]:
        """Digests of all parameters as a reader decodes them, and the report's line of each quantized one."""
        values, digests = HeldValues(model, self._source, self._plan), dict[str, witness.Digest]()
        refs = {f"{ref.name}.weight": ref for ref in self._source.adapter.refs}
        for name in values.key_of:
            before, began = self._source.binding.tensor(name), time.perf_counter()
            check_finite(before, name)
            self._outcome.source[name] = (tuple(before.shape), witness.dtype_name(before.dtype))
            after = values.tensor(name)
            digests[name] = witness.digest(after)
            if name.removesuffix(".weight") in self._plan.assignment.tasks:
                layer = self._line(refs[name], before, after, time.perf_counter() - began)
                self._outcome.layers.append(layer)
                self._progress.layer(layer)
                self._progress.step()
        order = {name: position for position, name in enumerate(self._plan.assignment.tasks)}
        self._outcome.layers.sort(key=lambda layer: order[layer.name])
        self._source.checkpoint.release()
        return digests

    def _line(self, ref: LinearRef, before: Tensor, after: Tensor, seconds: float) -> LayerReport:
        itemsize, before = before.element_size(), before.float()
        norm = float(before.square().sum())
        error = float((after.float() - before).square().sum()) / norm if norm > 0 else 0.0
        if not error < 1:  # NaN, too: int8 goes through float16, which has no numbers beyond 65504
            raise NumericalError(f"bitsandbytes loses {ref.name}: its weights differ by {error:.2g} of their square.")
        return LayerReport(
            name=ref.name,
            block=ref.block,
            role=ref.role,
            shape=(ref.out_features, ref.in_features),
            scheme=self._layout.kind.label,
            method=FIXED[self._plan.recipe.format]["method"],
            bytes_before=ref.weights * itemsize,
            bytes_after=self._layout.nbytes(ref, itemsize),
            error=error,
            seconds=seconds,
        )

    def _output(self, model: Any) -> Tensor:
        values = HeldValues(model, self._source, self._plan)
        adapter = self._source.adapter
        with streamed(adapter, values, return_freed_memory), torch.inference_mode(), WideProducts():
            return witness.model_output(adapter.model(**self._inputs)).clone()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with torch.no_grad():
                yield
        finally:
            self._outcome.phases[phase] += time.perf_counter() - began


class HeldValues:
    """`pipeline.residency.Values` of a model in memory, its quantized weights decoded one at a time."""

    def __init__(self, model: Any, source: Source, plan: Plan) -> None:
        self._model, self._plan = model, plan
        self._dtypes = source.binding.dtypes
        self.key_of = source.binding.key_of

    def tensor(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        if leaf == "weight" and path in self._plan.assignment.tasks:
            return bnb.dense_of(module, self._dtypes[name])
        value: Tensor = getattr(module, leaf).detach()
        return value


def prepare(adapter: Adapter, plan: Plan) -> None:
    """Import what converting needs, and refuse what is known not to fit before anything is loaded.

    Raises:
        UserError: memory cannot hold the model.
        RunError: bitsandbytes cannot be imported.
    """
    want = converting(adapter, plan, bytes_after(adapter, plan)).terms.total
    have = psutil.virtual_memory().available
    if want > have:
        raise UserError(
            f"bitsandbytes needs the whole model in memory, {want / 1e9:.1f} GB, and {have / 1e9:.1f} GB are "
            "available; close other programs, or take --format compressed-tensors, which works block by block."
        )
    try:
        importlib.import_module("bitsandbytes")
        importlib.import_module("transformers.integrations.bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise RunError(f"bitsandbytes cannot be imported: {' '.join(str(error).split())[:300]}") from error
    bnb.silence()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' bars and bitsandbytes' word on every cast have no place in llmcomp's own output."""
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
