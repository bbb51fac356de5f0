"""Discovery: blocks, stages, roles, ties and dtypes of every tiny architecture; errors that show what was."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from structures import BERT, BLOOM, DEBERTA, LASTING, LLAMA, MLP, OTHERS, SECOND, STAGES
from tiny import DECODERS, GPT_OSS, TINY, TWO_CHAINS, VISION_LANGUAGE, build, tiny
from tiny_sentences import write_json, write_modules
from torch import nn

from llmcomp.adapters.base import Adapter, Block
from llmcomp.adapters.discover import discover, skeleton
from llmcomp.errors import BadCheckpoint, UnknownArchitecture
from llmcomp.experts import split_experts

TASKS = dict.fromkeys(TINY, "masked-lm") | dict.fromkeys(DECODERS, "causal-lm")
TASKS |= dict.fromkeys(TWO_CHAINS, "seq2seq-lm")
TASKS |= {"whisper": "speech-seq2seq", "vit-classifier": "image-classification"}
TASKS |= dict.fromkeys(VISION_LANGUAGE, "image-text-to-text")
TASKS |= {name: "sequence-classification" for name in TINY if name.endswith("-classifier") and name != "vit-classifier"}


def config_only(directory: Path, config: transformers.PreTrainedConfig, architecture: str | None) -> Path:
    config.architectures = None if architecture is None else [architecture]
    config.save_pretrained(directory)
    return directory


def short_names(block: Block) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(ref.name.removeprefix(block.name + ".") for ref in stage) for stage in block.stages)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapter]:
    """The adapter of a tiny model that was saved; each is made once."""
    root = tmp_path_factory.mktemp("discover")
    return cache(lambda name: discover(skeleton(tiny(name, root / name))))


@pytest.mark.parametrize("name", TINY)
def test_blocks_stages_and_roles(name: str, found: Callable[[str], Adapter]) -> None:
    adapter = found(name)
    where, count, stages = STAGES[name.removesuffix("-classifier")]
    assert adapter.trace_problem is None and adapter.stages_known
    second, more, others = SECOND.get(name, ("", 0, ()))
    names = [f"{where}.{i}" for i in range(count)] + [f"{second}.{i}" for i in range(more)]
    assert [block.name for block in adapter.blocks] == names
    for block in adapter.blocks:
        stages = OTHERS.get((name, block.index), stages if block.index < count else others)
        assert short_names(block) == stages
        for short, ref in zip([n for stage in stages for n in stage], block.linears, strict=True):
            assert ref.role == ("mlp" if MLP.match(short) else "attention")
        assert all(ref.block == block.index for ref in block.linears)
    assert adapter.task == TASKS[name]


@pytest.mark.parametrize("name", TINY)
def test_shapes_are_those_of_the_weights(name: str, found: Callable[[str], Adapter]) -> None:
    model = build(name)
    split_experts(model)
    adapter = found(name)
    for ref in adapter.refs:
        weight = model.get_submodule(ref.name).weight
        shape = tuple(weight.T.shape if ref.transposed else weight.shape)
        assert (ref.out_features, ref.in_features) == shape
    assert all(ref.transposed == (name == "gpt2") for block in adapter.blocks for ref in block.linears)


@pytest.mark.parametrize("name", TINY)
def test_every_matrix_is_accounted_for(name: str, found: Callable[[str], Adapter]) -> None:
    """A matrix is compressible, or named with a reason, or an embedding of positions or types."""
    adapter = found(name)
    model = build(name)
    split_experts(model)
    known = {ref.name for ref in adapter.refs} | set(adapter.uncompressed)
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owner = key.rpartition(".")[0]
        if parameter.dim() > 1 and not isinstance(model.get_submodule(owner), nn.Embedding):
            assert owner in known or key in known
    assert not set(adapter.uncompressed) & {ref.name for ref in adapter.refs}


@pytest.mark.parametrize("name", TINY)
def test_ties_embeddings_and_head(name: str, found: Callable[[str], Adapter]) -> None:
    model = build(name)
    adapter = found(name)
    shared: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(key)
    expected = {frozenset(keys) for keys in shared.values() if len(keys) > 1}
    groups: dict[str, set[str]] = {}
    for target, source in adapter.ties.items():
        groups.setdefault(source, {source}).add(target)
    assert set(map(frozenset, groups.values())) == expected
    if name in TWO_CHAINS:  # encoder, decoder and head share them
        assert adapter.embeddings is None and adapter.head is None
        return
    if name == "vit-classifier":
        assert adapter.embeddings is None and adapter.head is None
        assert "classifier: its outputs are the answer itself" in adapter.uncompressed.values()
        return
    assert adapter.embeddings is not None
    assert model.get_submodule(adapter.embeddings.name) is model.get_input_embeddings()
    if adapter.task == "sequence-classification":
        assert adapter.head is None
        assert "classifier: its outputs are the answer itself" in adapter.uncompressed.values()
    else:
        assert adapter.head is not None
        assert model.get_submodule(adapter.head.name) is model.get_output_embeddings()


def test_poolers_and_classifiers_say_why_they_stay(tmp_path: Path) -> None:
    adapter = discover(skeleton(tiny("bert-classifier", tmp_path)))
    assert adapter.uncompressed == {
        "bert.pooler.dense": "pooler, outside of the blocks",
        "classifier": "classifier: its outputs are the answer itself",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "modernbert", "gpt2", "mpnet"])
def test_skeleton_has_no_weights_but_real_buffers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny(name, tmp_path, dtype=dtype)
    model = skeleton(tmp_path)
    plain = getattr(transformers, type(model).__name__).from_pretrained(tmp_path)
    assert not model.training
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    for mine, theirs in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (mine[0], mine[1].shape, mine[1].dtype) == (theirs[0], theirs[1].shape, theirs[1].dtype)
    for mine, theirs in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1]) and mine[1].dtype == theirs[1].dtype


def test_dtype_of_the_weights_where_the_config_has_none(tmp_path: Path) -> None:
    tiny("llama", tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {parameter.dtype for parameter in skeleton(tmp_path).parameters()} == {torch.bfloat16}
    (tmp_path / "model.safetensors").unlink()
    assert {parameter.dtype for parameter in skeleton(tmp_path).parameters()} == {torch.float32}


def test_parameters_that_insist_on_float32(tmp_path: Path) -> None:
    """T5's `wo` overflows in float16; from_pretrained keeps it in float32."""
    config = transformers.T5Config(num_layers=1, d_model=32, d_ff=32, d_kv=16, num_heads=2, vocab_size=32)
    transformers.T5ForConditionalGeneration(config).half().save_pretrained(tmp_path)
    plain = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    expected = {name: parameter.dtype for name, parameter in plain.named_parameters()}
    assert set(expected.values()) == {torch.float16, torch.float32}
    assert {name: parameter.dtype for name, parameter in skeleton(tmp_path).named_parameters()} == expected


