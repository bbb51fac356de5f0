"""The model card: metadata that the Hub accepts, the report's numbers, nothing from outside that breaks out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hub_writing import card_errors
from huggingface_hub import ModelCard

from llmcomp import licences, provenance
from llmcomp.report import card as cards
from llmcomp.report.schema import Distillation, Interval, Origin, Report
from llmcomp.report.snippets import NOT_RUN, snippets

COMMIT = "fe8a4ea1ffedaf415f4da2f062534de366a451e6"
ORIGIN = Origin("TinyLlama/TinyLlama-1.1B", COMMIT, "apache-2.0", None, None, ["en", "de"], "text-generation")


@pytest.fixture
def known(report: Report) -> Report:
    return replace(report, origin=ORIGIN, format="compressed-tensors")


def front(text: str) -> dict:
    return yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---\n"))


def test_metadata_are_what_the_hub_reads(known: Report) -> None:
    text = cards.card(known, "me/tiny-w4", gguf=True).text
    assert card_errors(text) == []
    data = front(text)
    assert data["base_model"] == ORIGIN.repo and data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0" and data["language"] == ["en", "de"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"llmcomp", "gptq", "int4", "compressed-tensors"} <= set(data["tags"])


def test_huggingface_hub_reads_the_results_back(known: Report) -> None:
    results = ModelCard(cards.card(known, "me/tiny-w4").text).data.eval_results
    perplexity = next(one for one in results if one.metric_type == "perplexity")
    after = known.after.quality.metrics["perplexity"]
    assert perplexity.metric_value == after.value
    assert perplexity.metric_args == {"interval_low": after.low, "interval_high": after.high}
    assert perplexity.task_type == "text-generation"
    assert {one.metric_type for one in results} == {"perplexity", "kl_mean", "top1_agreement"}


def test_the_table_is_the_reports(known: Report) -> None:
    text = cards.card(known, "me/tiny-w4").text
    assert "| perplexity | 12.43 [12.10, 12.78] | 12.90 [12.55, 13.26] | +3.79% |" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) > 4 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}


def test_everything_that_was_asked_of_a_card_is_there(known: Report) -> None:
    made = cards.card(known, "me/tiny-w4", gguf=True)
    for heading in ("Before and after", "How to load it", "Faster, or only smaller", "How it was made",
                    "Calibration data", "Limits", "Licence"):  # fmt: skip
        assert f"\n## {heading}\n" in made.text
    for words in (COMMIT, "CC BY-SA 3.0 and GFDL", "torch 2.13.0", "14 of 2,461 rows were duplicates",
                  "2 weights got something other than asked", "method: gptq"):  # fmt: skip
        assert words in made.text
    assert set(made.images) == set(re.findall(r"\]\((llmcomp_plots/\w+\.png)\)", made.text))
    assert all(image.startswith(b"\x89PNG") for image in made.images.values())


def test_what_was_trained_on_is_named_with_its_licence(known: Report) -> None:
    losses = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    found = Distillation("logits", {"soft": 1.0}, "all", ["org/teacher"], "mine.txt: 8 samples", 1, 2, 9, 0, losses)
    text = cards.card(replace(known, distillation=found, recipe={"data": "mine.txt"}), "me/student").text
    assert "Learned from org/teacher by logits (soft × 1" in text.split("## How it was made")[1]
    said = text.split("## Calibration and training data")[1].split("## ")[0]
    assert "Calibrated on WikiText-2" in said and "Licence: CC BY-SA 3.0 and GFDL." in said
    assert "Trained on mine.txt: 8 samples. Licence: not known to llmcomp." in said
    assert "distilled" in cards.tags(replace(known, distillation=found))


def test_a_report_with_little_in_it_makes_a_card(known: Report) -> None:
    bare = replace(known, layers=[], left=[], before=None, after=None, divergence=None, size_before=None,
                   size_after=None, origin=None, calibration={}, labels=[], notes=[], verification=None)  # fmt: skip
    text = cards.card(bare, "./here").text
    assert card_errors(text) == []
    assert "base_model" not in text and "Nothing was measured." in text and "None was read." in text
    assert "names no licence" in text


def test_what_comes_from_outside_stays_inside(known: Report) -> None:
    nasty = "x | y\n## Heading <script>alert(1)</script>"
    quality = replace(known.after.quality, data=nasty, metrics={"a|b": Interval(1.0, 0.5, 1.5)})
    known = replace(known, notes=[nasty], after=replace(known.after, quality=quality),
                    origin=replace(ORIGIN, license_name="---\nlicense: mit"))  # fmt: skip
    text = cards.card(known, "me/tiny-w4").text
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body and "\n## Heading" not in body and "a\\|b" in body
    assert front(text)["license"] == "apache-2.0" and card_errors(text) == []


def test_relations_are_the_hubs_words(known: Report) -> None:
    assert cards.relation(known) == "quantized"
    pruned = replace(known, layers=[replace(layer, scheme="2:4") for layer in known.layers])
    assert cards.relation(pruned) == "finetune"
    assert "sparse" in cards.tags(pruned) and "int4" not in cards.tags(pruned)


def test_snippets_are_those_that_can_work(known: Report) -> None:
    titles = [one.title for one in snippets(known, "me/x", gguf=True)]
    assert titles == ["transformers", "llmcomp", "llama.cpp", "vLLM"]
    untested = [one for one in snippets(known, "me/x", gguf=True) if not one.tested]
    assert [one.title for one in untested] == ["vLLM"] and untested[0].hint == NOT_RUN
    own = snippets(replace(known, format="llmcomp"), "me/x", gguf=False)
    assert "import llmcomp.hf" in own[0].code and len(own) == 2
    for task in ("masked-lm", "encoder", "sequence-classification", "question-answering"):
        for one in snippets(replace(known, task=task), "me/x", gguf=False):
            compile(one.code, "snippet", "exec")


@pytest.mark.parametrize(
    ("licence", "name", "words"),
    [
        ("apache-2.0", None, None),
        ("MIT", None, None),
        ("cc-by-nd-4.0", None, "cc-by-nd-4.0, which forbids sharing derivatives"),
        ("CC-BY-NC-ND-3.0", None, "forbids sharing derivatives"),
        ("cc-by-nc-4.0", None, "its conditions hold for it, too"),
        ("llama3.1", None, "its conditions hold for it, too"),
        (None, None, "names no licence"),
        ("other", "mit, cc-by-nd-4.0", "cc-by-nd-4.0, which forbids sharing derivatives"),
        ("other", "mit, apache-2.0", "under other (mit, apache-2.0)"),
    ],
)
def test_what_a_licence_says_of_derivatives(licence: str | None, name: str | None, words: str | None) -> None:
    said = licences.warning(licence, name)
    assert said is None if words is None else words in said


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nlanguage: [en, no]\n---\nText", Origin(license="mit", languages=["en", "no"])),
        ("---\nlicense: [apache-2.0]\nlanguage: en\n---", Origin(license="apache-2.0", languages=["en"])),
        ("---\r\nlicense: other\r\nlicense_name: gemma\r\n---\r\n", Origin(license="other", license_name="gemma")),
        ("---\nlicense:\n- mit\n- cc-by-nd-4.0\n---\n", Origin(license="other", license_name="mit, cc-by-nd-4.0")),
        ("no metadata", Origin()),
        ("---\n[not: a: mapping\n---\n", Origin()),
        ("---\n- a list\n---\n", Origin()),
        ("---\nlicense: {a: b}\nlanguage: 3\n---\n", Origin()),
        ("---\ndate: 2020-99-99\n---\n", Origin()),
    ],
)
def test_what_a_sources_card_says(tmp_path: Path, card: str, expected: Origin) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert provenance.origin_of(tmp_path) == expected


def test_a_snapshot_knows_its_commit(tmp_path: Path, known: Report) -> None:
    snapshot = tmp_path / "models--org--base--x" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    found = provenance.origin_of(snapshot)
    assert (found.repo, found.commit) == ("org/base--x", COMMIT)
    (snapshot / "llmcomp_report.json").write_text(known.to_json())
    assert provenance.origin_of(snapshot) == ORIGIN, "what llmcomp made keeps the origin of its source"
