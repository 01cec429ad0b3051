"""Rows as the models' own templates write them: one BOS, one end, nothing behind it."""

from __future__ import annotations

import pickle
import sys
import time
from dataclasses import replace
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from rayrm.errors import (
    EmptyResponse,
    InvalidRow,
    InvalidTokenIds,
    ModelError,
    RowError,
    RowTooLong,
)
from rayrm.packing import Ids
from rayrm.rows import Row, is_ids, prompt_key
from rayrm.text.fingerprints import fingerprint
from rayrm.text.sampled import sampled_row
from rayrm.text.template import COMPOSED, Template, TemplateSpec, set_pad_token
from tests.makers import CHATML, tiny_tokenizer
from tests.tiny import byte_tokenizer

LLAMA2 = """{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}\
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}\
{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}\
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"""
LLAMA3 = """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + \
'<|eot_id|>' }}{% endfor %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}\
{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + \
m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"""
PHI3 = """{% for m in messages %}\
{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"

# special tokens, chat template, eos, bos, the rendered row of "Hi"/"Paris", its end
STYLES: dict[str, tuple[list[str], str, str, str | None, str, str]] = {
    "chatml": (
        ["<pad>", "<|im_start|>", "<|im_end|>"],
        CHATML,
        "<|im_end|>",
        "<|im_start|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nParis",
        "<|im_end|>",
    ),
    "qwen": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        CHATML,
        "<|im_end|>",
        None,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nParis",
        "<|im_end|>",
    ),
    "llama2": (
        ["<unk>", "<s>", "</s>"],
        LLAMA2,
        "</s>",
        "<s>",
        "<s>[INST] Hi [/INST] Paris",
        " </s>",
    ),
    "mistral": (
        ["<unk>", "<s>", "</s>"],
        MISTRAL,
        "</s>",
        "<s>",
        "<s>[INST] Hi [/INST] Paris",
        "</s>",
    ),
    "llama3": (
        ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved|>"],
        LLAMA3,
        "<|eot_id|>",
        "<|begin|>",
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nParis",
        "<|eot_id|>",
    ),
    "gemma": (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        GEMMA,
        "<eos>",
        "<bos>",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nParis",
        "<end_of_turn>",
    ),
    "phi3": (
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
        PHI3,
        "<|endoftext|>",
        None,
        "<|user|>\nHi<|end|>\n<|assistant|>\nParis",
        "<|end|>\n<|endoftext|>",
    ),
    "no special token": (
        ["<unk>", "</s>"],
        PLAIN,
        "</s>",
        None,
        "user: Hi\nassistant: Paris",
        "</s>",
    ),
}
styles = pytest.mark.parametrize("style", STYLES)


def template(
    style: str, max_length: int = 1000, format: Literal["chat", "text"] = "chat"
) -> Template:
    special, jinja, eos, bos, _, _ = STYLES[style]
    named = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    tokenizer = byte_tokenizer(special, template=jinja, adds_bos=bos is not None, **named)
    spec = TemplateSpec(format, "\n", max_length, fingerprint(tokenizer))
    set_pad_token(tokenizer)
    return Template(tokenizer, spec)


def text_template(
    adds_bos: bool = False, separator: str = "\n", max_length: int = 1000
) -> Template:
    """A base model's tokenizer, which has no chat template."""
    tokenizer = byte_tokenizer(
        ["<unk>", "<s>", "</s>"], bos_token="<s>", eos_token="</s>", adds_bos=adds_bos
    )
    return Template(tokenizer, TemplateSpec("text", separator, max_length, fingerprint(tokenizer)))


def encode(
    template: Template, prompt: Any, response: Any, finished: bool = True, tools: Any = None
) -> Ids:
    (ids,) = template.encode([Row(prompt, response, finished, tools)])
    assert isinstance(ids, np.ndarray), ids
    assert ids.dtype == np.int32
    return ids


def text(template: Template, ids: list[int] | Ids) -> str:
    decoded = template.tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(decoded, str)
    return decoded


def failure(template: Template, prompt: Any, response: Any, finished: bool = True) -> RowError:
    good = Row("Hi", "Paris")
    results = template.encode([good, Row(prompt, response, finished), good])
    assert isinstance(results[1], RowError), results[1]
    good_ids = [ids for ids in results if isinstance(ids, np.ndarray)]
    assert len(good_ids) == 2 and np.array_equal(good_ids[0], good_ids[1])
    return results[1]


# Chat -------------------------------------------------------------------------------------------


