"""What is compared, and what does not pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcomp.errors import BadRecipe, VerificationFailed
from llmcomp.exports.compare import Difference, answers, difference, import_or_explain, require_close
from llmcomp.exports.signatures import Signature

ENCODER = Signature(["input_ids", "attention_mask"], ["logits"], [], 100, 64)
DECODER = Signature(["input_ids", "attention_mask", "position_ids"], ["logits"], [(2, 4, 4)], 100, 64)


def outputs(value: float = 1.0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*batch["input_ids"].shape, 7) for batch in ENCODER.batches()]
    return [{"logits": value * torch.randn(shape, generator=generator)} for shape in shapes]


def test_it_is_relative_to_the_deviation() -> None:
    wanted, found = outputs(10.0), outputs(10.0)
    for one in found:
        one["logits"] += 1.0
    gap = difference(found, wanted, ENCODER)
    assert gap.largest == pytest.approx(1.0, abs=1e-5)
    assert gap.relative == pytest.approx(0.1, rel=0.1)


def test_padding_does_not_count() -> None:
    found = outputs()
    for one, batch in zip(found, ENCODER.batches(), strict=True):
        one["logits"][batch["attention_mask"] == 0] = 1e6
    assert difference(found, outputs(), ENCODER) == Difference(0.0, 0.0)


def test_nan_does_not_pass() -> None:
    found = outputs()
    found[1]["logits"][0, 0, 0] = float("nan")
    with pytest.raises(VerificationFailed, match="logits of the file is NaN or Inf"):
        difference(found, outputs(), ENCODER)


def test_another_shape_does_not_pass() -> None:
    found = outputs()
    found[0] = {"logits": found[0]["logits"][:, :, :3]}
    with pytest.raises(VerificationFailed, match=r"\[2, 11, 3\], expected \[2, 11, 7\]"):
        difference(found, outputs(), ENCODER)


def test_what_is_too_far_is_told() -> None:
    require_close(Difference(1.0, 0.01), 0.01, "Outputs")
    for relative in (0.011, float("nan")):
        with pytest.raises(VerificationFailed, match=r"Outputs differ .* 1e-02 is allowed"):
            require_close(Difference(1.0, relative), 0.01, "Outputs")


def test_a_cache_that_does_not_grow_is_seen() -> None:
    def forgets(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = inputs["input_ids"]
        present = {name: torch.zeros(len(ids), 2, ids.shape[1], 4) for name in DECODER.present}
        return {"logits": torch.zeros(*ids.shape, 7), **present}

    with pytest.raises(VerificationFailed, match="it is not a cache"):
        answers(forgets, DECODER)


def test_prompts_are_padded_on_the_left_and_count_from_the_first_token() -> None:
    batch = DECODER.batches()[0]
    assert batch["attention_mask"][1].tolist() == [0] * 3 + [1] * 8
    assert batch["position_ids"][1].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]


def test_a_missing_package_says_what_to_install() -> None:
    with pytest.raises(BadRecipe, match=r"needs the package no_such_package: pip install 'llmcomp\[onnx\]'"):
        import_or_explain(("json", "no_such_package"), "onnx")
