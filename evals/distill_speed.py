"""How fast a student trains on what lies inside its teacher, beside the same losses written plainly.

    python -m evals.distill_speed --threads 1                     # all students, 5 rounds, 512 tokens, float32
    python -m evals.distill_speed --threads 1 --only tinybert-6 --rounds 3 --batch-size 4
    python -m evals.distill_speed --device cuda --dtype bfloat16 --batch-size 32 --steps 10

Models have random weights and the shape of BERT-base (12 layers, 768 wide, 12 heads); students are half as deep. Both
ways take a batch of full rows through teacher and student, back, and through AdamW:

llmcomp: the objective of `llmcomp distill` (`llmcomp.training.distilling`), whose models compute attention by SDPA.
plain: eager attention in all layers of both models, `output_attentions=True, output_hidden_states=True`, and the
    losses from these tuples. Eager transformers gives attentions behind the softmax and TinyBERT learns them before it,
    so the plain way has an eager function of its own that gives scores instead, as the BertSelfAttention of TinyBERT's
    published code does. MiniLM's queries, keys and values are in no tuple: hooks on the last layer give them.

llmcomp trains with its own float32 products (`llmcomp.matmul.fast_matmul`: oneDNN where that is as accurate as MKL and
faster, as on EPYC with AVX512-BF16). A third way, the plain one with these products, shows how much of the ratio is
theirs; under bf16 and on a GPU it is the plain one again.

Before the rounds, both take one step's loss and gradients from the same weights without dropout, and must agree. Then
rounds alternate which way is first. Dropout of students is that of their configs (BERT 0.1, Llama none); `--dropout 0`
turns it off. Time is seconds on a GPU, and on a CPU those of the process' threads, which are the same on a machine that
does nothing else. Ratios are of samples a second, medians over rounds, with the least and the greatest. Memory is the
highest of a step above what lay there before it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from evals.common import markdown
from evals.process import Monitor, machine, memory_of
from llmcomp.adapters.discover import discover
from llmcomp.inner_losses import layer_map
from llmcomp.matmul import fast_matmul
from llmcomp.training.distilling import METHODS, PROJECTIONS, Distillation, Layers, Weights, project
from llmcomp.training.guides import watched
from llmcomp.training.taps import Taps

SCORES = "plain_scores"  # the eager attention that gives scores
PLAIN, FAST, OURS = "plain", "plain, fast products", "llmcomp"
HEADER = ["student", "losses", "parameters, M", "plain, samples/s", "with fast products", "llmcomp",
          "llmcomp / plain [least, greatest]", "llmcomp / plain with fast products", "memory of a step, plain, MB",
          "llmcomp"]  # fmt: skip
TINY_4 = {"hidden_size": 312, "intermediate_size": 1200}
MINI = {"hidden_size": 384, "intermediate_size": 1536}
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One row: what is compared, and how the student differs from its teacher."""

    method: str
    config: Callable[..., PreTrainedConfig]
    student: dict[str, int]
    teacher: dict[str, int]

    @property
    def causal(self) -> bool:
        """Whether the models are decoders."""
        return self.config is LlamaConfig


GROUPED = {"vocab_size": 32000, "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4,
           "intermediate_size": 2048, "bos_token_id": 1}  # fmt: skip
CASES = {
    "tinybert-6": Case("tinybert", BertConfig, {"num_hidden_layers": 6}, {"num_hidden_layers": 12}),
    "tinybert-4": Case("tinybert", BertConfig, {"num_hidden_layers": 4, **TINY_4}, {"num_hidden_layers": 12}),
    "minilm-6": Case("minilm", BertConfig, {"num_hidden_layers": 6, **MINI}, {"num_hidden_layers": 12}),
    "llama-6": Case(
        "tinybert", LlamaConfig, {**GROUPED, "num_hidden_layers": 6}, {**GROUPED, "num_hidden_layers": 12}
    ),
}  # fmt: skip


# --- the plain way ---


