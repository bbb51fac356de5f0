"""How an export is loaded, as code that runs as it stands: by llama.cpp, onnxruntime, OpenVINO, transformers.

tests/e2e/test_pushing_exports.py runs it, but for what says that it was not run.
"""

from __future__ import annotations

from llmcomp.export_record import ExportRecord
from llmcomp.report.snippets import NOT_RUN, TEXT, Snippet, transformers

TITLES = {
    "gguf": "GGUF", "onnx": "ONNX", "openvino": "OpenVINO's IR", "compressed-tensors": "compressed-tensors",
    "llmcomp": "llmcomp's own layout", "dense": "plain safetensors",
}  # fmt: skip
# Of the architectures that `llmcomp export` writes as GGUF, those that transformers reads back and tests have tried.
_GGUF_IN_TRANSFORMERS = ("LlamaForCausalLM",)
_PAST = "past_key_values"


def snippets(record: ExportRecord, name: str) -> list[Snippet]:
    """All that hold for the export, to be loaded as `name`, an id on the Hub or a directory."""
    if record.form == "gguf":
        return _gguf(record, name)
    if record.form in ("onnx", "openvino"):
        return [_graph(record, name)]
    adapter = [transformers(record.form, record.task, record.architecture, name)]
    code = f'import llmcomp\n\nmodel = llmcomp.load("{name}")'
    return [*adapter, Snippet("llmcomp", "python", code, "Opens what transformers opens; packed weights stay packed.")]


def _gguf(record: ExportRecord, name: str) -> list[Snippet]:
    code = f'llama-cli --hf-repo {name} --hf-file model.gguf --prompt "{TEXT}"'
    found = [Snippet("llama.cpp", "bash", code, NOT_RUN, tested=False)]
    if record.architecture in _GGUF_IN_TRANSFORMERS:
        code = "\n".join([
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}", gguf_file="model.gguf")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'output = model.generate(**tokenizer("{TEXT}", return_tensors="pt"), max_new_tokens=20)',
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ])  # fmt: skip
        hint = "`pip install transformers gguf`; weights are decoded when they are loaded, so it takes no less memory."
        found.append(Snippet("transformers", "python", code, hint))
    return found


_OPEN = {
    "onnx": ('session = onnxruntime.InferenceSession(f"{path}/model.onnx")',
             "shapes = {one.name: one.shape for one in session.get_inputs()}",
             "session.run(None, inputs)"),
    "openvino": ('model = openvino.Core().compile_model(f"{path}/openvino_model.xml", "CPU")',
                 "shapes = {one.any_name: one.partial_shape for one in model.inputs}",
                 "list(model(inputs).values())"),
}  # fmt: skip


def _graph(record: ExportRecord, name: str) -> Snippet:
    """ONNX or OpenVINO: one call on a text; of a decoder without a past, which gives the next token."""
    package = {"onnx": "onnxruntime", "openvino": "openvino"}[record.form]
    opened, shapes, run = _OPEN[record.form]
    lines = ["import numpy as np", f"import {package}", "from huggingface_hub import snapshot_download",
             "from transformers import AutoTokenizer", "", f'path = snapshot_download("{name}")',
             "tokenizer = AutoTokenizer.from_pretrained(path)", opened, shapes]  # fmt: skip
    if record.task == "causal-lm":
        size = "shape[{}].get_length()" if record.form == "openvino" else "shape[{}]"
        lines += [
            f'ids = tokenizer("{TEXT}", return_tensors="np")["input_ids"]',
            'inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), '
            '"position_ids": np.arange(ids.shape[1])[None]}',
            f'inputs |= {{name: np.zeros([1, {size.format(1)}, 0, {size.format(3)}], np.float32)'
            f'\n           for name, shape in shapes.items() if name.startswith("{_PAST}")}}  # nothing is past yet',
            f"logits = {run}[0]",
            "print(tokenizer.decode(logits[0, -1].argmax()))",
        ]  # fmt: skip
    else:
        lines += [
            f'encoded = tokenizer("{TEXT}", return_tensors="np")',
            'inputs = {name: encoded.get(name, np.zeros_like(encoded["input_ids"])) for name in shapes}',
            f"print([output.shape for output in {run}])",
        ]
    return Snippet(package, "python", "\n".join(lines), f"`pip install {package} transformers`")
