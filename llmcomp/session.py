"""One run, from a directory to a published checkpoint: prepare, compress, put together, verify, measure,
publish. Nothing appears under the output's name before the last of these."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from llmcomp.calibration.data import Texts
from llmcomp.calibration.media import Media
from llmcomp.devices import CPU, choose, describe, forget_peak, peak_bytes
from llmcomp.digests import digests
from llmcomp.errors import BadRecipe, LlmcompError, UserError
from llmcomp.feeds import call
from llmcomp.formats.save import (
    ShardWriter,
    checkpoint_config,
    clear_scratch,
    partial_of,
    preflight,
    publish,
    scratch_of,
    writing,
)
from llmcomp.formats.verify import verify
from llmcomp.formats.witness import dtype_name
from llmcomp.measure.cost import size_of
from llmcomp.measure.inputs import MEDIA, evaluation_data
from llmcomp.measure.machine import this_machine
from llmcomp.measure.run import evaluate_model
from llmcomp.pipeline import cutting
from llmcomp.pipeline.job import Data, Job, Outcome, Plan, Source, gather, open_source, plan_recipe, plan_rest
from llmcomp.pipeline.journal import Journal, fingerprint
from llmcomp.pipeline.labels import labels
from llmcomp.pipeline.memory import PeakMemory
from llmcomp.pipeline.narrowed import notes
from llmcomp.pipeline.plan import bytes_needed
from llmcomp.pipeline.pruning import Reduction
from llmcomp.pipeline.run import Compression
from llmcomp.pipeline.sharing import Sharing
from llmcomp.pipeline.streaming import open_streamed
from llmcomp.pipeline.whole import Conversion, prepare
from llmcomp.progress import Progress, Silent
from llmcomp.provenance import origin_of
from llmcomp.ranks import ALONE, World
from llmcomp.recipe import Recipe
from llmcomp.report.html import FILE_NAME as PAGE_NAME
from llmcomp.report.html import render
from llmcomp.report.schema import FILE_NAME, Left, Removed, Report
from llmcomp.run_options import RunOptions

RECIPE_NAME = "llmcomp_recipe.yaml"
_DISCARDED = (
    "An unfinished run of another recipe, model or data, on another device, or of another number of processes was "
    "discarded; starting afresh."
)


class Session:
    """The run of a recipe on a model.

    Args:
        model: the name that the user gave; source: what it led to; path: the directory.
        world: the ranks that compress together; the first one alone writes, verifies, measures and reports.
    """

    def __init__(
        self, model: str, source: str, path: Path, recipe: Recipe, options: RunOptions, progress: Progress,
        world: World = ALONE,
    ) -> None:
        self.model, self.source_name, self.path = model, source, path
        self.recipe, self.options, self.world = recipe, options, world
        self.progress = progress if world.first else Silent()
        self.device = choose(options.device, world.size)
        self.output = Path(options.output or default_output(model, *(step.summary for step in recipe.steps)))
        self.partial = partial_of(self.output)
        self.phases: dict[str, float] = {}
        self.notes: list[str] = []
        self.removed: list[Removed] = []

    def run(self) -> tuple[Path, Report]:
        """Do it all.

        Raises:
            UserError, RunError: see `llmcomp.quantize`.
        """
        with self._timed("prepare"):
            source = open_source(
                self.path,
                trust_remote_code=self.options.trust_remote_code,
                allow_pickle=self.options.allow_pickle,
            )
            plan = plan_recipe(self.recipe, source.adapter)
            if plan.whole:
                self._alone()
                self.device = CPU
                prepare(source.adapter, plan)
            if plan.reduction is not None and self.world.size > 1:
                raise BadRecipe(
                    f"A model is pruned in one process, and this run has {self.world.size}; run llmcomp prune without "
                    "a launcher, then what is to follow on its output."
                )
            if self.world.first:
                need = bytes_needed(plan, source.binding.key_of)
                preflight(self.path, self.output, self.options.overwrite, need)
            texts = self._evaluation_data(source.adapter.task)
            data = gather(self.recipe, source, plan, self.model, self.progress, self.world)
        forget_peak(self.device)
        with PeakMemory() as memory:
            source, plan, outcome = (self._convert if plan.whole else self._compress)(source, plan, data)
            of_others = self.world.largest(memory.peak)
            on_device = self.world.largest(peak_bytes(self.device))
            self.world.part()
            if not self.world.first:  # what the first one will have made of it
                return self.output, Report.from_json(self.world.conclude(None).decode())
            checkpoint = self._assemble(source, plan, outcome)
        if on_device:
            self._note(f"Tensors took up to {on_device / 1e6:,.0f} MB on the device, {describe(self.device)}.")
        report = self._report(source, plan, data, outcome, max(memory.peak, of_others))
        if self.options.verify:
            with self._timed("verify"):
                self.progress.phase("verify")
                report.verification = verify(checkpoint, self.partial / "witness")
        if self.options.evaluate:
            self._measure(report, checkpoint, source, plan, texts)
        report.size_after = size_of(checkpoint, _role_of(source, plan))
        report.phases, report.notes = self.phases, self.notes
        report.labels, report.files = labels(plan, report.format), digests(checkpoint)
        with writing(checkpoint):
            (checkpoint / FILE_NAME).write_text(report.to_json(), encoding="utf-8")
            (checkpoint / PAGE_NAME).write_text(render(report), encoding="utf-8")
        publish(self.partial, self.output, self.options.overwrite)
        self.world.conclude(report.to_json().encode())
        return self.output, report

    def _alone(self) -> None:
        if self.world.size > 1:
            raise BadRecipe(
                f"--format {self.recipe.format} is made by transformers of the whole model in one process, and this "
                f"run has {self.world.size}; start it without a launcher."
            )
        if self.options.device not in ("auto", "cpu"):
            raise BadRecipe(
                f"--format {self.recipe.format} is made by transformers of the whole model on the CPU; leave out "
                f"--device {self.options.device}."
            )

    # --- the phases ---

    def _compress(self, source: Source, plan: Plan, data: Data) -> tuple[Source, Plan, Outcome]:
        """By the loop over blocks; what was compressed, which is a smaller model where the recipe prunes, and the plan,
        with ranks or sparsities if those were to be shared out first."""
        parts = [self.recipe.to_yaml(), source.checkpoint.fingerprint(), data.fingerprint, version("llmcomp")]
        if self.device.type != "cpu":  # sums in another order are other bits
            parts.append(describe(self.device))
        if self.world.size > 1:  # the same here
            parts.append(f"{self.world.size} ranks")
            self._note(f"{self.world.size} processes share the work; memory is of the one that takes most.")
            self._agree(source, data)
        journal = Journal(self.partial, fingerprint(*parts), self.world)
        if journal.discarded:
            self._note(_DISCARDED)
        elif journal.done:
            self._note(f"Resuming: {len(journal.done)} parts of an unfinished run are reused.")
        batches = [call(source.adapter.model, one.input_ids, one.attention_mask, one.context) for one in data.batches]
        partial = self.partial if self.world.first else scratch_of(self.partial, self.world.rank)
        narrowed: cutting.Cut | None = None
        if plan.reduction is not None:
            narrowed = self._cut(source, plan.reduction, cutting.Setting(
                batches, data.witness, partial / "pruned", fingerprint(*parts), self.options.activation_memory,
                self.device, self.options.trust_remote_code, data.labels,
            ))  # fmt: skip
            source = narrowed.source
            plan = replace(plan_rest(self.recipe, source.adapter), reduction=plan.reduction)
        if plan.shared is not None:
            with self._timed(plan.shared):
                memory = self.options.activation_memory
                sharing = Sharing(source, plan, batches, partial, memory, self.device, self.world, self.progress)
                by_ranks = plan.shared == "ranks"
                found: Any = {"ranks": sharing.ranks()} if by_ranks else {"sparsities": sharing.sparsities()}
                plan = replace(plan_rest(self.recipe, source.adapter, **found), reduction=plan.reduction)
        job = Job(
            adapter=source.adapter,
            binding=source.binding,
            assignment=plan.assignment,
            options={} if self.recipe.quantizing is None else self.recipe.quantizing.options,
            pruning={} if self.recipe.sparsifying is None else self.recipe.sparsifying.options,
            factoring={} if self.recipe.factorizing is None else self.recipe.factorizing.options,
            layout=plan.layout,
            ties=plan.ties,
            batches=batches,
            witness=data.witness,
            partial=partial,
            activation_memory=self.options.activation_memory,
            world=self.world,
            seed=self.recipe.seed,
            device=self.device,
        )
        try:
            outcome = Compression(job, journal, self.progress).run()
        finally:
            if not self.world.first:
                clear_scratch(job.partial)
        if narrowed is not None:
            outcome = narrowed.before(outcome)
        self.phases |= outcome.phases
        return source, plan, outcome

    def _cut(self, source: Source, reduction: Reduction, setting: cutting.Setting) -> cutting.Cut:
        """The smaller model that the recipe prunes the source to, and what is gone."""
        narrowed = cutting.cut(source, reduction, setting, self.progress)
        self.removed = narrowed.removed
        for sentence in notes(self.removed, len(source.adapter.blocks)):
            self._note(sentence)
        return narrowed

    def _agree(self, source: Source, data: Data) -> None:
        """Compare what this rank has read with what the first one has."""
        mine = {
            "recipe": self.recipe.to_yaml(),
            "model": source.checkpoint.fingerprint(times=False),
            "calibration data": data.fingerprint,
            "version of llmcomp": version("llmcomp"),
            "kind of device": self.device.type,
        }
        first = json.loads(self.world.message(json.dumps(mine).encode() if self.world.first else None))
        if other := [name for name in mine if mine[name] != first[name]]:
            raise UserError(
                f"Rank {self.world.rank} has another {' and '.join(other)} than rank 0; give all hosts the same "
                f"(here the model is {self.path})."
            )

    def _convert(self, source: Source, plan: Plan, data: Data) -> tuple[Source, Plan, Outcome]:
        """By transformers, from the whole model."""
        self._note("Errors are of the weights alone, ||W - Q||² / ||W||².")
        allow = self.options.allow_pickle
        outcome = Conversion(source, plan, data.witness, self.partial, self.progress, allow_pickle=allow).run()
        self.phases |= outcome.phases
        return source, plan, outcome

    def _assemble(self, source: Source, plan: Plan, outcome: Outcome) -> Path:
        """The future output in the partial directory, all but the report."""
        model: Any = source.adapter.model
        config = checkpoint_config(
            source.checkpoint.config,
            source.adapter.architecture,
            dtype_name(model.dtype),
            plan.layout.config(model),
            plan.untied,
        )
        files = source.checkpoint.copied_files()
        extra = {RECIPE_NAME: self.recipe.to_yaml()}
        with self._timed("save"):
            writer = ShardWriter(self.partial)
            return writer.finish(outcome.order, config, files, extra, root=source.checkpoint.path)

    def _measure(
        self, report: Report, checkpoint: Path, source: Source, plan: Plan, texts: Texts | Media | None
    ) -> None:
        """Before and after with the same code; what cannot be measured does not cost the user the checkpoint."""
        if texts is None:
            what = MEDIA[source.adapter.task]
            self._note(f"Not evaluated: the model reads {what}, of which none come with llmcomp; give --eval-data.")
            return
        with self._timed("evaluate"):
            try:
                found = evaluate_model(
                    checkpoint,
                    against=self.path,
                    data=texts,
                    role=_role_of(source, plan),
                    progress=self.progress,
                    streamer=open_streamed,
                    allow_pickle=self.options.allow_pickle,
                )
            except LlmcompError as error:
                self._note(f"Not evaluated: {error}")
                return
        report.before, report.after, report.divergence = found.before, found.after, found.divergence
        for note in found.notes:
            self._note(note)

    def _evaluation_data(self, task: str) -> Texts | Media | None:
        """What to measure on, read before the work so that a wrong name is said at once."""
        options = self.options
        if not options.evaluate or not self.world.first or (task in MEDIA and options.eval_data is None):
            return None
        source = options.eval_data or (self.model if self.model.startswith("sample:") else "default")
        return evaluation_data(
            task, source, text_column=options.text_column, label_column=options.label_column, progress=self.progress
        )

    # --- the report ---

    def _report(self, source: Source, plan: Plan, data: Data, outcome: Outcome, peak: int) -> Report:
        adapter = source.adapter
        fallbacks = sum(layer.fallback is not None for layer in outcome.layers)
        if fallbacks:
            self._note(f"{fallbacks} of {len(outcome.layers)} weights fell back; the layer table says why.")
        said = [layer.scaling for layer in outcome.layers if layer.scaling is not None]
        if said:
            scaled = sum(one.startswith("inputs scaled") for one in said)
            self._note(
                f"{scaled} of {len(said)} weights read scaled inputs; the page's layer table says what takes the "
                "scales over, and why the others have none."
            )
        learned = {layer.block: layer for layer in outcome.layers if layer.block_error_start and layer.block_error}
        if learned:
            gains = [(one.block_error or 0) / (one.block_error_start or 1) for one in learned.values()]
            self._note(
                f"Learned rounding: the error of {len(gains)} blocks' outputs became {min(gains):.2f} to "
                f"{max(gains):.2f} of what it was at the start."
            )
        if self.recipe.quantizing is not None and self.recipe.quantizing.method == "auto":
            taken = dict.fromkeys(layer.method for layer in outcome.layers)
            self._note(f"auto took {', '.join(taken)}.")
        if plan.assignment.calibrated and not adapter.stages_known:
            why = f"the model's forward could not be traced, {adapter.trace_problem}"
            self._note(f"Each weight was calibrated alone, whatever shares its input: {why}.")
        self.notes += plan.layout.notes
        if plan.untied:
            self._note("The head no longer shares the embeddings' storage; its bytes are counted.")
        if outcome.spilled:
            self.notes.append(f"{outcome.spilled / 1e6:,.0f} MB of waiting activations went to mapped files.")
        return Report(
            command=self.recipe.steps[0].kind if len(self.recipe.steps) == 1 else "compress",
            model=self.model,
            source=str(self.path if Path(self.source_name).exists() else self.source_name),
            output=str(self.output),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=this_machine(describe(self.device)),
            architecture=adapter.architecture,
            task=adapter.task,
            recipe=yaml.safe_load(self.recipe.to_yaml()),
            format=self.recipe.format,
            calibration=data.facts,
            layers=outcome.layers,
            left=left_alone(source, plan),
            removed=self.removed,
            size_before=size_of(self.path, _role_of(source, plan), allow_pickle=self.options.allow_pickle),
            peak_memory=peak,
            resumed_blocks=outcome.resumed,
            origin=origin_of(self.path),
            llmcomp_version=version("llmcomp"),
        )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.progress.note(text)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - began


def default_output(model: str, *steps: str) -> Path:
    """`./<model>-<step>`, such as 'm-gptq-w4', from a directory, a Hub id or a 'sample:' name.

    Args:
        steps: what was done, as `llmcomp.recipe` sums steps up.
    """
    stem = model.rstrip("/\\").replace(":", "-").replace("\\", "/").split("/")[-1]
    if stem in ("", ".", ".."):
        stem = Path(model).resolve().name or "model"
    return Path("-".join([stem, *steps]))


def _role_of(source: Source, plan: Plan) -> Any:
    """Tensor name → role, by the module it belongs to; of all that was there where the plan prunes."""
    adapter = source.adapter if plan.reduction is None else plan.reduction.source
    roles = {ref.name: ref.role for ref in adapter.refs}

    def role(name: str) -> str:
        module = name.rpartition(".")[0]
        return roles.get(module) or roles.get(module.rpartition(".")[0], "other")  # a factor is a module in a linear

    return role


def left_alone(source: Source, plan: Plan) -> list[Left]:
    """What was not compressed, or not stored so, with its bytes; what shares another's storage has none."""
    state = source.adapter.model.state_dict()
    found = []
    for name, reason in plan.assignment.left.items():
        tensor = None if f"{name}.weight" in plan.ties else state.get(f"{name}.weight", state.get(name))
        found.append(Left(name, reason, 0 if tensor is None else tensor.numel() * tensor.element_size()))
    return found
