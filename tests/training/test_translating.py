"""Teachers that read other tokens: places and distributions against slow loops over characters in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, build, write_tokenizer
from torch import Tensor

from llmcomp import losses
from llmcomp.errors import BadRecipe
from llmcomp.kept import Kept, decode, encode, fewer
from llmcomp.training.data import collator, key_of
from llmcomp.training.distilling import Targets
from llmcomp.training.guides import watched
from llmcomp.training.taps import Taps
from llmcomp.training.translating import aligned, of_next_tokens, of_rows, shared_tokens, translator

TEXT = ("The weather in Zürich — they said — was fine; nobody wore a coat. ", "Why not? It cost 12€ more than a hat, "
        "and we had walked under the trees the whole afternoon.")  # fmt: skip
TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The student's and the teacher's, each trained on another text."""
    root = tmp_path_factory.mktemp("tokenizers")
    return (write_tokenizer(root / "own", encoder=False, text=[TEXT[0] * 5]),
            write_tokenizer(root / "its", encoder=False, text=[TEXT[1] * 5, "The weather was fine. "]))  # fmt: skip


def batch_of(tokenizer: Any) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])} for text in TEXT]


def places64(own: Any, its: Any, ids: list[int]) -> dict[int, int]:
    """{position of the student: that of the teacher with the same characters before what follows}."""
    text = own.decode(ids)
    read = its(text, add_special_tokens=False)["input_ids"]
    ends = {its.decode(read[: number + 1]): number for number in range(len(read))}
    found = {}
    for number in range(len(ids) - 1):
        said = own.decode(ids[: number + 1])
        if text.startswith(said) and said in ends:
            found[number] = ends[said]
    return found


def probabilities(row: Tensor) -> list[float]:
    powers = [math.exp(float(value) / TEMPERATURE) for value in row]
    return [power / math.fsum(powers) for power in powers]


def reference(student: Tensor, teacher: Tensor, own: Any, its: Any, both: list[tuple[int, int]]) -> tuple[float, int]:
    """Σ KL over shared tokens and all others, and the number of places, of rows of logits."""
    terms = []
    for sample, z, t in zip(batch_of(own), student, teacher, strict=True):
        for one, other in places64(own, its, sample["input_ids"].tolist()).items():
            q, p = probabilities(z[one]), probabilities(t[other])
            pairs = [(p[b], q[a]) for a, b in both]
            pairs.append((1 - math.fsum(a for a, _ in pairs), 1 - math.fsum(b for _, b in pairs)))
            terms.append(math.fsum(a * math.log(a / b) for a, b in pairs))
    return math.fsum(terms), len(terms)


def test_a_language_model_is_compared_over_what_both_have(tokenizers: tuple[Any, Any]) -> None:
    own, its = tokenizers
    teacher, student = build("llama"), build("llama", seed=1)
    shared = shared_tokens(own, its)
    both = list(zip(shared[0].tolist(), shared[1].tolist(), strict=True))
    assert 100 < len(both) < min(len(own), len(its))
    special = {*own.all_special_ids}
    for one, other in both:
        assert own.decode([one]) == its.decode([other]) and one not in special
    translate = translator(own, its, 128)
    collate = aligned(collator("causal-lm", own), translate)
    batch = collate(batch_of(own))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    reader = of_next_tokens(translate, shared, VOCABULARY, TEMPERATURE, 0)
    said = reader(watched(teacher, Taps(teacher, ())))(inputs).logits
    logits = student(**inputs).logits.detach()
    found = losses.soft_targets(logits, said, batch["scored"], TEMPERATURE)
    texts = [its(text, add_special_tokens=False, return_tensors="pt") for text in TEXT]
    read = [teacher(input_ids=text["input_ids"]).logits[0].detach() for text in texts]
    total, count = reference(logits, read, own, its, both)  # type: ignore[arg-type]
    assert count == int(batch["scored"].sum()) and 20 < count < int((batch["labels"] != losses.IGNORED).sum())
    assert float(found) == pytest.approx(TEMPERATURE**2 * total / count, rel=1e-3)
    assert isinstance(said, Kept)  # as a cache holds it
    again = decode(encode(fewer(said, len(both)), 16), said.classes)
    rounded = float(losses.soft_targets(logits, again, batch["scored"], TEMPERATURE))
    assert rounded == pytest.approx(float(found), rel=1e-2)
    less = float(losses.soft_targets(logits, fewer(said, 9), batch["scored"], TEMPERATURE))
    assert 0 < less <= float(found)