@styles
def test_a_row_is_what_the_template_renders_up_to_the_end_of_turn(style: str) -> None:
    chat = template(style)
    body, end = STYLES[style][4:]
    assert text(chat, encode(chat, "Hi", "Paris")) == body + end


@styles
def test_a_row_ends_in_a_special_token_that_never_pads(style: str) -> None:
    chat = template(style)
    last = encode(chat, "Hi", "Paris")[-1]
    assert chat.tokenizer.added_tokens_decoder[int(last)].special
    assert last != chat.tokenizer.pad_token_id


@styles
def test_ids_are_those_of_transformers_own_rendering(style: str) -> None:
    chat = template(style)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Paris"}]
    theirs: Any = chat.tokenizer.apply_chat_template(messages, return_dict=False)
    ours = encode(chat, "Hi", "Paris").tolist()
    if style == "no special token":
        assert ours[:-1] == theirs[:-1] and ours[-1] == chat.tokenizer.eos_token_id
    else:
        assert theirs[: len(ours)] == ours
        assert text(chat, theirs[len(ours) :]).strip() == ""


@styles
def test_bos_stands_once(style: str) -> None:
    chat = template(style)
    bos = STYLES[style][3]
    if bos is not None and style != "chatml":
        row = encode(chat, "Hi", "Paris").tolist()
        assert row[0] == chat.tokenizer.bos_token_id
        assert row.count(chat.tokenizer.bos_token_id) == 1


@styles
def test_an_end_that_the_sampler_kept_does_not_stand_twice(style: str) -> None:
    chat = template(style)
    expected = encode(chat, "Hi", "Paris")
    end = STYLES[style][5]
    for kept in {end, end.strip(), end.split("\n")[0].strip()}:
        assert text(chat, encode(chat, "Hi", "Paris" + kept)) == text(chat, expected)
        messages = [{"role": "assistant", "content": "Paris" + kept}]
        assert np.array_equal(encode(chat, "Hi", messages), expected)


@styles
def test_an_unfinished_row_is_not_closed(style: str) -> None:
    chat = template(style)
    body = STYLES[style][4]
    assert text(chat, encode(chat, "Hi", "Paris", finished=False)) == body


@styles
def test_messages_and_their_text_are_one_row(style: str) -> None:
    chat = template(style)
    user, assistant = (
        {"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Paris"))
    )
    expected = encode(chat, "Hi", "Paris")
    for prompt, response in (("Hi", [assistant]), ([user], "Paris"), ([user], [assistant])):
        assert np.array_equal(encode(chat, prompt, response), expected)


@styles
def test_an_end_inside_the_response_stays(style: str) -> None:
    chat = template(style)
    body, end = STYLES[style][4:]
    inside = end.strip().split("\n")[-1] + "Rome"
    assert text(chat, encode(chat, "Hi", "Paris" + inside)) == body + inside + end


def test_whitespace_of_the_response_is_kept_where_the_template_keeps_it() -> None:
    chatml, llama3 = template("chatml"), template("llama3")
    assert text(chatml, encode(chatml, "Hi", " Paris \n")).endswith(
        "assistant\n Paris \n<|im_end|>"
    )
    assert text(llama3, encode(llama3, "Hi", " Paris \n")).endswith("\n\nParis<|eot_id|>")


def test_a_response_of_several_messages_is_scored_whole() -> None:
    chat = template("chatml")
    response = [
        {"role": "assistant", "content": "Where?"},
        {"role": "user", "content": "France"},
        {"role": "assistant", "content": "Paris"},
    ]
    row = text(chat, encode(chat, "Hi", response))
    assert row.endswith(
        "assistant\nWhere?<|im_end|>\n<|im_start|>user\nFrance<|im_end|>\n"
        "<|im_start|>assistant\nParis<|im_end|>"
    )


def test_a_conversation_without_a_prompt_is_scored_whole() -> None:
    """Records whose conversations differ from the first message on share no prompt."""
    chat = template("chatml")
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Paris"},
    ]
    prompts: list[Any] = [[], "", np.array([], dtype=np.int32)]  # as a replica gets an empty list
    for nothing in prompts:
        assert np.array_equal(encode(chat, nothing, conversation), encode(chat, "Hi", "Paris"))


