"""Sentence embeddings: every pooling against float64 row by row, Dense and Normalize, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import WIDTH, tiny
from tiny_sentences import sentence_encoder, write_dense, write_json, write_modules

from llmcomp.errors import BadCheckpoint
from llmcomp.measure.embeddings import read_head

LENGTHS = (5, 1, 9, 9, 3)

# Of one text's hidden states [tokens, width] without padding, as the papers' formulas read.
POOLINGS = {
    "cls": lambda x: x[0],
    "max": lambda x: x.max(0),
    "mean": lambda x: sum(x) / len(x),
    "mean_sqrt_len_tokens": lambda x: sum(x) / len(x) ** 0.5,
    "weightedmean": lambda x: sum((n + 1) * row for n, row in enumerate(x)) / sum(range(1, len(x) + 1)),
    "lasttoken": lambda x: x[-1],
}
ACTIVATIONS = {
    "Tanh": np.tanh,
    "Identity": lambda x: x,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """The files that `read_head` reads, without a transformer."""
    write_modules(tmp_path, "Pooling")
    write_json(tmp_path / "1_Pooling/config.json", {"pooling_mode": "mean"})
    return tmp_path


def hidden_states() -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """Hidden states with their mask, padding filled with what must not leak; each text's own in float64."""
    hidden = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
        hidden[row, length:] = 1e6
    return hidden, mask, [hidden[row, :length].double().numpy() for row, length in enumerate(LENGTHS)]


