"""A tokenizer's chat template: what it writes around prompts and answers, and a row's text by it.

Two rules, of which an export has one. "template": the template renders prompt and response.
"continue": it renders the prompt with its generation prompt, and the response's own text and the
end of turn follow, as a sampler saw them. They give the same text unless the template rewrites
answers (Qwen3's writes an empty thought before an answer without one, DeepSeek-R1's drops
thoughts). A response that was cut off is never rewritten. Knows nothing of ids and lengths.
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
from rayrm.text.dropped import THOUGHT_KEYS, first_dropped
from rayrm.text.ends import Ends

Rule = Literal["template", "continue"]
Thoughts = Literal["keep", "drop"]

# Stand for a prompt and a response where only what a template writes around them is wanted.
PROMPT, RESPONSE = "PROMPT", "RESPONSE"

# What a message has for the template; nothing else of it can change a reward.
KEYS = ("role", "content", *MESSAGE_KEYS)

# A thought that a response begins with; one that was cut off is all of the response.
_OPEN, _CLOSE = "<think>", "</think>"
_THOUGHT = re.compile(r"\s*<think>.*?(</think>\s*|$)", re.DOTALL)

# Answers as models give them, to see whether a template rewrites them.
_ANSWERS = ("Paris, I think.", "<think>\nFrance, so\n</think>\n\nParis.")


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer; ends: tokens besides its own that end a text."""

    tokenizer: PreTrainedTokenizerBase
    ends: tuple[str, ...] = ()

    def render(
        self, messages: Sequence[Message], tools: Tools | None = None, *, answer: bool = False
    ) -> str:
        """What the template writes; answer: and what an answer is to begin with.

        Raises InvalidRow where it refuses the messages.
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
        """The text of a row whose response is the last message, closed if it is finished.

        thoughts "drop": the last message is judged without its thought. Raises InvalidRow where the
        template refuses the messages, EmptyResponse where nothing is left to judge.
        """
        final = self.judged(messages[-1], thoughts, finished)
        content = final["content"]
        end = self.closing[1] if finished else ""
        if len(bare(final)) > 2:  # calls, or a thought by itself: only the template can write them
            return self._answered([*messages[:-1], final], tools) + end
        if rule == "continue":
            return self.join(self.render(messages[:-1], tools, answer=True), content) + end
        body = self._answered([*messages[:-1], final], tools)
        if finished:
            return body + end
        head = self.render(messages[:-1], tools, answer=True)
        return body if self._as_sampled(body, head, content) else self.join(head, content)

    def judged(self, final: Message, thoughts: Thoughts, finished: bool) -> Message:
        """The last message as it is judged: without the end that a sampler left behind it."""
        content, _ = self.tokens.split(final.get("content") or "")
        if thoughts == "drop":
            if _OPEN in self.opening and _OPEN not in content:
                # The generation prompt wrote it; without its end all is thought, or nothing is.
                content = _OPEN + content if _CLOSE in content or not finished else content
            if thought := _THOUGHT.match(content):
                content = content[thought.end() :]
            final = {k: v for k, v in final.items() if k not in THOUGHT_KEYS}
        if not content and len(bare(final)) == 2:
            raise EmptyResponse(
                "the response is empty: there is nothing to score"
                if thoughts == "keep"
                else "the response is empty, or no more than a thought, which is not judged"
            )
        return {**final, "content": content or (final.get("content") and "")}

    def join(self, head: str, content: str) -> str:
        """A rendered prompt and the answer that follows, whose <think> it may have written."""
        if head.rstrip().endswith(_OPEN) and content.lstrip().startswith(_OPEN):
            content = content.lstrip().removeprefix(_OPEN)
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
        """What of a row the template drops, in words; otherwise as compose.

        judged: index of the response's first message. asked: what comes before was asked about.
        """
        final = bare(self.judged(messages[-1], thoughts, finished))
        given = [bare(m) for m in messages[:-1]]
        sampled = len(final) == 2 and (rule == "continue" or not finished)
        if not sampled:
            given.append(final)
        return first_dropped(
            partial(self._render, answer=sampled),
            given,
            tools,
            judged=judged,
            final=len(messages) - 1,
            asked=asked,
        )

    @cached_property
    def rewrites(self) -> bool:
        """Whether an answer as it is sampled and as the template writes it differ."""
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
        """What the template writes behind a prompt when an answer is to be sampled."""
        return self.render([_message("user", PROMPT)], answer=True).partition(PROMPT)[2]

    @cached_property
    def lead(self) -> str:
        """What it writes between that and an answer: space, or all where it has no such prompt."""
        prompt = [_message("user", PROMPT)]
        head = self.render(prompt, answer=True)
        whole = self.render([*prompt, _message("assistant", RESPONSE)])
        before = whole[: whole.rindex(RESPONSE)]
        lead = before.removeprefix(head) if before.startswith(head) else ""
        return lead if lead.isspace() or head == self.render(prompt) else ""

    @cached_property
    def closing(self) -> tuple[str, str]:
        """What it writes behind a response, and the part of it that a row ends in."""
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
        """What it writes before the text of a user's turn in the middle of a conversation."""
        question, again = (_message("user", mark) for mark in (PROMPT, "AGAIN"))
        text = self.render([question, _message("assistant", RESPONSE), again])
        between = text[text.rindex(RESPONSE) + len(RESPONSE) : text.rindex("AGAIN")]
        return between.partition(self.tokens.own[0])[2].lstrip()

    @cached_property
    def tokens(self) -> Ends:
        """What ends and pads a text of this template's."""
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
        """The template's rendering of messages that end in an answer, without its closing."""
        text, closing = self.render(messages, tools), self.closing[0]
        if not text.endswith(closing):
            raise InvalidRow(
                f"the chat template ends this conversation with {text[-20:]!r}, not {closing!r}"
            )
        return text.removesuffix(closing)

    def _as_sampled(self, body: str, head: str, content: str) -> bool:
        """Whether the body ends in the content as it is, after no more than space or a header."""
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


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def bare(message: Message) -> Message:
    """Of a message what a template is given: role, content, and those other keys that say more."""
    given = {k: message.get(k) for k in KEYS if message.get(k) or k in ("role", "content")}
    thoughts = [given[key] for key in THOUGHT_KEYS if key in given]
    if len(thoughts) > 1 and thoughts[0] == thoughts[1]:  # one thought under both of its names
        del given[THOUGHT_KEYS[1]]
    return given


def eos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends a text. Raises ModelError where there is none."""
    if not isinstance(tokenizer.eos_token, str):
        raise ModelError("the tokenizer has no EOS token, so a finished response cannot be marked")
    return tokenizer.eos_token


def pad_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.pad_token if isinstance(tokenizer.pad_token, str) else ""
