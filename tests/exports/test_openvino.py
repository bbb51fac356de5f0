"""IRs of OpenVINO: that the integers stay packed, and what the runtime answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from packed_checkpoints import BY_ROW, GROUPED, dense_model, in_turn, logits_by_steps, packed, relative
from tiny import tiny

from llmcomp.errors import BadRecipe, UnknownArchitecture, VerificationFailed
from llmcomp.exports import openvino as openvino_export
from llmcomp.formats.opening import Opened, open_checkpoint
from llmcomp.schemes import Scheme


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Opened, Path, list[str]]:
    """One block of a Llama, all kinds of groups, packed embeddings with a tied head."""
    folder = tmp_path_factory.mktemp("openvino")
    source = tiny("llama", folder / "source", num_hidden_layers=1)
    schemes = {**in_turn(source, (*GROUPED[1:], BY_ROW[2])), "model.embed_tokens": Scheme(4, 32, False)}
    opened = packed(source, folder / "packed", schemes)
    (folder / "out").mkdir()
    return opened, folder / "out", openvino_export.export(opened, folder / "out")


def test_prompt_and_cached_steps_are_one_pass_of_transformers(decoder: tuple[Opened, Path, list[str]]) -> None:
    opened, out, _ = decoder
    compiled = openvino.Core().compile_model(out / "openvino_model.xml", "CPU", openvino_export.IN_FLOAT32)

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = compiled(dict(inputs))
        return {output.get_any_name(): found[output].copy() for output in compiled.outputs}

    ids = torch.randint(5, 500, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = dense_model(opened)(ids).logits
    assert relative(logits_by_steps(run, opened, ids), wanted) < 1e-4  # inputs that a scheme rounds are not, here


def test_integers_stay_packed(decoder: tuple[Opened, Path, list[str]]) -> None:
    _, out, notes = decoder
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "openvino_model.bin", "openvino_model.xml"]
    types: dict[str, int] = {}
    for node in openvino.Core().read_model(out / "openvino_model.xml").get_ordered_ops():
        if node.get_type_name() == "Constant":
            name = node.get_element_type().to_string()
            types[name] = types.get(name, 0) + node.get_byte_size()
    assert {"u4", "u8"} <= set(types) and "u2" not in types  # with which not every CPU multiplies
    assert types["f32"] < 60_000  # scales, norms, zero points; a float32 copy of one weight has 32,768 bytes and more
    assert "The IR keeps the integers" in notes[0] and "MB of u4" in notes[0]
    assert any("Inputs are not rounded by the model itself" in note for note in notes)


def test_a_converter_that_decodes_is_an_error(decoder: tuple[Opened, Path, list[str]], tmp_path: Path) -> None:
    """A model of one float32 constant in the place of what was converted."""
    from llmcomp.exports import onnx as onnx_export

    signature = onnx_export.signature_of(decoder[0], "causal-lm")
    model, _ = onnx_export.build(decoder[0], signature, "causal-lm", openvino_export.choose)
    dense = openvino.opset13.constant(np.ones((4, 4), np.float32))
    read = openvino.opset13.parameter([4, 4])
    plain = openvino.Model([openvino.opset13.matmul(read, dense, False, False)], [read])
    openvino.save_model(plain, tmp_path / "openvino_model.xml", compress_to_fp16=False)
    with pytest.raises(VerificationFailed, match="it decoded some"):
        openvino_export._require_packed(openvino, model, tmp_path / "openvino_model.xml")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    source = tiny("bart", tmp_path / "source")
    with pytest.raises(UnknownArchitecture, match="is an encoder-decoder; llmcomp writes OpenVINO of"):
        openvino_export.export(open_checkpoint(source), tmp_path)


def test_a_missing_package_says_what_to_install(
    decoder: tuple[Opened, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BadRecipe, match=r"openvino needs the package openvino: pip install 'llmcomp\[openvino\]'"):
        openvino_export.export(decoder[0], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-classifier", "roberta-classifier", "mistral", "qwen3"])
def test_families(name: str, tmp_path: Path) -> None:
    source = tiny(name, tmp_path / "source")
    (tmp_path / "out").mkdir()
    opened = packed(source, tmp_path / "packed", in_turn(source, [*GROUPED, *BY_ROW]))
    assert openvino_export.export(opened, tmp_path / "out")