def test_a_prompt_that_ends_in_an_assistant_message_keeps_it_as_a_turn_of_its_own() -> None:
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    chat = template("chatml")
    assert text(chat, encode(chat, prompt, "Paris")) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell<|im_end|>\n"
        "<|im_start|>assistant\nParis<|im_end|>"
    )
    error = failure(template("mistral"), prompt, "Paris")
    assert isinstance(error, InvalidRow) and "must alternate" in str(error)


def rendered(chat: Template, prompt: str) -> str:
    """A prompt on its way to a sampler."""
    messages = [{"role": "user", "content": prompt}]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("style", [s for s in STYLES if s != "no special token"])
@pytest.mark.parametrize("form", [rendered, lambda _, prompt: prompt], ids=["rendered", "plain"])
def test_a_sampled_text_is_the_row_of_its_prompt_and_response(style: str, form: Any) -> None:
    chat = template(style)
    end = STYLES[style][5]
    for kept in (end, end.split("\n")[0]):
        row = sampled_row(chat, form(chat, "Hi"), "Paris" + kept)
        assert np.array_equal(encode(chat, *row), encode(chat, "Hi", "Paris"))
        assert row.finished
    row = sampled_row(chat, form(chat, "Hi"), "Paris")
    assert np.array_equal(encode(chat, *row), encode(chat, "Hi", "Paris", finished=False))
    assert not row.finished
    rows = [sampled_row(chat, form(chat, "Hi"), response) for response in ("Paris", "Rome")]
    assert prompt_key(rows[0].prompt) == prompt_key(rows[1].prompt)
    if form is rendered:
        with pytest.raises(EmptyResponse):
            sampled_row(chat, form(chat, "Hi"), end)


def test_a_sampled_answer_is_written_as_the_template_writes_answers() -> None:
    # Qwen3's habit: an answer without a thought gets an empty one, in training too.
    thoughts = (
        CHATML.replace(
            "{{ m['content'] }}",
            "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}"
            "<think></think>{% endif %}{{ m['content'] }}",
        )
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = template("qwen")
    chat.tokenizer.chat_template = thoughts
    prompt = rendered(chat, "Hi")
    for start, sampled in (
        ("", "Paris"),
        ("", "<think>Hm.</think>Paris"),
        ("<think></think>", "Paris"),
        ("Well", ", Paris"),
    ):
        row = sampled_row(chat, prompt + start, sampled + "<|im_end|>")
        assert np.array_equal(encode(chat, *row), encode(chat, "Hi", start + sampled))


def test_a_prompt_of_another_template_is_refused() -> None:
    for style, others in (("qwen", STYLES.keys()), ("mistral", ["qwen", "llama3", "gemma"])):
        for other in set(others) - {"qwen", "chatml", "no special token", style}:
            with pytest.raises(InvalidRow, match="rendered by another template"):
                sampled_row(template(style), rendered(template(other), "Hi"), "Paris")
    with pytest.raises(InvalidRow, match="cannot be told from a plain one"):
        sampled_row(template("no special token"), "Hi", "Paris")


def test_a_sampled_text_ends_in_eos_where_there_is_no_chat_template() -> None:
    rows = text_template()
    assert sampled_row(rows, "Hi", "Paris</s>") == Row("Hi", "Paris", True)
    assert sampled_row(rows, "Hi", "Paris") == Row("Hi", "Paris", False)


def test_a_template_that_refuses_one_conversation_fails_that_row_alone() -> None:
    prompt = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    error = failure(template("gemma"), prompt, "Paris")
    assert isinstance(error, InvalidRow) and "System role not supported" in str(error)


def test_a_template_that_refuses_every_conversation_is_a_model_error() -> None:
    chat = template("chatml")
    chat.tokenizer.chat_template = "{{ raise_exception('not for chat') }}"
    with pytest.raises(ModelError, match="not for chat"):
        chat.encode([Row("Hi", "Paris")])


@pytest.mark.parametrize(
    "response",
    ["", "<|im_end|>", [], np.array([]), [{"role": "assistant", "content": ""}]],
    ids=["nothing", "only the end", "no message", "no ids", "empty message"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_an_empty_response_is_an_error(response: Any, finished: bool) -> None:
    assert isinstance(failure(template("chatml"), "Hi", response, finished), EmptyResponse)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        (None, "Paris"),
        ("Hi", None),
        ("Hi", 3.5),
        ("Hi", b"Paris"),
        ("Hi", "half an emoji \ud83d"),
        ("Hi", [{"role": "assistant", "content": None}]),
        ("Hi", [{"role": "assistant", "content": [{"type": "text", "text": "Paris"}]}]),
        ([{"content": "Hi"}], "Paris"),
        ([{"role": "user", "content": 3}], "Paris"),
        ("Hi", [{"role": "user", "content": "Paris"}]),
        ("Hi", [5, 6]),
        ([5, 6], "Paris"),
        ("Hi", [5, "6"]),
        ("Hi", [True, False]),
        ([5], np.array([0.5])),
        ([5], np.array([[5]])),
        ([5], np.array(5)),
        ("", "Paris"),
    ],
)
def test_what_is_not_text_messages_or_ids_is_an_error(prompt: Any, response: Any) -> None:
    error = failure(template("chatml"), prompt, response)
    assert isinstance(error, InvalidRow)
    assert str(error)


def test_messages_to_a_model_without_a_template_are_an_error() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    error = failure(text_template(), messages, "Paris")
    assert isinstance(error, InvalidRow) and "chat template" in str(error)


# Text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "separator", "adds_bos", "expected"),
    [
        ("Hi", "\n", False, "Hi\nParis</s>"),
        ("Hi", "\n", True, "<s>Hi\nParis</s>"),
        ("Hi", "", True, "<s>HiParis</s>"),
        ("Hi", "\n\nA: ", False, "Hi\n\nA: Paris</s>"),
        ("<s>Hi", "\n", True, "<s>Hi\nParis</s>"),
        ("", "\n", True, "<s>Paris</s>"),
        ("", "\n", False, "Paris</s>"),
    ],
)
def test_text_rows_are_prompt_separator_response_eos(
    prompt: str, separator: str, adds_bos: bool, expected: str
) -> None:
    rows = text_template(adds_bos, separator)
    ids = encode(rows, prompt, "Paris")
    assert text(rows, ids) == expected
    assert ids[-1] == rows.tokenizer.eos_token_id
    assert np.array_equal(encode(rows, prompt, "Paris</s>"), ids)
    unfinished = encode(rows, prompt, "Paris", finished=False)
    assert np.array_equal(unfinished, ids[:-1])


