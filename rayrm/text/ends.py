"""Separate a response from what a sampler leaves around it: ends of turn, other ends, padding.

Knows the tokens that end and pad, as text; nothing of how a row is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Ends:
    """The tokens that may stand behind a response.

    turn: what the template closes a turn with, as it is written; own: the special tokens in it, or
    right behind it. others: what else ends a text for the model, such as those of its
    generation_config. pad: the token that pads.
    """

    turn: str
    own: tuple[str, ...]
    others: frozenset[str]
    pad: str

    @classmethod
    def of(cls, turn: str, own: Iterable[str], others: Iterable[str], pad: str) -> Ends:
        first, *behind = sorted(own, key=turn.find)
        return cls(turn, (first,), frozenset({*others, *behind}) - {first}, pad)

    def split(self, text: str) -> tuple[str, bool]:
        """The text without the ends and pads behind it, and whether it ended.

        Behind the template's end everything is padding. Another end counts if it stands once:
        several of one are padding, as where a model pads with its end of text.
        """
        backwards, n = text[::-1], 0
        run: list[str] = []
        while token := self._backwards.match(backwards, n):
            n = token.end()
            run.append(token[1][::-1])
        content, run = text[: len(text) - n], run[::-1]
        ended = any(token in self.own for token in run)
        if ended:
            return content.removesuffix(self.turn[: self.turn.find(self.own[0])]), True
        return content, bool(run) and run[0] in self.others and run.count(run[0]) == 1

    def without_left_pads(self, prompt: str, bos: str | None) -> str:
        """A prompt without the padding before it; what begins a text is none."""
        pads = sorted({self.pad, *self.own, *self.others} - {bos, ""})
        found = re.match(f"(?:{'|'.join(map(re.escape, pads))})+", prompt) if pads else None
        return prompt[found.end() :] if found else prompt

    @cached_property
    def _backwards(self) -> re.Pattern[str]:
        """A token and what space follows it, read from right to left.

        From the left, a search would begin anew at every token of a long run of them.
        """
        tokens = {*self.own, *self.others, self.pad} - {""}
        # The longest first: one token may begin as another does.
        backwards = sorted((t[::-1] for t in tokens), key=len, reverse=True)
        return re.compile(rf"\s*({'|'.join(map(re.escape, backwards))})")
