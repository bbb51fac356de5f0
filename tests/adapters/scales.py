"""A scale folded into a dense model, written out plainly: what tests compare llmcomp's own folding with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmcomp.adapters.base import LinearRef
from llmcomp.adapters.folds import Fold


def apply_fold(model: nn.Module, stage: Sequence[LinearRef], fold: Fold, scale: Tensor) -> None:
    """Divide the producer's channels by `scale` [in] and multiply its readers' columns, in place."""
    producer = model.get_submodule(fold.producer)
    with torch.no_grad():
        for column, channel in enumerate(fold.channels.tolist()):
            divided = scale[column]
            if column != fold.channels.tolist().index(channel):
                continue  # a channel that several columns read is divided once
            if fold.kind == "linear":
                rows = producer.weight.T if hasattr(producer, "nf") else producer.weight
                rows[channel] /= divided
            else:
                shift = 1 if fold.kind == "norm+1" else 0
                producer.weight[channel] = (producer.weight[channel].float() + shift) / divided - shift
            if getattr(producer, "bias", None) is not None:
                producer.bias[channel] /= divided
        for ref in stage:
            weight = model.get_submodule(ref.name).weight
            weight *= scale.unsqueeze(1) if ref.transposed else scale
        for name in fold.others:
            model.get_parameter(name).mul_(scale)