def test_empty_text_is_an_error() -> None:
    for response in ("", "</s>"):
        assert isinstance(failure(text_template(), "Hi", response), EmptyResponse)


def test_without_an_eos_a_finished_row_cannot_be_marked() -> None:
    rows = text_template()
    rows.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        rows.encode([Row("Hi", "Paris")])


# Ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [template("chatml"), text_template(adds_bos=True)])
@pytest.mark.parametrize("finished", [True, False])
def test_ids_are_scored_as_given(rows: Template, finished: bool) -> None:
    for prompt, response in (
        ([5, 6, 7], [8, 2]),
        (np.array([5, 6, 7]), np.array([8, 2], dtype=np.int64)),
        ((5, 6, 7), np.array([8, 2], dtype=np.uint16)),
        ([], [5, 6, 7, 8, 2]),
        (np.array([]), [5, 6, 7, 8, 2]),
    ):
        assert encode(rows, prompt, response, finished).tolist() == [5, 6, 7, 8, 2]


@pytest.mark.parametrize(
    ("prompt", "response", "named"),
    [
        ([5], [9, 10_000], "10000"),
        ([-1], [9], "-1"),
        ([5], [2**40], str(2**40)),
        ([5], [2**70], str(2**70)),
    ],
)
def test_ids_outside_the_vocabulary_are_an_error(
    prompt: list[int], response: list[int], named: str
) -> None:
    chat = template("chatml")
    error = failure(chat, prompt, response)
    assert isinstance(error, InvalidTokenIds)
    assert named in str(error) and str(len(chat.tokenizer)) in str(error)


def test_the_last_id_of_the_vocabulary_is_inside() -> None:
    chat = template("chatml")
    size = len(chat.tokenizer)
    assert encode(chat, [size - 1], [5])[0] == size - 1
    assert isinstance(failure(chat, [size], [5]), InvalidTokenIds)


def test_empty_response_ids_are_an_error() -> None:
    assert isinstance(failure(template("chatml"), [5], []), EmptyResponse)
    assert isinstance(failure(template("chatml"), [5], np.array([], np.int32)), EmptyResponse)


def test_kinds_and_keys_of_prompts() -> None:
    assert is_ids([1, 2]) and is_ids(np.array([1])) and not is_ids("ab") and not is_ids([True])
    same = ([5, 6], (5, 6), np.array([5, 6]), np.array([5, 6], dtype=np.uint8))
    assert len({prompt_key(p) for p in same}) == 1
    messages = [{"role": "user", "content": "Hi"}]
    assert prompt_key(messages) == prompt_key([dict(messages[0])]) != prompt_key("Hi")