def embedded(directory: Path) -> np.ndarray:
    hidden, mask, _ = hidden_states()
    return np.asarray(read_head(directory).embed(hidden, mask).double().numpy())


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling(encoder: Path, mode: str) -> None:
    write_json(encoder / "1_Pooling/config.json", {"pooling_mode": mode})
    expected = np.stack([POOLINGS[mode](text) for text in hidden_states()[2]])
    np.testing.assert_allclose(embedded(encoder), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_without_padding(encoder: Path, mode: str) -> None:
    write_json(encoder / "1_Pooling/config.json", {"pooling_mode": mode})
    hidden = hidden_states()[0][2:4]
    found = read_head(encoder).embed(hidden, None).double().numpy()
    expected = np.stack([POOLINGS[mode](text) for text in hidden.double().numpy()])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({}, ("mean",)),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        # of flags the order is the module's own, not the file's
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode_weightedmean_tokens": True}, ("weightedmean",)),
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, ("max",)),
    ],
)
def test_modes_of_old_and_new_configs(encoder: Path, config: dict[str, Any], modes: tuple[str, ...]) -> None:
    write_json(encoder / "1_Pooling/config.json", config)
    expected = [np.concatenate([POOLINGS[mode](text) for mode in modes]) for text in hidden_states()[2]]
    np.testing.assert_allclose(embedded(encoder), np.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_and_normalize_in_their_order(encoder: Path, activation: str, bias: bool) -> None:
    write_modules(encoder, "Pooling", "Normalize", "Dense", "Normalize")
    tensors = {
        name: one.double().numpy() for name, one in write_dense(encoder / "3_Dense", activation, bias).items()
    }
    expected = []
    for text in hidden_states()[2]:
        pooled = text.mean(0)
        made = tensors["linear.weight"] @ (pooled / np.linalg.norm(pooled)) + tensors.get("linear.bias", 0.0)
        made = ACTIVATIONS[activation](made)
        expected.append(made / np.linalg.norm(made))
    np.testing.assert_allclose(embedded(encoder), np.stack(expected), rtol=1e-4, atol=1e-6)


def test_dense_with_gelu(encoder: Path) -> None:
    write_modules(encoder, "Pooling", "Dense")
    tensors = write_dense(encoder / "2_Dense", "GELU")
    pooled = torch.tensor(np.stack([text.mean(0) for text in hidden_states()[2]]))
    expected = F.gelu(pooled @ tensors["linear.weight"].double().T + tensors["linear.bias"].double())
    np.testing.assert_allclose(embedded(encoder), expected.numpy(), rtol=1e-4, atol=1e-6)


def test_half_precision_is_pooled_in_single(encoder: Path) -> None:
    hidden, mask, _ = hidden_states()
    head = read_head(encoder)
    rounded = hidden.bfloat16()
    assert torch.equal(head.embed(rounded, mask), head.embed(rounded.float(), mask))


def test_how_texts_are_made_ready(encoder: Path) -> None:
    assert read_head(encoder).prepared(" A text ") == " A text "
    assert read_head(encoder).max_length is None
    write_json(encoder / "sentence_bert_config.json", {"max_seq_length": 77, "do_lower_case": True})
    prompts = {"prompts": {"query": "Query: ", "document": ""}, "default_prompt_name": "query"}
    write_json(encoder / "config_sentence_transformers.json", prompts)
    head = read_head(encoder)
    assert head.max_length == 77 and head.prepared("A text") == "query: a text"


def change(file: str, content: Any) -> Any:
    return lambda path: write_json(path / file, content)


def dense(**more: Any) -> Any:
    def make(path: Path) -> None:
        write_modules(path, "Pooling", "Dense")
        write_dense(path / "2_Dense", **more)

    return make


def dense_without_weights(path: Path) -> None:
    dense()(path)
    (path / "2_Dense/model.safetensors").unlink()


def left_out_prompt(path: Path) -> None:
    write_json(path / "1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False})
    write_json(
        path / "config_sentence_transformers.json", {"prompts": {"q": "Query: "}, "default_prompt_name": "q"}
    )


REFUSED = {
    "other modules": (
        lambda path: write_modules(path, "LSTM", "Pooling"),
        "modules Transformer, LSTM, Pooling; sent",
    ),
    "no pooling": (
        lambda path: write_modules(path, "Normalize"),
        "has the sentence-transformers modules Transformer, N",
    ),
    "no modules": (
        change("modules.json", []),
        "has the sentence-transformers modules none; sentence embeddings",
    ),
    "own code": (
        change(
            "modules.json",
            [{"path": "", "type": "mine.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}],
        ),
        "has the sentence-transformers modules mine.Transformer, x.Pooling; sentence embeddings are measured for",
    ),
    "pooling mode": (
        change("1_Pooling/config.json", {"pooling_mode": "median"}),
        "pools by 'median'; known are cls, max",
    ),
    "pooling file": (lambda path: (path / "1_Pooling/config.json").unlink(), "1_Pooling/config.json"),
    "activation": (
        dense(activation="Softplus"),
        "activates by torch.nn.modules.activation.Softplus; known are torch's",
    ),
    "foreign activation": (
        dense(activation_function="mine.Tanh"),
        "activates by mine.Tanh; known are torch's Tanh, ",
    ),
    "residual": (
        dense(use_residual=True),
        "2_Dense is a Dense module with a residual, which is not measured; use",
    ),
    "tokens": (
        dense(module_input_name="token_embeddings"),
        "2_Dense works on 'token_embeddings'; measured are modules",
    ),
    "no weights": (dense_without_weights, "2_Dense/model.safetensors holds no linear.weight"),
    "prompt": (
        left_out_prompt,
        "leaves its default prompt 'q' out of the pooling, which is not measured; use",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_in_one_sentence(encoder: Path, case: str) -> None:
    spoil, words = REFUSED[case]
    spoil(encoder)
    with pytest.raises(BadCheckpoint) as caught:
        read_head(encoder)
    said = str(caught.value)
    assert words in said and said.startswith(str(encoder)) and said.endswith(".") and "\n" not in said


def test_the_packages_of_version_6(tmp_path: Path) -> None:
    """What sentence-transformers 6.2 writes for the same model, other packages and one pooling field."""
    sentence_encoder(tmp_path)
    kinds = (
        "base.modules.transformer.Transformer",
        "sentence_transformer.modules.pooling.Pooling",
        "base.modules.normalize.Normalize",
    )
    modules = json.loads((tmp_path / "modules.json").read_text())
    for module, kind in zip(modules, kinds, strict=True):
        module["type"] = f"sentence_transformers.{kind}"
    write_json(tmp_path / "modules.json", modules)
    pooling = {"embedding_dimension": WIDTH, "pooling_mode": "mean", "include_prompt": True}
    write_json(tmp_path / "1_Pooling/config.json", pooling)
    write_json(tmp_path / "2_Normalize/config.json", {"module_input_name": "sentence_embedding"})
    again = tmp_path / "again"
    assert np.array_equal(embedded(tmp_path), embedded(sentence_encoder(again)))


def test_a_plain_model_has_no_head(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="modules none"):
        read_head(tiny("bert", tmp_path))
