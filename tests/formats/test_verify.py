"""A whole checkpoint passes; every damaged one is refused with a sentence that names what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Written, bert, gpt2, linears, llama, write
from damage import DAMAGES, UP, K, edit_config, flip
from safetensors import safe_open

from llmcomp.errors import VerificationFailed
from llmcomp.formats import witness
from llmcomp.formats.verify import check, verify
from llmcomp.schemes import Scheme

SYM, ASYM, A8 = Scheme(4, 64), Scheme(4, 64, False), Scheme(8, activations="int8-dynamic")
STATIC = Scheme(8, activations="int8-static")
EMBEDDINGS = {"model.embed_tokens": Scheme(8)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """One checkpoint a kind; tests corrupt copies."""
    made = {}
    for kind, scheme in {"symmetric": SYM, "asymmetric": ASYM, "activations": A8, "static": STATIC}.items():
        model = llama()
        schemes = dict.fromkeys(linears(model), scheme)
        made[kind] = write(tmp_path_factory.mktemp(kind), model, schemes)
    return made


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize(
    ("make", "schemes"),
    [
        (llama, lambda names: dict.fromkeys(names, SYM)),
        (llama, lambda names: dict.fromkeys(names, ASYM)),
        (llama, lambda names: {name: (SYM, ASYM, Scheme(8))[n % 3] for n, name in enumerate(names)}),
        (lambda: llama(tied=True), lambda names: dict.fromkeys(names, SYM)),
        (lambda: llama(tied=True), lambda names: EMBEDDINGS | dict.fromkeys(names, SYM)),
        (lambda: llama(tied=True), lambda names: {"lm_head": Scheme(8)} | dict.fromkeys(names, ASYM)),
        (lambda: llama(dtype=torch.bfloat16), lambda names: dict.fromkeys(names, SYM)),
        (bert, lambda names: dict.fromkeys(names, ASYM)),
        (llama, lambda names: dict.fromkeys(names, A8)),
        (lambda: llama(dtype=torch.bfloat16), lambda names: dict.fromkeys(names, STATIC)),
        (gpt2, lambda names: dict.fromkeys(names, ASYM)),
        (gpt2, lambda names: {}),
    ],
    ids=["sym", "asym", "mixed", "tied", "embeddings", "head", "bf16", "bert", "activations", "static", "gpt2", "none"],
)
def test_a_whole_checkpoint_passes(tmp_path: Path, make: Callable, schemes: Callable, stream: bool) -> None:
    model = make()
    plan = schemes(linears(model))
    whole = write(tmp_path, model, plan)
    result = check(whole.directory, whole.witness, stream)
    assert result.passed
    assert result.modules_compressed == len(plan)
    assert result.streamed is stream
    assert (result.max_logit_difference is None) is stream
    assert any("not compared" in line for line in result.checks) is stream


def test_a_dense_checkpoint_passes(tmp_path: Path) -> None:
    model = gpt2()
    whole = write(tmp_path, model, dict.fromkeys(linears(model), SYM), form="dense")
    assert check(whole.directory, whole.witness).modules_compressed == 0


@pytest.mark.parametrize("stream", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    written: dict[str, Written], tmp_path: Path, name: str, stream: bool
) -> None:
    damage = DAMAGES[name]
    directory = tmp_path / "checkpoint"
    shutil.copytree(written[damage.kind].directory, directory)
    damage.apply(directory)
    with pytest.raises(VerificationFailed, match=damage.said) as caught:
        check(directory, written[damage.kind].witness, stream)
    assert "\n" not in str(caught.value)


def test_other_outputs_are_refused(written: dict[str, Written], tmp_path: Path) -> None:
    """Equal weights, but a model that computes something else: a config field that changes no shape."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(written["symmetric"].directory, directory)
    edit_config(directory, lambda config: config.update(hidden_act="relu"))
    with pytest.raises(VerificationFailed, match=r"outputs differ by .* of their standard deviation"):
        check(directory, written["symmetric"].witness)