def test_messages_that_json_cannot_hold_are_an_error() -> None:
    """They could neither be compared nor sent to a replica."""
    message = {"role": "user", "content": "Hi", "image": object()}
    assert isinstance(failure(template("chatml"), [message], "Paris"), InvalidRow)


# Length -----------------------------------------------------------------------------------------


@styles
@pytest.mark.parametrize("finished", [True, False])
def test_an_overlong_row_loses_its_prompt_from_the_left_and_never_its_response(
    style: str, finished: bool
) -> None:
    chat = template(style)
    row = Row("What is the capital of France?", "Paris, I think.", finished)
    ids = encode(chat, *row)
    end = STYLES[style][5] if finished else ""
    before, _, after = text(chat, ids).partition(str(row.prompt))
    for length in range(len(ids) + 2, 0, -1):
        limited = Template(chat.tokenizer, replace(chat.spec, max_length=length))
        refused, cut = limited.fit(row, ids, "error")
        assert not cut and isinstance(refused, RowTooLong if length < len(ids) else np.ndarray)
        kept, cut = limited.fit(row, ids, "truncate")
        assert cut == (isinstance(kept, np.ndarray) and length < len(ids))
        if isinstance(kept, RowError):
            assert isinstance(kept, RowTooLong)
            assert str(length) in str(kept) and str(len(ids)) in str(kept)
            # Refused only where all but the prompt's text leaves no room for any of it.
            assert length <= len(ids) - len(str(row.prompt))
        else:
            assert min(length, len(ids)) - len(kept) in (0, 1)  # a template may trim a first space
            whole = text(chat, kept)
            assert whole.startswith(before) and whole.endswith(after), "header or response is cut"
            assert str(row.prompt).endswith(whole[len(before) : len(whole) - len(after)])
            assert whole.endswith("Paris, I think." + end)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "An apple."},
    {"role": "user", "content": "And a colour?"},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.mark.parametrize("style", ["chatml", "llama3"])
def test_turns_go_first_and_the_system_message_and_the_last_header_stay(style: str) -> None:
    chat = template(style)
    row = Row(CONVERSATION, "Paris.")
    ids = encode(chat, *row)
    shorter = [
        encode(chat, [CONVERSATION[0], *CONVERSATION[start:]], "Paris.") for start in (1, 3, 5)
    ]
    system, _, question = text(chat, shorter[-1]).partition("What is")
    for length in range(len(ids), 0, -1):
        limited = Template(chat.tokenizer, replace(chat.spec, max_length=length))
        kept, _ = limited.fit(row, ids, "truncate")
        fits = [of for of in shorter if len(of) <= length]
        if fits:
            assert isinstance(kept, np.ndarray) and np.array_equal(kept, fits[0])
        elif isinstance(kept, np.ndarray):
            # Inside the last turn, and no more than needed; the template may trim a first space.
            assert length - len(kept) in (0, 1)
            assert text(chat, kept).startswith(system)
            assert "What is the capital of France?".endswith(
                text(chat, kept)[len(system) :].partition(question[-12:])[0].partition("?")[0] + "?"
            )
        else:
            assert isinstance(kept, RowTooLong)


def test_a_cut_conversation_begins_as_the_template_wants_it() -> None:
    """Mistral's begins with a user's turn and refuses the others."""
    chat = template("mistral")
    row = Row(CONVERSATION[1:], "Paris.")
    ids = encode(chat, *row)
    limited = Template(chat.tokenizer, replace(chat.spec, max_length=len(ids) - 1))
    kept, cut = limited.fit(row, ids, "truncate")
    assert isinstance(kept, np.ndarray) and cut
    assert np.array_equal(kept, encode(chat, CONVERSATION[3:], "Paris."))


def test_rows_that_are_compared_lose_the_same_of_their_prompt() -> None:
    chat = template("chatml")
    rows = [Row(CONVERSATION, "Paris."), Row(CONVERSATION, "Paris, I am quite sure of that.")]
    ids = [encode(chat, *row) for row in rows]
    longest = len(encode(chat, [CONVERSATION[0], *CONVERSATION[3:]], "Paris.")) + 1
    chat = template("chatml", max_length=longest)  # room for two turns beside the short response
    fitted, cut = chat.fit_alike(rows, ids, "truncate")
    assert cut and max(map(len, (of for of in fitted if isinstance(of, np.ndarray)))) <= longest
    first, second = (text(chat, of) for of in fitted if isinstance(of, np.ndarray))
    assert first.partition("Paris")[0] == second.partition("Paris")[0]
    alone, _ = chat.fit(rows[0], ids[0], "truncate")
    assert isinstance(alone, np.ndarray) and "And a colour?" in text(chat, alone)
    assert "And a colour?" not in first, "its neighbour is longer"


