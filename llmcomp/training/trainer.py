"""The HF `Trainer` with a loss of our own: what recovery and distillation train with. There is no second loop.

What of the Trainer is replaced: how the loss is computed and what it is divided by (positions of the whole step, of all
processes), what a training checkpoint holds (the weights that are trained, and nothing else, exactly), and that a loss
which is no number ends the run. Accelerate, gradient accumulation, schedules, the states that a killed run resumes from
and trackers are the Trainer's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from llmcomp import losses
from llmcomp.errors import BadData, BadRecipe, NumericalError
from llmcomp.feeds import in_dtype
from llmcomp.matmul import WideProducts, fast_matmul, multiplies
from llmcomp.pipeline.memory import reusing_large_blocks
from llmcomp.progress import Progress
from llmcomp.training import sharding
from llmcomp.training.compression import PowerSgd
from llmcomp.training.course import arguments, history, step_samples
from llmcomp.training.data import Batch, Samples
from llmcomp.training.order import GroupedByLength
from llmcomp.training.settings import Optimization, Teaching
from llmcomp.training.states import (
    WEIGHTS,
    at_its_end,
    held_state,
    last_whole,
    no_better,
    restore,
    step_of,
    trained,
)
from llmcomp.training.trackers import tracker

Teacher = Callable[[Mapping[str, Tensor]], Tensor]  # what the student reads → logits [..., classes]
_BESIDE = ("labels", "scored")  # of a batch what the model does not read


@dataclass(frozen=True)
class Objective:
    """What a student's logits are held against: labels, a teacher, or both, L = (1 - w) hard + w soft.

    Attributes:
        teacher: None for labels alone. temperature, weight: T and w, as `settings.Teaching`.
        regression: labels are numbers, and a teacher's logits are, too.
        labelled: whether there are labels; without them w is 1.
    """

    teacher: Teacher | None = None
    temperature: float = 1.0
    weight: float = 0.5
    regression: bool = False
    labelled: bool = True

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], counts: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            logits: of the student, aligned with the batch's labels.
            counts: [2], labels and scored positions of the whole step that the batch is a part of; None for its own.
        """
        labels, scored = batch["labels"], batch["scored"]
        hard_count, soft_count = (None, None) if counts is None else (counts[0], counts[1])
        hard = losses.scores if self.regression else losses.hard_targets
        if self.teacher is None:
            return hard(logits, labels, hard_count)
        targets = self.teacher({name: value for name, value in batch.items() if name not in _BESIDE})
        if self.regression:
            soft = losses.scores(logits, targets.to(logits.device)[..., 0], soft_count)
        else:
            soft = losses.soft_targets(logits, targets.to(logits.device), scored, self.temperature, soft_count)
        if not self.labelled:
            return soft
        return (1 - self.weight) * hard(logits, labels, hard_count) + self.weight * soft

    def counts(self, batches: list[Batch]) -> Tensor:
        """Labels and scored positions of some batches, [2]."""
        labels = [batch["labels"].isfinite() if self.regression else batch["labels"] != losses.IGNORED
                  for batch in batches]  # fmt: skip
        return torch.stack([torch.stack([one.sum() for one in labels]).sum(),
                            torch.stack([batch["scored"].sum() for batch in batches]).sum()])  # fmt: skip


