"""Stop a chat template's clock, so that a row has the same ids on any day.

Llama 3's template and others write today's date into the system message, by the function
strftime_now that transformers gives to every template. Knows nothing of exports.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers calls it. A template that has a macro of that name reads no clock.
_CLOCK = re.compile(r"\bstrftime_now\b")
_STOPPED = "{% macro strftime_now(format) %}"

# strftime's directives that tell a moment, each also without its padding ("%-d").
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxX"


def reads_clock(template: str) -> bool:
    """Whether what the template renders depends on when it does."""
    return _CLOCK.search(template) is not None and not template.startswith(_STOPPED)


def stop_clock(template: str, at: datetime) -> str:
    """The template with that moment in place of its clock, whatever it asks of it.

    A macro shadows the function, so that transformers and what renders by it (vLLM, TRL) give the
    same text on any day. A template without a clock stays as it is.
    """
    if not reads_clock(template):
        return template
    codes = [f"%{flag}{letter}" for letter in _DIRECTIVES for flag in ("-", "")]
    replaced = "".join(f" | replace({code!r}, {at.strftime(code)!r})" for code in codes)
    # The environment trims the line's end behind a block, so that the template begins as it did.
    return f"{_STOPPED}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


def stop_clocks(tokenizer: PreTrainedTokenizerBase, at: datetime) -> None:
    """stop_clock in a tokenizer's chat template, or in all of them where it has several."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: stop_clock(one, at) for name, one in template.items()}
    elif template:
        tokenizer.chat_template = stop_clock(template, at)
