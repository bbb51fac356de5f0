"""Train the two sample models and write the text that ships with them.

    python scripts/train_samples.py --output llmcomp/samples --lm-steps 2200 --classifier-steps 2000

Half an hour of one core with AVX512-BF16 (OMP_NUM_THREADS=1). Both models are at most 4 MB in bfloat16 and
have widths that groups of 64 and 128 divide; `sample_text.py` says what is held out. The language model is as
large and as long trained as that allows, so that its weights are needed (that is what makes 2 bits hurt);
dropout on what each block adds keeps it from learning two megabytes by heart. The classifier's encoder first
fills in masked words of the same text.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from sample_text import MODULES, SEPARATOR, Document, documents, every_fourth_run, labelled, split
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WINDOW, CLASSIFIER_WINDOW = 256, 128  # tokens
Batch = dict[str, torch.Tensor]


def lm_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|pad|>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1536, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[0], pad_token=special[1],
        model_max_length=WINDOW,
    )  # fmt: skip


def classifier_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names["mask_token"] = "[MASK]"
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=4096, special_tokens=list(names.values()))
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=CLASSIFIER_WINDOW,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names,
    )  # fmt: skip


def optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks (fewer steps), AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layer" in n]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True)]


def fit(model: PreTrainedModel, batch: Callable[[], Batch], steps: int, rate: float) -> None:
    """Linear warm-up over a twentieth of the steps, then linear decay to zero; forward in bfloat16."""
    chosen = optimizers(model, rate)
    model.train()
    for step in range(steps):
        for group in (group for optimizer in chosen for group in optimizer.param_groups):
            group["lr"] = rate * min((step + 1) / (steps / 20), (steps - step) / (steps * 0.95))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{type(model).__name__} step {step}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()


def windows(tokens: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """[count, length] from random places of `tokens` [n]."""
    starts = torch.randint(len(tokens) - length, (count, 1))
    return tokens[starts + torch.arange(length)]


def train_lm(train: str, steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = lm_tokenizer([train])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=WINDOW,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        for added in (block.self_attn.o_proj, block.mlp.down_proj):
            added.register_forward_hook(lambda module, _, out: F.dropout(out, 0.1, module.training))
    tokens = torch.tensor(tokenizer(train, verbose=False)["input_ids"])

    def batch() -> Batch:
        chosen = windows(tokens, WINDOW, 16)
        return {"input_ids": chosen, "labels": chosen}

    fit(model, batch, steps, rate=3e-3)
    return model, tokenizer


def masked_batches(tokens: torch.Tensor, mask_id: int, vocabulary: int) -> Callable[[], Batch]:
    """BERT's recipe: of 15% of the places, 80% become [MASK], 10% another word, 10% stay."""

    def batch() -> Batch:
        words = windows(tokens, CLASSIFIER_WINDOW, 32)
        chosen, dice = torch.rand(words.shape) < 0.15, torch.rand(words.shape)
        shown = torch.where(chosen & (dice < 0.8), mask_id, words)
        shown = torch.where(chosen & (dice > 0.9), torch.randint(5, vocabulary, words.shape), shown)
        return {"input_ids": shown, "labels": torch.where(chosen, words, -100)}

    return batch


def train_classifier(
    train: str, rows: list[dict[str, Any]], steps: int
) -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    tokenizer = classifier_tokenizer([train])
    areas = list(MODULES["areas"])
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=CLASSIFIER_WINDOW, pad_token_id=0,
        id2label=dict(enumerate(areas)), label2id={area: i for i, area in enumerate(areas)},
    )  # fmt: skip
    masked = BertForMaskedLM(config)
    tokens = torch.tensor(tokenizer(train, add_special_tokens=False, verbose=False)["input_ids"])
    fit(masked, masked_batches(tokens, tokenizer.mask_token_id, len(tokenizer)), steps, rate=1e-3)
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(masked.bert.state_dict(), strict=False)  # all but the pooler
    labels = torch.tensor([row["label"] for row in rows])

    def batch() -> Batch:
        chosen = torch.randint(len(rows), (32,))
        texts = [rows[i]["text"] for i in chosen]
        encoded = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
        return {**encoded, "labels": labels[chosen]}

    fit(model, batch, steps // 4, rate=3e-4)
    return model, tokenizer


def write_text(folder: Path, train: list[Document], validation: list[Document]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in (("calibration", every_fourth_run(train)), ("validation", validation)):
        (folder / f"{name}.txt").write_text(joined(found), encoding="utf-8")
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in labelled(found)]
        (folder / f"classifier_{name}.jsonl").write_text("".join(rows), encoding="utf-8")


def joined(found: list[Document]) -> str:
    return SEPARATOR.join(document.text for document in found) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="gets lm/, classifier/ and text/")
    parser.add_argument("--only", choices=["lm", "classifier", "text"], help="leave the others as they are")
    parser.add_argument("--lm-steps", type=int, default=2200)
    parser.add_argument("--classifier-steps", type=int, default=2000, help="a quarter more for the labels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, validation = split(documents())
    if options.only in (None, "text"):
        write_text(options.output / "text", train, validation)
    if options.only in (None, "lm"):
        torch.manual_seed(options.seed)
        save(*train_lm(joined(train), options.lm_steps), options.output / "lm")
    if options.only in (None, "classifier"):
        torch.manual_seed(options.seed)
        made = train_classifier(joined(train), labelled(train), options.classifier_steps)
        save(*made, options.output / "classifier")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
