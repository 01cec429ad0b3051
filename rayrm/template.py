"""Text → token ids, one way for training, evaluation and serving.

Chat format: the tokenizer's own template renders prompt and response, and the row ends with the
end-of-turn token. Text format: prompt, separator, response, EOS. Also: which token pads, what a
tokenizer's fingerprint is, and how an over-long row is cut. Knows nothing of groups or models.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeGuard

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rayrm.data import Message, Text
from rayrm.errors import (
    EmptyResponse,
    InvalidRow,
    InvalidTokenIds,
    ModelError,
    RowError,
    RowTooLong,
)
from rayrm.packing import Ids, common_prefix

Tokens = Sequence[int] | NDArray[np.integer]
Overlong = Literal["error", "truncate"]

# Characters that a normalizer makes one of, at most: NFC composes up to four.
COMPOSED = 4

# Stands for a prompt where only what a template writes behind it is wanted.
_MARK = "PROMPT"

# What other models' chat templates put around turns: ChatML and Llama 3, DeepSeek, Gemma, Mistral.
_TURN_MARKS = re.compile(
    r"<\|[^\s<>|]+\|>|<｜[^\s<>｜]+｜>|<(?:start|end)_of_turn>|\[/?INST\]"  # noqa: RUF001
)


class Row(NamedTuple):
    """One prompt and one response, both text, both messages (or text), or both token ids.

    An unfinished response was cut at the sampler's token limit: it is never closed with an end.
    """

    prompt: Text | Tokens
    response: Text | Tokens
    finished: bool = True


@dataclass(frozen=True)
class TemplateSpec:
    """What must be the same in training and serving; stored in the export.

    fingerprint is that of the tokenizer as its makers published it, before a pad token was added.
    """

    format: Literal["chat", "text"]
    separator: str
    max_length: int
    fingerprint: str


@dataclass(frozen=True)
class Template:
    """Turns rows into ids by a spec and the tokenizer it was made for."""

    tokenizer: PreTrainedTokenizerBase
    spec: TemplateSpec

    def encode(self, rows: Sequence[Row]) -> list[Ids | RowError]:
        """Ids of each row at full length, int32 [tokens], or the error of that row.

        Text of more than most_characters is RowTooLong untokenised, since that takes time without
        bound. It cannot lose the left of its prompt either: how a tail's ids stand in the whole,
        only the ids of the whole tell.
        """
        composed = [self._compose(row) for row in rows]
        texts = [text for parts in composed if isinstance(parts, list) for text in parts]
        ids = iter(self._tokenize(texts))
        return [
            self._join(row, [next(ids) for _ in parts]) if isinstance(parts, list) else parts
            for row, parts in zip(rows, composed, strict=True)
        ]

    def fit(self, row: Row, ids: Ids, overlong: Overlong) -> tuple[Ids | RowError, bool]:
        """The row's ids within max_length and whether its prompt was cut.

        Only the prompt's left is ever cut; a response that alone is too long is an error.
        """
        excess = len(ids) - self.spec.max_length
        if excess <= 0:
            return ids, False
        response = self.response_tokens(row, ids)
        if overlong == "truncate" and excess < len(ids) - response:
            return ids[excess:], True
        return RowTooLong(
            f"row has {len(ids)} tokens (response: {response}), the limit is "
            f"{self.spec.max_length}: shorten it, raise max_length, or ask for its prompt to be "
            'cut with overlong="truncate" (a response is never cut)'
        ), False

    def response_tokens(self, row: Row, ids: Ids) -> int:
        """Tokens of the response with its end, as they stand at the end of the row's ids.

        Found by where the ids part from those of another response: how much a template writes
        behind a response, and what merges at its start, is its own affair.
        """
        if is_ids(row.response):
            return len(row.response)
        if isinstance(row.response, str):
            other: Text = _other_text(row.response)
        else:
            assert _is_messages(row.response)
            first, *rest = row.response
            other = [{**first, "content": _other_text(first["content"])}, *rest]
        row = row._replace(response=other)
        ids_of_other = self._join(row, self._tokenize(self._texts(row)))
        return len(ids) - common_prefix([ids, ids_of_other])

    def sampled_row(self, prompt: str, sampled: str) -> Row:
        """The row of a prompt and the text that was sampled to it, special tokens and all.

        It is finished if the text ends in its end of turn (text format: EOS). A prompt that this
        chat template has rendered already, with the start of the answer, is not rendered again:
        that row is the ids of the whole conversation. Raises InvalidRow for a prompt that another
        template has rendered and for lone surrogates, EmptyResponse where nothing was sampled,
        RowTooLong as encode does.
        """
        check_row(Row(prompt, sampled))
        if self.spec.format == "text":
            return Row(prompt, sampled, sampled.endswith(_eos(self.tokenizer)))
        if not self.opening.strip():
            raise InvalidRow(
                "this model's chat template does not mark where an answer starts, so a rendered "
                "prompt cannot be told from a plain one: send prompt and response"
            )
        finished = self._kept_end(sampled) > 0
        if self.opening not in prompt:
            marks = [t for t in self._special_tokens if t in prompt]
            if marks or (marks := _TURN_MARKS.findall(prompt)):
                raise InvalidRow(
                    f"the prompt holds {marks[0]!r}, but not {self.opening!r}, with which this "
                    "model's chat template starts an answer: it was rendered by another template, "
                    "send its text or messages"
                )
            return Row(prompt, sampled, finished)
        before, _, prefill = prompt.rpartition(self.opening)
        # The answer's turn as in training: a template may write more than it starts an answer with.
        (turn,) = self._compose_chat(Row(_MARK, prefill + sampled, finished))
        text = before + turn.partition(_MARK)[2]
        self._check_length([max(prompt, text, key=len)])
        prompt_ids, ids = (np.array(x, np.int32) for x in self._tokenize([prompt, text]))
        n = common_prefix([np.append(prompt_ids, -1), ids])
        return Row(ids[:n], ids[n:], finished)

    # chat ------------------------------------------------------------------------------------

    @cached_property
    def opening(self) -> str:
        """What the chat template writes behind a prompt when an answer is to be sampled."""
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        assert isinstance(rendered, str)
        return rendered.partition(_MARK)[2]

    @cached_property
    def closing(self) -> tuple[str, str]:
        """What the chat template writes behind a response, and the part of it that is kept."""
        mark = "RESPONSE"
        try:
            rendered = self._render(
                [{"role": "user", "content": "PROMPT"}, {"role": "assistant", "content": mark}]
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ModelError(
                f"the chat template cannot render a prompt and its response: {error}"
            ) from None
        closing = rendered[rendered.rindex(mark) + len(mark) :]
        ends = [closing.rindex(t) + len(t) for t in self._special_tokens if t in closing]
        if ends:
            return closing, closing[: max(ends)]
        return closing, closing.rstrip() + _eos(self.tokenizer)

    def _kept_end(self, response: str) -> int:
        """Characters of the end of turn that a sampler which keeps special tokens leaves behind."""
        kept = self.closing[1]
        backwards, n = response[::-1], 0
        while end := self._end_backwards.match(backwards, n):
            n = end.end()
        return max(n, len(kept) if response.endswith(kept) else 0)

    @cached_property
    def _end_backwards(self) -> re.Pattern[str]:
        """A token of the end of turn and what space follows it, read from right to left.

        From the left, a search would begin anew at every token of a long run of them.
        """
        closing, kept = self.closing
        ends = [t[::-1] for t in self._special_tokens if t in closing or t in kept]
        return re.compile(rf"\s*({'|'.join(map(re.escape, ends))})")

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted(
            {t.content for t in added if t.special} | {*self.tokenizer.all_special_tokens}
        )

    def _render(self, messages: list[Message]) -> str:
        # Of a message only these two: what a record or a caller adds must not change a reward.
        bare = [{"role": m["role"], "content": m["content"]} for m in messages]
        rendered = self.tokenizer.apply_chat_template(
            bare, tokenize=False, add_generation_prompt=False
        )
        assert isinstance(rendered, str)
        return rendered

    def _compose_chat(self, row: Row) -> list[str]:
        prompt, response = row.prompt, row.response
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}] if prompt else []
        elif _is_empty(prompt):
            prompt = []
        if isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        assert _is_messages(prompt) and _is_messages(response)
        closing, kept = self.closing
        *before, final = response
        if not prompt and not before:
            raise InvalidRow(
                "the row has no prompt to put into the chat template: give one, or train with "
                "data.format: text"
            )
        if final["role"] != "assistant":
            raise InvalidRow(f"a response ends with an assistant message, got {final['role']!r}")
        # A sampler that keeps special tokens hands over the end itself: it must not stand twice.
        content = final["content"]
        content = content[: len(content) - self._kept_end(content)]
        if not content:
            raise EmptyResponse("the response is empty: there is nothing to score")
        try:
            text = self._render([*prompt, *before, {"role": "assistant", "content": content}])
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRow(
                f"the tokenizer's chat template refuses the messages: {error}"
            ) from None
        if not text.endswith(closing):
            raise InvalidRow(
                f"the chat template ends this conversation with {text[-20:]!r}, not {closing!r}"
            )
        return [text.removesuffix(closing) + (kept if row.finished else "")]

    # text ------------------------------------------------------------------------------------

    def _compose_text(self, row: Row) -> list[str]:
        if not (isinstance(row.prompt, str) and isinstance(row.response, str)):
            raise InvalidRow(
                "messages need a chat template and this model has none: give text, or train with "
                "data.chat_template"
            )
        response = row.response.removesuffix(_eos(self.tokenizer))
        if not response:
            raise EmptyResponse("the response is empty: there is nothing to score")
        return [row.prompt, response]

    def _join(self, row: Row, pieces: list[list[int]]) -> Ids:
        if self.spec.format == "chat":
            return np.array(pieces[0], dtype=np.int32)
        prompt, response = pieces
        bos = self.tokenizer.bos_token_id
        head = [bos] if self._adds_bos and prompt[:1] != [bos] else []
        separator = self._tokenize([self.spec.separator])[0] if row.prompt else []
        end = [self.tokenizer.eos_token_id] if row.finished else []
        return np.array([*head, *prompt, *separator, *response, *end], dtype=np.int32)

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][0] == bos

    # both ------------------------------------------------------------------------------------

    def _compose(self, row: Row) -> list[str] | Ids | RowError:
        """The texts to tokenise for a row, or its ids as given, or its error."""
        try:
            check_row(row)
            if is_ids(row.response):
                return self._check_ids(row)
            texts = self._texts(row)
            self._check_length(texts)
            return texts
        except RowError as error:
            return error

    def _texts(self, row: Row) -> list[str]:
        return self._compose_chat(row) if self.spec.format == "chat" else self._compose_text(row)

    @cached_property
    def most_characters(self) -> int:
        """Characters that a text of max_length tokens has at most, so that more cannot fit.

        A token covers no more of them than its entry in the vocabulary has, before a normalizer
        composed them. Exact unless the tokenizer drops text, as the special tokens of Phi-3 do
        with the spaces beside them: so long a row is refused though without them it would fit.
        """
        return self.spec.max_length * COMPOSED * max(map(len, self.tokenizer.get_vocab()))

    def _check_length(self, texts: list[str]) -> None:
        """Raises RowTooLong for a row that is too long by its characters."""
        characters = sum(map(len, texts))
        if characters > self.most_characters:
            raise RowTooLong(
                f"row has {characters} characters, {self.spec.max_length} tokens hold at most "
                f"{self.most_characters}: shorten it, or raise max_length (a row beyond that is "
                "not tokenised, and its prompt not cut)"
            )

    def _check_ids(self, row: Row) -> Ids:
        prompt, response = (np.asarray(x) for x in (row.prompt, row.response))
        if not len(response):
            raise EmptyResponse("the response is empty: there is nothing to score")
        ids = np.concatenate([prompt, response]) if len(prompt) else response
        bad = ids[(ids < 0) | (ids >= len(self.tokenizer))]
        if len(bad):
            raise InvalidTokenIds(
                f"token id {bad[0]} is outside the tokenizer's vocabulary of {len(self.tokenizer)}"
            )
        return ids.astype(np.int32)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids


def check_row(row: Row) -> None:
    """Raises InvalidRow unless prompt and response are both ids, or text and messages.

    An empty list or array goes with either: no prompt, or an empty response.
    """
    kinds = {_kind(value) for value in (row.prompt, row.response) if not _is_empty(value)}
    if "none" in kinds or ("ids" in kinds and len(kinds) > 1):
        raise InvalidRow(
            "prompt and response must both be text, messages "
            '({"role": …, "content": …} with text content) or token ids; '
            f"got {_describe(row.prompt)} and {_describe(row.response)}"
        )


def _is_empty(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return not value.size
    return isinstance(value, list | tuple) and not value


def _kind(value: object) -> Literal["text", "messages", "ids", "none"]:
    if _is_text(value):
        return "text"
    if isinstance(value, np.ndarray):
        return "ids" if value.ndim == 1 and (value.dtype.kind in "iu" or not value.size) else "none"
    if isinstance(value, list | tuple):
        if all(issubclass(t, int | np.integer) and t is not bool for t in set(map(type, value))):
            return "ids"
        if _is_messages(value) and _is_json(value):
            return "messages"
    return "none"


def _is_messages(value: object) -> TypeGuard[Sequence[Message]]:
    return isinstance(value, list | tuple) and all(
        isinstance(m, dict) and _is_text(m.get("role")) and _is_text(m.get("content"))
        for m in value
    )


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string without lone surrogates, which no tokenizer takes."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_ids(value: object) -> bool:
    """Whether a prompt or response is token ids."""
    return _kind(value) == "ids"


def _other_text(text: str) -> str:
    """A text that begins differently, also where a template strips both."""
    return "B" if text.lstrip().startswith("A") else "A"


def prompt_key(prompt: Text | Tokens) -> object:
    """Equal for equal prompts: rows with one key belong to one group."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, np.ndarray) or is_ids(prompt):
        return np.asarray(prompt, dtype=np.int32).tobytes()
    return json.dumps(prompt)


def _describe(value: object) -> str:
    kind = _kind(value)
    return kind if kind != "none" else f"{type(value).__name__} {reprlib.repr(value)}"


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(tokenizer.eos_token, str):
        raise ModelError("the tokenizer has no EOS token, so a finished response cannot be marked")
    return tokenizer.eos_token


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes token ids mean the same: sha256 over the vocabulary, id by id."""
    vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a pad token that never ends a row; True if it had to be added.

    transformers pools the last id that is not pad, so pad = EOS pools one token early.
    """
    template = tokenizer.chat_template or ""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    pad = tokenizer.pad_token
    if pad and pad not in taken and pad not in template:
        return False
    special = [t.content for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special]
    free = [t for t in special if t not in taken and t not in template]
    if not free:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        return True
    named = [t for t in free if "pad" in t.lower()]
    unknown = [t for t in free if t == tokenizer.unk_token]
    tokenizer.pad_token = (named or unknown or free)[0]
    return False