def scoring_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **more: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """transformers' eager attention, but what it gives beside the output are the scores before mask and softmax."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    masked = scores if attention_mask is None else scores + attention_mask
    shares = F.dropout(F.softmax(masked, dim=-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (shares @ value).transpose(1, 2).contiguous(), scores


@dataclass
class Plain:
    """Losses from tuples of all layers; of full rows, so that means are over everything that a query sees."""

    student: Any
    teacher: Any
    case: Case
    weights: Weights
    layers: Layers

    def __post_init__(self) -> None:
        AttentionInterface.register(SCORES, scoring_attention)
        AttentionMaskInterface.register(SCORES, eager_mask)
        self.teacher.eval().requires_grad_(False)
        for model in (self.student, self.teacher):
            model.set_attn_implementation(SCORES)
        self.heard: list[dict[str, Tensor]] = [{}, {}]
        for heard, model, layer in zip(self.heard, (self.student, self.teacher), self.layers.last, strict=True):
            for name in ("query", "key", "value") if self.weights.relation else ():
                linear = getattr(model.bert.encoder.layer[layer].attention.self, name)
                linear.register_forward_hook(lambda _, given, made, h=heard, n=name: h.update({n: made}))
            if self.case.causal:
                model.model.layers[-1].register_forward_hook(lambda _, given, made, h=heard: h.update(last=made))

    def loss(self, batch: Batch) -> Tensor:
        """Of one batch."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        every = {"output_attentions": True, "output_hidden_states": True}
        with torch.no_grad():
            its = self.teacher(**inputs, **every)
        own = self.student(**inputs, **every)
        weights, total = self.weights, self._prediction(own.logits, its.logits)
        if weights.hard:
            total = total * weights.soft + weights.hard * F.cross_entropy(own.logits.float(), batch["labels"])
        if weights.embedding:
            total = total + F.mse_loss(self._wide("embedding", own.hidden_states[0]), its.hidden_states[0])
        if weights.relation:
            total = total + weights.relation * self._relations()
        for one, two in self.layers.pairs:
            if weights.hidden:
                wide = self._wide("hidden", self._state(own, self.student, one))
                total = total + F.mse_loss(wide, self._state(its, self.teacher, two))
            if weights.attention:
                total = total + self._attention(own.attentions[one], its.attentions[two])
        return total

    def _prediction(self, own: Tensor, its: Tensor) -> Tensor:
        if self.case.causal:
            own, its = own[:, :-1], its[:, :-1]
        own, its = own.float().flatten(0, -2), its.float().flatten(0, -2)
        return F.kl_div(own.log_softmax(-1), its.log_softmax(-1), reduction="batchmean", log_target=True)

    def _state(self, made: Any, model: Any, layer: int) -> Tensor:
        """A block's output; the last one's is in no tuple of a decoder, which gives it behind the norm."""
        if self.case.causal and layer + 1 == model.config.num_hidden_layers:
            return self.heard[model is self.teacher]["last"]
        states: Tensor = made.hidden_states[layer + 1]
        return states

    def _wide(self, name: str, states: Tensor) -> Tensor:
        projections = getattr(self.student, PROJECTIONS, None)
        return states if projections is None else projections[name](states)

    def _attention(self, own: Tensor, its: Tensor) -> Tensor:
        if not self.case.causal:
            return F.mse_loss(own.float(), its.float())
        before = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).tril()
        error = torch.where(before, own.float() - its.float(), 0).square()
        return (error.sum(-1) / before.sum(-1)).mean()

    def _relations(self) -> Tensor:
        total: Any = 0.0
        for name in ("query", "key", "value"):
            logs = []
            for heard in self.heard:
                split = heard[name].unflatten(-1, (self.layers.relation_heads, -1)).transpose(1, 2).float()
                logs.append((split @ split.transpose(2, 3) / split.shape[-1] ** 0.5).log_softmax(-1))
            one, other = logs
            total = total + F.kl_div(one, other, reduction="sum", log_target=True) / one[..., 0].numel()
        return total


