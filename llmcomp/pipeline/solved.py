"""A solved task; and the settings of the method that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmcomp.building import build
from llmcomp.formats import witness
from llmcomp.methods import METHODS
from llmcomp.methods.solution import Solution
from llmcomp.pipeline.assign import Task
from llmcomp.report.schema import LayerReport


@dataclass(frozen=True)
class Solved:
    """A task, its solution and its share of the time in seconds. `learned`: the error of the block's output before
    and after its weights were tuned together, of the output's energy; None where they were not."""

    task: Task
    solution: Solution
    seconds: float
    learned: tuple[float, float] | None = None


@dataclass(frozen=True)
class Finished:
    """A compressed weight as it will lie in the file: its parameter's name, digest, tensors and report."""

    name: str
    digest: witness.Digest
    tensors: dict[str, Tensor]
    layer: LayerReport


def method_config(method: str, options: Mapping[str, Any]) -> Any:
    """The method's own config from a recipe's options.

    Raises:
        BadRecipe: an option that the method does not have.
    """
    return build(METHODS[method].config, dict(options), f"options of {method}")


def method_has(method: str, options: Mapping[str, Any]) -> bool:
    """Whether the options are this method's: those of a step's main method do not reach an override's."""
    return set(options) <= set(METHODS[method].config.__dataclass_fields__)
