"""Compute two fingerprints of a tokenizer: what its ids mean, and how it turns text into ids.

fingerprint() hashes the vocabulary: callers send it with ids. fingerprint_text() hashes the files:
tokenizers with equal hashes give every text and conversation the same ids. Padding, truncation and
an added pad token are part of neither, since no row has them. Does not know about exports, and does
not import transformers, so that a client can name a tokenizer.
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

# Files of a tokenizer without tokenizer.json.
_VOCABULARIES = ("*.model", "vocab.*", "merges.txt")

# Settings of batches and of decoding, and where the files came from.
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

# Settings that name special tokens, other than the pad token.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")

# Attribute in which a tokenizer keeps its fingerprint and the state that it was computed from.
_REMEMBERED = "_rayrm_fingerprint"


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 over a tokenizer's vocabulary, id by id, without a pad token behind it.

    Two tokenizers with equal fingerprints mean the same by the same ids. A pad token that has the
    highest id and no other role was added for batches; no row has it. The tokenizer keeps the hash
    until tokens are added or its pad token changes: for 150 000 tokens it takes half a second.
    """
    made_of = getattr(tokenizer, "_tokenizer", None)
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    state = (len(tokenizer), added, tokenizer.pad_token)
    known: str
    known_of, known_state, known = vars(tokenizer).get(_REMEMBERED, (None, None, ""))
    if not known or known_of is not made_of or known_state != state:
        vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items())
        if vocabulary[-1][1] == tokenizer.pad_token and vocabulary[-1][1] not in _others(tokenizer):
            vocabulary.pop()
        known = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
        vars(tokenizer)[_REMEMBERED] = made_of, state, known
    return known


def _others(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the special tokens that have another role than the pad token."""
    roles = tokenizer.special_tokens_map
    return {
        token for role, token in roles.items() if role != "pad_token" and isinstance(token, str)
    }


def fingerprint_text(directory: Path, at: datetime) -> str:
    """Return the sha256 of all in a tokenizer's files that affects how text becomes ids.

    at: the moment at which a chat template's clock is stopped, if the template reads one.
    """
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        if (file := directory / name).exists():
            settings |= _read(file)
    pad = _content(settings.get("pad_token"))
    if pad in [_content(settings.get(role)) for role in _ROLES]:
        pad = None  # it is more than a pad
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
    """Return fingerprint_text of the files that a tokenizer in memory would be saved as."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return fingerprint_text(Path(directory), at)


def read_chat_templates(directory: Path) -> dict[str, str]:
    """Return the chat templates in a tokenizer's files by name, such as "default", "tool_use"."""
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
    """Return tokenizer.json without the settings of padding and without an added pad token."""
    kept = {k: v for k, v in tokenizer.items() if k not in ("padding", "truncation")}
    vocabulary = kept["model"].get("vocab")
    if not (isinstance(vocabulary, dict) and pad in vocabulary):
        kept["added_tokens"] = _without_added_pad(kept.get("added_tokens") or [], pad)
    return kept


def _without_added_pad(tokens: list[dict[str, Any]], pad: str | None) -> list[dict[str, Any]]:
    """Return the added tokens without a pad token with the highest id: it was added for batches."""
    last = max((token["id"] for token in tokens), default=-1)
    return [t for t in tokens if not (t["content"] == pad and t["id"] == last)]


def _content(token: Any) -> str | None:
    """Return the text of a special token, which files hold as a string or as an object."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def _read(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_bytes())
    return values if isinstance(values, dict) else {}
