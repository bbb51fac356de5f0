"""The Python API: what the CLI and scripts call.

    import llmcomp
    result = llmcomp.quantize("sample:lm", bits=4)
    result.report.divergence.kl_mean.value
    model = llmcomp.load(result.output)
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcomp.progress import Progress, Silent
from llmcomp.ranks import joined
from llmcomp.recipe import Calibration, FactorizeStep, PruneStep, Recipe, SparsifyStep, check, step_of
from llmcomp.run_options import CompressResult, ExportResult, RunOptions

if TYPE_CHECKING:
    from llmcomp.measure.bench import Benchmark
    from llmcomp.measure.bench import Settings as BenchSettings
    from llmcomp.measure.run import Evaluation, Settings


def quantize(
    model: str,
    *,
    bits: int | None = None,
    group_size: int | str | None = None,
    method: str | None = None,
    symmetric: bool = True,
    activations: str | None = None,
    calibration: str = "default",
    format: str = "compressed-tensors",
    recipe: Recipe | None = None,
    options: RunOptions = RunOptions(),
    progress: Progress | None = None,
    **run: Any,
) -> CompressResult:
    """Quantize a model's weights, verify the checkpoint, and measure what it cost.

    In a process that torchrun or `accelerate launch --multi_gpu` started, all ranks call this and compress together;
    all get the result, the first one writes it.

    Args:
        model: a local directory, a Hub id, an alias or a 'sample:' name.
        bits, group_size, method, symmetric, activations, calibration, format: sugar for a recipe of one step. None is
            what the format fixes, else 4 bits (with activations 8), the default groups, 'gptq'.
        recipe: the whole recipe instead; the six above are then ignored.
        options: how to run; `run` overrides single fields, as in `quantize("bert-base", overwrite=True)`.
        progress: hears where the run stands.

    Raises:
        UserError: what was asked cannot be (exit status 2).
        RunError: something failed on the way; no output appears (exit status 1). Of several ranks, all fail.
    """
    if recipe is None:
        given = {"bits": bits, "group_size": group_size, "method": method, "activations": activations}
        step = step_of(format, symmetric=symmetric, **{k: v for k, v in given.items() if v is not None})
        recipe = Recipe((step,), Calibration(calibration), format=format)
    return compress(model, recipe, options=options, progress=progress, **run)


def prune(
    model: str,
    *,
    heads: float | None = None,
    mlp: float | None = None,
    layers: int | None = None,
    method: str = "activation",
    calibration: str = "default",
    options: RunOptions = RunOptions(),
    progress: Progress | None = None,
    **run: Any,
) -> CompressResult:
    """Take attention heads, neurons and blocks out of a model, verify the checkpoint, and measure what it cost.

    What comes out is a smaller model of the same kind, which plain transformers opens.

    Args:
        model: a local directory, a Hub id, an alias or a 'sample:' name.
        heads: share of the attention heads that go, in groups that share keys and values.
        mlp: share of the MLPs' neurons that go. layers: how many blocks go.
        method: 'activation', what costs least of what calibration reads, made up for by what stays; 'taylor', what
            changes the loss least, of a classifier by the labels of `calibration`; or 'magnitude'.
        calibration, options, progress, run: as `quantize`.

    Raises:
        UserError, RunError: as `quantize`.
    """
    recipe = Recipe((PruneStep(method, heads, mlp, layers),), Calibration(calibration), format="dense")
    return compress(model, recipe, options=options, progress=progress, **run)


def sparsify(
    model: str,
    *,
    pattern: str = "2:4",
    sparsity: float | None = None,
    method: str = "sparsegpt",
    allocate: bool = False,
    update: bool = False,
    calibration: str = "default",
    format: str = "dense",
    options: RunOptions = RunOptions(),
    progress: Progress | None = None,
    **run: Any,
) -> CompressResult:
    """Set weights of a model to zero, verify the checkpoint, and measure what it cost.

    Args:
        model: a local directory, a Hub id, an alias or a 'sample:' name.
        pattern: '2:4', '4:8', any 'N:M' (N of every M consecutive inputs are kept), or 'unstructured'.
        sparsity: share that an unstructured pattern removes; a half where none is given.
        method: a name in `llmcomp.methods.SPARSE`.
        allocate: `sparsity` is of all matrices together, and more is removed where it costs less.
        update: what is left aims at the source's outputs on what the compressed blocks before it give.
        calibration, options, progress, run: as `quantize`.
        format: 'dense' stores zeros like any weight, so nothing is smaller; 'llmcomp' what N:M keeps and its places.

    Raises:
        UserError, RunError: as `quantize`.
    """
    step = SparsifyStep(method, pattern, sparsity, allocate=allocate, update=update)
    recipe = Recipe((step,), Calibration(calibration), format=format)
    return compress(model, recipe, options=options, progress=progress, **run)


def factorize(
    model: str,
    *,
    ratio: float | None = None,
    rank: int | None = None,
    method: str = "svd-llm",
    ranks: str = "uniform",
    targets: tuple[str, ...] = ("attention", "mlp"),
    calibration: str = "default",
    format: str = "llmcomp",
    options: RunOptions = RunOptions(),
    progress: Progress | None = None,
    **run: Any,
) -> CompressResult:
    """Put two thin factors in the place of a model's matrices, verify the checkpoint, and measure what it cost.

    Args:
        model: a local directory, a Hub id, an alias or a 'sample:' name.
        ratio: share of the matrices' bytes that is kept, 0.8 where no rank is given either.
        rank: of every matrix, instead of a ratio.
        method: a name in `llmcomp.methods.LOW_RANK`; factors of 'svd-llm' are updated.
        ranks: 'uniform', the ratio holds for each matrix, or 'balanced', for all of them together.
        targets: roles, ranges of blocks, patterns or names, as in a recipe.
        calibration, options, progress, run: as `quantize`.
        format: 'llmcomp' holds the factors; 'dense' their product, as large as before.

    Raises:
        UserError, RunError: as `quantize`.
    """
    step = FactorizeStep(method, ratio, rank, ranks, targets=tuple(targets))
    recipe = Recipe((step,), Calibration(calibration), format=format)
    return compress(model, recipe, options=options, progress=progress, **run)


def compress(
    model: str,
    recipe: Recipe,
    *,
    options: RunOptions = RunOptions(),
    progress: Progress | None = None,
    **run: Any,
) -> CompressResult:
    """Compress a model by a recipe, of several steps in one pass, verify the checkpoint, and measure what it cost.

    Args:
        model, options, progress, run: as `quantize`.

    Raises:
        UserError, RunError: as `quantize`.
    """
    from llmcomp import hub

    # Large tensors on huge pages, where Linux has them on request: half the time in page faults. torch reads
    # this at its first allocation, so it has an effect only where torch has not been used before.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    progress = progress or Silent()
    check(recipe)
    options = replace(options, **run)
    with joined() as world:
        resolved = hub.resolve(
            model, revision=options.revision, allow_pickle=options.allow_pickle,
            trust_remote_code=options.trust_remote_code, progress=progress if world.first else Silent(),
        )  # fmt: skip
        from llmcomp.session import Session

        session = Session(model, resolved.source, resolved.path, recipe, options, progress, world)
        return CompressResult(*session.run())


def evaluate(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    data: Any | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a checkpoint, side by side with `against` where that is given.

    Args:
        directory, against: local directories, Hub ids, aliases or 'sample:' names.
        data: `llmcomp.calibration.data.Texts`; None for held-out text (see `llmcomp evaluate --help`).
        settings: how much is measured.

    Raises:
        UserError, RunError: as `llmcomp.measure.run.evaluate_model`.
    """
    from llmcomp import hub

    path = hub.resolve(str(directory), progress=progress).path
    other = None if against is None else hub.resolve(str(against), progress=progress).path
    from llmcomp.measure.run import evaluate_model
    from llmcomp.pipeline.streaming import open_streamed

    return evaluate_model(
        path, against=other, data=data, settings=settings, progress=progress, streamer=open_streamed
    )