# --- llmcomp's ---


class Ours:
    """The objective that `llmcomp distill` trains by."""

    def __init__(self, student: Any, teacher: Any, weights: Weights, layers: Layers) -> None:
        self.student = student
        own, its = ([block.name for block in discover(model).blocks] for model in (student, teacher))
        above = Taps(teacher, its, layers.hidden(weights, 1), layers.attention(weights, 1))
        below = Taps(student, own, layers.hidden(weights, 0), layers.attention(weights, 0))
        self.objective = Distillation(guide=watched(teacher, above), student=below, weights=weights, layers=layers)

    def loss(self, batch: Batch) -> Tensor:
        """Of one batch."""
        logits = self.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return self.objective.loss(logits, batch)


# --- both ---


def built(case: Case, config: Mapping[str, int], length: int, seed: int) -> Any:
    """A model with random weights."""
    torch.manual_seed(seed)
    kind = AutoModelForCausalLM if case.causal else AutoModelForSequenceClassification
    return kind.from_config(case.config(max_position_embeddings=length, **config), attn_implementation="sdpa")


def both(case: Case, length: int, device: str) -> dict[str, Plain | Ours]:
    """The two ways, each with models of its own that have the same weights."""
    teacher, student = (built(case, config, length, seed).to(device)
                        for seed, config in enumerate((case.teacher, case.student)))  # fmt: skip
    depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    heads = list(range(student.config.num_attention_heads))
    layers = Layers(layer_map("uniform", *depths), (depths[0] - 1, depths[1] - 1), heads, len(heads))
    weights = METHODS[case.method]
    project(student, weights, (student.config.hidden_size, teacher.config.hidden_size))
    student.train()
    twin = copy.deepcopy(student)
    return {PLAIN: Plain(twin, copy.deepcopy(teacher), case, weights, layers),
            OURS: Ours(student, teacher, weights, layers)}  # fmt: skip


def drawn(case: Case, args: argparse.Namespace, seed: int) -> Batch:
    """Full rows of random tokens, with labels as `llmcomp.training.data` aligns them."""
    ids = torch.randint(5, 30_000, (args.batch_size, args.tokens), generator=torch.Generator().manual_seed(seed))
    scored = torch.ones(args.batch_size, dtype=torch.bool)
    if case.causal:
        scored = torch.arange(args.tokens).expand_as(ids) < args.tokens - 1
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2, "scored": scored}
    return {name: value.to(args.device) for name, value in found.items()}