def frozen(model: nn.Module) -> Teacher:
    """A model as a teacher: in eval mode, without gradients."""
    model.eval().requires_grad_(False)
    if not getattr(model, "is_quantized", False) and slow_products(model):
        model.float()

    def teach(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            device = next(model.parameters()).device
            given = {name: value.to(device) for name, value in inputs.items()}
            logits: Tensor = model(**in_dtype(model, given)).logits
            return logits

    return teach


def slow_products(model: nn.Module) -> bool:
    """Whether it lies on a CPU that has no units for products of its parameters' dtypes."""
    return any(value.device.type == "cpu" and not multiplies(value.dtype) for value in model.parameters())


@dataclass(frozen=True)
class Rules:
    """What else than an objective decides how parameters change.

    Attributes:
        callbacks: of the Trainer's loop. rates: the highest learning rate of parameters that have their own.
        penalty: what is added to the loss of a step, of the parameters alone.
    """

    callbacks: tuple[TrainerCallback, ...] = ()
    rates: Mapping[nn.Parameter, float] = field(default_factory=dict)
    penalty: Callable[[], Tensor] | None = None


class ObjectiveTrainer(Trainer):
    """The Trainer, whose loss is an `Objective`."""

    loss_is_scaled_for_ga = True
    model: nn.Module
    objective: Objective
    shared = False  # whether each process has a part of the model (`sharding`)
    order: GroupedByLength | None = None  # which samples a step reads, where it is not the Trainer's own order

    def __init__(self, *given: Any, objective: Objective, rules: Rules, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.objective, self.rules = objective, rules
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{name: value for name, value in inputs.items() if name not in _BESIDE})
        loss = self.objective.loss(outputs.logits, inputs, num_items_in_batch)
        if num_items_in_batch is not None:  # counts are of all processes, whose gradients are then averaged
            loss = loss * self.accelerator.num_processes
        if self.rules.penalty is not None and model.training:  # of each process the same, in one of the step's forwards
            loss = loss + self.rules.penalty() / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *given: Any) -> Any:
        """With a learning rate of its own, and no decay, for parameters that have one."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*given)
        if made and self.rules.rates:
            for group in optimizer.param_groups:
                group["params"] = [one for one in group["params"] if one not in self.rules.rates]
            for rate in sorted(set(self.rules.rates.values())):
                own = [one for one, its in self.rules.rates.items() if its == rate]
                optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(loss.isfinite()):
            raise NumericalError(self._not_a_number("loss"))
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        counts = self.objective.counts(batch_samples).to(device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    # --- training checkpoints: the trained weights as they are ---

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not (self.args.should_save or self.shared):
            return
        held = held_state(self.model)  # which all processes gather together, where each has a part
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(held, folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shared:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        scheduler: Any = self.lr_scheduler
        held = {OPTIMIZER_NAME: sharding.whole_state(self.optimizer), SCHEDULER_NAME: scheduler.state_dict()}
        if self.args.should_save:
            for name, state in held.items():
                torch.save(state, Path(output_dir) / name)

    def _defer_fsdp_gradient_reduction(self) -> Any:
        return sharding.summed_later(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.shared:
            sharding.share_out(self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        restore(self.model, Path(str(self.state.best_model_checkpoint)))

    def _not_a_number(self, what: str) -> str:
        last = last_whole(Path(str(self.args.output_dir)))
        kept = "none was saved before it" if last is None else f"the state of step {step_of(last)} is kept in {last}"
        return (
            f"The {what} of step {self.state.global_step + 1} is not a finite number; {kept}; take a smaller "
            f"--learning-rate than {self.args.learning_rate:g}."
        )


class Watch(TrainerCallback):  # type: ignore[misc]
    """Says where training stands, refuses gradients that are no numbers, and holds masks.

    Args:
        masks: {parameter: bool of its shape, False for weights that stay zero}.
    """

    def __init__(self, progress: Progress, masks: Mapping[nn.Parameter, Tensor]) -> None:
        self.progress, self.masks = progress, dict(masks)
        self.trainer: ObjectiveTrainer | None = None
        for parameter in masks:  # before they are summed up, clipped and remembered by the optimizer
            parameter.register_hook(lambda gradient, parameter=parameter: gradient * self.masks[parameter])

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.masks = {parameter: mask.to(parameter.device) for parameter, mask in self.masks.items()}
        self.progress.phase("train", state.max_steps)
        self.progress.step(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        assert self.trainer is not None
        for _, parameter in trained(self.trainer.model):
            if parameter.grad is not None and not sharding.finite(parameter.grad):
                raise NumericalError(self.trainer._not_a_number("gradient"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        with torch.no_grad():
            for parameter, mask in self.masks.items():
                parameter.mul_(mask)

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.progress.step()


class Patience(TrainerCallback):  # type: ignore[misc]
    """Ends training after so many evaluations that were no better than the best."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if no_better(state.log_history, self.patience):
            control.should_training_stop = True


