"""Separate a response from what a sampler leaves around it: ends of turn, other ends, padding.

Works on text with special tokens. Does not know how a row is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Ends:
    """The tokens that may follow a response.

    turn: the text with which the template ends a turn. own: the special tokens in it. others: other
    tokens that end a text for the model, such as those of its generation_config. pad: the token
    that pads.
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
        """Return the text without trailing ends and pads, and whether it ended.

        Everything after the template's end is padding. Another end counts if it occurs once;
        repeated, it is padding, as of models that pad with their end of text.
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
        """Return a prompt without padding on its left; a BOS token is not padding."""
        pads = sorted({self.pad, *self.own, *self.others} - {bos, ""}, key=len, reverse=True)
        found = re.match(f"(?:{'|'.join(map(re.escape, pads))})+", prompt) if pads else None
        return prompt[found.end() :] if found else prompt

    @cached_property
    def _backwards(self) -> re.Pattern[str]:
        """Match a token and the space after it in reversed text.

        A search from the left would start again at every token of a long run of them.
        """
        tokens = {*self.own, *self.others, self.pad} - {""}
        # The longest first, since a token may be a prefix of another.
        backwards = sorted((t[::-1] for t in tokens), key=len, reverse=True)
        return re.compile(rf"\s*({'|'.join(map(re.escape, backwards))})")
