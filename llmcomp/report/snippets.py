"""How a checkpoint is loaded, as code that runs as it stands: by plain transformers, llmcomp, llama.cpp's format, vLLM.

Each is chosen by what the report says, so that a card shows nothing that cannot work. tests/e2e/test_card_snippets.py
runs them against a Hub, but for those that say they were not run.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmcomp.report.schema import Report

NOT_RUN = "Not run by llmcomp's tests."
_OWN, _PACKED, _BNB = "llmcomp", "compressed-tensors", ("bnb-nf4", "bnb-int8")
_TEXT = "The function returns the"
# task → (Auto class, what reads its input, how it is called)
_LOGITS = "with torch.no_grad():\n    print(model(**inputs).logits.shape)"
_CALLS = {
    "causal-lm": ("AutoModelForCausalLM", "AutoTokenizer",
                  "output = model.generate(**inputs, max_new_tokens=20)\n"
                  "print(tokenizer.decode(output[0], skip_special_tokens=True))"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "AutoTokenizer",
                   "output = model.generate(**inputs, max_new_tokens=20)\n"
                   "print(tokenizer.decode(output[0], skip_special_tokens=True))"),
    "masked-lm": ("AutoModelForMaskedLM", "AutoTokenizer", _LOGITS),
    "sequence-classification": ("AutoModelForSequenceClassification", "AutoTokenizer",
                                "with torch.no_grad():\n    scores = model(**inputs).logits.softmax(-1)[0].tolist()\n"
                                "print({model.config.id2label[number]: score for number, score in enumerate(scores)})"),
    "token-classification": ("AutoModelForTokenClassification", "AutoTokenizer", _LOGITS),
    "encoder": ("AutoModel", "AutoTokenizer",
                "with torch.no_grad():\n    print(model(**inputs).last_hidden_state.shape)"),
}  # fmt: skip
_PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "multiple-choice": "multiple-choice",
    "image-classification": "image-classification",
    "image-text-to-text": "image-text-to-text",
    "speech-seq2seq": "automatic-speech-recognition",
    "encoder": "feature-extraction",
}


@dataclass(frozen=True)
class Snippet:
    """A block of code of a card.

    Attributes:
        title: which software. language: 'python' or 'bash'. code: as it stands in the card.
        hint: what it needs, or what to know, in one sentence.
        tested: whether tests run it.
    """

    title: str
    language: str
    code: str
    hint: str
    tested: bool = True


def snippets(report: Report, name: str, gguf: bool) -> list[Snippet]:
    """All that hold for the checkpoint.

    Args:
        name: id on the Hub, or directory.
        gguf: whether `llmcomp export --format gguf` takes it.
    """
    found = [_transformers(report, name), _llmcomp(report, name)]
    if gguf:
        code = f"llmcomp export {name} {name.rpartition('/')[2]}-gguf --format gguf"
        found.append(Snippet("llama.cpp", "bash", code, "Writes model.gguf with the checkpoint's own integers."))
    if report.format == _PACKED and report.task == "causal-lm":
        found.append(Snippet("vLLM", "bash", f"vllm serve {name}", NOT_RUN, tested=False))
    return found


def pipeline_tag(report: Report) -> str | None:
    """The Hub's word for what the model does: as its source's card has it, else by its task."""
    known = report.origin.pipeline_tag if report.origin else None
    return known or _PIPELINES.get(report.task)


def _transformers(report: Report, name: str) -> Snippet:
    auto, reader, call = _CALLS.get(report.task, (report.architecture, "", ""))
    imports = ["import torch"] if "torch." in call else []
    if report.format == _OWN:
        imports.append("import llmcomp.hf  # registers the layout with transformers")
    names = ", ".join(sorted(filter(None, (auto, reader))))
    lines = [*imports, f"from transformers import {names}", "", f'model = {auto}.from_pretrained("{name}")']
    if reader:
        lines += [f'tokenizer = {reader}.from_pretrained("{name}")',
                  f'inputs = tokenizer("{_TEXT}", return_tensors="pt")', call]  # fmt: skip
    packages = {_OWN: "llmcomp", _PACKED: "transformers compressed-tensors"}.get(report.format, "transformers")
    packages = "transformers bitsandbytes accelerate" if report.format in _BNB else packages
    return Snippet("transformers", "python", "\n".join(lines), f"`pip install {packages}`")


def _llmcomp(report: Report, name: str) -> Snippet:
    lines = ["import llmcomp", "", f'model = llmcomp.load("{name}")']
    packed = report.format in (_OWN, _PACKED)
    hint = "Weights stay packed in memory." if packed else "Opens what transformers opens."
    if report.recovery is not None and "beside" in report.recovery.kept:
        hint += " The trained adapter is put on; plain transformers loads the model without it."
    return Snippet("llmcomp", "python", "\n".join(lines), hint)