def test_rows_that_are_compared_do_not_lose_more_for_one_that_cannot_fit() -> None:
    chat = template("chatml", max_length=80)
    rows = [Row("Hi", "Paris"), Row("Hi", "Paris" * 20), Row("Hi", "Rome")]
    fitted, _ = chat.fit_alike(rows, [encode(chat, *row) for row in rows], "truncate")
    assert isinstance(fitted[1], RowTooLong)
    for of, row in ((fitted[0], rows[0]), (fitted[2], rows[2])):
        assert isinstance(of, np.ndarray) and np.array_equal(of, encode(chat, *row))


@pytest.mark.parametrize("style", ["chatml", "llama3"])
def test_ids_are_cut_at_a_turn_and_keep_system_message_and_header(style: str) -> None:
    chat = template(style)
    whole = encode(chat, CONVERSATION, "Paris.")
    n = chat.response_tokens(Row(CONVERSATION, "Paris."), whole)
    row = Row(whole[:-n], whole[-n:])
    for length in range(len(whole), n + 60, -1):
        limited = Template(chat.tokenizer, replace(chat.spec, max_length=length))
        by_messages, _ = limited.fit(Row(CONVERSATION, "Paris."), whole, "truncate")
        by_ids, _ = limited.fit(row, whole, "truncate")
        if isinstance(by_messages, np.ndarray):
            assert isinstance(by_ids, np.ndarray)
            assert text(chat, by_ids).split() == text(chat, by_messages).split()


def test_what_begins_a_text_stays_when_its_prompt_is_cut() -> None:
    rows = text_template(adds_bos=True, max_length=10)
    for row in (
        Row("abcdefgh", "Paris"),
        Row(encode(rows, "abcdefgh", "Paris")[:-6], encode(rows, "", "Paris")[1:]),
    ):
        kept, cut = rows.fit(row, encode(rows, *row), "truncate")
        assert isinstance(kept, np.ndarray) and cut and len(kept) == 10
        assert text(rows, kept) == "<s>gh\nParis</s>"


def test_an_overlong_text_row_keeps_its_response_and_end() -> None:
    rows = text_template(max_length=10)
    row = Row("abcdefgh", "Paris")
    kept, cut = rows.fit(row, encode(rows, *row), "truncate")
    assert isinstance(kept, np.ndarray) and cut
    assert text(rows, kept) == "fgh\nParis</s>"
    lone = Row("abc", "Paris, London")
    assert isinstance(rows.fit(lone, encode(rows, *lone), "truncate")[0], RowTooLong)


def test_a_response_that_holds_its_own_end_is_not_taken_to_be_longer() -> None:
    chat = template("chatml")
    whole = encode(chat, "Hello", "Paris")
    chat = template("chatml", max_length=len(whole) - 2)
    for response in ("Paris", "Paris<|im_end|>"):
        row = Row("Hello", response)
        kept, cut = chat.fit(row, encode(chat, *row), "truncate")
        assert isinstance(kept, np.ndarray) and cut
        assert np.array_equal(kept, encode(chat, "llo", "Paris"))


def test_overlong_ids_keep_the_response_ids() -> None:
    chat = template("chatml", max_length=4)
    row = Row([5, 6, 7, 8], [9, 10])
    kept, cut = chat.fit(row, encode(chat, *row), "truncate")
    assert isinstance(kept, np.ndarray) and kept.tolist() == [7, 8, 9, 10] and cut
    lone = Row([5], [6, 7, 8, 9])
    assert isinstance(chat.fit(lone, encode(chat, *lone), "truncate")[0], RowTooLong)


def test_a_response_of_several_messages_is_not_cut() -> None:
    chat = template("chatml")
    response = [
        {"role": "assistant", "content": "Where?"},
        {"role": "user", "content": "France"},
        {"role": "assistant", "content": "Paris"},
    ]
    row = Row("Hi", response)
    ids = encode(chat, *row)
    for length in range(len(ids)):
        limited = Template(chat.tokenizer, replace(chat.spec, max_length=length))
        kept, _ = limited.fit(row, ids, "truncate")
        if not isinstance(kept, RowError):
            assert "Where?" in text(chat, kept)


