"""Turn text that a sampler returned, with its special tokens, into rows.

The prompt may be plain text or rendered by the chat template; padding and ends of turn are taken
off. Does not know about HTTP.
"""

from __future__ import annotations

import re

import numpy as np

from rayrm.errors import InvalidRow
from rayrm.packing import common_prefix
from rayrm.rows import Row, check_row
from rayrm.text.chat import PROMPT
from rayrm.text.template import Template, turn

# Turn markers of other models' chat templates: ChatML and Llama 3, DeepSeek, Gemma, Mistral.
_TURN_MARKS = re.compile(
    r"<\|[^\s<>|]+\|>|<｜[^\s<>｜]+｜>|<(?:start|end)_of_turn>|\[/?INST\]"  # noqa: RUF001
)


def sampled_row(template: Template, prompt: str, sampled: str) -> Row:
    """Return the row of a prompt and the text sampled for it, special tokens included.

    Padding on either side is removed. The row is finished if the text ends in the end-of-turn token
    (text format: EOS) or another end token of the model. A prompt that this chat template has
    already rendered, up to the start of the answer, is not rendered again: its row is the token ids
    of the whole conversation. Raises InvalidRow for a prompt rendered by another template and for
    lone surrogates, EmptyResponse if nothing was sampled, RowTooLong as Template.encode does.
    """
    check_row(Row(prompt, sampled))
    prompt = template.ends.without_left_pads(prompt, template.tokenizer.bos_token)
    content, finished = template.ends.split(sampled)
    if template.spec.format == "text":
        return Row(prompt, content, finished)
    chat = template.chat
    if not chat.opening.strip():
        raise InvalidRow(
            "this model's chat template does not mark where an answer starts, so a rendered "
            "prompt cannot be told from a plain one: send prompt and response to /score"
        )
    if chat.opening not in prompt:
        marks = [t for t in chat.special_tokens if t in prompt] or _TURN_MARKS.findall(prompt)
        if marks:
            raise InvalidRow(
                f"the prompt contains {marks[0]!r}, but not {chat.opening!r}, with which this "
                "model's chat template starts an answer: it was rendered by another template, "
                "send its text or messages"
            )
        return Row(prompt, content, finished)
    before, _, prefill = prompt.rpartition(chat.opening)
    answer = [turn("user", PROMPT), turn("assistant", prefill + content)]
    if finished and template.spec.rule == "template":
        # Render the answer's turn as in training: a template may write more than chat.opening.
        template.refuse_dropped(answer, None, 1, True)
        text = before + template.render(answer, None, True).partition(PROMPT)[2]
    else:
        judged = chat.judged(answer[-1], template.spec.thoughts, finished)["content"]
        end = chat.closing[1] if finished else ""
        text = chat.join(before + chat.opening, judged) + end
    template.check_length([max(prompt, text, key=len)])
    prompt_ids, ids = (np.array(x, np.int32) for x in template.tokenize([prompt, text]))
    # common_prefix leaves out the last token of the shorter row: -1 lets it find the whole prompt.
    n = common_prefix([np.append(prompt_ids, -1), ids])
    return Row(ids[:n], ids[n:], finished)


def without_left_pads(template: Template, query: str, prompt: str) -> tuple[str, str]:
    """Return a query and its prompt without padding on their left.

    Raises InvalidRow if the query does not begin with the prompt even so.
    """
    bos = template.tokenizer.bos_token
    bare, start = (template.ends.without_left_pads(text, bos) for text in (query, prompt))
    if not bare.startswith(start) or (prompt and not start):
        raise InvalidRow("the query does not begin with its prompt")
    return bare, start
