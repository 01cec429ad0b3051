"""Turn text into token ids, in the same way for training, evaluation and serving.

Chat format: the chat template's text of prompt and response, up to the end of turn (chat.py). Text
format: prompt, separator, response, EOS. Also chooses the pad token and truncates over-long rows.
Does not know about groups or models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rayrm.data.records import Message, Text
from rayrm.errors import EmptyResponse, InvalidRow, InvalidTokenIds, RowError, RowTooLong
from rayrm.packing import Ids, common_prefix
from rayrm.rows import Row, Tokens, Tools, check_row, is_empty, is_ids, is_messages, prompt_key
from rayrm.text.chat import PROMPT, RESPONSE, ChatTemplate, Rule, Thoughts, eos, pad_of
from rayrm.text.ends import Ends

Overlong = Literal["error", "truncate"]

# Maximum number of characters that a normalizer composes into one: NFC composes four.
COMPOSED = 4

# Roles of instructions that come before the first turn.
_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class TemplateSpec:
    """What must be the same in training and serving; stored in the export.

    separator: text between prompt and response in the text format. max_length: in tokens.
    fingerprint: of the tokenizer before a pad token was added. rule: how a chat row is composed
    (chat.py). thoughts: "drop" scores a response without the thought that it begins with. ends:
    tokens besides the tokenizer's EOS that end a text for the base model.
    """

    format: Literal["chat", "text"]
    separator: str
    max_length: int
    fingerprint: str
    rule: Rule = "template"
    thoughts: Thoughts = "keep"
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """A tokenizer and the spec by which it turns rows into ids."""

    tokenizer: PreTrainedTokenizerBase
    spec: TemplateSpec

    def encode(self, rows: Sequence[Row]) -> list[Ids | RowError]:
        """Return the ids of each row at full length, int32 [tokens], or the row's error.

        Text of more than most_characters is RowTooLong and not tokenized, which would take time
        without bound; such a prompt is not truncated either, since that needs the ids of all of it.
        A row of which the chat template drops a part is InvalidRow.
        """
        asked: set[object] = set()
        return self._encode([self._compose(row, asked) for row in rows], rows)

    def fit(self, row: Row, ids: Ids, overlong: Overlong) -> tuple[Ids | RowError, bool]:
        """Return a row's ids within max_length, or its error, and whether its prompt was cut."""
        fitted, cut = self.fit_alike([row], [ids], overlong)
        return fitted[0], cut

    def fit_alike(
        self, rows: Sequence[Row], ids: Sequence[Ids], overlong: Overlong
    ) -> tuple[list[Ids | RowError], bool]:
        """Cut the common prompt of several rows to max_length; return ids, and whether it was cut.

        The prompt is cut from the left: first whole turns, then the text of the last turn. BOS, the
        system message and that turn's header stay. All rows are cut as the longest of them needs; a
        row that does not fit however its prompt is cut is RowTooLong and does not count.
        """
        longest = self.spec.max_length
        if max(map(len, ids)) <= longest:
            return list(ids), False
        fitted: list[Ids | RowError] = list(ids)
        if overlong == "error":
            for i, (row, of) in enumerate(zip(rows, ids, strict=True)):
                fitted[i] = of if len(of) <= longest else self._too_long(row, of, overlong)
            return fitted, False
        left = sorted(range(len(rows)), key=lambda i: -len(ids[i]))
        while left and len(ids[left[0]]) > longest:
            cut = self._cut([rows[i] for i in left], [ids[i] for i in left])
            if cut is not None:
                for i, of in zip(left, cut, strict=True):
                    fitted[i] = of
                return fitted, True
            first = left.pop(0)
            fitted[first] = self._too_long(rows[first], ids[first], overlong)
        return fitted, False

    def response_tokens(self, row: Row, ids: Ids) -> int:
        """Return the number of the row's last tokens that belong to the response and its end.

        They start where the ids differ from those with another response, since templates write
        text after a response, and tokens may merge at its start.
        """
        if is_ids(row.response):
            return len(row.response)
        if isinstance(row.response, str):
            other: Text = _other_text(row.response)
        else:
            assert is_messages(row.response)
            first, *rest = row.response
            other = [{**first, "content": _other_text(first.get("content") or "")}, *rest]
        row = row._replace(response=other)
        ids_of_other = self._join(row, self.tokenize(self._texts(row)))
        return len(ids) - common_prefix([ids, ids_of_other])

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template, if spec.format is "chat"."""
        return ChatTemplate(self.tokenizer, self.spec.ends)

    # chat ------------------------------------------------------------------------------------

    def _conversation(self, row: Row) -> tuple[list[Message], int]:
        """Return a row's messages, and the index of the response's first message."""
        prompt, response = _as_messages(row.prompt, "user"), _as_messages(row.response, "assistant")
        if not response:
            raise EmptyResponse("the response is empty: there is nothing to score")
        if not prompt and len(response) == 1:
            raise InvalidRow(
                "the row has no prompt to put into the chat template: give one, or train with "
                "data.format: text"
            )
        if response[-1]["role"] != "assistant":
            role = response[-1]["role"]
            raise InvalidRow(f"a response ends with an assistant message, got {role!r}")
        return [*prompt, *response], len(prompt)

    def render(self, messages: list[Message], tools: Tools | None, finished: bool) -> str:
        rule, thoughts = self.spec.rule, self.spec.thoughts
        return self.chat.compose(messages, tools, finished=finished, rule=rule, thoughts=thoughts)

    def refuse_dropped(
        self,
        messages: list[Message],
        tools: Tools | None,
        judged: int,
        finished: bool,
        asked: bool = False,
    ) -> None:
        """Raise InvalidRow if the chat template drops a part of a row.

        judged: index of the response's first message. asked: check only the response.
        """
        dropped = self.chat.first_dropped(
            messages,
            tools,
            judged=judged,
            asked=asked,
            finished=finished,
            rule=self.spec.rule,
            thoughts=self.spec.thoughts,
        )
        if dropped:
            raise InvalidRow(
                f"the chat template drops {dropped}: a reward would not depend on it, so leave it "
                "out, or use a template that renders it"
            )

    def dropped_thoughts(self, row: Row) -> int:
        """Count the messages of a row's prompt whose thoughts the chat template drops by design."""
        if self.spec.format == "text" or is_ids(row.response):
            return 0
        messages, judged = self._conversation(row)
        return self.chat.dropped_thoughts(
            messages,
            row.tools,
            judged=judged,
            finished=row.finished,
            rule=self.spec.rule,
            thoughts=self.spec.thoughts,
        )

    # text ------------------------------------------------------------------------------------

    def _compose_text(self, row: Row) -> list[str]:
        if not (isinstance(row.prompt, str) and isinstance(row.response, str)) or row.tools:
            raise InvalidRow(
                f"{'tools' if row.tools else 'messages'} need a chat template and this model has "
                "none: give text, or train with data.chat_template"
            )
        response, _ = self.ends.split(row.response)
        if not response:
            raise EmptyResponse("the response is empty: there is nothing to score")
        return [row.prompt, response]

    def _join(self, row: Row, pieces: list[list[int]]) -> Ids:
        if self.spec.format == "chat":
            return np.array(pieces[0], dtype=np.int32)
        prompt, response = pieces
        bos = self.tokenizer.bos_token_id
        head = [bos] if self._adds_bos and prompt[:1] != [bos] else []
        separator = self.tokenize([self.spec.separator])[0] if row.prompt else []
        end = [self.tokenizer.eos_token_id] if row.finished else []
        return np.array([*head, *prompt, *separator, *response, *end], dtype=np.int32)

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][0] == bos

    # both ------------------------------------------------------------------------------------

    def _compose(self, row: Row, asked: set[object]) -> list[str] | Ids | RowError:
        """Return the texts to tokenize for a row, its ids if it has ids, or its error.

        asked: prompts of which the chat template is known to drop nothing.
        """
        try:
            check_row(row)
            if is_ids(row.response):
                return self._check_ids(row)
            texts = self._texts(row)
            self.check_length(texts)
            if self.spec.format == "chat":
                messages, judged = self._conversation(row)
                prompt = prompt_key(row.prompt, row.tools)
                self.refuse_dropped(messages, row.tools, judged, row.finished, prompt in asked)
                asked.add(prompt)
            return texts
        except RowError as error:
            return error

    def _texts(self, row: Row) -> list[str]:
        if self.spec.format == "text":
            return self._compose_text(row)
        return [self.render(self._conversation(row)[0], row.tools, row.finished)]

    def _encode(
        self, composed: Sequence[list[str] | Ids | RowError], rows: Sequence[Row]
    ) -> list[Ids | RowError]:
        texts = [text for parts in composed if isinstance(parts, list) for text in parts]
        ids = iter(self.tokenize(texts))
        return [
            self._join(row, [next(ids) for _ in parts]) if isinstance(parts, list) else parts
            for row, parts in zip(rows, composed, strict=True)
        ]

    @cached_property
    def ends(self) -> Ends:
        """The tokens that may follow a response without being part of it."""
        if self.spec.format == "chat":
            return self.chat.tokens
        end = eos(self.tokenizer)
        return Ends(end, (end,), frozenset(self.spec.ends) - {end}, pad_of(self.tokenizer))

    @cached_property
    def most_characters(self) -> int:
        """Maximum number of characters of a text of max_length tokens.

        A token covers at most as many characters as its vocabulary entry has, before a normalizer
        composes them. A tokenizer that drops text, such as Phi-3's spaces next to special tokens,
        could fit more: such a row is refused.
        """
        return self.spec.max_length * COMPOSED * max(map(len, self.tokenizer.get_vocab()))

    def check_length(self, texts: list[str]) -> None:
        """Raise RowTooLong if a row has more characters than max_length tokens can hold."""
        characters = sum(map(len, texts))
        if characters > self.most_characters:
            raise RowTooLong(
                f"row has {characters} characters, {self.spec.max_length} tokens hold at most "
                f"{self.most_characters}: shorten it, or raise max_length (longer rows are neither "
                "tokenized nor truncated)"
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

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    # length ----------------------------------------------------------------------------------

    def _too_long(self, row: Row, ids: Ids, overlong: Overlong) -> RowTooLong:
        has = (
            f"row has {len(ids)} tokens (response: {self.response_tokens(row, ids)}), the limit is "
            f"{self.spec.max_length}"
        )
        if overlong == "error":
            return RowTooLong(
                f"{has}: shorten it, raise max_length, or truncate its prompt with "
                'overlong="truncate" (responses are never truncated)'
            )
        return RowTooLong(
            f"{has}, also without the part of its prompt that may be truncated (not the system "
            "message, nor what follows the last user message, nor the response): shorten it, or "
            "raise max_length"
        )

    def _cut(self, rows: Sequence[Row], ids: Sequence[Ids]) -> list[Ids] | None:
        """Return the rows' ids with as much of their prompt as lets the first, the longest, fit.

        None if it does not fit however the prompt is cut.
        """
        if self.spec.format == "text" or is_ids(rows[0].response):
            return self._cut_ids(rows, ids)
        prompt = _as_messages(rows[0].prompt, "user")
        system = next((i for i, m in enumerate(prompt) if m["role"] not in _SYSTEM), len(prompt))
        kept, turns = prompt[:system], prompt[system:]
        starts = [i for i, message in enumerate(turns) if message["role"] == turns[0]["role"]]
        if not starts:
            return None

        def from_turn(start: int) -> list[Ids] | None:
            return self._with_prompt(rows, [*kept, *turns[start:]])

        def fits(start: int) -> bool:
            cut = from_turn(start)
            return cut is not None and self._excess(cut) <= 0

        # Fewer turns are shorter, so a bisection tokenizes few of the possible numbers of turns.
        fewest = bisect_left(starts, True, lo=1, key=fits)
        if fewest < len(starts):
            return from_turn(starts[fewest])
        first, *rest = turns[starts[-1] :]
        text, dropped = first.get("content") or "", 0
        begins = self._begins(text)
        cut = from_turn(starts[-1])
        while cut and (excess := self._excess(cut)) > 0:
            dropped += excess
            if dropped >= len(begins):
                return None
            left = {**first, "content": text[begins[dropped] :]}
            cut = self._with_prompt(rows, [*kept, left, *rest])
        return cut

    def _with_prompt(self, rows: Sequence[Row], prompt: list[Message]) -> list[Ids] | None:
        """Return the rows' ids with that prompt; None if the chat template refuses it."""
        try:
            rows = [row._replace(prompt=prompt) for row in rows]
            return [self._join(row, self.tokenize(self._texts(row))) for row in rows]
        except InvalidRow:
            return None

    def _excess(self, ids: Sequence[Ids]) -> int:
        return max(map(len, ids)) - self.spec.max_length

    def _begins(self, text: str) -> list[int]:
        """Return the character at which each token of the text begins."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in encoded["offset_mapping"]]

    def _cut_ids(self, rows: Sequence[Row], ids: Sequence[Ids]) -> list[Ids] | None:
        """Do the same as _cut for ids, in which turns are found by the ids of a user's header."""
        longest, excess = ids[0], self._excess(ids)
        prompt = len(longest) - self.response_tokens(rows[0], longest)
        headers = self._headers(longest[:prompt])
        begins = headers[0][0] if headers else int(self._begins_text(longest))
        for start, _ in headers[1:]:
            if start - begins >= excess:
                return [np.concatenate([of[:begins], of[start:]]) for of in ids]
        start, end = headers[-1] if headers else (begins, begins)
        rest = end + excess - (start - begins)
        if rest >= prompt:
            return None
        return [np.concatenate([of[:begins], of[start:end], of[rest:]]) for of in ids]

    def _begins_text(self, ids: Ids) -> bool:
        return self._adds_bos and len(ids) > 0 and int(ids[0]) == self.tokenizer.bos_token_id

    def _headers(self, prompt: Ids) -> list[tuple[int, int]]:
        """Return for each user turn in a prompt's ids where it begins and where its header ends."""
        if self.spec.format == "text" or not (header := self.chat.user_header):
            return []
        pattern, whole = (np.array(self.tokenize([t])[0]) for t in (header.rstrip(), header))
        found = [
            i
            for i in range(len(prompt) - len(pattern) + 1)
            if np.array_equal(prompt[i : i + len(pattern)], pattern)
        ]
        space = len(whole) - len(pattern)
        return [(i, i + len(pattern) + space) for i in found]


def _as_messages(value: Text | Tokens, role: str) -> list[Message]:
    """Return messages unchanged, and text as one message of that role; an empty prompt has none."""
    if isinstance(value, str):
        return [turn(role, value)] if value or role == "assistant" else []
    if is_empty(value):
        return []
    assert is_messages(value)
    return list(value)


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _other_text(text: str) -> str:
    """Return a text that begins differently, even if a template strips both texts."""
    return "B" if text.lstrip().startswith("A") else "A"


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a pad token that no row contains; return whether one had to be added.

    transformers reads the reward at the last id that is not pad: with pad = EOS, one token early.
    """
    written = _written(tokenizer)
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    pad = tokenizer.pad_token
    if pad and pad not in taken and pad not in written:
        return False
    special = [t.content for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special]
    free = [t for t in special if t not in taken and t not in written]
    if not free:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        return True
    named = [t for t in free if "pad" in t.lower()]
    unknown = [t for t in free if t == tokenizer.unk_token]
    tokenizer.pad_token = (named or unknown or free)[0]
    return False


def _written(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template and a rendering: it may assemble tokens ('<|' + role + '|>')."""
    if not (template := tokenizer.chat_template):
        return ""
    source = "".join(template.values()) if isinstance(template, dict) else template
    chat = ChatTemplate(tokenizer)
    try:
        return source + chat.render([turn("user", PROMPT), turn("assistant", RESPONSE)])
    except InvalidRow:  # raised again when rows are rendered
        return source