def test_a_text_that_cannot_fit_never_reaches_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenize = Template.tokenize
    seen: list[int] = []

    def counting(self: Template, texts: list[str]) -> list[list[int]]:
        seen.extend(map(len, texts))
        return tokenize(self, texts)

    monkeypatch.setattr(Template, "tokenize", counting)
    long = "ab " * 1_000_000
    opening = template("chatml").chat.opening
    for rows in (template("chatml"), text_template()):
        for row in (Row(long, "Paris"), Row("Hi", long), Row("Hi", long, False)):
            (error,) = rows.encode([row])
            assert isinstance(error, RowTooLong) and str(rows.most_characters) in str(error)
        good, bad = Row("Hi", "Paris"), Row("a" * rows.most_characters, "Paris")
        results = rows.encode([good, bad, good])
        assert [isinstance(ids, RowError) for ids in results] == [False, True, False]
    for prompt, sampled in ((long + opening, "Paris"), (f"Hi{opening} {long}", "Paris")):
        with pytest.raises(RowTooLong):
            sampled_row(template("chatml"), prompt, sampled)
    assert max(seen) < 1000


def test_the_longest_text_that_is_tokenised_can_be_cut() -> None:
    """A template that strips a response may write more for the one that it is compared with."""
    rows = template("llama3", max_length=40)
    for response in ("Paris", " ", " \n "):
        bare = len(rows._texts(Row("a", response))[0]) - 1
        row = Row("a" * (rows.most_characters - bare), response)
        (ids,) = rows.encode([row])
        assert isinstance(ids, np.ndarray)
        kept, cut = rows.fit(row, ids, "truncate")
        assert isinstance(kept, np.ndarray) and cut and len(kept) == 40
        (error,) = rows.encode([row._replace(prompt=f"a{row.prompt}")])
        assert isinstance(error, RowTooLong)


def test_no_tokens_hold_more_characters_than_that() -> None:
    """Also where a normalizer composes them: U+1F82 is four, and none is more."""
    assert max(len(normalize("NFD", chr(c))) for c in range(sys.maxunicode + 1)) == COMPOSED
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(["\u1f82" * 30, "long"])
    rows = Template(tokenizer, TemplateSpec("chat", "\n", 50, ""))
    pieces = [normalize("NFD", "\u1f82" * 30), " " * 30, "<|im_start|>", *tokenizer.get_vocab()]

    @settings(max_examples=100, deadline=None, database=None)
    @given(st.lists(st.sampled_from(pieces) | st.text(max_size=5)).map("".join))
    def holds(text: str) -> None:
        row = Row(f"a{text}", "x")
        (ids,), (characters,) = rows.encode([row]), map(len, rows._texts(row))
        assert isinstance(ids, RowTooLong) == (characters > rows.most_characters)
        tokens = len(rows.tokenize([text])[0])
        assert len(text) * rows.spec.max_length <= rows.most_characters * tokens

    holds()


def test_a_long_run_of_ends_takes_no_longer_than_other_text() -> None:
    """A search from the left takes minutes: it begins anew at each of them."""
    rows = template("chatml", max_length=10**6)
    ends = "<|im_end|>" * 30_000
    start = time.process_time()
    assert isinstance(rows.encode([Row("Hi", ends + "x")])[0], np.ndarray)
    assert isinstance(rows.encode([Row("Hi", ends)])[0], EmptyResponse)
    assert not sampled_row(rows, "Hi", ends + "x").finished
    assert sampled_row(rows, "Hi", "x" + ends).finished
    assert time.process_time() - start < 30
    assert np.array_equal(encode(rows, "Hi", f"x{ends} \n"), encode(rows, "Hi", "x"))


def test_a_row_nested_to_python_s_limit_is_an_error_of_its_own() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    message = {"role": "user", "content": "Hi", "extra": deep}
    for prompt in (deep, [message]):
        assert isinstance(failure(template("chatml"), prompt, "Paris"), InvalidRow)


def test_a_sampled_text_with_a_lone_surrogate_is_refused() -> None:
    rows = template("chatml")
    for prompt in ("Hi", "Hi" + rows.chat.opening):
        for row in ((prompt, "\ud83d"), ("\ud83d" + prompt, "Paris")):
            with pytest.raises(InvalidRow):
                sampled_row(rows, *row)


