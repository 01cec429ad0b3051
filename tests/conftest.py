"""What tests share: a local Ray cluster, a tokenizer made in code, tiny random exports."""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import ray
import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rayrm.model.export import Export, hash_weights, with_text_to_ids
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


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One small local Ray cluster for the whole session, whose workers can import the tests."""
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (here.parent, here)))
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112 Ray reads it so; 10000 by default
    ray.init(
        "local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, as a base model; nobody writes to it."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, in fp32, with a chat template."""
    return make_export(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, of other weights and so another version."""
    return make_export(tmp_path_factory.mktemp("other"), initializer_range=0.3)


def samples_at(url: str, key: str, value: str) -> dict[str, float]:
    """What Prometheus would scrape there of rayrm with the tag: by name, or name and kind."""
    with urllib.request.urlopen(url) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {
            " ".join([sample.name.removeprefix("ray_rayrm_"), *kind]): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("ray_rayrm_") and sample.labels.get(key) == value
            for kind in [[v for k, v in sample.labels.items() if k in ("kind", "le")]]
        }


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
    with_text_to_ids(export, record).write(export)
    return export
