"""`llmcomp distill`: a smaller model that a larger one trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcomp.cli import options as o
from llmcomp.cli import training as t
from llmcomp.cli.running import Publishing, show

_LAYERS, _LOSSES = "Layers", "Losses"


def _weight(flag: str, what: str) -> typer.models.OptionInfo:
    found: typer.models.OptionInfo = typer.Option(
        f"--{flag}-weight", help=f"Of {what}.", show_default="the method's", rich_help_panel=_LOSSES
    )
    return found


def distill(
    teacher: Annotated[
        str, typer.Argument(help="A directory, a Hub id, an alias or a 'sample:' name.", show_default=False)
    ],
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            help="What is cut from the teacher: layers=3, blocks=0+2+5, or narrower, "
            "layers=3,hidden=128,heads=4,mlp=512; or a checkpoint, or a config.json.",
            show_default=False,
        ),
    ] = None,
    data: t.Data = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="logits: soft targets and labels; distilbert: with the cosine of hidden states; tinybert: with "
            "embeddings, hidden states and attention scores; minilm: with relations of queries, keys and values; "
            "fitnets: with hidden states; attention-transfer; labels: no teacher.",
        ),
    ] = "logits",
    samples: t.Samples = None,
    sequence_length: t.SequenceLength = 128,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            "--ensemble", help="A further teacher, averaged with the first; may be repeated.", show_default="none",
            rich_help_panel=t.TEACHER,
        ),
    ] = None,
    assistants: Annotated[
        list[str] | None,
        typer.Option(
            "--assistants", help="A student on the way, which teaches the next one; may be repeated.",
            show_default="none", rich_help_panel=t.TEACHER,
        ),
    ] = None,
    past: Annotated[
        float | None,
        typer.Option(
            "--past", help="Learn from the moving average of the student's own weights instead, with this decay.",
            show_default="from the teacher", rich_help_panel=t.TEACHER,
        ),
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(
            "--peer", help="Learn from this second student instead, while it learns from the first one.",
            show_default="from the teacher", rich_help_panel=t.TEACHER,
        ),
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            "--teacher-cache", help="Keep the teacher's logits in this directory: it runs once for all epochs and "
            "runs.", show_default="none", rich_help_panel=t.TEACHER,
        ),
    ] = None,
    cached_classes: Annotated[
        int, typer.Option("--cached-classes", help="Kept of a distribution, the others as one.",
                          rich_help_panel=t.TEACHER)
    ] = 64,
    cached_bits: Annotated[
        int, typer.Option("--cached-bits", help="Of a kept logarithm, 16 or 8.", rich_help_panel=t.TEACHER)
    ] = 16,
    vocabulary: Annotated[
        str,
        typer.Option(
            "--vocabulary", help="same: of teacher and student; shared: the tokens that both have are compared.",
            rich_help_panel=t.TEACHER,
        ),
    ] = "same",
    temperature: t.Temperature = 2.0,
    divergence: Annotated[
        str,
        typer.Option(help="From the teacher's distribution: forward, reverse or jsd.", rich_help_panel=t.TEACHER),
    ] = "forward",
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="Train the student without a teacher, too.", rich_help_panel=t.TEACHER),
    ] = False,
    layer_map: Annotated[
        str,
        typer.Option(
            "--layer-map", help="Student's layers to teacher's: uniform, last, skip, or pairs such as 0:1,1:3.",
            rich_help_panel=_LAYERS,
        ),
    ] = "uniform",
    head_map: Annotated[
        list[int] | None,
        typer.Option(
            "--head-map", help="The teacher's head for each of the student's, in order; repeated.",
            show_default="as many heads", rich_help_panel=_LAYERS,
        ),
    ] = None,
    relation_heads: Annotated[
        int | None,
        typer.Option(
            "--relation-heads", help="Of minilm's relations.", show_default="the most that fit both models",
            rich_help_panel=_LAYERS,
        ),
    ] = None,
    hard_weight: Annotated[float | None, _weight("hard", "the labels")] = None,
    soft_weight: Annotated[float | None, _weight("soft", "the teacher's distribution")] = None,
    cosine_weight: Annotated[float | None, _weight("cosine", "the angle of the last hidden states")] = None,
    embedding_weight: Annotated[float | None, _weight("embedding", "the embeddings")] = None,
    hidden_weight: Annotated[float | None, _weight("hidden", "the hidden states")] = None,
    attention_weight: Annotated[float | None, _weight("attention", "the attention scores")] = None,
    relation_weight: Annotated[float | None, _weight("relation", "the relations")] = None,
    transfer_weight: Annotated[float | None, _weight("transfer", "where hidden states are large")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="The highest.", show_default="5e-5", rich_help_panel=t.TRAINING),
    ] = None,
    epochs: t.Epochs = 1.0,
    steps: t.Steps = None,
    batch_size: t.BatchSize = 8,
    accumulate: t.Accumulate = 1,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", min=0, help="Of AdamW.", rich_help_panel=t.TRAINING)
    ] = 0.0,
    seed: t.Seed = 0,
    bf16: t.Bf16 = False,
    evaluate_every: t.EvaluateEvery = None,
    patience: t.Patience = None,
    save_every: t.SaveEvery = None,
    group_by_length: t.GroupByLength = False,
    gradient_checkpointing: t.GradientCheckpointing = False,
    powersgd: t.PowerSgd = None,
    track: t.Track = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory.", show_default="./TEACHER-METHOD-STUDENT")
    ] = None,
    overwrite: o.Overwrite = False,
    evaluate: o.Evaluate = True,
    verify: o.Verify = True,
    device: o.Device = "auto",
    eval_data: o.EvalData = None,
    text_column: t.TextColumn = None,
    label_column: t.LabelColumn = None,
    push_to_hub: o.PushToHub = None,
    private: o.Private = False,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Train a smaller model by a larger one; verify the checkpoint, measure both side by side.

    Examples:

        llmcomp distill sample:classifier --student layers=1 --data default --method distilbert

        llmcomp distill ./classifier --student layers=3 --data train.jsonl --label-column label --baseline

        llmcomp distill ./bert --student layers=4,hidden=312,heads=12,mlp=1200 --data text.txt --method tinybert
    """
    from llmcomp.errors import BadData, BadRecipe

    if student is None:
        raise BadRecipe("llmcomp distill needs a student; give --student layers=3, a checkpoint or a config.json.")
    if data is None:
        raise BadData("llmcomp distill needs something to train on; give --data a file, a Hub dataset or 'default'.")
    given = dict(locals())
    publishing = Publishing(push_to_hub, private)
    publishing.check(verify)
    from dataclasses import fields

    from llmcomp.cli.progress import listener
    from llmcomp.training.distill_plan import DistillPlan
    from llmcomp.training_api import distill

    given |= {name: tuple(given[name] or ()) for name in ("ensemble", "assistants", "head_map")}
    given |= {name: None if (path := given[name]) is None else str(path) for name in ("output", "teacher_cache")}
    plan = DistillPlan(**{one.name: given[one.name] for one in fields(DistillPlan)})
    with listener(json) as progress:
        result = distill(plan, progress)
    show(result, json)
    publishing.publish(result.output, json)
