"""Short names for models that people compress often. `llmcomp models` prints this table."""

from typing import NamedTuple


class Alias(NamedTuple):
    """A Hub id, its architecture family and its number of parameters in words."""

    repo: str
    family: str
    parameters: str


ALIASES: dict[str, Alias] = {
    "bert-base": Alias("google-bert/bert-base-uncased", "BERT", "110M"),
    "bert-base-cased": Alias("google-bert/bert-base-cased", "BERT", "108M"),
    "bert-large": Alias("google-bert/bert-large-uncased", "BERT", "335M"),
    "distilbert": Alias("distilbert/distilbert-base-uncased", "DistilBERT", "66M"),
    "distilbert-sst2": Alias(
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english", "DistilBERT", "67M"
    ),
    "distilroberta": Alias("distilbert/distilroberta-base", "RoBERTa", "82M"),
    "roberta-base": Alias("FacebookAI/roberta-base", "RoBERTa", "125M"),
    "roberta-large": Alias("FacebookAI/roberta-large", "RoBERTa", "355M"),
    "xlm-roberta-base": Alias("FacebookAI/xlm-roberta-base", "XLM-RoBERTa", "278M"),
    "modernbert": Alias("answerdotai/ModernBERT-base", "ModernBERT", "149M"),
    "modernbert-large": Alias("answerdotai/ModernBERT-large", "ModernBERT", "395M"),
    "mpnet": Alias("microsoft/mpnet-base", "MPNet", "109M"),
    "all-mpnet": Alias("sentence-transformers/all-mpnet-base-v2", "MPNet", "109M"),
    "minilm": Alias("sentence-transformers/all-MiniLM-L6-v2", "BERT", "23M"),
    "bge-small": Alias("BAAI/bge-small-en-v1.5", "BERT", "33M"),
    "gpt2": Alias("openai-community/gpt2", "GPT-2", "124M"),
    "gpt2-medium": Alias("openai-community/gpt2-medium", "GPT-2", "355M"),
    "gpt2-large": Alias("openai-community/gpt2-large", "GPT-2", "774M"),
    "gpt2-xl": Alias("openai-community/gpt2-xl", "GPT-2", "1.6B"),
    "distilgpt2": Alias("distilbert/distilgpt2", "GPT-2", "82M"),
    "opt-125m": Alias("facebook/opt-125m", "OPT", "125M"),
    "opt-1.3b": Alias("facebook/opt-1.3b", "OPT", "1.3B"),
    "pythia-160m": Alias("EleutherAI/pythia-160m", "GPT-NeoX", "162M"),
    "tinyllama": Alias("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Llama", "1.1B"),
    "llama-3.2-1b": Alias("meta-llama/Llama-3.2-1B", "Llama", "1.2B"),
    "llama-3.2-3b": Alias("meta-llama/Llama-3.2-3B", "Llama", "3.2B"),
    "llama-3.1-8b": Alias("meta-llama/Llama-3.1-8B", "Llama", "8.0B"),
    "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M", "Llama", "135M"),
    "smollm2-360m": Alias("HuggingFaceTB/SmolLM2-360M", "Llama", "362M"),
    "smollm2-1.7b": Alias("HuggingFaceTB/SmolLM2-1.7B", "Llama", "1.7B"),
    "mistral-7b": Alias("mistralai/Mistral-7B-v0.3", "Mistral", "7.2B"),
    "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B", "Qwen2", "494M"),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", "Qwen3", "596M"),
    "qwen3-1.7b": Alias("Qwen/Qwen3-1.7B", "Qwen3", "1.7B"),
    "qwen3-4b": Alias("Qwen/Qwen3-4B", "Qwen3", "4.0B"),
    "qwen3-8b": Alias("Qwen/Qwen3-8B", "Qwen3", "8.2B"),
}
