"""Masks that change while the Trainer trains: callbacks of its loop, and the rounds of a lottery ticket around it."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from llmcomp.patterns import Pattern
from llmcomp.ranks import ALONE, World
from llmcomp.training.pruning import (
    Span,
    above,
    learned_scores,
    magnitudes,
    mask_buffers,
    masks_of,
    penalty,
    ticket_sparsity,
    under_masks,
)
from llmcomp.training.states import STATE, WEIGHTS, held_state, last_whole, restore
from llmcomp.training.trainer import Trained

ROUND, REWIND = "round", "rewind"


class Pruner(TrainerCallback):  # type: ignore[misc]
    """Removes more and more weights of those under masks, after each step that is due.

    A state is saved after the masks have changed, and a state that is read has them, so a resumed run goes on from the
    same ones. Rank 0 chooses: where processors differ, sums do by a bit, and with them a mask.

    Args:
        pattern: of the last masks.
        learned: scores are learned, so that a removed weight may come back; else they are magnitudes, and it may not.
        together: whether the weights of all matrices compete.
    """

    def __init__(
        self, model: nn.Module, pattern: Pattern, span: Span, *, learned: bool, together: bool, world: World = ALONE
    ) -> None:
        self.model, self.pattern, self.span = model, pattern, span
        self.learned, self.together, self.world = learned, together, world

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step == 0:
            self._change(0, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self._change(state.global_step, state.max_steps)

    def _change(self, step: int, total: int) -> None:
        if self.span.due(step, total, after=self.learned):
            self.put(self._masks(self.span.share(step, total, self.pattern.sparsity)))

    def _masks(self, share: float) -> dict[str, Tensor]:
        found = under_masks(self.model)
        held = None if self.learned else {name: under.mask for name, under in found.items()}
        scores = learned_scores(found) if self.learned else magnitudes(found)
        return masks_of(scores, self.pattern, share, held, self.together)

    def put(self, masks: dict[str, Tensor]) -> None:
        """Set masks, on all ranks those of the first."""
        found = under_masks(self.model)
        for name, mask in masks.items():
            found[name].put(self.world.from_first(mask.contiguous()))

    def prune(self, share: float) -> None:
        """Remove up to a share of all, now."""
        self.put(self._masks(share))


class Softly(Pruner):
    """Removes what has σ(S) below a threshold that rises, while a penalty pushes scores down with it: how much is
    removed is learned, too, and may differ between matrices.

    Args:
        threshold: the last one. strength: of the penalty at the end, times the mean of σ(S).
    """

    def __init__(
        self, model: nn.Module, span: Span, *, threshold: float, strength: float, world: World = ALONE
    ) -> None:
        super().__init__(model, Pattern(removed=0.5), span, learned=True, together=False, world=world)
        self.threshold, self.strength = threshold, strength
        self._reached = 0.0  # of the threshold, as a share

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self._reached = self.span.share(state.global_step, state.max_steps, 1.0)
        super().on_train_begin(args, state, control)

    def _change(self, step: int, total: int) -> None:
        self._reached = self.span.share(step, total, 1.0)
        super()._change(step, total)

    def _masks(self, share: float) -> dict[str, Tensor]:
        return above(learned_scores(under_masks(self.model)), self.threshold * self._reached)

    def loss(self) -> Tensor:
        """What is added to the loss of a step."""
        return self.strength * self._reached * penalty(learned_scores(under_masks(self.model)))


class Rewind(TrainerCallback):  # type: ignore[misc]
    """Keeps the state of one step of the first round, to which all later ones go back.

    Args:
        share: of all steps, after which it is; where that is none, the weights that training started from.
        states: folder of the round's states. kept: where it goes.
    """

    def __init__(self, model: nn.Module, share: float, states: Path, kept: Path, *, first: bool) -> None:
        self.model, self.share, self.states, self.kept, self.first = model, share, states, kept, first

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if self.first and int(self.share * state.max_steps) == state.global_step == 0 and not self.kept.exists():
            _keep_start(self.model, self.kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        step = int(self.share * state.max_steps)
        if state.global_step == step:
            control.should_save = True
        if self.first and state.global_step > step and not self.kept.exists():  # all ranks have saved theirs by now
            copy_whole(self.states / f"{STATE}-{step}", self.kept)


def copy_whole(source: Path, target: Path, change: Callable[[Path], None] = lambda folder: None) -> None:
    """Copy a folder, change the copy, and let it appear only then."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    change(temporary)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(target)