def test_default_dtype_and_random_state_are_left_alone(tmp_path: Path) -> None:
    tiny("gpt2", tmp_path, dtype=torch.bfloat16)
    before = torch.get_rng_state()
    discover(skeleton(tmp_path))
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


def test_discovery_leaves_the_skeleton_alone(tmp_path: Path) -> None:
    model = skeleton(tiny("llama", tmp_path))
    discover(model)
    assert model.config.pad_token_id == 0
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(not buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("name", TINY)
def test_what_is_computed_after_the_next_stage_has_begun(
    name: str, found: Callable[[str], Adapter]
) -> None:
    for block in found(name).blocks:
        assert block.applications == (2 if name.startswith("albert") else 1)
        if block.applications == 1:
            assert block.lasting == {f"{block.name}.{short}" for short in LASTING.get(name, ())}


def test_parallel_branches_behind_two_norms_are_two_stages() -> None:
    """Falcon 40B; Falcon 11B has the same blocks with one norm for both."""
    more = {"new_decoder_architecture": True, "num_kv_heads": 2}
    two = discover(build("falcon", **more).to("meta")).blocks[0]
    assert short_names(two) == BLOOM
    one = discover(build("falcon", **more, num_ln_in_parallel_attn=1).to("meta")).blocks[0]
    assert short_names(one) == STAGES["falcon"][2]


def test_relative_positions_with_projections_of_their_own() -> None:
    """What reads DeBERTa's relative embeddings is a stage between the attention's inputs and its output."""
    block = discover(build("deberta-v2", share_att_key=False).to("meta")).blocks[0]
    positions = ("attention.self.pos_key_proj", "attention.self.pos_query_proj")
    assert short_names(block) == (DEBERTA[0], positions, *DEBERTA[1:])


def test_shared_blocks_know_how_often_they_run() -> None:
    adapter = discover(build("albert", num_hidden_layers=5, num_hidden_groups=2).to("meta"))
    assert [block.applications for block in adapter.blocks] == [3, 2]
    again = {ref.name for stage in adapter.blocks[0].stages[:-1] for ref in stage}
    assert adapter.blocks[0].lasting == again


class Looping(transformers.LlamaForCausalLM):
    """Runs all of its blocks twice, one after the other."""

    @property
    def base_model(self) -> nn.Module:
        model = self.model

        class Body(nn.Module):
            def forward(self, input_ids: torch.Tensor, **_: object) -> None:
                model(inputs_embeds=model(input_ids).last_hidden_state)

        return Body()


def test_a_model_that_comes_back_to_a_block_is_refused() -> None:
    expected = (
        "Looping comes back to an earlier block (its blocks run in the order 0, 1, 0, 1); llmcomp compresses "
        "blocks that are run once, or several times in a row."
    )
    with pytest.raises(UnknownArchitecture) as caught:
        discover(Looping(build("llama").config).to("meta"))
    assert str(caught.value) == expected


def test_padding_token_does_not_stop_the_trace(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, pad_token_id=0)
    adapter = discover(skeleton(config_only(tmp_path, config, "GPT2ForSequenceClassification")))
    assert adapter.stages_known and adapter.task == "sequence-classification"


class Untraceable(transformers.LlamaForCausalLM):
    """Looks at the values of its ids, which meta tensors do not have."""

    @property
    def base_model(self) -> nn.Module:
        class Body(nn.Module):
            def forward(self, input_ids: torch.Tensor, **_: object) -> None:
                if int(input_ids.sum()) > 0:
                    raise AssertionError("not reached")

        return Body()


def test_without_a_trace_each_linear_is_its_own_stage_and_says_so() -> None:
    model = Untraceable(build("llama").config).to("meta")
    adapter = discover(model)
    assert not adapter.stages_known
    assert adapter.trace_problem is not None and "meta" in adapter.trace_problem
    assert [len(stage) for stage in adapter.blocks[0].stages] == [1] * 7
    assert adapter.blocks[0].lasting == {ref.name for ref in adapter.blocks[0].linears}
    assert len(adapter.blocks[0].linears) == 7


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_experts_are_linears_and_routers_stay(name: str, found: Callable[[str], Adapter]) -> None:
    adapter = found(name)
    routed = [ref for ref in adapter.refs if ref.share < 1]
    assert routed and all(".experts." in ref.name for ref in routed)
    assert {ref.share for ref in routed} == {0.25 if name == "deepseek-v3" else 0.5}
    reasons = {why for key, why in adapter.uncompressed.items() if key.endswith("mlp.gate.weight")}
    assert reasons == {"router: it decides which experts a token goes to"}


@pytest.mark.parametrize(
    ("family", "stays"),
    [("Qwen2Moe", {"mlp.gate.weight", "mlp.shared_expert_gate"}), ("Phimoe", {"mlp.router"})],
)
def test_routers_and_gates_that_are_linears_stay_too(family: str, stays: set[str], tmp_path: Path) -> None:
    settings = {**build("mixtral").config.to_dict(), "num_experts": 4, "moe_intermediate_size": 128}
    config = getattr(transformers, f"{family}Config")(**settings)
    adapter = discover(skeleton(config_only(tmp_path, config, f"{family}ForCausalLM")))
    left = {name.partition("layers.1.")[2]: why for name, why in adapter.uncompressed.items() if ".1." in name}
    assert left == dict.fromkeys(stays, "router: it decides which experts a token goes to")
    assert sum(ref.share < 1 for ref in adapter.blocks[1].linears) == 12


def test_experts_that_cannot_be_taken_apart_are_refused(tmp_path: Path) -> None:
    """GPT-OSS has biases, gates and ups in turn, and files that hold all experts as one tensor
    (`tests/formats/test_expert_checkpoints.py` has what transformers makes of packed ones)."""
    config = transformers.GptOssConfig(**GPT_OSS)
    expected = (
        "GptOssForCausalLM keeps its experts in fused parameters (model.layers.0.mlp.experts.gate_up_proj and 3 more) "
        "that lie so in files, where transformers reads no packed ones; most of the model would stay as it is."
    )
    with pytest.raises(UnknownArchitecture) as caught:
        discover(skeleton(config_only(tmp_path, config, "GptOssForCausalLM")))
    assert str(caught.value) == expected


def test_no_architecture_means_the_bare_model(tmp_path: Path) -> None:
    model = skeleton(config_only(tmp_path, build("bert").config, None))
    assert type(model).__name__ == "BertModel"
    assert discover(model).task == "encoder"


# --- what cannot be ---


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nosuch", "architectures": ["NoSuchModel"]}')
    with pytest.raises(UnknownArchitecture, match=r"names no model type that transformers [\d.]+ knows"):
        skeleton(tmp_path)


def test_unknown_class(tmp_path: Path) -> None:
    config_only(tmp_path, build("bert").config, "BertForTelepathy")
    with pytest.raises(UnknownArchitecture, match="the architecture BertForTelepathy, which transformers"):
        skeleton(tmp_path)


def test_config_that_transformers_refuses(tmp_path: Path) -> None:
    config_only(tmp_path, build("llama").config, "LlamaForCausalLM")
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_size": "wide"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"transformers refuses .*hidden_size"):
        skeleton(tmp_path)


def test_corrupt_shard_where_its_dtype_is_asked(tmp_path: Path) -> None:
    config_only(tmp_path, build("llama").config, "LlamaForCausalLM")
    config = json.loads((tmp_path / "config.json").read_text())
    config["dtype"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(BadCheckpoint, match=r"model.safetensors is truncated or corrupt \("):
        skeleton(tmp_path)


@pytest.mark.parametrize(
    ("name", "architecture", "reason"),
    [
        ("bart", "BartForSequenceClassification", "is an encoder-decoder, but not one that writes text"),
        ("t5", "T5Model", "is an encoder-decoder, but not one that writes text"),
    ],
)
def test_models_that_cannot_be_fed_are_refused(name: str, architecture: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitecture, match=f"{architecture} {reason}"):
        discover(skeleton(config_only(tmp_path, build(name).config, architecture)))


class Blockless(transformers.PreTrainedModel):
    """Two lists, neither of which is one of like modules with linears."""

    config_class = transformers.BertConfig
    base_model_prefix = ""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.mixed = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))])
        self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(3)])
        self.post_init()


