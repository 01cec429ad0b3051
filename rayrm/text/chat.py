"""Compose the text of a row with a tokenizer's chat template.

An export has one of two rules. "template": the template renders prompt and response. "continue":
it renders the prompt with its generation prompt; the response's own text and the end of turn
follow, as a sampler saw them. The texts are equal unless the template rewrites answers: Qwen3's
writes an empty thought before an answer without one, DeepSeek-R1's drops thoughts. An unfinished
response is never rewritten. Does not know about ids and lengths.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rayrm.data.records import MESSAGE_KEYS, Message
from rayrm.errors import EmptyResponse, InvalidRow, ModelError
from rayrm.rows import Tools
from rayrm.text.dropped import (
    THOUGHT_KEYS,
    THOUGHT_TAGS,
    Render,
    dropped_thoughts,
    first_dropped,
)
from rayrm.text.ends import Ends

Rule = Literal["template", "continue"]
Thoughts = Literal["keep", "drop"]

# A prompt and a response to find out what a template writes around them.
PROMPT, RESPONSE = "PROMPT", "RESPONSE"

# Keys of a message that the template gets; no other key can change a reward.
KEYS = ("role", "content", *MESSAGE_KEYS)

# A thought at the start of a response; without its end it is all of the response.
_THOUGHT = re.compile(
    "|".join(
        rf"\s*{re.escape(start)}.*?({re.escape(end)}\s*|$)" for start, end in THOUGHT_TAGS.items()
    ),
    re.DOTALL,
)

# Answers as models sample them, to find out whether a template rewrites them.
_ANSWERS = (
    "Paris, I think.",
    *(f"{start}\nFrance, so\n{end}\n\nParis." for start, end in THOUGHT_TAGS.items()),
)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template. ends: tokens besides the tokenizer's EOS that end a text."""

    tokenizer: PreTrainedTokenizerBase
    ends: tuple[str, ...] = ()

    def render(
        self, messages: Sequence[Message], tools: Tools | None = None, *, answer: bool = False
    ) -> str:
        """Render messages; with answer=True, followed by the generation prompt.

        Raises InvalidRow if the template refuses the messages.
        """
        try:
            return self._render([bare(m) for m in messages], tools, answer)
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRow(
                f"the tokenizer's chat template refuses the messages: {error}"
            ) from None

    def compose(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        finished: bool = True,
        rule: Rule = "template",
        thoughts: Thoughts = "keep",
    ) -> str:
        """Return the text of a row that ends with its response, with the end of turn if finished.

        thoughts: "drop" leaves out the thought of the last message. Raises InvalidRow if the
        template refuses the messages, EmptyResponse if nothing is left to score.
        """
        final = self.judged(messages[-1], thoughts, finished)
        content = final["content"]
        end = self.closing[1] if finished else ""
        if len(bare(final)) > 2:  # only the template can write calls and separate thoughts
            return self._answered([*messages[:-1], final], tools) + end
        if rule == "continue":
            return self.join(self.render(messages[:-1], tools, answer=True), content) + end
        body = self._answered([*messages[:-1], final], tools)
        if finished:
            return body + end
        head = self.render(messages[:-1], tools, answer=True)
        return body if self._as_sampled(body, head, content) else self.join(head, content)

    def judged(self, final: Message, thoughts: Thoughts, finished: bool) -> Message:
        """Return the last message as it is scored: without a sampler's end, perhaps its thought."""
        content, _ = self.tokens.split(final.get("content") or "")
        if thoughts == "drop":
            begun = _begun_thought(self.opening)
            if begun and begun not in content:
                # Without an end, an unfinished response is all thought, a finished one has none.
                ends = THOUGHT_TAGS[begun] in content or not finished
                content = begun + content if ends else content
            if thought := _THOUGHT.match(content):
                content = content[thought.end() :]
            final = {k: v for k, v in final.items() if k not in THOUGHT_KEYS}
        if not content and len(bare(final)) == 2:
            raise EmptyResponse(
                "the response is empty: there is nothing to score"
                if thoughts == "keep"
                else "the response is empty, or no more than a thought, which is not scored"
            )
        return {**final, "content": content or (final.get("content") and "")}

    def join(self, head: str, content: str) -> str:
        """Append an answer to a rendered prompt, which may have begun the answer's thought."""
        begun = _begun_thought(head)
        if begun and content.lstrip().startswith(begun):
            content = content.lstrip().removeprefix(begun)
            written = head[len(head.rstrip()) :]
            content = content.removeprefix(written)
        elif not content.startswith(self.lead):
            content = self.lead + content
        return head + content

    def first_dropped(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        judged: int,
        asked: bool = False,
        finished: bool = True,
        rule: Rule = "template",
        thoughts: Thoughts = "keep",
    ) -> str | None:
        """Name the first part of a row that the template drops; None if it drops nothing.

        judged: index of the response's first message. asked: the prompt is known to be kept. Other
        arguments and errors: see compose.
        """
        render, given = self._rendering(messages, finished, rule, thoughts)
        keep = thoughts == "keep"
        return first_dropped(render, given, tools, judged=judged, asked=asked, thoughts=keep)

    def dropped_thoughts(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        judged: int,
        finished: bool = True,
        rule: Rule = "template",
        thoughts: Thoughts = "keep",
    ) -> int:
        """Count the messages before the response whose thoughts the template drops."""
        render, given = self._rendering(messages, finished, rule, thoughts)
        return dropped_thoughts(render, given, tools, judged=judged)

    def _rendering(
        self, messages: Sequence[Message], finished: bool, rule: Rule, thoughts: Thoughts
    ) -> tuple[Render, list[Message]]:
        """Return how compose renders these messages, and those of them that it renders."""
        final = bare(self.judged(messages[-1], thoughts, finished))
        given = [bare(m) for m in messages[:-1]]
        sampled = len(final) == 2 and (rule == "continue" or not finished)
        if not sampled:
            given.append(final)
        return partial(self._render, answer=sampled), given

    @cached_property
    def rewrites(self) -> bool:
        """Whether the template writes an answer differently from how it was sampled."""
        prompt = _message("user", PROMPT)
        for answer in _ANSWERS:
            try:
                messages = [prompt, _message("assistant", answer)]
                body, head = self._answered(messages), self.render(messages[:1], answer=True)
            except InvalidRow:
                continue
            if body != self.join(head, answer):
                return True
        return False

    @cached_property
    def opening(self) -> str:
        """The text that the template writes after a prompt before an answer is sampled."""
        return self.render([_message("user", PROMPT)], answer=True).partition(PROMPT)[2]

    @cached_property
    def lead(self) -> str:
        """The whitespace between the generation prompt and an answer.

        If the template has no generation prompt, it is all that precedes an answer.
        """
        prompt = [_message("user", PROMPT)]
        head = self.render(prompt, answer=True)
        whole = self.render([*prompt, _message("assistant", RESPONSE)])
        before = whole[: whole.rindex(RESPONSE)]
        lead = before.removeprefix(head) if before.startswith(head) else ""
        return lead if lead.isspace() or head == self.render(prompt) else ""

    @cached_property
    def closing(self) -> tuple[str, str]:
        """The text that the template writes after a response, and the part that a row ends with."""
        try:
            rendered = self.render([_message("user", PROMPT), _message("assistant", RESPONSE)])
        except InvalidRow as error:
            raise ModelError(f"no prompt and response can be rendered: {error}") from None
        if RESPONSE not in rendered:
            raise ModelError(
                "the chat template drops what an assistant says: nothing can be scored"
            )
        closing = rendered[rendered.rindex(RESPONSE) + len(RESPONSE) :]
        ends = [closing.rindex(t) + len(t) for t in self.special_tokens if t in closing]
        if ends:
            return closing, closing[: max(ends)]
        return closing, closing.rstrip() + eos(self.tokenizer)

    @cached_property
    def user_header(self) -> str:
        """The text that the template writes before the content of a later user message."""
        question, again = (_message("user", mark) for mark in (PROMPT, "AGAIN"))
        text = self.render([question, _message("assistant", RESPONSE), again])
        between = text[text.rindex(RESPONSE) + len(RESPONSE) : text.rindex("AGAIN")]
        return between.partition(self.tokens.own[0])[2].lstrip()

    @cached_property
    def tokens(self) -> Ends:
        """The tokens that end and pad a text of this template."""
        kept = self.closing[1]
        own = [t for t in self.special_tokens if t in kept]
        return Ends.of(kept, own, {*self.ends, eos(self.tokenizer)}, pad_of(self.tokenizer))

    @cached_property
    def special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted(
            {t.content for t in added if t.special} | {*self.tokenizer.all_special_tokens}
        )

    def _answered(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """Render messages that end in an answer, without the text after it."""
        text, closing = self.render(messages, tools), self.closing[0]
        if not text.endswith(closing):
            raise InvalidRow(
                f"the chat template ends this conversation with {text[-20:]!r}, not {closing!r}"
            )
        return text.removesuffix(closing)

    def _as_sampled(self, body: str, head: str, content: str) -> bool:
        """Return whether a rendering is the head and the unchanged content, up to whitespace."""
        if not body.endswith(content):
            return False
        before = body.removesuffix(content)
        return head.startswith(before) or before.removeprefix(head).isspace()

    def _render(self, messages: Sequence[Message], tools: Tools | None, answer: bool) -> str:
        offered: list[Any] | None = list(tools) if tools else None
        rendered = self.tokenizer.apply_chat_template(
            list(messages),
            tools=offered,
            tokenize=False,
            add_generation_prompt=answer,
        )
        assert isinstance(rendered, str)
        return rendered


def _begun_thought(head: str) -> str:
    """Return the tag of the thought that a rendered prompt ends by beginning, "" for none."""
    return next((tag for tag in THOUGHT_TAGS if head.rstrip().endswith(tag)), "")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def bare(message: Message) -> Message:
    """Return what the template gets of a message: role, content, and other KEYS with a value."""
    given = {k: message.get(k) for k in KEYS if message.get(k) or k in ("role", "content")}
    thoughts = [given[key] for key in THOUGHT_KEYS if key in given]
    if len(thoughts) > 1 and thoughts[0] == thoughts[1]:  # one thought under both keys
        del given[THOUGHT_KEYS[1]]
    return given


def eos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that ends a text. Raises ModelError if there is none."""
    if not isinstance(tokenizer.eos_token, str):
        raise ModelError("the tokenizer has no EOS token, so a finished response cannot be marked")
    return tokenizer.eos_token


def pad_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.pad_token if isinstance(tokenizer.pad_token, str) else ""
