"""The pure parts of the benchmark: windows, losses, divergences, paired intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evals.common import (
    MARKS_ENV,
    Interval,
    assets_root,
    calibration_windows,
    mark,
    markdown,
    paired_interval,
    paired_ratio,
    percent,
    read_memory,
    sentence_kl,
    window_losses,
    window_starts,
)


@pytest.mark.parametrize("tokens", [20_000, 262_144, 64 * 256])
def test_window_starts_are_evenly_spaced_and_inside(tokens):
    by_seed = [window_starts(tokens, 64, 256, seed) for seed in range(3)]
    spacing = (tokens - 256) / 64
    for seed, starts in enumerate(by_seed):
        assert len(starts) == 64
        assert starts[0] == int(seed * (tokens - 256) / (3 * 64))
        assert starts[-1] + 256 <= tokens
        assert set(np.diff(starts)) <= {int(spacing), int(spacing) + 1}
    assert not set(by_seed[0]) & set(by_seed[1]) & set(by_seed[2])


def test_window_starts_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="cannot hold 64 windows of 256"):
        window_starts(64 * 256 - 1, 64, 256, 0)
    with pytest.raises(ValueError, match=r"seed 3 is outside 0\.\.2"):
        window_starts(100_000, 64, 256, 3)


def test_calibration_windows_are_the_text_at_those_places(assets):
    from transformers import AutoTokenizer

    model, text = assets / "models" / "lm", assets / "data" / "books" / "calibration.txt"
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), add_special_tokens=False)["input_ids"]
    windows = calibration_windows(model, text, seed=1)
    starts = window_starts(len(ids), 64, 256, 1)
    assert windows.shape == (64, 256)
    assert windows[17].tolist() == ids[starts[17] : starts[17] + 256]


def test_window_losses_match_float64():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        initializer_range=0.5,  # logits far from uniform, so that an error in the shift would show
    )
    model = LlamaForCausalLM(config).eval()
    windows = torch.randint(50, (5, 16))
    losses = window_losses(model, windows, batch=2)
    with torch.inference_mode():
        log_p = model(windows).logits.double().log_softmax(-1)
    expected = [
        -np.mean([log_p[row, place, windows[row, place + 1]].item() for place in range(15)])
        for row in range(5)
    ]
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_sentence_kl_matches_torch_and_is_zero_on_itself():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 40, 3)) * 4
    log_p, log_q = (torch.tensor(x).log_softmax(-1) for x in (p, q))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(sentence_kl(p, q), expected.numpy(), atol=1e-12)
    np.testing.assert_allclose(sentence_kl(p, p + 5), 0, atol=1e-12)


class TestPairedInterval:
    """Against cases whose answer is known."""

    def test_constant_shift_has_no_width(self):
        base = np.random.default_rng(0).normal(size=(3, 100))
        interval = paired_interval(base + 0.25, base)
        assert (interval.low, interval.mean, interval.high) == pytest.approx((0.25, 0.25, 0.25))

    def test_width_over_windows_is_the_normal_one(self):
        noise = np.random.default_rng(1).normal(size=256)
        ours = np.tile(noise, (3, 1))  # seeds agree, so only the windows' noise is left
        interval = paired_interval(ours, np.zeros_like(ours))
        half = 1.96 * noise.std() / np.sqrt(256)
        assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)
        assert interval.mean == pytest.approx(noise.mean())

    def test_seeds_that_disagree_widen_it(self):
        seeds = np.repeat([[-1.0], [0.0], [1.0]], 256, axis=1)  # no noise between windows at all
        interval = paired_interval(seeds, np.zeros_like(seeds))
        assert interval.low <= -0.9
        assert interval.high >= 0.9

    def test_noise_shared_by_both_cancels(self):
        rng = np.random.default_rng(2)
        hard = rng.normal(size=256) * 10  # some windows are hard for every model
        ours = hard + rng.normal(size=(3, 256)) * 0.01
        theirs = hard + 0.01 + rng.normal(size=(3, 256)) * 0.01
        interval = paired_interval(ours, theirs)
        assert interval.low < -0.01 < interval.high < 0

    def test_is_reproducible_and_checks_shapes(self):
        ours = np.random.default_rng(3).normal(size=(3, 20))
        assert paired_interval(ours, ours * 2) == paired_interval(ours, ours * 2)
        with pytest.raises(ValueError, match="one shape"):
            paired_interval(ours, ours[:, :-1])


class TestPairedRatio:
    def test_a_share_that_all_have_has_no_width(self):
        bottom = np.random.default_rng(0).uniform(1, 2, size=(3, 50))
        found = paired_ratio(bottom * 0.97, bottom)
        assert (found.low, found.mean, found.high) == pytest.approx((0.97, 0.97, 0.97))

    def test_it_is_the_ratio_of_means_of_what_was_drawn(self):
        """Against draws that are made one by one."""
        rng = np.random.default_rng(1)
        top, bottom = rng.uniform(0, 1, (3, 40)), rng.uniform(1, 2, (3, 40))
        slow = []
        for _ in range(4000):
            picked = np.ix_(rng.integers(0, 3, 3), rng.integers(0, 40, 40))
            slow.append(top[picked].mean() / bottom[picked].mean())
        found = paired_ratio(top, bottom)
        assert found.mean == pytest.approx(top.mean() / bottom.mean())
        assert (found.low, found.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.01)

    def test_nothing_below_the_line_is_no_ratio(self):
        found = paired_ratio(np.ones((2, 9)), np.zeros((2, 9)))
        assert np.isnan([found.low, found.high]).all()


def test_percent_is_relative_perplexity():
    shown = percent(Interval(np.log(1.02), 0.0, np.log(1.5)))
    assert (shown.mean, shown.low, shown.high) == pytest.approx((2, 0, 50))


def test_read_memory_reads_kilobytes():
    status = "Name:\tx\nVmHWM:\t   900 kB\nVmRSS:\t 800 kB\n"
    status += "RssAnon:\t 500 kB\nRssFile:\t 200 kB\nRssShmem:\t 100 kB\n"
    memory = read_memory(status)
    assert (memory.anonymous, memory.mapped) == (500 * 1024, 300 * 1024)
    assert (memory.resident, memory.high_water) == (800 * 1024, 900 * 1024)


def test_mark_writes_only_where_asked(tmp_path, monkeypatch):
    monkeypatch.delenv(MARKS_ENV, raising=False)
    mark("IMPORTED")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(MARKS_ENV, str(tmp_path / "marks"))
    mark("IMPORTED")
    mark("DONE")
    rows = [json.loads(line) for line in (tmp_path / "marks").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["IMPORTED", "DONE"]
    assert rows[0]["anonymous"] > 1e6
    assert rows[0]["time"] <= rows[1]["time"]


def test_markdown_pads_columns():
    assert markdown(["a", "tool"], [["1.25", "x"]]) == "| a    | tool |\n|------|------|\n| 1.25 | x    |"


def test_assets_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("LLMCOMP_ASSETS", "/some/where")
    assert assets_root() == Path("/some/where")