def test_blocks_that_cannot_be_found_show_what_was() -> None:
    expected = (
        "The blocks of Blockless could not be found: expected a list of like modules that contain linear "
        "layers, found these lists: mixed (2 x Linear/Sequential), norms (3 x LayerNorm)."
    )
    with pytest.raises(UnknownArchitecture) as caught:
        discover(Blockless(transformers.BertConfig()))
    assert str(caught.value) == expected


# --- the real models ---


@pytest.mark.parametrize(
    ("folder", "task"), [("lm", "causal-lm"), ("minilm-sst2", "sequence-classification")]
)
def test_trained_models(folder: str, task: str, assets: Path) -> None:
    adapter = discover(skeleton(assets / "models" / folder))
    stages = LLAMA if folder == "lm" else BERT
    assert adapter.task == task and len(adapter.blocks) == 6 and adapter.stages_known
    last = adapter.blocks[-1]
    assert short_names(last) == stages
    expected = {"lm": 4 * 256**2 - 2 * 256 * 128 + 3 * 256 * 768, "minilm-sst2": 4 * 384**2 + 2 * 384 * 1536}
    assert sum(ref.weights for ref in last.linears) == expected[folder]


def test_sentence_encoders_are_taken_without_their_heads(tmp_path: Path) -> None:
    """As sentence-transformers loads them; cross-encoders and sparse ones keep theirs."""
    for name, bare in (("mpnet", "MPNetModel"), ("qwen3", "Qwen3Model"), ("bert-classifier", "BertModel")):
        directory = tiny(name, tmp_path / name)
        write_modules(directory, "Pooling")
        adapter = discover(skeleton(directory))
        assert (adapter.architecture, adapter.task, adapter.head) == (bare, "encoder", None)
    write_json(directory / "sentence_bert_config.json", {"transformer_task": "sequence-classification"})
    assert discover(skeleton(directory)).task == "sequence-classification"