def bench(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    settings: BenchSettings | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure how fast a checkpoint runs and what it takes in memory, round by round beside `against` where given.

    Args:
        directory, against: local directories, Hub ids, aliases or 'sample:' names.
        settings: `llmcomp.measure.bench.Settings`; None measures with all cores.

    Raises:
        UserError, RunError: as `llmcomp.measure.bench.bench`.
    """
    from llmcomp import hub

    path = hub.resolve(str(directory), progress=progress).path
    other = None if against is None else hub.resolve(str(against), progress=progress).path
    from llmcomp.measure.bench import Settings, bench

    return bench(path, against=other, settings=settings or Settings(), progress=progress)


def load(directory: str | Path, *, progress: Progress | None = None, adapter: bool = True) -> Any:
    """The transformers model in a directory (or behind a name), in eval mode, its weights packed where they lie so:
    in llmcomp's own layout, and in compressed-tensors' for integers, whichever tool wrote it. What else plain
    transformers opens is loaded as it does.

    Args:
        adapter: with the adapter that `llmcomp recover` has left beside packed weights, where there is one.

    Raises:
        ModelNotFound: nothing there.
        BadCheckpoint: transformers cannot load it, or would have to make up weights.
    """
    from llmcomp import hub

    path = hub.resolve(str(directory), progress=progress).path
    from llmcomp.loading import load_packed

    return load_packed(path, progress, adapter)


def export(
    directory: str | Path,
    output: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a checkpoint anew in another format, from its integers and scales, without the model it was made of.

    Args:
        directory: a local directory, Hub id, alias or 'sample:' name.
        output: the directory to be made.
        format: one of `llmcomp.exports.EXPORTS`.

    Raises:
        UserError: a format that there is not or that cannot represent something; an output that is there already.
        RunError: what was written is not what was read; nothing appears.
    """
    from llmcomp import hub

    path = hub.resolve(str(directory), progress=progress).path
    from llmcomp.exports.run import export_to

    return ExportResult(Path(output), export_to(path, Path(output), format, overwrite, progress or Silent()))
