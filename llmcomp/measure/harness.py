"""Tasks of EleutherAI's lm-evaluation-harness as an extra (`pip install llmcomp[lm-eval]`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from llmcomp.errors import BadData, RunError, UserError
from llmcomp.report.schema import Interval


def require(task: str = "causal-lm") -> None:
    """Say at once, not after everything else has been measured, that the harness cannot be used.

    Raises:
        BadData: a model of another task than the harness measures.
        UserError: lm-eval is not installed.
    """
    if task != "causal-lm":
        raise BadData(f"--lm-eval measures causal language models; this model's task is {task}.")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--lm-eval needs the lm-eval package ({error}); install it with: pip install llmcomp[lm-eval]"
        ) from error


def run(model: nn.Module, tokenizer: Any, tasks: Sequence[str], seed: int = 0) -> dict[str, Interval]:
    """Run tasks on a loaded causal language model.

    Args:
        tasks: names of the harness' own tasks, or paths of YAML task files (no network if data are local).

    Returns:
        'lm-eval:<task>/<metric>' → value with the 95% interval of the harness' standard error (the value
        itself where it gives none).

    Raises:
        UserError: lm-eval is not installed.
        BadData: an unknown task, or a task file that cannot be read.
        RunError: the harness failed.
    """
    require()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(
        include_path=[str(file.resolve().parent) for file in files] or None,
        include_defaults=len(files) < len(tasks),
    )
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise BadData(f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them.")
    try:
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=names,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RunError(
            f"lm-eval failed on {', '.join(names)}: {' '.join(str(error).split())[:300]}"
        ) from error
    return intervals(results["results"])


def intervals(results: dict[str, dict[str, Any]]) -> dict[str, Interval]:
    """The harness' table {task: {'acc,none': value, 'acc_stderr,none': error}} as intervals of ±1.96 e."""
    found: dict[str, Interval] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            error = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else 0.0
            name = f"lm-eval:{task}/{metric}" + ("" if filtered == "none" else f",{filtered}")
            found[name] = Interval(float(value), value - 1.96 * error, value + 1.96 * error)
    return found


def _task_name(file: Path) -> str:
    """The `task:` of a task file. Its YAML may carry the harness' own tags, which are passed over."""
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadData(
            f"The lm-eval task file {file} cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == "task":
            return str(value.value)
    raise BadData(f"{file} names no 'task'; expected a YAML task file of lm-eval.")
