"""The page: complete, alone, escaped, and the same every time."""

import dataclasses
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmcomp.report.html import render
from llmcomp.report.schema import Left, Report


@pytest.fixture(scope="module")
def text() -> str:
    """The page of the example, drawn once."""
    example = runpy.run_path(str(Path(__file__).parent / "conftest.py"))
    return render(example["make_report"]())


VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects text, attributes and element names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]


def test_holds_everything(report: Report, text: str) -> None:
    page = Page(text)
    for part in (
        "12.43 → 12.90",
        "[12.55, 13.26]",
        "91.2%",
        "WikiText-2 train, 128 samples",
        "14 of 2,461 rows were duplicates",
        "201 tensor names, shapes and dtypes equal",
        "Gram matrix did not factor",
        "lm_head",
        "method: gptq",
        "llmcomp quantize tinyllama --recipe llmcomp_recipe.yaml --output tinyllama-gptq-w4",
        "AMD EPYC 9B14",
        "2026-11-21 10:41 UTC",
        "3 input channels never active",
    ):
        assert part in page.text, part
    names = set(page.text.split())
    assert all(layer.name in names for layer in report.layers)


def test_has_all_plots_with_accessible_titles(text: str) -> None:
    page = Page(text)
    assert [value for tag, key, value in page.attributes if (tag, key) == ("svg", "role")] == ["img"] * 3
    ids = set(page.all("id"))
    for name in ("sizes", "errors", "places"):
        assert f"{name}-title {name}-description" in page.all("aria-labelledby")
        assert {f"{name}-title", f"{name}-description"} <= ids
    assert "model.layers.21.mlp.down_proj: 0.0622, int4 g128" in page.text  # a tooltip


def test_ids_are_unique_and_links_lead_somewhere(text: str) -> None:
    page = Page(text)
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    used = [value.removeprefix("#") for value in page.all("href")]
    used += re.findall(r"url\(#([^)]+)\)", " ".join(page.all("clip-path")))
    assert used
    assert set(used) <= set(ids)


def test_needs_no_network(text: str) -> None:
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert page.all("src") == []
    assert all(value.startswith("#") for value in page.all("href"))
    assert not re.search(r"@import|url\((?!#)", text)


def test_colours_follow_the_theme(text: str) -> None:
    assert "prefers-color-scheme: dark" in text
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert not any(re.search(r"(fill|stroke): #", plot) for plot in plots)
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    for theme in re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:1]:
        assert used <= set(re.findall(r"--([\w-]+):", theme))


FIELDS = ("model", "output", "source", "architecture", "task", "format")


def test_outside_text_is_escaped(report: Report) -> None:
    def evil(field: str) -> str:
        return f"<script>{field}</script>\"'$x^$"

    for field in FIELDS:
        setattr(report, field, evil(field))
    report.notes, report.labels = [evil("note")], [evil("label")]
    report.left = [Left(evil("left"), evil("reason"), 5)]
    report.layers[0].name, report.layers[0].fallback = evil("layer"), evil("fallback")
    report.layers[1].role, report.layers[1].scheme = evil("role"), evil("scheme")
    report.recipe = {"recipe": evil("recipe")}
    report.calibration = {"data": evil("data"), "warnings": [evil("warning")]}
    assert report.size_after is not None
    report.size_after.parts[evil("part")] = 10**9
    text = render(report)
    Page(text)
    assert text.count("<script>") == 1
    names = "note label left reason layer fallback role scheme recipe data warning part"
    for field in (*FIELDS, *names.split()):
        assert f"&lt;script&gt;{field}&lt;" in text, field


def test_is_the_same_every_time(report: Report, text: str) -> None:
    assert text == render(Report.from_json(report.to_json()))


def test_with_little_to_say(report: Report) -> None:
    bare = Report.from_json(report.to_json())
    for name in ("size_before", "size_after", "before", "after", "divergence", "verification", "peak_memory"):
        setattr(bare, name, None)
    bare.layers, bare.left, bare.labels, bare.notes = [], [], [], []
    bare.recipe, bare.calibration, bare.phases = {}, {}, {}
    bare.command, bare.format = "evaluate", ""
    page = Page(render(bare))
    assert "tinyllama" in page.text
    assert "svg" not in {tag for tag, _, _ in page.attributes}


def test_without_evaluation(report: Report) -> None:
    text = render(dataclasses.replace(report, before=None, after=None, divergence=None))
    assert "Quality was not measured" in Page(text).text
    assert text.count("<svg") == 3


def test_layers_without_errors_or_parts(report: Report) -> None:
    for layer in report.layers:
        layer.error = None
    assert report.size_after is not None
    report.size_after.parts = {}
    page = Page(render(report))
    assert "errors-title" not in page.all("id")
    assert "sizes-title" not in page.all("id")
    assert "places-title" in page.all("id")


def test_does_not_touch_matplotlib_settings(report: Report) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    render(report)
    assert dict(matplotlib.rcParams) == before
