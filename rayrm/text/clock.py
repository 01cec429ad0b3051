"""Stop a chat template's clock, so that a row has the same ids on any day.

Some templates, such as Llama 3's, write today's date into the system message with the function
strftime_now, which transformers gives to every template. Does not know about exports.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers' name of the function. A template that defines a macro of that name has no clock.
_CLOCK = re.compile(r"\bstrftime_now\b")
_STOPPED = "{% macro strftime_now(format) %}"

# Stands for an escaped percent sign (%%): a character of Unicode's private use area.
_PERCENT = "\ue000"

# strftime's directives, with glibc's; each also without its padding ("%-d").
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf"


def reads_clock(template: str) -> bool:
    """Return whether a chat template renders different text at another time."""
    return _CLOCK.search(template) is not None and not template.startswith(_STOPPED)


def stop_clock(template: str, at: datetime) -> str:
    """Return the template with its clock stopped at that moment.

    A macro shadows the function, so transformers, vLLM and TRL render the same text on any day. It
    knows strftime's directives, also with the flag "-", but no other flags. A template without a
    clock is returned unchanged.
    """
    if not reads_clock(template):
        return template
    codes = [f"%{flag}{letter}" for letter in _DIRECTIVES for flag in ("-", "")]
    replaced = "".join(f" | replace({code!r}, {at.strftime(code)!r})" for code in codes)
    # A percent sign is hidden from the other directives until the end.
    replaced = f" | replace('%%', {_PERCENT!r}){replaced} | replace({_PERCENT!r}, '%')"
    # The environment removes the newline after a block, so the template begins as before.
    return f"{_STOPPED}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


def stop_clocks(tokenizer: PreTrainedTokenizerBase, at: datetime) -> None:
    """Stop the clock in a tokenizer's chat template, or in all of them if it has several."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: stop_clock(one, at) for name, one in template.items()}
    elif template:
        tokenizer.chat_template = stop_clock(template, at)
