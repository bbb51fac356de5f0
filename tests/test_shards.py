"""Headers of weight files: what is promised must be there, to the byte."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmcomp.errors import BadCheckpoint
from llmcomp.shards import leaves, read_shard

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn]
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
tensors = st.dictionaries(
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
    max_size=5,
)


def write(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), span: tuple[int, int] = (0, 8)) -> bytes:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": span}}).encode()


@quick
@given(tensors)
def test_reads_what_safetensors_wrote(tmp_path: Path, made: dict) -> None:
    file = tmp_path / "model.safetensors"
    state = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in made.items()}
    save_file(state, file)
    found = read_shard(file).tensors
    assert {k: (i.dtype, i.shape, i.nbytes) for k, i in found.items()} == {
        k: (t.dtype, tuple(t.shape), t.nbytes) for k, t in state.items()
    }


@quick
@given(st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_seen(tmp_path: Path, share: float) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.ones(7)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadCheckpoint, match="truncated or corrupt"):
        read_shard(file)


@quick
@given(st.binary(min_size=1, max_size=40))
def test_every_extra_byte_is_seen(tmp_path: Path, extra: bytes) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, 5)}, file)
    file.write_bytes(file.read_bytes() + extra)
    with pytest.raises(BadCheckpoint, match="truncated or corrupt"):
        read_shard(file)


@quick
@given(st.binary(max_size=200))
def test_noise_is_refused_in_one_sentence(tmp_path: Path, noise: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(noise)
    with pytest.raises(BadCheckpoint, match="truncated or corrupt"):
        read_shard(file)


@quick
@given(st.data())
def test_a_changed_header_byte_never_escapes_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.ones(7)}, file)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1 - 88))
    content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        found = read_shard(file).tensors
    except BadCheckpoint:
        return
    assert sum(info.nbytes for info in found.values()) == 88


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b"{", b"", "its header is unreadable"),
        (b"[]", b"", "its header is unreadable"),
        (b'{"w": 3}', b"", "its header is unreadable"),
        (entry("F31"), b"\0" * 8, "its header is unreadable, KeyError 'F31'"),
        (entry(shape=(3,)), b"\0" * 8, "w should take 12 bytes, its header gives it 8"),
        (entry(span=(4, 12)), b"\0" * 12, "w should take 8 bytes"),
        (entry(shape=(-1, -2)), b"\0" * 8, "its header is unreadable, ValueError shape [-1, -2] of w"),
        (entry(), b"\0" * 7, "its header promises {} bytes, the file has {}"),
    ],
)
def test_what_is_wrong_is_said(header: bytes, data: bytes, why: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(BadCheckpoint) as caught:
        read_shard(file)
    size = 8 + len(header) + len(data)
    assert str(caught.value).startswith(f"{file} is truncated or corrupt (")
    assert str(caught.value).endswith("); copy or download it again.")
    assert why.format(size + 1, size) in str(caught.value)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)  # sparse
    with pytest.raises(BadCheckpoint, match="its header should take 200000000 bytes"):
        read_shard(file)


@pytest.mark.parametrize("name", ["/e/x", "../x", "a/../../x", "..\\x", "C:\\x", "C:x", "\\x", "..", "", "."])
def test_names_that_leave(name: str) -> None:
    assert leaves(name)


@given(st.lists(st.text("abc.-", min_size=1).filter(lambda part: part.strip(".")), min_size=1))
def test_names_that_stay(parts: list[str]) -> None:
    assert not leaves("/".join(parts))


@given(st.text("ab./\\:", max_size=12))
def test_a_name_that_stays_resolves_inside(name: str) -> None:
    if not leaves(name):
        assert PurePosixPath("/top") in PurePosixPath("/top", name).parents
        assert ".." not in PurePosixPath(name).parts
