"""Quality of models that read more than one text, against losses that the models compute themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import build, tiny
from tiny_media import write_data

from llmcomp.calibration.data import Batch, Texts
from llmcomp.calibration.media import read_media
from llmcomp.errors import BadData
from llmcomp.measure import quality
from llmcomp.measure.inputs import make_inputs, media_inputs
from llmcomp.measure.load import load_tokenizer
from llmcomp.measure.run import Settings

SETTINGS = Settings(windows=5, sequence_length=33, rows=8, tokens_per_batch=60)


def coarser(model: Any) -> Any:
    """The same with rounded weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_((parameter * 16).round() / 16)
    return other


def own_losses(model: Any, batches: list[Batch], main: str) -> tuple[float, int]:
    """Sum of the negative log-likelihoods by the model's own loss on labels, in float64; how many tokens."""
    total, count, exact = 0.0, 0, copy.deepcopy(model).double()
    for batch in batches:
        for row in range(len(batch.input_ids)):
            labels = batch.input_ids[row : row + 1, 1:]
            given = batch.context[main][row : row + 1]
            given = given.double() if given.is_floating_point() else given
            with torch.no_grad():
                output = exact(**{main: given}, decoder_input_ids=batch.input_ids[row : row + 1, :-1])
            loss = torch.nn.functional.cross_entropy(output.logits[0], labels[0], reduction="sum")
            total, count = total + float(loss), count + labels.numel()
    return total, count


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_perplexity_is_that_of_what_the_decoder_writes(name: str, tmp_path: Path) -> None:
    directory, model = tiny(name, tmp_path / "m", tokenizer=True), build(name)
    if name == "whisper":
        data = read_media(str(write_data(name, tmp_path / "data")), "sound")
        inputs, main = media_inputs(data, directory, model, "speech-seq2seq", SETTINGS), "input_features"
    else:
        words = " ".join(f"word{n} and more" for n in range(300))
        texts = Texts([words], None, "words", running=True)
        inputs, main = make_inputs(texts, load_tokenizer(directory), model, "seq2seq-lm", SETTINGS), "input_ids"
    before, after, divergence = quality.compare(model, coarser(model), inputs.batches, inputs.subject)
    total, count = own_losses(model, inputs.batches, main)
    assert before is not None and after is not None and divergence is not None
    assert before.tokens == count
    assert before.metrics["perplexity"].value == pytest.approx(np.exp(total / count), rel=1e-5)
    assert divergence.kl_mean.value > 1e-6 and after.metrics["perplexity"].value != before.metrics["perplexity"].value


def test_images_are_classified_beside_their_labels(tmp_path: Path) -> None:
    directory, model = tiny("vit-classifier", tmp_path / "m", tokenizer=True), build("vit-classifier")
    data = read_media(str(write_data("vit-classifier", tmp_path / "data")), "images")
    inputs = media_inputs(data, directory, model, "image-classification", SETTINGS)
    before, _, divergence = quality.compare(model, coarser(model), inputs.batches, inputs.subject)
    with torch.no_grad():
        pixels = torch.cat([batch.context["pixel_values"] for batch in inputs.batches])
        mine, other = model.double()(pixels.double()).logits, coarser(model)(pixels.double()).logits
    assert data.labels is not None and before is not None and divergence is not None
    right = [model.config.label2id[label] for label in data.labels]
    assert before.metrics["accuracy"].value == pytest.approx(float((mine.argmax(-1).numpy() == right).mean()))
    kl = torch.nn.functional.kl_div(other.log_softmax(-1), mine.log_softmax(-1), reduction="none", log_target=True)
    assert divergence.kl_mean.value == pytest.approx(float(kl.sum(-1).mean()), rel=1e-2)


def test_labels_that_are_not_the_models(tmp_path: Path) -> None:
    directory, model = tiny("vit-classifier", tmp_path / "m", tokenizer=True), build("vit-classifier")
    data = read_media(str(write_data("vit-classifier", tmp_path / "data")), "images")
    data.labels = ["cat"] * 8
    with pytest.raises(BadData, match="label 'cat' is none of the model's 3 classes"):
        media_inputs(data, directory, model, "image-classification", SETTINGS)
