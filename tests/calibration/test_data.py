"""Reading texts from every kind of source, cutting them into windows, batching them."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from tiny import BOS, EOS, PAD, write_tokenizer

from llmcomp.calibration import data
from llmcomp.calibration.data import Texts
from llmcomp.errors import BadData

TEXT = "the model reads a module and returns the value of an object with its name in the class"
WORDS = TEXT.split()


def running(tokens: int = 4000) -> Texts:
    rows = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(40)) + f" {i}." for i in range(tokens // 60)]
    return Texts(rows, None, "made text", running=True)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("decoder"), encoder=False)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("encoder"), encoder=True)


ROWS = [{"id": 1, "sentence": "good film", "label": 1}, {"id": 2, "sentence": "dull", "label": 0}]


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    else:
        path.write_text(json.dumps(ROWS))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_tables_give_rows_and_labels(tmp_path, suffix):
    texts = data.read_texts(str(write(tmp_path / f"rows{suffix}")))
    assert texts.rows == ["good film", "dull"]
    assert texts.labels == [1, 0]
    assert not texts.running


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"s": "a", "label": 1}\n{"s": "b", "label": null}\n{"s": "c"}\n{"s": "d", "label": 0}'),
        ("a.csv", "text,label\na,1\nb,\nc,\nd,0\n"),
        ("a.tsv", 'text\tlabel\na\t1\nb\t""\nc\t\nd\t0\n'),
    ],
)
def test_rows_may_lack_a_label_where_that_is_allowed(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert data.read_texts(str(tmp_path / name), gaps=True).labels == [1, None, None, 0]
    with pytest.raises(BadData, match="no label in row 1"):
        data.read_texts(str(tmp_path / name), label_column="label")


def test_plain_text_is_kept_to_the_letter(tmp_path):
    text = "One.\n\n\n\nTwo, in\ntwo lines.\n\n é\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    texts = data.read_texts(str(tmp_path / "a.txt"))
    assert "\n\n".join(texts.rows) == text
    assert texts.running


def test_columns_can_be_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"first": "a", "second": "b", "score": 0.5}\n{"first": "c", "second": null, "score": 1}\n'
    )
    texts = data.read_texts(str(path), text_column="second")
    assert texts.rows == ["b", ""]
    assert texts.labels == [0.5, 1]


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("a.txt", None, {}, "does not exist"),
        ("a.txt", b"", {}, "is empty"),
        ("a.txt", b" \n\n", {}, "nothing but white space"),
        ("a.txt", b"caf\xe9 au lait", {}, r"not UTF-8: byte 0xe9 at offset 3"),
        ("a.docx", b"x", {}, r"ends in '.docx'; expected one of .txt"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', {}, "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n7', {}, "row 1 is int; expected an object"),
        ("a.json", b'{"text": "a"}', {}, "must be a list of objects"),
        ("a.csv", b"text\n", {}, "holds no rows"),
        ("a.csv", b"text,label\na\n", {}, "row 0 has another number of fields"),
        ("a.parquet", b"nonsense", {}, "is not a readable parquet file"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', {}, r"no column that is clearly the text \(columns: a, b\)"),
        ("a.jsonl", b'{"a": "x"}', {"text_column": "text"}, "has no column 'text'; it has a"),
        ("a.jsonl", b'{"a": "x"}', {"label_column": "gold"}, "has no column 'gold'; it has a"),
        ("a.jsonl", b'{"a": 3}', {"text_column": "a"}, "column 'a' holds int in row 0; expected text"),
        ("a.jsonl", b'{"a": "x", "l": null}', {"label_column": "l"}, "no label in row 0"),
        ("a.safetensors", b"nonsense", {}, "is not a readable safetensors file"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path, name, content, options, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=words) as caught:
        data.read_texts(str(tmp_path / name), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "split"), [("org/name:config:test", "train"), ("org/name", "validation[:10%]")]
)
def test_calibration_refuses_held_out_splits(source, split):
    with pytest.raises(BadData, match="Calibration never reads a held-out split"):
        data.read_texts(source, split=split)


def test_a_file_that_is_called_test_is_warned_of(tmp_path):
    (tmp_path / "test.txt").write_text("a text")
    assert "looks like held-out data" in data.read_texts(str(tmp_path / "test.txt")).warnings[0]


def test_token_ids_need_no_tokenizer(tmp_path):
    ids = torch.arange(24).view(4, 6)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    texts = data.read_texts(str(tmp_path / "ids.safetensors"))
    found = data.windows(texts, None, samples=3, length=5, seed=1, task="causal-lm")
    assert torch.equal(torch.stack(found), ids[:3, :5])


@pytest.mark.parametrize(
    "tensors", [{"tokens": torch.ones(2, 2, dtype=torch.int64)}, {"input_ids": torch.ones(2, 2)},
                {"input_ids": torch.ones(4, dtype=torch.int64)}],
)  # fmt: skip
def test_other_tensors_are_no_token_ids(tmp_path, tensors):
    save_file(tensors, tmp_path / "ids.safetensors")
    with pytest.raises(BadData, match="must hold one int64 tensor 'input_ids'"):
        data.read_texts(str(tmp_path / "ids.safetensors"))


@pytest.mark.parametrize(
    ("tokens", "count", "length"), [(1000, 10, 20), (200, 10, 20), (205, 10, 20), (7, 7, 1)]
)
def test_windows_start_inside_and_do_not_overlap(tokens, count, length):
    taken = []
    for seed in range(5):
        starts = data.window_starts(tokens, count, length, seed)
        assert len(starts) == count
        assert starts[0] >= 0 and starts[-1] + length <= tokens
        assert all(b - a >= length for a, b in itertools.pairwise(starts))
        taken.append(tuple(starts))
    if tokens >= 2 * count * length:
        assert len(set(taken)) == 5


def test_decoder_windows_are_stretches_of_the_text(decoder):
    texts = running()
    stream = decoder("\n\n".join(texts.rows), add_special_tokens=False)["input_ids"]
    found = data.windows(texts, decoder, samples=8, length=64, seed=2, task="causal-lm")
    assert [len(window) for window in found] == [64] * 8
    joined = " ".join(map(str, stream))
    assert all(" ".join(map(str, window.tolist())) in joined for window in found)
    again = data.windows(texts, decoder, samples=8, length=64, seed=2, task="causal-lm")
    other = data.windows(texts, decoder, samples=8, length=64, seed=1, task="causal-lm")
    assert data.fingerprint(found) == data.fingerprint(again) != data.fingerprint(other)


def test_decoders_that_begin_texts_with_a_token_begin_windows_with_it(decoder, tmp_path):
    from tokenizers import processors

    beginning = write_tokenizer(tmp_path, encoder=False)
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    texts = running()
    found = data.windows(texts, beginning, samples=4, length=32, seed=0, task="causal-lm")
    assert all(window[0] == BOS and EOS not in window and len(window) == 32 for window in found)
    assert "each beginning with <s>" in data.describe(texts, found, beginning, "causal-lm")
    plain = data.windows(texts, decoder, samples=4, length=32, seed=0, task="causal-lm")
    assert BOS not in torch.cat(plain)
    assert "no beginning token" in data.describe(texts, plain, decoder, "causal-lm")


@pytest.mark.parametrize("task", ["masked-lm", "encoder", "sequence-classification"])
def test_encoder_windows_of_running_text_are_wrapped(encoder, task):
    found = data.windows(running(), encoder, samples=4, length=32, seed=0, task=task)
    for window in found:
        assert len(window) == 32
        assert window[0] == BOS and window[-1] == EOS
        assert not torch.isin(window[1:-1], torch.tensor([BOS, EOS, PAD])).any()


def test_classifiers_get_rows_and_language_models_get_them_joined(encoder):
    texts = Texts([" ".join(WORDS[: 1 + i % 9]) for i in range(300)], None, "rows")
    found = data.windows(texts, encoder, samples=20, length=8, seed=0, task="sequence-classification")
    assert len(found) == 20
    assert len({len(window) for window in found}) > 1
    assert max(len(window) for window in found) == 8
    assert all(window[0] == BOS and window[-1] == EOS for window in found)
    joined = data.windows(texts, encoder, samples=20, length=30, seed=0, task="masked-lm")
    assert {len(window) for window in joined} == {30}


def test_length_is_clipped_to_the_positions_of_the_model(decoder):
    found = data.windows(running(), decoder, samples=2, length=512, seed=0, task="causal-lm", max_length=48)
    assert [len(window) for window in found] == [48, 48]


def test_fewer_tokens_than_one_sample(decoder):
    texts = Texts(["short text"], None, "a.txt", running=True)
    with pytest.raises(BadData, match=r"a.txt has \d+ tokens, fewer than one sample of 64"):
        data.windows(texts, decoder, samples=2, length=64, seed=0, task="causal-lm")


def test_rows_without_text(encoder):
    with pytest.raises(BadData, match="has no row with text"):
        data.windows(Texts(["", " "], None, "a.csv"), encoder, samples=2, length=8, seed=0, task="encoder")


def test_a_long_text_is_not_tokenized_whole(decoder, monkeypatch):
    monkeypatch.setattr(data, "_WHOLE", 100_000)
    texts = running(60_000)
    asked = []

    class Counting:
        def __call__(self, text, **options):
            asked.append(len(text))
            return decoder(text, **options)

    found = data.windows(texts, Counting(), samples=6, length=32, seed=1, task="causal-lm")
    assert [len(window) for window in found] == [32] * 6
    assert sum(asked) < sum(map(len, texts.rows)) / 10
    stream = "\n\n".join(texts.rows)
    assert all(decoder.decode(window) in stream for window in found)


def test_batches_cover_every_window_once_and_pad_little():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (100,), generator=generator).tolist()
    found = [torch.full((n,), i + 1) for i, n in enumerate(lengths)]
    result = data.batches(found, tokens_per_batch=128, pad_id=0)
    seen = []
    for batch in result:
        assert batch.input_ids.numel() <= 128
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        assert torch.equal(batch.input_ids != 0, mask.bool())
        seen += [row[row != 0].tolist() for row in batch.input_ids]
    assert sorted(seen) == sorted(window.tolist() for window in found)
    assert sum(batch.tokens for batch in result) == sum(lengths)
    assert sum(batch.input_ids.numel() for batch in result) < 1.25 * sum(lengths)


def test_equal_windows_need_no_mask_and_a_long_one_stands_alone():
    found = [torch.arange(1, 9)] * 5 + [torch.arange(1, 65)]
    result = data.batches(found, tokens_per_batch=16, pad_id=None)
    assert [tuple(batch.input_ids.shape) for batch in result] == [(2, 8), (2, 8), (1, 8), (1, 64)]
    assert all(batch.attention_mask is None for batch in result)
    assert data.batches([], tokens_per_batch=16, pad_id=0) == []


def test_fingerprint_sees_order_and_borders():
    a, b = torch.tensor([1, 2]), torch.tensor([3])
    prints = [data.fingerprint(x) for x in ([a, b], [b, a], [torch.tensor([1]), torch.tensor([2, 3])])]
    assert len(set(prints)) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in prints)


def test_rows_of_the_sample_classifier():
    from llmcomp.samples import classifier_calibration

    if not classifier_calibration().is_file():
        pytest.skip("the sample texts have not been made")
    train, held_out = data.read_texts("sample:classifier"), data.evaluation_texts("sample:classifier")
    assert len(train.rows) == len(train.labels) > 0
    assert not set(train.rows) & set(held_out.rows)


@pytest.mark.parametrize("columns", ["first,second", " first , second "])
def test_two_columns_are_pairs(tmp_path: Path, columns: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("first,second,score\na,b,0.5\nc,,1\n")
    texts = data.evaluation_texts(str(path), text_column=columns, label_column="score")
    assert (texts.rows, texts.partners, texts.labels) == (["a", "c"], ["b", ""], [0.5, 1])
    with pytest.raises(BadData, match=r"Calibration reads one text column, not two \(.*first"):
        data.read_texts(str(path), text_column=columns)
    with pytest.raises(BadData, match=r"has no column ''; it has first, second, score"):
        data.evaluation_texts(str(path), text_column="first,")


def test_one_column_may_have_a_comma_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a,b": "x", "a": "y"}\n')
    texts = data.evaluation_texts(str(path), text_column="a,b")
    assert texts.rows == ["x"] and texts.partners is None