# Pad token and fingerprint ----------------------------------------------------------------------


def pad(special: list[str], template: str | None = None, **named: str) -> tuple[str, bool]:
    tokenizer = byte_tokenizer(special, template=template, adds_bos=False, **named)
    before, count = fingerprint(tokenizer), len(tokenizer)
    added = set_pad_token(tokenizer)
    assert added == (len(tokenizer) != count)
    assert fingerprint(tokenizer) == before or not added
    chosen = tokenizer.pad_token
    assert isinstance(chosen, str)
    assert chosen not in (tokenizer.eos_token, tokenizer.bos_token)
    return chosen, added


@pytest.mark.parametrize(
    ("special", "named", "chosen"),
    [
        (["<pad>", "</s>", "<x>"], {"pad_token": "<x>"}, "<x>"),
        (["<x>", "</s>", "<my_pad_id>", "<unk>"], {"unk_token": "<unk>"}, "<my_pad_id>"),
        (["<x>", "</s>", "<unk>"], {"unk_token": "<unk>"}, "<unk>"),
        (["</s>", "<s>", "<x>", "<y>"], {"bos_token": "<s>"}, "<x>"),
        (["</s>", "<x>"], {"pad_token": "</s>"}, "<x>"),
        (["</s>", "<s>", "<x>"], {"pad_token": "<s>", "bos_token": "<s>"}, "<x>"),
        (["</s>", "<x>"], {"unk_token": "</s>"}, "<x>"),
    ],
    ids=["own", "named", "unknown", "other special", "pad = eos", "pad = bos", "unk = eos"],
)
def test_an_existing_token_pads(special: list[str], named: dict[str, str], chosen: str) -> None:
    assert pad(special, eos_token="</s>", **named) == (chosen, False)


def test_a_token_of_the_chat_template_never_pads() -> None:
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    assert pad(special, CHATML, eos_token="<|endoftext|>") == ("<|pad|>", True)
    # A base tokenizer whose pad token is what its chat template ends in.
    assert pad([*special, "<x>"], CHATML, eos_token="<|endoftext|>", pad_token="<|im_end|>") == (
        "<x>",
        False,
    )


def test_a_token_is_added_as_the_last_resort() -> None:
    assert pad(["</s>"], eos_token="</s>", pad_token="</s>") == ("<|pad|>", True)


def test_fingerprints_tell_vocabularies_apart() -> None:
    def tokenizer(*special: str) -> PreTrainedTokenizerBase:
        return byte_tokenizer(special, eos_token=special[0])

    assert fingerprint(tokenizer("a1", "b2")) == fingerprint(tokenizer("a1", "b2"))
    assert fingerprint(tokenizer("a1", "b2")) != fingerprint(tokenizer("b2", "a1"))
    assert len(fingerprint(tiny_tokenizer())) == 64


def test_a_tokenizer_remembers_its_fingerprint_until_tokens_are_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    other.add_tokens(["more"])
    calls = 0
    get_vocab = type(tokenizer).get_vocab

    def counting(self: PreTrainedTokenizerBase) -> dict[str, int]:
        nonlocal calls
        calls += 1
        return get_vocab(self)

    monkeypatch.setattr(type(tokenizer), "get_vocab", counting)
    first = fingerprint(tokenizer)
    assert [fingerprint(tokenizer) for _ in range(3)] == [first] * 3 and calls == 1
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert fingerprint(copied) == first != fingerprint(other)
    tokenizer.add_tokens(["more"])
    assert fingerprint(tokenizer) == fingerprint(other)
    tokenizer._tokenizer = byte_tokenizer(["a"], eos_token="a")._tokenizer
    assert fingerprint(tokenizer) not in (first, fingerprint(other))


def test_a_long_conversation_is_cut_without_tokenising_every_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i}"} for i in range(201)]
    chat = template("chatml")
    row = Row(turns, "Paris.")
    ids = encode(chat, *row)
    kept = encode(chat, turns[40:], "Paris.")
    limited = Template(chat.tokenizer, replace(chat.spec, max_length=len(kept)))
    tokenize, calls = Template.tokenize, list[int]()

    def counting(self: Template, texts: list[str]) -> list[list[int]]:
        calls.append(len(texts))
        return tokenize(self, texts)

    monkeypatch.setattr(Template, "tokenize", counting)
    cut, _ = limited.fit(row, ids, "truncate")
    assert isinstance(cut, np.ndarray) and np.array_equal(cut, kept)
    assert len(calls) < 12