def test_padded_positions_do_not_count(written: dict[str, Written], tmp_path: Path) -> None:
    place = tmp_path / "witness"
    shutil.copytree(written["symmetric"].witness, place)
    known = witness.load(place)
    known.output[1, 4:] = 1e3  # the second row's padding
    plan = {"compressed": known.compressed, "source": known.source, "inputs": known.inputs}
    witness.save(place, output=known.output, **plan)
    assert check(written["symmetric"].directory, place).passed
    known.output[1, 3] += 1
    witness.save(place, output=known.output, **plan)
    with pytest.raises(VerificationFailed, match="outputs differ"):
        check(written["symmetric"].directory, place)


@pytest.mark.parametrize(
    ("device", "share", "passes"), [("cpu", 3e-3, False), ("cuda", 3e-3, True), ("cuda", 0.02, False)]
)
def test_outputs_of_a_gpu_may_differ_by_more(
    device: str, share: float, passes: bool, written: dict[str, Written], tmp_path: Path
) -> None:
    """Of inputs that are rounded some lie near an edge, nearer than kernels are apart; a wrong model is further."""
    place = tmp_path / "witness"
    shutil.copytree(written["symmetric"].witness, place)
    known = witness.load(place)
    assert known.device == "cpu"
    noise = torch.randn(known.output.shape, generator=torch.Generator().manual_seed(0))
    noisy = known.output + share * known.output.std() * noise
    witness.save(place, compressed=known.compressed, source=known.source, inputs=known.inputs, output=noisy)
    plan = json.loads((place / "witness.json").read_text())
    (place / "witness.json").write_text(json.dumps({**plan, "device": device}))
    if passes:
        assert check(written["symmetric"].directory, place).passed
        return
    with pytest.raises(VerificationFailed, match="outputs differ"):
        check(written["symmetric"].directory, place)


def test_not_finite_is_refused(written: dict[str, Written], tmp_path: Path) -> None:
    place = tmp_path / "witness"
    shutil.copytree(written["symmetric"].witness, place)
    known = witness.load(place)
    known.output[0, 0, 0] = float("nan")
    witness.save(
        place, compressed=known.compressed, source=known.source, inputs=known.inputs, output=known.output
    )
    with pytest.raises(VerificationFailed, match="not finite"):
        check(written["symmetric"].directory, place)


def test_a_parameter_without_a_witness_is_refused(written: dict[str, Written], tmp_path: Path) -> None:
    place = tmp_path / "witness"
    shutil.copytree(written["symmetric"].witness, place)
    path = place / "digests" / "all.json"
    digests = json.loads(path.read_text())
    del digests["model.norm.weight"]
    path.write_text(json.dumps(digests))
    for stream in (False, True):
        with pytest.raises(VerificationFailed, match=r"model\.norm\.weight"):
            check(written["symmetric"].directory, place, stream)


def test_fresh_process_passes(written: dict[str, Written]) -> None:
    result = verify(written["asymmetric"].directory, written["asymmetric"].witness)
    assert result.passed
    assert result.modules_compressed == 14
    assert result.max_logit_difference is not None


def test_fresh_process_refuses_and_says_why(written: dict[str, Written], tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(written["symmetric"].directory, directory)
    flip(directory, f"{K}.weight_scale", byte=2)
    with pytest.raises(VerificationFailed, match=f"{K}.weight has other values"):
        verify(directory, written["symmetric"].witness)


def test_a_process_that_dies_is_a_failure(
    written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho 'Killed: out of memory' >&2\nkill -9 $$\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(interpreter))
    with pytest.raises(VerificationFailed, match="died with status -9: Killed: out of memory"):
        verify(written["symmetric"].directory, written["symmetric"].witness)
    interpreter.write_text("#!/bin/sh\nexec sleep 20\n")
    with pytest.raises(VerificationFailed, match="took longer"):
        verify(written["symmetric"].directory, written["symmetric"].witness, timeout=0.2)


def test_memory_decides_whether_to_stream(
    written: dict[str, Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    assert check(written["symmetric"].directory, written["symmetric"].witness).streamed


def test_fixture_is_what_it_says(written: dict[str, Written]) -> None:
    """The damages name three shards and zero points: they must be there."""
    for kind, made in written.items():
        with safe_open(made.directory / "model-00002-of-00003.safetensors", "pt") as shard:
            assert (f"{UP}.weight_zero_point" in shard.keys()) is (kind == "asymmetric")  # noqa: SIM118