@dataclass(frozen=True)
class Trained:
    """What a training was.

    Attributes:
        steps: optimizer steps; resumed: those of an earlier run that was killed.
        parameters: how many numbers were trained.
        history: by step the loss, and the loss on what was held out.
    """

    steps: int
    resumed: int
    parameters: int
    history: list[dict[str, float]]


def train(
    model: nn.Module, samples: Samples, collate: Callable[..., Batch], objective: Objective, settings: Optimization,
    folder: Path, progress: Progress, *, learning_rate: float, masks: Mapping[nn.Parameter, Tensor] | None = None,
    device: str = "cpu", rules: Rules = Rules(),
) -> Trained:  # fmt: skip
    """Train the parameters of a model that ask for gradients, in place; goes on from what a killed run left.

    Args:
        folder: of the states that are saved on the way.
        learning_rate: where the settings name none.
        masks: weights that stay zero, by parameter. rules: see there.

    Raises:
        BadData: no samples.
        NumericalError: a loss or gradient that is not finite, with its step.
    """
    if not len(samples):
        raise BadData("There is nothing to train on: the data gave no sample.")
    held_out = None
    if settings.evaluate_every is not None:
        samples, held_out = samples.held_out()
    set_seed(settings.seed)
    watch = Watch(progress, masks or {})
    callbacks: list[TrainerCallback] = [*rules.callbacks, watch]
    if settings.patience is not None:
        callbacks.append(Patience(settings.patience))
    if settings.track is not None:
        callbacks.append(tracker(settings.track, folder))
    compressed = None if settings.powersgd is None else PowerSgd(settings.powersgd)
    if (shared := sharding.asked()) and (masks or rules != Rules() or compressed is not None):
        what = "gradients are compressed" if compressed is not None else "weights are changed by more than gradients"
        raise BadRecipe(f"FSDP2 does not train where {what}; launch this without FSDP.")
    last = last_whole(folder)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore", FutureWarning)  # of what the Trainer itself asks models for
        stack.enter_context(sharding.by_us() if shared else nullcontext())
        trainer = ObjectiveTrainer(
            model, arguments(settings, len(samples), folder, learning_rate, device), collate, samples, held_out,
            callbacks=callbacks, objective=objective, rules=rules,
        )  # fmt: skip
        watch.trainer = trainer
        if settings.group_by_length:
            trainer.order = GroupedByLength(samples.lengths, step_samples(trainer.args), settings.seed)
        if compressed is not None:
            compressed.join(trainer)
        stack.enter_context(_own_forward(model))
        stack.enter_context(WideProducts() if slow_products(model) else nullcontext())
        stack.enter_context(fast_matmul())
        stack.enter_context(reusing_large_blocks())  # of gradients, made anew each step
        if shared:  # the Trainer then leaves the model's placement and gradients to whoever has sharded it
            stack.enter_context(sharding.sharded(model, device))
            trainer.shared = trainer.is_distributed_loading_by_transformers = True
        if last is None or not at_its_end(trainer, model, last, settings.patience):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return Trained(
        trainer.state.global_step,
        0 if last is None else step_of(last),
        sum(value.numel() for _, value in trained(model)),
        history(trainer.state.log_history),
    )


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Takes off again what accelerate puts around a forward: under bf16 autocast, what is said after the training would
    be rounded, too."""
    kept = model.__dict__.get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if kept is not None:
            model.__dict__["forward"] = kept


def objective_of(teaching: Teaching, teacher: Teacher | None, *, regression: bool, labelled: bool) -> Objective:
    """The objective that settings and data name."""
    return Objective(teacher, teaching.temperature, teaching.weight, regression, labelled)