def test_of_one_tokenizer_all_places_are_shared(tokenizers: tuple[Any, Any]) -> None:
    """A student that is its teacher loses nothing, whatever is not compared."""
    own, _ = tokenizers
    model = build("llama")
    translate = translator(own, own, 128)
    plain = collator("causal-lm", own)
    batch = aligned(plain, translate)(batch_of(own))
    outside = [number for number in range(len(plain(batch_of(own))["scored"])) if not batch["scored"][number].any()]
    assert not outside
    row = translate(batch_of(own)[1]["input_ids"].numpy())
    known = row.where >= 0
    assert torch.equal(row.where[known], torch.arange(len(row.where))[known])
    assert int(known.sum()) >= len(known) - 4  # but inside of a character, and the last
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    guide = of_next_tokens(translate, shared_tokens(own, own), VOCABULARY, 1.0, 0)(watched(model, Taps(model, ())))
    logits = model(**inputs).logits.detach()
    assert float(losses.soft_targets(logits, guide(inputs).logits, batch["scored"])) == pytest.approx(0, abs=1e-5)


def test_a_longer_text_than_the_teacher_reads(tokenizers: tuple[Any, Any]) -> None:
    own, its = tokenizers
    row = batch_of(own)[1]["input_ids"].numpy()
    whole, cut = (translator(own, its, longest)(row) for longest in (128, 12))
    assert len(cut.ids) == 12 and int(cut.where.max()) <= 11
    assert torch.equal(torch.where(whole.where < 12, whole.where, -1), cut.where)


def test_a_classifier_reads_the_row_in_its_own_tokens(tokenizers: tuple[Any, Any]) -> None:
    own, its = tokenizers
    model = build("bert-classifier")
    read = [torch.tensor(its(text, add_special_tokens=False)["input_ids"]) for text in TEXT]
    pairs = {key_of(one["input_ids"].numpy()): other for one, other in zip(batch_of(own), read, strict=True)}
    rows = batch_of(own)[::-1]
    batch = collator("sequence-classification", own)(rows)
    guide = of_rows(pairs, 0)(watched(model, Taps(model, ())))
    found = guide({name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    wanted = torch.cat([model(input_ids=one[None]).logits.detach() for one in read[::-1]])
    assert isinstance(found, Tensor) and torch.allclose(found, wanted, atol=1e-5)


def test_vocabularies_without_a_common_token(tokenizers: tuple[Any, Any]) -> None:
    class Other:
        """Says other characters for each token."""

        all_special_ids: tuple[int, ...] = ()

        def __len__(self) -> int:
            return 3

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [0]}

        def decode(self, ids: list[int]) -> str:
            return "漢" * len(ids)

        def batch_decode(self, rows: list[list[int]]) -> list[str]:
            return [self.decode(row) + "字" for row in rows]

    with pytest.raises(BadRecipe, match="share no token"):
        shared_tokens(tokenizers[0], Other())


def test_all_of_the_students_tokens_are_known(tokenizers: tuple[Any, Any]) -> None:
    """There is no other outcome then: the teacher's distribution over them is scaled to 1."""
    own, _ = tokenizers
    classes = 7
    shared = torch.arange(classes), torch.arange(classes) + 2
    logits = torch.randn(1, 9, 12)
    ids = batch_of(own)[0]["input_ids"][:9].numpy()
    guide = of_next_tokens(translator(own, own, 128), shared, classes, TEMPERATURE, 0)(lambda inputs: Targets(logits))
    said = guide({"input_ids": torch.from_numpy(ids)[None]}).logits
    assert isinstance(said, Kept) and said.indices is None
    wanted = (logits[0, :, 2:9] / TEMPERATURE).log_softmax(-1)
    where = translator(own, own, 128)(ids).where
    assert torch.allclose(said.logs, wanted[where[where >= 0]], atol=1e-6)
