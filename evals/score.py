"""Open a checkpoint the way a user of the tool would, and write what every benchmark compares.

    python -m evals.score --model DIR --loader transformers --task causal-lm --output FILE --text NAME=PATH …

`transformers` is a plain `from_pretrained`; `gptqmodel` is that tool's own loader with its own dequantizing
kernel, `auto_round` transformers with that package and its decoded weights. A causal LM gives the loss of every
window of every text, a classifier its logits on every sentence. Both are computed in fp32, sentence by sentence where
padding could otherwise differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from evals.common import evaluation_windows, window_losses


def open_with_gptqmodel(folder: Path) -> torch.nn.Module:
    """gptqmodel's own loader, then its own dequantized weights in fp32.

    Its CPU kernels compute in 16 bits and take neither every width nor whole channels; asking each layer
    for its dequantized weight measures the checkpoint instead of a kernel, as is done for the others.
    """
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    with_dense_linears(model, TorchLinear, lambda layer: layer.dequantize_weight().T)
    return model.float()


def open_with_auto_round(folder: Path) -> torch.nn.Module:
    """transformers with auto-round's own kernels, then its decoded weights in fp32.

    It opens any checkpoint of its own in fp16 on a CPU and computes so; each layer's weight is what the layer
    makes of the unit matrix.
    """
    import auto_round_extension.torch.qlinear_torch as full
    import auto_round_extension.torch.qlinear_torch_zp as shifted

    model = AutoModelForCausalLM.from_pretrained(folder)

    def decoded(layer: torch.nn.Module) -> torch.Tensor:
        unit = torch.eye(layer.infeatures, dtype=torch.float16)
        shift = 0 if layer.bias is None else layer.bias
        with torch.no_grad():
            return (layer(unit) - shift).T

    with_dense_linears(model, (full.QuantLinear, shifted.QuantLinear), decoded)
    return torch.nn.Module.float(model)  # PreTrainedModel.float refuses a model that was quantized


def with_dense_linears(
    model: torch.nn.Module, kind: type | tuple[type, ...], weight_of: Callable[[torch.nn.Module], torch.Tensor]
) -> None:
    """Put plain linears in fp32 in the place of a model's packed ones; `weight_of` gives [out, in]."""
    replaced = 0
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, kind):
            continue
        weight = weight_of(layer).float()
        dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        dense.weight.data = weight.contiguous()
        if layer.bias is not None:
            dense.bias.data = layer.bias.float()
        model.set_submodule(name, dense)
        replaced += 1
    if replaced == 0:
        raise RuntimeError("the checkpoint opened with no quantized layer in it")


def open_model(folder: Path, loader: str, task: str) -> torch.nn.Module:
    """The checkpoint as a module in fp32, ready to be evaluated."""
    if loader == "gptqmodel":
        return open_with_gptqmodel(folder).eval()
    if loader == "auto_round":
        return open_with_auto_round(folder).eval()
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def sentence_logits(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path
) -> list[list[float]]:
    """Logits [sentences, labels] of a JSONL file with a `sentence` column, one sentence at a time."""
    logits = []
    with torch.inference_mode():
        for line in path.read_text(encoding="utf-8").splitlines():
            batch = tokenizer(json.loads(line)["sentence"], return_tensors="pt", truncation=True)
            logits.append(model(**batch).logits[0].float().tolist())
    return logits


def main() -> None:
    """Command line as in the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--loader", choices=("transformers", "gptqmodel", "auto_round"), default="transformers")
    parser.add_argument("--task", choices=("causal-lm", "classification"), default="causal-lm")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = open_model(args.model, args.loader, args.task)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    result = {}
    for text in args.text:
        name, _, path = text.partition("=")
        if args.task == "causal-lm":
            result[name] = window_losses(model, evaluation_windows(tokenizer, Path(path))).tolist()
        else:
            result[name] = sentence_logits(model, tokenizer, Path(path))
    args.output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
