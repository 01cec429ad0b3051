"""Two fingerprints: what token ids mean, and what turns text into ids.

fingerprint() is over a tokenizer's vocabulary: callers send it with ids. fingerprint_text() is over
the files: two tokenizers that share it give every text and conversation the same ids. How a batch
is padded and truncated is not part of it, nor is a pad token: no row has one. Knows nothing of
exports, and loads no transformers, so that a client can name a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrm.text.clock import stop_clock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE = "chat_template.jinja"

# What a tokenizer without tokenizer.json is made from.
_VOCABULARIES = ("*.model", "vocab.*", "merges.txt")

# Settings of batches, of decoding, and of where the files came from.
_UNRELATED = {
    "backend",
    "chat_template",  # hashed as it is rendered
    "clean_up_tokenization_spaces",
    "is_local",
    "local_files_only",
    "max_length",
    "model_max_length",
    "name_or_path",
    "processor_class",
    "special_tokens_map_file",
    "stride",
    "tokenizer_file",
    "transformers_version",
    "truncation_side",
    "truncation_strategy",
}

# Where a tokenizer keeps its fingerprint, beside what it was made of.
_REMEMBERED = "_rayrm_fingerprint"


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes token ids mean the same: sha256 over the vocabulary, id by id.

    Remembered by the tokenizer until tokens are added to it: of 150 000 it takes half a second.
    """
    made_of = getattr(tokenizer, "_tokenizer", None)
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    known: str
    of, then, known = vars(tokenizer).get(_REMEMBERED, (None, None, ""))
    if not known or of is not made_of or then != (len(tokenizer), added):
        vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items())
        known = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
        vars(tokenizer)[_REMEMBERED] = made_of, (len(tokenizer), added), known
    return known


def fingerprint_text(directory: Path, at: datetime) -> str:
    """sha256 of a tokenizer's files as far as they turn text into ids.

    at: the moment at which a chat template's clock is stopped, if it reads one.
    """
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        if (file := directory / name).exists():
            settings |= _read(file)
    pad = _content(settings.get("pad_token"))
    if added := settings.get("added_tokens_decoder"):
        tokens = [{**token, "id": int(i)} for i, token in added.items()]
        settings["added_tokens_decoder"] = _without_added_pad(tokens, pad)
    templates = read_chat_templates(directory)
    parts: list[Any] = [
        {k: v for k, v in settings.items() if k not in _UNRELATED and not k.startswith("pad")},
        {name: stop_clock(template, at) for name, template in templates.items()},
    ]
    if (file := directory / TOKENIZER).exists():
        parts.append(_without_padding(_read(file), pad))
    else:
        files = sorted({f for pattern in _VOCABULARIES for f in directory.glob(pattern)})
        parts += [[f.name, hashlib.sha256(f.read_bytes()).hexdigest()] for f in files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_of_text(tokenizer: PreTrainedTokenizerBase, at: datetime) -> str:
    """As fingerprint_text, of a tokenizer in memory: of the files that it would be saved as."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return fingerprint_text(Path(directory), at)


def read_chat_templates(directory: Path) -> dict[str, str]:
    """The chat templates in a tokenizer's files by name, "default" and such as "tool_use"."""
    file = directory / SETTINGS[0]
    template = _read(file).get("chat_template") if file.exists() else None
    if isinstance(template, str):
        found = {"default": template}
    else:
        found = {one["name"]: one["template"] for one in template or ()}
    if (file := directory / TEMPLATE).exists():
        found["default"] = file.read_text()
    more = directory / "additional_chat_templates"
    return found | {file.stem: file.read_text() for file in sorted(more.glob("*.jinja"))}


def _without_padding(tokenizer: dict[str, Any], pad: str | None) -> dict[str, Any]:
    """tokenizer.json less how batches are padded and with what."""
    kept = {k: v for k, v in tokenizer.items() if k not in ("padding", "truncation")}
    vocabulary = kept["model"].get("vocab")
    if not (isinstance(vocabulary, dict) and pad in vocabulary):
        kept["added_tokens"] = _without_added_pad(kept.get("added_tokens") or [], pad)
    return kept


def _without_added_pad(tokens: list[dict[str, Any]], pad: str | None) -> list[dict[str, Any]]:
    """Added tokens less a pad token behind all others: it was added to train with."""
    last = max((token["id"] for token in tokens), default=-1)
    return [t for t in tokens if not (t["content"] == pad and t["id"] == last)]


def _content(token: Any) -> str | None:
    """The text of a special token, which files have as text or as an object."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def _read(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_bytes())
    return values if isinstance(values, dict) else {}