class Step:
    """A training step of one way."""

    def __init__(self, way: Plain | Ours, args: argparse.Namespace) -> None:
        self.way, self.args, self.fast = way, args, isinstance(way, Ours)
        self.optimizer = torch.optim.AdamW(way.student.parameters(), lr=1e-5, fused=True)

    def loss(self, batch: Batch) -> Tensor:
        """In the dtype that was asked for."""
        wide = self.args.dtype == "float32"
        with nullcontext() if wide else torch.autocast(self.args.device, getattr(torch, self.args.dtype)):
            return self.way.loss(batch)

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients without dropout; nothing is changed."""
        before = {module: module.p for module in self.way.student.modules() if isinstance(module, nn.Dropout)}
        _drop(self.way.student, dict.fromkeys(before, 0.0))
        loss = self.loss(batch)
        loss.backward()
        found = {name: value.grad for name, value in self.way.student.named_parameters() if value.grad is not None}
        self.optimizer.zero_grad()
        _drop(self.way.student, before)
        return float(loss.detach()), found

    def __call__(self, batch: Batch) -> None:
        """Forward, backward and the optimizer."""
        with fast_matmul() if self.fast else nullcontext():
            self.loss(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def timed(self, batches: list[Batch]) -> float:
        """Seconds of some steps."""
        clock = time.process_time if self.args.device == "cpu" else time.perf_counter
        self._wait()
        began = clock()
        for batch in batches:
            self(batch)
        self._wait()
        return clock() - began

    def memory(self, batch: Batch) -> int:
        """Bytes of a step above those before it."""
        gc.collect()
        if self.args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self(batch)
            return torch.cuda.max_memory_allocated() - before
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier step left to the allocator
        lay = memory_of(os.getpid())
        assert lay is not None
        monitor = Monitor(os.getpid())
        monitor.start()
        self(batch)
        monitor.stop()
        return max([lay.anonymous, *(sample.own.anonymous for sample in monitor.samples)]) - lay.anonymous

    def _wait(self) -> None:
        if self.args.device != "cpu":
            torch.cuda.synchronize()


def _drop(model: nn.Module, shares: Mapping[nn.Dropout, float]) -> None:
    """Set dropout; some attention reads the number alone."""
    for module, share in shares.items():
        module.p = share


def agree(steps: Mapping[str, Step], batch: Batch, tolerance: float) -> None:
    """Whether both ways compute the same.

    Raises:
        SystemExit: losses or gradients that differ by more than the tolerance, relative.
    """
    (plain, wanted), (loss, found) = (steps[name].gradients(batch) for name in (PLAIN, OURS))
    apart = abs(loss - plain) / abs(plain)
    size = torch.stack([value.norm() for value in wanted.values()]).norm()
    zeros = {name: torch.zeros_like(value) for name, value in found.items()}
    far = float(torch.stack([(found[name] - wanted.get(name, zeros[name])).norm() for name in found]).norm() / size)
    print(f"loss {loss:.6f}, apart {apart:.1e}; gradients apart {far:.1e} of their norm", file=sys.stderr, flush=True)
    if not (apart <= tolerance and far <= tolerance and wanted.keys() <= found.keys()):
        raise SystemExit(f"The two ways do not compute the same: loss {loss} and {plain}, gradients {far:.1e} apart.")


def measured(name: str, args: argparse.Namespace) -> list[str]:
    """One row of the table."""
    case = CASES[name]
    if args.dropout is not None and not case.causal:
        shares = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
        case = replace(case, student={**case.student, **shares})
    steps = {way: Step(made, args) for way, made in both(case, args.tokens, args.device).items()}
    agree(steps, drawn(case, args, 0), 1e-4 if args.dtype == "float32" else 3e-2)
    memory = [f"{steps[way].memory(drawn(case, args, 0)) / 1e6:.0f}" for way in (PLAIN, OURS)]  # these warm up, too
    steps[FAST] = copy.copy(steps[PLAIN])
    steps[FAST].fast = True
    times: dict[str, list[float]] = {way: [] for way in (PLAIN, FAST, OURS)}
    for number in range(args.rounds):
        batches = [drawn(case, args, 1 + number * args.steps + step) for step in range(args.steps)]
        for way in list(times) if number % 2 else reversed(list(times)):
            times[way].append(steps[way].timed(batches))
            print(f"{name}, {way}: {times[way][-1] / args.steps:.3f} s a step", file=sys.stderr, flush=True)
    speeds = [f"{args.steps * args.batch_size / median(found):.2f}" for found in times.values()]
    ratios = []
    for way in (PLAIN, FAST):
        found = [one / other for one, other in zip(times[way], times[OURS], strict=True)]
        ratios.append(f"{median(found):.2f} [{min(found):.2f}, {max(found):.2f}]")
    size = sum(value.numel() for value in steps[OURS].way.student.parameters()) / 1e6
    return [name, case.method, f"{size:.1f}", *speeds, *ratios, *memory]


def main(argv: list[str] | None = None) -> int:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of a round")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--dropout", type=float, help="of students that have one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(machine(args.threads)))
    print(f"\n{args.batch_size} rows of {args.tokens} tokens, {args.dtype}, {args.rounds} rounds of {args.steps}\n")
    print(markdown(HEADER, [measured(name, args) for name in CASES if args.only in (None, name)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
