"""A tokenizer made in code, and tiny random bases and exports that have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rayrm.model.export import Export, hash_weights, with_fingerprints
from rayrm.model.net import DTYPES, load_base, quiet, save_weights
from rayrm.text.template import TemplateSpec

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
SENTENCES = [
    "user assistant system",
    "What is the capital of France? The capital of France is Paris.",
    "Name three fruits: apples, pears and plums. Name two colours: red and blue.",
    "A longer answer is not always a better answer; it has to stay on the question.",
]


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE of a few hundred tokens, ChatML, EOS <|im_end|>, pad <|pad|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
    )


def make_base(directory: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A tiny random causal language model with the tiny tokenizer, as transformers saves it."""
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        # Larger than usual, so that tokens matter and rewards differ.
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if model_type == "opt":
        config.word_embed_proj_dim, config.ffn_dim = 32, 64
    config.update(changes)
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_export(
    directory: Path,
    model_type: str = "llama",
    dtype: Literal["bfloat16", "float32"] = "float32",
    **changes: Any,
) -> Path:
    """A tiny random reward model, exported; rows up to 256 tokens. changes: to its config."""
    base = make_base(directory / "base", model_type, **changes)
    model, tokenizer, made_by = load_base(str(base))
    export = directory / "export"
    export.mkdir()
    save_weights(model, model.state_dict(), export, DTYPES[dtype])
    tokenizer.save_pretrained(export)
    spec = TemplateSpec("chat", "\n", 256, made_by)
    record = Export(name="tiny", dtype=dtype, template=spec, weights_sha256=hash_weights(export))
    with_fingerprints(export, record).write(export)
    return export
