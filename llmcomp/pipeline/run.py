"""The loop: block by block from the source's files to shards, the compressed block feeding the next.

    read block → (inputs of a stage → statistics → method → compressed weights in place)* → shard, digests

Memory holds one block, the statistics of one stage and what the lanes carry. Source weights are mapped from
their files. No method, format or family is named here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from llmcomp.adapters.base import Block, LinearRef
from llmcomp.calibration.capture import Lane, Stop, advance_all, stopping
from llmcomp.calibration.parking import Parking
from llmcomp.calibration.stats import GramAccumulator
from llmcomp.devices import computing_on
from llmcomp.errors import RunError
from llmcomp.formats import witness
from llmcomp.formats.save import ShardWriter, writing
from llmcomp.pipeline.assign import Task
from llmcomp.pipeline.beside import Beside
from llmcomp.pipeline.earlier import earlier_shard
from llmcomp.pipeline.job import Job, Outcome
from llmcomp.pipeline.journal import Journal
from llmcomp.pipeline.memory import keep_large_blocks_apart, return_freed_memory, reusing_large_blocks
from llmcomp.pipeline.ranges import Ranges
from llmcomp.pipeline.residency import Residency
from llmcomp.pipeline.scaling import Scaled, Scaling
from llmcomp.pipeline.solve import layer_report, solve_stage
from llmcomp.pipeline.solved import Finished, Solved
from llmcomp.pipeline.surveying import survey
from llmcomp.pipeline.tuning import Tuning
from llmcomp.progress import Progress
from llmcomp.weights import INPUT_SCALE

_HOLES = 8 * 2**20  # bytes that went to files and left holes in the heap, too scattered to be filled again


class Compression:
    """One run of the loop. Shards, digests and the witness lie in `job.partial` after `run`."""

    def __init__(self, job: Job, journal: Journal, progress: Progress) -> None:
        self._job, self._journal, self._progress = job, journal, progress
        self._writer = ShardWriter(job.partial)
        self._evidence = job.partial / "witness"
        self._params = Residency(job.adapter, job.binding, job.device)
        self._outcome = Outcome(phases=dict.fromkeys(("read", "forward", "solve", "save"), 0.0))
        spill = job.partial / "activations"
        spill.mkdir(parents=True, exist_ok=True)
        self._parking = Parking(spill, job.activation_memory, job.device)
        self._trimmed = 0  # of `spilled`, when the heap last gave its free pages back
        self._world = job.world
        self._scaling = Scaling(
            job.adapter, job.assignment.tasks, self._params, job.options, job.partial, job.world
        )
        self._ranges = Ranges(job.assignment.tasks)
        self._tuning = Tuning(
            job.adapter, job.assignment.tasks, self._params, job.options, job.seed, self._parking, job.world
        )
        self._tuning.leave_out(block.name for block in job.adapter.blocks if _key(block) in journal.done)
        self._done: dict[str, Finished] = {}  # linears of the present block
        self._pending: dict[str, Task] = {}
        # Blocks that run several times are looked at from the model's start, which then has to stay.
        self._keeps_all = any(block.applications > 1 for block in job.adapter.blocks)
        self._remaining = set(job.assignment.tasks) if job.assignment.calibrated else set()
        model, calibration = job.adapter.model, job.batches if job.assignment.calibrated else ()
        self._lanes = [Lane(model, batch, device=job.device) for batch in calibration]
        self._beside = Beside(model, job.assignment.tasks, calibration, self._params, self._parking)
        self._beside.pair(self._lanes)
        self._lanes.append(Lane(model, job.witness, counted=False, device=job.device))

    def run(self) -> Outcome:
        """Compress, write and gather evidence.

        Raises:
            NumericalError: NaN or Inf in weights or activations.
            RunError: a block that could not be run, or a full disk.
            UserError: a directory that cannot be written to.
        """
        keep_large_blocks_apart()
        adapter, model, tasks = self._job.adapter, self._job.adapter.model, self._job.assignment.tasks
        self._progress.phase("compress", len(adapter.blocks))
        linears = {name: model.get_submodule(name) for name in tasks}
        blocks = {block.name: model.get_submodule(block.name) for block in adapter.blocks}
        try:
            with (
                writing(self._job.partial),
                computing_on(self._job.device),
                stopping(model, blocks, linears, self._pending.__contains__, self._tuning.awaits),
                self._scaling.dividing(linears),
                # After statistics were taken, and after the division: the order in which a reader has them.
                self._ranges.rounding(linears),
            ):
                self._begin()
                reached = self._advance()
                for block in adapter.blocks:
                    further = block is not adapter.blocks[-1]
                    if reached is None or reached.name != block.name:
                        place = reached.name if reached else "the end"
                        raise RunError(f"The model's forward reached {place} instead of {block.name}.")
                    reached = self._block(block, further)
                    self._progress.step()
                self._end()
        finally:
            for lane in self._lanes:
                lane.close()
            self._beside.close()
        self._outcome.spilled = self._parking.spilled
        return self._outcome

    # --- the parts of the model, in the order of computation ---

    def _begin(self) -> None:
        """Read what lies outside of the blocks; compress the embeddings, if they are to be."""
        self._params.settle()
        self._read(self._params.outside)
        embeddings, tasks = self._job.adapter.embeddings, self._job.assignment.tasks
        if embeddings is None or embeddings.name not in tasks:
            return
        key = "embeddings"
        if key in self._journal.done:
            self._restore(key, (embeddings,))
        else:
            self._solve((embeddings,), None)
            self._write(key, [f"{embeddings.name}.weight"])

    def _block(self, block: Block, further: bool) -> Stop | None:
        """Compress one block, or take it from an earlier run; where the lanes stop next, if they go further."""
        key, names = _key(block), self._params.inside(block.name)
        self._read(names)
        if self._tuning.follows(block.name):
            with self._timed("forward"):
                self._tuning.remember(block)
        if key in self._journal.done:
            self._restore(key, block.linears)
            self._scaling.restore(key, block)
            self._outcome.resumed += 1
        else:
            if block.applications > 1 and self._job.assignment.calibrated:
                self._survey(block)
            elif self._tuning.awaits(block.name):
                self._tuned(block)
            else:
                self._stages(block.stages, block.lasting)
            self._write(key, names, self._scaling.finish(key, block))
        for _ in range(block.applications - 1):
            self._advance()
        reached = self._advance() if further else None
        if further:
            self._release(names)
        self._job.binding.checkpoint.release()
        return_freed_memory()
        return reached

    def _stages(self, stages: Sequence[Sequence[LinearRef]], lasting: frozenset[str] = frozenset()) -> None:
        """Solve stages as the lanes reach them (all at once where no method reads statistics).

        Args:
            lasting: linears that lanes still compute with when they have reached the next stage.
        """
        tasks, wanted = self._job.assignment.tasks, self._wanted(stages)
        if not self._job.assignment.calibrated:
            for stage in filter(None, wanted):
                self._solve(stage, None)
            return
        self._pending.update({ref.name: tasks[ref.name] for stage in wanted for ref in stage})
        latest: list[str] = []
        while self._pending:
            accumulator = GramAccumulator()
            reached = self._advance(accumulator, wanted)
            # Every lane has computed with what was solved last; the file keeps it, memory need not.
            self._release([f"{name}.weight" for name in latest if name not in lasting])
            if reached is None or reached.name not in self._pending:
                raise self._unseen()
            stage = next(refs for refs in wanted if any(ref.name == reached.name for ref in refs))
            refs = [ref for ref in stage if ref.name in self._pending]
            latest = [ref.name for ref in refs]
            self._solve(refs, accumulator)

    def _tuned(self, block: Block) -> None:
        """Solve stage by stage, then tune the block as a whole; lanes compute it again when they go on."""
        self._stages(block.stages, frozenset(ref.name for ref in block.linears))
        self._advance()
        with self._timed("solve"):
            tuned = self._tuning.finish(block)
        with self._timed("save"):
            for done in tuned:
                self._finish(done, None)

    def _survey(self, block: Block) -> None:
        """Solve a block that runs several times in a row, by what it reads in all of its runs.

        A stage cannot be solved before the last run has been seen, and that comes after all the others'
        stages. So other lanes go through the block first, uncompressed; they start where the model does.
        """
        wanted = [stage for stage in self._wanted(block.stages) if stage]
        found = {stage[0].name: GramAccumulator() for stage in wanted}
        self._pending.update({name: self._job.assignment.tasks[name] for name in found})
        with self._timed("forward"):
            whole = survey(self._job.adapter.model, self._job.batches, self._job.device, found, block.applications)
        if not whole:
            raise self._unseen()
        for stage in wanted:
            self._solve(stage, found.pop(stage[0].name))

    def _wanted(self, stages: Sequence[Sequence[LinearRef]]) -> list[list[LinearRef]]:
        """Of each stage, the linears that are to be compressed."""
        return [[ref for ref in stage if ref.name in self._job.assignment.tasks] for stage in stages]

    def _unseen(self) -> RunError:
        unseen = next(iter(self._pending))
        return RunError(
            f"{unseen} was never computed in the calibration run ({len(self._pending)} such); "
            "leave it out of the recipe by an override with 'skip: true'."
        )

    def _release(self, names: Sequence[str]) -> None:
        """Forget values that no lane will compute with again."""
        if not self._keeps_all:
            self._params.release(names)
            self._beside.forget(names)

    def _end(self) -> None:
        """Compress the head, if it is to be; run the witness to its output; write the rest."""
        head, tasks = self._job.adapter.head, self._job.assignment.tasks
        if head is not None and head.name in tasks:
            if "head" in self._journal.done:
                self._restore("head", (head,))
            else:
                self._stages(((head,),))
                self._write("head", [f"{head.name}.weight"])
        for lane in self._lanes[:-1]:
            lane.close()
        if not self._world.first:
            return
        last = self._lanes[-1]
        with self._timed("forward"):
            while last.output is None:
                self._parking.fetch(last.waiting())
                if last.advance() is None:
                    break
        written = {f"{ref.name}.weight" for ref in (self._job.adapter.embeddings, head) if ref and ref.name in tasks}
        self._write("outside", [name for name in self._params.outside if name not in written])
        layout = self._job.layout
        packed = {name: task.label for name, task in tasks.items() if name not in layout.dense}
        witness.save(
            self._evidence,
            compressed=packed if layout.config(self._job.adapter.model) else {},
            source=self._outcome.source,
            inputs=self._job.witness,
            output=witness.model_output(last.output),
        )

    # --- what is done to a part ---

    def _read(self, names: Sequence[str]) -> None:
        with self._timed("read"):
            self._params.read(names)
        for name in names:
            value = self._params.value(name)
            self._outcome.source[name] = (tuple(value.shape), witness.dtype_name(value.dtype))

    def _advance(
        self, accumulator: GramAccumulator | None = None, stages: Sequence[Sequence[LinearRef]] = ()
    ) -> Stop | None:
        """Move all lanes to their next stop, gathering statistics and parking what they wait with. stages: among which
        the stop will be."""
        if not self._remaining:
            # Nothing more is asked of calibration; its logits alone would be the largest tensors of the run.
            for lane in self._lanes[:-1]:
                lane.close()
            del self._lanes[:-1]
            self._beside.close()

        def visit(lane: Lane, stop: Stop) -> None:
            if stop.inputs is None:
                return
            if accumulator is not None and stop.kind == "linear" and lane.counted:
                with reusing_large_blocks(give_back=False):
                    accumulator.add(lane.tokens(stop.inputs))
            self._tuning.note(lane, stop)
            self._beside.note(lane, stop)
            self._parking.park(lane.held())
            if self._parking.holed - self._trimmed > _HOLES:
                return_freed_memory()
                self._trimmed = self._parking.holed

        with self._timed("forward"):
            reached = advance_all(self._lanes, visit, lambda lane: self._parking.fetch(lane.waiting()))
            self._beside.advance(reached, stages)
            return_freed_memory()  # else the heap keeps what the lanes have let go, beside what comes next
        return reached

    def _solve(self, refs: Sequence[LinearRef], accumulator: GramAccumulator | None) -> None:
        """Compress linears of one input and put the result where the lanes will compute with it."""
        with self._timed("solve"):
            tasks = [self._job.assignment.tasks[ref.name] for ref in refs]
            weights = [self._params.weight(ref) for ref in refs]
            sources = dict(zip((ref.name for ref in refs), weights, strict=True))
            stats = None if accumulator is None else accumulator.finish(refs[0].name, self._world)
            beside = self._beside.finish(refs[0].name, self._world)
            scaled = self._scaling.choose(refs, weights, stats, {name: one.tensors for name, one in self._done.items()})
            if isinstance(scaled, Scaled) and stats is not None:
                weights = [(weight * scaled.factor).to(weight.dtype) for weight in weights]
                stats.scale_(scaled.factor)
            self._ranges.find(refs, stats, weights[0])
            job = self._job
            solved = solve_stage(tasks, weights, stats, job.options, self._world, job.pruning, job.factoring, beside)
            del weights, stats, beside
        with self._timed("save"):
            while solved:
                done = solved.pop(0)
                learns = self._tuning.start(done, sources.pop(done.task.ref.name))
                self._finish(done, scaled.about if isinstance(scaled, Scaled) else scaled, final=not learns)
            if isinstance(scaled, Scaled):
                self._take_over(refs, scaled)
            return_freed_memory()

    def _finish(self, done: Solved, about: str | None, final: bool = True) -> None:
        """Put a compressed weight where lanes compute with it; keep what the file will hold, if it is `final`."""
        ref, weight = done.task.ref, self._ranges.ranged(done.task.ref, done.solution.weight)
        name = f"{ref.name}.weight"
        itemsize = self._params.value(name).element_size()
        self._beside.keep(name)
        self._params.install(ref, weight.dense())
        self._pending.pop(ref.name, None)
        if not final:
            return
        tensors = self._job.layout.tensors(ref, weight)
        layer = layer_report(done, self._job.layout, itemsize, about)
        self._done[ref.name] = Finished(name, witness.digest(self._params.value(name)), tensors, layer)
        self._remaining.discard(ref.name)
        self._progress.layer(layer)

    def _take_over(self, refs: Sequence[LinearRef], scaled: Scaled) -> None:
        """Let the lanes divide what these linears read, and the file hold what divides it there."""
        self._scaling.use(refs, scaled)
        if scaled.producer is not None:
            done = self._done[scaled.producer]
            decoded = self._job.layout.decode(self._job.adapter.ref(scaled.producer), scaled.tensors)
            self._done[scaled.producer] = replace(done, tensors=scaled.tensors, digest=witness.digest(decoded))

    def _write(self, key: str, names: Sequence[str], instead: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """One shard: what was compressed since the last one, and of `names` what is not; `instead`: values that
        differ in the file from those in memory."""
        with self._timed("save"):
            finished, self._done = list(self._done.values()), {}
            packed = {done.name for done in finished}
            values = {name: self._params.value(name) for name in names if name not in packed} | {**instead}
            tensors = {name: value for name, value in values.items() if name not in self._job.ties}
            for done in finished:
                tensors |= done.tensors
                values |= {name: one for name, one in done.tensors.items() if name.endswith(f".{INPUT_SCALE}")}
            rename = self._job.binding.file_name
            layers = [done.layer for done in finished]
            if self._world.first:
                shard = self._writer.write(key, {rename(name): tensor for name, tensor in tensors.items()})
                witness.record(self._evidence, key, values, {done.name: done.digest for done in finished})
                self._journal.add(key, shard, layers)
        self._outcome.layers += layers
        self._outcome.order.append(key)

    def _restore(self, key: str, refs: Sequence[LinearRef]) -> None:
        """Take compressed weights from the shard of an earlier run, decoded as a reader would."""
        path, layout, rename = self._writer.path(key), self._job.layout, self._job.binding.file_name
        with self._timed("read"), earlier_shard(path, layout, rename, self._world) as shard:
            for ref in (ref for ref in refs if ref.name in self._job.assignment.tasks):
                weight = f"{ref.name}.weight"
                # Ranks tell each other what a file holds from one CPU to the other.
                room = torch.empty_like(self._params.value(weight), device="cpu")
                self._beside.keep(weight)
                self._params.put(weight, shard.decoded(ref, room))
                self._ranges.restore(ref, lambda name: shard.tensor(name).to(self._job.device))
                self._remaining.discard(ref.name)
        self._outcome.layers += self._journal.done[key].layers
        self._outcome.order.append(key)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with torch.no_grad():
                yield
        finally:
            self._outcome.phases[phase] += time.perf_counter() - began


def _key(block: Block) -> str:
    """What a block's shard is called."""
    return f"block-{block.index:05d}"
