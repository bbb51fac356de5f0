"""How a checkpoint is loaded, as code that runs as it stands: by plain transformers, llmcomp, llama.cpp's format, vLLM.

Each is chosen by what the report says, so that a card shows nothing that cannot work. tests/e2e/test_card_snippets.py
and test_pushing.py run them as they stand, but for those that say they were not run.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmcomp.report.schema import Report

NOT_RUN = "Not run by llmcomp's tests."
_OWN, _PACKED, _BNB = "llmcomp", "compressed-tensors", ("bnb-nf4", "bnb-int8")
TEXT = "The function returns the"
_READ_TEXT = f'inputs = reader("{TEXT}", return_tensors="pt")'
_LOGITS = "with torch.no_grad():\n    print(model(**inputs).logits.shape)"
_GENERATE = (
    "output = model.generate(**inputs, max_new_tokens=20)\nprint(reader.decode(output[0], skip_special_tokens=True))"
)


@dataclass(frozen=True)
class _Call:
    """How a task is done: Auto class, what reads its input, the code that makes `inputs`, the code that uses them."""

    auto: str
    use: str
    read: str = _READ_TEXT
    reader: str = "AutoTokenizer"


_CALLS = {
    "causal-lm": _Call("AutoModelForCausalLM", _GENERATE),
    "seq2seq-lm": _Call("AutoModelForSeq2SeqLM", _GENERATE),
    "masked-lm": _Call("AutoModelForMaskedLM", _LOGITS),
    "sequence-classification": _Call(
        "AutoModelForSequenceClassification",
        "with torch.no_grad():\n    scores = model(**inputs).logits.softmax(-1)[0].tolist()\n"
        "print({model.config.id2label[number]: score for number, score in enumerate(scores)})",
    ),
    "token-classification": _Call(
        "AutoModelForTokenClassification",
        "with torch.no_grad():\n    labels = model(**inputs).logits.argmax(-1)[0].tolist()\n"
        "print([model.config.id2label[label] for label in labels])",
    ),
    "question-answering": _Call(
        "AutoModelForQuestionAnswering",
        "with torch.no_grad():\n    found = model(**inputs)\n"
        "first, last = found.start_logits.argmax(), found.end_logits.argmax()\n"
        'print(reader.decode(inputs["input_ids"][0, first : last + 1]))',
        'inputs = reader("What is returned?", "The function returns the sum.", return_tensors="pt")',
    ),
    "image-classification": _Call(
        "AutoModelForImageClassification",
        "with torch.no_grad():\n    label = model(**inputs).logits.argmax(-1).item()\n"
        "print(model.config.id2label[label])",
        'image = Image.new("RGB", (224, 224), "orange")  # or Image.open("photo.jpg")\n'
        'inputs = reader(image, return_tensors="pt")',
        "AutoImageProcessor",
    ),
    "encoder": _Call("AutoModel", "with torch.no_grad():\n    print(model(**inputs).last_hidden_state.shape)"),
}
PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq-lm": "text-generation",  # the Hub has no text2text-generation any more
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
    found = [_sentences(report.format, name)] if is_sentences(report) else []
    code = any(file.endswith(".py") for file in report.files)
    found.append(transformers(report.format, report.task, report.architecture, name, code))
    found += [] if code else [_llmcomp(report, name)]
    if gguf:
        command = f"llmcomp export {name} {name.rpartition('/')[2]}-gguf --format gguf"
        found.append(Snippet("llama.cpp", "bash", command, "Writes model.gguf with the checkpoint's own integers."))
    if report.format == _PACKED and report.task == "causal-lm":
        command = f"vllm serve {name}" + (" --trust-remote-code" if code else "")
        found.append(Snippet("vLLM", "bash", command, NOT_RUN, tested=False))
    return found


def is_sentences(report: Report) -> bool:
    """Whether sentence-transformers opens it: its modules are among the files."""
    return "modules.json" in report.files


def pipeline_tag(report: Report) -> str | None:
    """The Hub's word for what the model does: as its source's card has it, else by its task."""
    known = report.origin.pipeline_tag if report.origin else None
    return known or PIPELINES.get(report.task)


def transformers(form: str, task: str, architecture: str, name: str, code: bool = False) -> Snippet:
    """Plain transformers, for a checkpoint in one of our formats; `code`: which brings Python code along."""
    call = _CALLS.get(task)
    imports = ["import torch"] if call and "torch." in call.use else []
    if form == _OWN:
        imports.append(_REGISTER)
    if call and "Image." in call.read:
        imports.append("from PIL import Image")
    names = ", ".join(sorted((call.auto, call.reader))) if call else architecture
    auto = call.auto if call else architecture
    trusted, warned = (", trust_remote_code=True", _ITS_CODE) if code else ("", "")
    lines = [*imports, f"from transformers import {names}", "", f'model = {auto}.from_pretrained("{name}"{trusted})']
    if call:
        lines += [f'reader = {call.reader}.from_pretrained("{name}")', call.read, call.use]
    return Snippet("transformers", "python", "\n".join(lines), f"`pip install {_packages(form)}`{warned}")


_ITS_CODE = "; it runs the Python code of this repository, which came with the source: read it first."
_REGISTER = "import llmcomp.hf  # registers the layout with transformers"


def _packages(form: str) -> str:
    known = {_OWN: "llmcomp", _PACKED: "transformers compressed-tensors"}
    return "transformers bitsandbytes accelerate" if form in _BNB else known.get(form, "transformers")


def _sentences(form: str, name: str) -> Snippet:
    lines = [*([_REGISTER] if form == _OWN else []), "from sentence_transformers import SentenceTransformer", "",
             f'model = SentenceTransformer("{name}")',
             f'print(model.encode(["{TEXT}", "It gives back the"]).shape)']  # fmt: skip
    return Snippet("sentence-transformers", "python", "\n".join(lines),
                   f"`pip install sentence-transformers {_packages(form)}`")  # fmt: skip


def _llmcomp(report: Report, name: str) -> Snippet:
    lines = ["import llmcomp", "", f'model = llmcomp.load("{name}")']
    packed = report.format in (_OWN, _PACKED)
    hint = "Weights stay packed in memory." if packed else "Opens what transformers opens."
    if report.recovery is not None and "beside" in report.recovery.kept:
        hint += " The trained adapter is put on; plain transformers loads the model without it."
    return Snippet("llmcomp", "python", "\n".join(lines), hint)