def draw_tickets(
    model: nn.Module, pruner: Pruner, rounds: int, rewind: float, folder: Path,
    train_round: Callable[[Path, list[TrainerCallback]], Trained],
) -> list[Trained]:  # fmt: skip
    """Train, remove a share of the lowest magnitudes, go back to the state of an early step, and again
    (arXiv:1803.03635; to an early step instead of the first: arXiv:1912.05671).

    What is gone back to is the state as a whole: weights, moments of the optimizer, schedule, order of the data.

    Args:
        rounds: how often weights are removed, so there is one training more.
        rewind: share of a round's steps after which that state is.
        folder: of all states; a run that was killed goes on in the round that it was in.
        train_round: (folder of its states, callbacks) → what it was, the model then trained.

    Returns:
        What each round was, also of those that an earlier run had done.
    """
    world, kept = pruner.world, folder / REWIND
    number = began = int(world.message(str(_latest(folder)).encode() if world.first else None))
    while True:
        states = folder / f"{ROUND}-{number}"
        if number and last_whole(states) is None:
            restore(model, states / f"{STATE}-0")
        done = train_round(states, [] if number else [Rewind(model, rewind, states, kept, first=world.first)])
        if number != began:  # the state that it began with is not one that a killed run has left
            done = replace(done, resumed=0)
        if world.first:
            _note(folder, number, done)
        if number == rounds:
            break
        number += 1
        pruner.prune(ticket_sparsity(number, rounds, pruner.pattern.sparsity))
        if world.first:
            _start(folder, number, kept, model)
        world.message(b"ready" if world.first else None)
        gc.collect()  # what has wrapped the model in this round is a circle, whose hooks would be the next one's, too
    return _noted(folder, number, done) if world.first else [done]


def _keep_start(model: nn.Module, kept: Path) -> None:
    temporary = kept.with_name(f".{kept.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    save_file(held_state(model), temporary / WEIGHTS)
    temporary.rename(kept)


def _latest(folder: Path) -> int:
    """The round that has begun last."""
    begun = (path.parent.name for path in folder.glob(f"{ROUND}-*/{STATE}-*"))
    return max((int(name.rpartition("-")[2]) for name in begun), default=0)


def _start(folder: Path, number: int, kept: Path, model: nn.Module) -> None:
    """Make the state that a round begins with: the one that is kept, with the masks of now. The former round's go."""

    def under_new_masks(state: Path) -> None:
        masks = {name: mask.detach().cpu().contiguous() for name, mask in mask_buffers(model)}
        save_file({**load_file(state / WEIGHTS), **masks}, state / WEIGHTS)

    written = kept / TRAINER_STATE_NAME
    step = json.loads(written.read_text(encoding="utf-8"))["global_step"] if written.exists() else 0
    copy_whole(kept, folder / f"{ROUND}-{number}" / f"{STATE}-{step}", under_new_masks)
    shutil.rmtree(folder / f"{ROUND}-{number - 1}")


def _note(folder: Path, number: int, done: Trained) -> None:
    (folder / f"{ROUND}-{number}.json").write_text(json.dumps(asdict(done)), encoding="utf-8")


def _noted(folder: Path, rounds: int, last: Trained) -> list[Trained]:
    files = [folder / f"{ROUND}-{number}.json" for number in range(rounds)]
    return [*(Trained(**json.loads(file.read_text(encoding="utf-8"))) for file in files), last]
