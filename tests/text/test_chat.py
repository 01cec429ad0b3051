"""What becomes of a response in a chat template: written, left as sampled, dropped, refused."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from rayrm.data.records import Group, Message, Preference, Text
from rayrm.errors import EmptyResponse, InvalidRow, ModelError, RowError
from rayrm.rows import Row, Tools
from rayrm.serving.http.openrlhf import read_rows
from rayrm.text.chat import ChatTemplate, Rule, Thoughts
from rayrm.text.clock import reads_clock, stop_clock
from rayrm.text.dropped import first_dropped
from rayrm.text.sampled import sampled_row
from rayrm.text.template import Template, TemplateSpec
from rayrm.training.dataset import encode_groups
from tests.makers import CHATML, tiny_tokenizer
from tests.shapes import SHAPES

RULES: tuple[Rule, ...] = ("template", "continue")
rules = pytest.mark.parametrize("rule", RULES)
shapes = pytest.mark.parametrize("shape", SHAPES)


def say(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def calling(name: str, arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return say("assistant", None, tool_calls=[call])


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALLED = [say("user", "Weather?"), calling("weather", {"city": "Paris"}), say("tool", "18")]
TWO_TURNS = [say("user", "A fruit?"), say("assistant", "An apple."), say("user", "A colour?")]


def text(template: Template, row: Row) -> str:
    (ids,) = template.encode([row])
    assert isinstance(ids, np.ndarray), ids
    decoded = template.tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(decoded, str)
    return decoded


def failure(template: Template, row: Row) -> RowError:
    (error,) = template.encode([row])
    assert isinstance(error, RowError), text(template, row)
    return error


def of(template: str, rule: Rule = "template", thoughts: Thoughts = "keep") -> Template:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Template(tokenizer, TemplateSpec("chat", "\n", 256, "", rule, thoughts))


# Ordinary rows ----------------------------------------------------------------------------------

ORDINARY: dict[str, list[Row]] = {
    "every model": [
        Row("Hi", "Paris"),
        Row("Hi", "  Paris, I think.\n"),
        Row("Hi", "Paris", False),
        Row("a", "b"),
        Row("Say <b>hi</b>, [INST] or x < y.", '<b>hi</b> {"x": [1, 2]}'),
        Row(TWO_TURNS, "Red."),
        Row(TWO_TURNS, [say("assistant", "Red."), say("user", "Why?"), say("assistant", "So.")]),
    ],
    "system": [Row([say("system", "Be brief."), say("user", "Hi")], "Paris")],
    "tools": [Row(CALLED, "It is 18."), Row(CALLED[:1], [calling("weather", {"n": 3})])],
    "declared": [Row(CALLED, "It is 18.", True, TOOLS)],
    "strings": [
        Row(
            [CALLED[0], calling("weather", '{"city": "Paris"}') | {"content": ""}, CALLED[2]], "18."
        )
    ],
    "thoughts": [
        Row("2+2?", "<think>\nTwo and two.\n</think>\n\n4"),
        Row("2+2?", "<think>Two and two.</think>4"),
        Row([*TWO_TURNS[:1], say("assistant", "<think>Hm.</think>An apple."), TWO_TURNS[2]], "Red"),
        Row("2+2?", [say("assistant", "4", reasoning_content="Two and two.")]),
    ],
}
HAS = {
    "qwen3": ("system", "tools", "declared", "strings", "thoughts"),
    "llama31": ("system", "tools", "declared"),
    "gemma2": (),
    "mistral": ("system",),
    "deepseek r1": ("system", "strings"),
}


@shapes
@rules
def test_no_ordinary_row_is_refused(shape: str, rule: Rule) -> None:
    template = SHAPES[shape].template_of(rule)
    for kind in ("every model", *HAS[shape]):
        for row in ORDINARY[kind]:
            assert text(template, row)


@shapes
def test_both_rules_give_the_same_ids_unless_answers_are_rewritten(shape: str) -> None:
    by_template, by_nobody = (SHAPES[shape].template_of(rule) for rule in RULES)
    rewrites = ChatTemplate(SHAPES[shape].tokenizer).rewrites
    assert rewrites == (shape in ("qwen3", "deepseek r1"))
    for row in [Row("Hi", "Paris"), Row(TWO_TURNS, "Red.")]:
        assert (text(by_template, row) == text(by_nobody, row)) != rewrites


# Content that a template drops --------------------------------------------------------------------


def test_responses_that_differ_in_a_dropped_thought_have_no_reward() -> None:
    template = SHAPES["deepseek r1"].template_of()
    for response in ("<think>wild guess</think>4", "<think>only</think>", "Yes, </think> is one."):
        error = failure(template, Row("2+2?", response))
        assert isinstance(error, InvalidRow) and "drops a thought of message 2" in str(error)
    assert text(template, Row("2+2?", "4"))


def test_what_is_continued_keeps_its_thought_and_does_not_repeat_its_beginning() -> None:
    template = SHAPES["deepseek r1"].template_of("continue")
    expected = "<begin><User>2+2?<Assistant><think>\ntwo\n</think>4<end>"
    for response in ("<think>\ntwo\n</think>4", "two\n</think>4", " <think>two\n</think>4"):
        assert text(template, Row("2+2?", response)) == expected
    assert "Yes, </think> is one." in text(template, Row("q", "Yes, </think> is one."))


@rules
def test_a_message_that_the_template_does_not_know_is_refused(rule: Rule) -> None:
    known = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages if m.role in ('user', 'assistant') %}",
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = known
    template = Template(tokenizer, TemplateSpec("chat", "\n", 256, "", rule))
    for prompt in (
        [say("human", "What is 2+2?"), say("user", "?")],
        [say("system", "Answer in French."), say("user", "q")],
        [say("system", "a"), say("user", "q")],  # a letter that stands in other texts too
    ):
        error = failure(template, Row(prompt, "4"))
        assert isinstance(error, InvalidRow) and "drops `content` of message 1" in str(error)
    assert text(template, Row("q", "4"))


@pytest.mark.parametrize(
    ("cut", "dropped"),
    [
        ("m['content'].split('\\n')[0]", "first\nsecond"),
        ("m['content'].split('\\n')[-1]", "first\nsecond"),
        ("m['content'][:20]", "a text of more than twenty characters"),
        ("m['content'] if '?' not in m['content'] else 'a question'", "Which one?"),
    ],
)
def test_a_part_of_a_response_that_goes_is_refused(cut: str, dropped: str) -> None:
    template = of(CHATML.replace("m['content']", cut))
    error = failure(template, Row("q", dropped))
    assert isinstance(error, InvalidRow) and "drops `content` of message 2" in str(error)


def test_a_template_that_drops_every_answer_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="drops what an assistant says"):
        of(CHATML.replace("m['content']", "m['content'] if m.role == 'user'")).encode(
            [Row("q", "a")]
        )


@pytest.mark.parametrize(
    "change",
    [
        "m['content'] | trim",
        "m['content'] | upper",
        "m['content'] | tojson",
        "m['content'] | e",
        "'[' + m['content'] + ']'",
        "m['content'] | replace('\\n', ' ')",
    ],
)
def test_what_a_template_does_to_all_of_a_text_is_no_loss(change: str) -> None:
    template = of(CHATML.replace("m['content']", change))
    for row in (Row("q", "Paris"), Row("Hi", ' a\n<b> "c" '), Row(TWO_TURNS, "4")):
        assert text(template, row)


def test_thoughts_of_earlier_turns_may_go_and_the_last_may_not() -> None:
    for shape, rule in (("qwen3", "template"), ("deepseek r1", "continue")):
        template = SHAPES[shape].template_of(rule)  # type: ignore[arg-type]
        thought = say("assistant", "<think>An orange?</think>An apple.")
        row = text(template, Row([TWO_TURNS[0], thought, TWO_TURNS[2]], "<think>Hm</think>Red."))
        assert "orange" not in row and "Hm" in row


def test_a_thought_in_the_response_may_not_go_whichever_message_has_it() -> None:
    response = [
        say("assistant", "<think>An orange?</think>An apple."),
        say("user", "Sure?"),
        say("assistant", "Yes."),
    ]
    for rule in RULES:
        error = failure(SHAPES["deepseek r1"].template_of(rule), Row("A fruit?", response))
        assert isinstance(error, InvalidRow) and "drops a thought of message 2" in str(error)
        asked = [say("user", "A fruit?", thinking="They want a fruit.")]
        error = failure(SHAPES["qwen3"].template_of(rule), Row(asked, "An apple."))
        assert isinstance(error, InvalidRow) and "`thinking` of message 1 ('user')" in str(error)


def test_thoughts_of_earlier_turns_that_go_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    template = SHAPES["deepseek r1"].template_of("continue")
    thought = say("assistant", "<think>An orange?</think>An apple.")
    with_thought: Text = [TWO_TURNS[0], thought, TWO_TURNS[2]]
    prompts: list[Text] = [with_thought, TWO_TURNS, "A colour?"]
    groups = [
        Group(prompt, ["Red.", "No."], [Preference(0, 1)], [True, True], "", f"f:{i}")
        for i, prompt in enumerate(prompts)
    ]
    report = encode_groups(groups, template, "truncate").report
    assert report.groups == 3 and report.prompts_without_thoughts == 1
    assert "1 prompts without thoughts" in str(report)


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS}
NAMES = "{% for t in tools or [] %}{{ (t.function or t).name }}{% endfor %}"
CALLS = "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
STRIPPED = "{{ m.content.split('<a>')[0] + m.content.split('</a>')[-1] }}"


@pytest.mark.parametrize(
    ("template", "row", "dropped"),
    [
        pytest.param(
            NAMES + CHATML,
            Row("q", "a", True, [{"type": "function", "function": FUNCTION}]),
            "tools[0].description",
            id="what a tool is for",
        ),
        pytest.param(
            NAMES + CHATML,
            Row("q", "a", True, [{"name": "weather", "parameters": PARAMETERS}]),
            "tools[0].parameters",
            id="parameters of a tool",
        ),
        pytest.param(
            NAMES + CHATML,
            Row("q", "a", True, [{"type": "web_search", "limit": 3}]),
            "tools[0].limit",
            id="a tool without a name",
        ),
        pytest.param(
            CHATML.replace("{{ m['content'] }}", CALLS.replace("c |", "c.function.name |")),
            Row([say("user", "q"), calling("f", {"a": True})], "a"),
            "`tool_calls[0].function.arguments.a`",
            id="an argument that is true",
        ),
        pytest.param(
            CHATML.replace("{{ m['content'] }}", CALLS.replace("c |", "c.function.name |")),
            Row([say("user", "q"), calling("f", {"a": None, "b": ""})], "a"),
            "`tool_calls[0].function.arguments.a`",
            id="an argument that is null",
        ),
        pytest.param(
            CHATML.replace("{{ m['content'] }}", STRIPPED),
            Row("q", "A long beginning. <a>secret</a> And a long end, longer than all else."),
            "`content` of message 2",
            id="a block within an answer",
        ),
        pytest.param(
            CHATML.replace("m['content']", "m['content'] | striptags"),
            Row("q", "A <b>bold</b> word."),
            "'<b>' in the response",
            id="tags",
        ),
        pytest.param(
            CHATML.replace("{{ m['content'] }}", "{{ m.content | replace('<b>', '') }}"),
            Row("A <b>?", "A <b>bold</b> word."),
            "'<b>' in the response",
            id="a tag",
        ),
    ],
)
def test_what_a_template_drops_within_something_is_found(
    template: str, row: Row, dropped: str
) -> None:
    error = failure(of(template), row)
    assert isinstance(error, InvalidRow) and f"drops {dropped}" in str(error)


def test_a_tool_of_which_the_template_writes_a_part_is_not_refused() -> None:
    """Cohere's, say, write names and descriptions of parameters, and not all else."""
    some = NAMES + "{% for t in tools or [] %}{{ t.function.description }}"
    some += "{{ t.function.parameters.properties | list }}"
    some += "{% for p in t.function.parameters.properties.values() %}{{ p.type }}{% endfor %}"
    some += "{% endfor %}"
    declared = {**FUNCTION, "return": {"type": "string"}, "strict": True}
    tool = {"type": "function", "function": declared}
    assert "Tells the weather." in text(of(some + CHATML), Row("q", "a", True, [tool]))


def test_what_says_nothing_may_go() -> None:
    properties = "{% for t in tools or [] %}{{ t.function.name }}"
    properties += "{% for p in t.function.parameters.properties %}{{ p }}{% endfor %}{% endfor %}"
    nothing = {"type": "object", "properties": {}}
    bare = {"name": "now", "description": " ", "parameters": nothing}
    tool = {"type": "function", "function": bare}
    assert text(of(properties + CHATML), Row("q", "a", True, [tool])).startswith("now")
    blank = [say("assistant", "4", reasoning_content="\n\n")]
    assert text(of(CHATML), Row("2+2?", blank)) == text(of(CHATML), Row("2+2?", "4"))
    response = [
        say("assistant", "<think>An orange?</think>An apple."),
        say("user", "Sure?"),
        say("assistant", "<think>Hm.</think>Yes."),
    ]
    r1 = SHAPES["deepseek r1"].template_of("continue", thoughts="drop")
    assert "orange" not in text(r1, Row("A fruit?", response))


def test_a_text_of_many_tags_is_rendered_a_few_times() -> None:
    calls: list[int] = []

    def render(messages: list[Message], tools: Tools | None) -> str:
        calls.append(1)
        return "".join(f"{m['role']}{m['content']}" for m in messages)

    html = "<b>w</b> " * 20_000
    messages = [say("user", html), say("assistant", html)]
    assert first_dropped(render, messages, None, judged=1) is None
    assert len(calls) == 2, "marked, and plain"

    def strip(messages: list[Message], tools: Tools | None) -> str:
        return render(messages, tools).replace("<b>", "")

    assert first_dropped(strip, messages, None, judged=1) == "'<b>' in the response"
    assert len(calls) <= 6


@rules
def test_keys_of_messages_are_rendered_or_refused_by_name(rule: Rule) -> None:
    qwen3 = SHAPES["qwen3"].template_of(rule)
    for keys in ({"name": "bob"}, {"tool_call_id": "c1"}):
        (name,) = keys
        error = failure(qwen3, Row([say("user", "Hi", **keys)], "Paris"))
        assert isinstance(error, InvalidRow) and f"drops `{name}` of message 1" in str(error)
    absent: list[dict[str, Any]] = [
        {"name": None},
        {"name": ""},
        {"tool_calls": []},
        {"tool_calls": None},
    ]
    for empty in absent:
        row = Row([say("user", "Hi", **empty)], "Paris")
        assert text(qwen3, row) == text(qwen3, Row("Hi", "Paris"))
    gemma = SHAPES["gemma2"].template_of(rule)
    error = failure(gemma, Row("Hi", "Paris", True, TOOLS))
    assert isinstance(error, InvalidRow) and "drops tools[0]" in str(error)
    error = failure(gemma, Row("Hi", [say("assistant", "4", reasoning_content="Hm")]))
    assert isinstance(error, InvalidRow) and "`reasoning_content` of message 2" in str(error)


def test_calls_are_asked_about_by_name_and_argument() -> None:
    forgets = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
    )
    prompt = [say("user", "Hi"), calling("weather", {"city": "Paris"}), say("tool", "18")]
    error = failure(of(forgets), Row(prompt, "It is 18."))
    assert "tool_calls[0].function.arguments.city" in str(error)
    no_arguments = [say("user", "Hi"), calling("weather", {}), say("tool", "18")]
    assert "weather" in text(of(forgets), Row(no_arguments, "It is 18."))


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (say("user", "Hi", name=3), "name"),
        (say("user", "Hi", tool_calls="get"), "tool_calls"),
        (say("user", "Hi", tool_calls=["get"]), "tool_calls"),
        (say("user", "Hi", reasoning_content=["hm"]), "reasoning_content"),
        (say("assistant", None), "content"),
    ],
)
def test_a_key_of_another_type_is_an_error_that_names_it(
    message: dict[str, Any], wrong: str
) -> None:
    error = failure(SHAPES["qwen3"].template_of(), Row([message, say("user", "?")], "Paris"))
    assert isinstance(error, InvalidRow) and f"`{wrong}` of message 1" in str(error)


def test_a_thought_is_left_out_where_answers_are_judged_without() -> None:
    for shape in ("qwen3", "deepseek r1"):
        template = SHAPES[shape].template_of("continue", thoughts="drop")
        plain = text(template, Row("2+2?", "4"))
        for response in ("<think>\nTwo.\n</think>\n\n4", "<think>Three?</think>4"):
            assert text(template, Row("2+2?", response)) == plain
        message = say("assistant", "4", reasoning_content="Two.")
        assert text(template, Row("2+2?", [message])) == plain
        for cut_off, finished in (("<think>\nTwo, and", True), ("<think>\nTwo, and", False)):
            error = failure(template, Row("2+2?", cut_off, finished))
            assert isinstance(error, EmptyResponse) and "no more than a thought" in str(error)
    for start, end in (
        ("<think>", "</think>"),
        ("<thinking>", "</thinking>"),
        ("[THINK]", "[/THINK]"),
    ):
        for rule in RULES:
            template = of(CHATML, rule=rule, thoughts="drop")
            assert text(template, Row("2+2?", f"{start}Two.{end}\n4")) == text(
                template, Row("2+2?", "4")
            )
            error = failure(template, Row("2+2?", f"{start}Two, and", False))
            assert isinstance(error, EmptyResponse)
    without = "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    closed = of(CHATML + without, rule="continue", thoughts="drop")
    assert text(closed, Row("2+2?", "Four, and", False)).endswith("Four, and")
    # A thought that the generation prompt began, and an answer that only mentions thoughts.
    r1 = SHAPES["deepseek r1"].template_of("continue", thoughts="drop")
    assert text(r1, Row("2+2?", "Two.\n</think>\n4")) == text(r1, Row("2+2?", "</think>4"))
    assert isinstance(failure(r1, Row("2+2?", "Two, and", False)), EmptyResponse)
    qwen3 = SHAPES["qwen3"].template_of("continue", thoughts="drop")
    assert "Yes, </think> is one." in text(qwen3, Row("q", "Yes, </think> is one."))


# Cut off ----------------------------------------------------------------------------------------


@shapes
@rules
def test_an_unfinished_response_is_never_rewritten(shape: str, rule: Rule) -> None:
    template = SHAPES[shape].template_of(rule)
    prompt = template.chat.render([say("user", "2+2?")], answer=True)
    for response in ("<think>\nLet me see, 2", "Paris is", "Paris \n is \n"):
        row = text(template, Row("2+2?", response, False))
        assert row.endswith(response.removeprefix("<think>\n"))
        if "</think>" not in row and shape == "qwen3":
            assert row == prompt + response


def test_a_sampled_response_is_scored_as_it_was_sampled() -> None:
    for rule in RULES:
        template = SHAPES["qwen3"].template_of(rule)
        prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        row = sampled_row(template, prompt, "<think>\nLet me see, 2")
        assert text(template, row) == prompt + "<think>\nLet me see, 2" and not row.finished
        for sampled in ("4", "<think>\nTwo.\n</think>\n\n4", "Two\n</think>\n4"):
            row = sampled_row(template, prompt, sampled + "<|im_end|>")
            assert text(template, row) == text(template, Row("2+2?", sampled)) and row.finished
    r1 = SHAPES["deepseek r1"].template_of("continue")
    row = sampled_row(r1, "<begin><User>2+2?<Assistant><think>\n", "two\n</think>4<end>")
    assert text(r1, row) == text(r1, Row("2+2?", "<think>\ntwo\n</think>4"))


# Ends and pads ------------------------------------------------------------------------------------

QWEN_PROMPT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("left", "right", "finished"),
    [
        ("", "<|im_end|>", True),
        ("", "<|im_end|>\n", True),
        ("", "<|im_end|><|endoftext|><|endoftext|>", True),
        ("<|endoftext|><|endoftext|>", "<|im_end|>", True),
        ("<|endoftext|>", "<|im_end|>\n<|endoftext|>", True),
        ("", "<|endoftext|>", True),
        ("", "<|endoftext|><|endoftext|>", False),
        ("<|endoftext|>", "", False),
        ("", "", False),
    ],
)
@rules
def test_pads_and_other_ends_of_a_sampled_text_are_not_of_it(
    left: str, right: str, finished: bool, rule: Rule
) -> None:
    template = SHAPES["qwen3"].template_of(rule, ends=("<|endoftext|>",))
    assert template.tokenizer.pad_token == "<|endoftext|>"
    for prompt in (QWEN_PROMPT, "q"):
        row = sampled_row(template, left + prompt, f"Paris.{right}")
        assert row.finished == finished
        assert text(template, row) == text(template, Row("q", "Paris.", finished))


@rules
def test_pads_on_the_left_of_the_query_alone_are_not_of_it(rule: Rule) -> None:
    template = SHAPES["qwen3"].template_of(rule, ends=("<|endoftext|>",))
    pads = "<|endoftext|>" * 2
    padded = [pads + QWEN_PROMPT + "Paris.<|im_end|>", pads + "qParis.<|im_end|>"]
    whole = [f"{pads}{query}" for query in padded]
    for queries, prompts in ((padded, [QWEN_PROMPT, "q"]), (whole, [pads + QWEN_PROMPT, "q"])):
        rows, errors = read_rows(template, queries, prompts)
        assert errors == {}
        for row in rows:
            assert text(template, row) == text(template, Row("q", "Paris."))
    _, errors = read_rows(template, [pads + "another"], ["q"])
    assert "does not begin with its prompt" in str(errors[0])


def test_a_pad_that_ends_nothing_does_not_finish_a_response() -> None:
    template = SHAPES["gemma2"].template_of(ends=("<end_of_turn>",))
    prompt = "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"
    for right, finished in (
        ("<pad><pad>", False),
        ("<end_of_turn><pad><pad>", True),
        ("<eos>", True),
        ("<eos><pad>", True),
    ):
        row = sampled_row(template, "<pad><pad>" + prompt, "Paris." + right)
        assert row.finished == finished
        assert text(template, row) == text(template, Row("q", "Paris.", finished))


def test_a_row_that_ended_in_another_end_is_closed_with_the_template_s() -> None:
    template = SHAPES["qwen3"].template_of(ends=("<|endoftext|>",))
    closed = text(template, Row("q", "Paris."))
    assert closed.endswith("<|im_end|>")
    assert text(template, Row("q", "Paris.<|endoftext|>")) == closed


# The clock ----------------------------------------------------------------------------------------


class Later(datetime):
    """A clock that shows another day."""

    @classmethod
    def now(cls, tz: Any = None) -> Later:
        return cls(2031, 1, 2, 3, 4, 5)


def test_a_stopped_clock_shows_its_moment_on_any_day(monkeypatch: pytest.MonkeyPatch) -> None:
    at = datetime(2026, 11, 6, 7, 8, 9)
    formats = ["%d %b %Y", "%A, %-d %B %y", "%Y-%m-%d %H:%M:%S", "%I:%M %p, day %j", "no date"]
    formats += ["%F %T", "%D %e %s %u %V %G %g", "%C %h %R %k %l %P %r", "100%% %%d %-m%%", "%%%d"]
    clock = "\n".join(f"{{{{ strftime_now({form!r}) }}}}" for form in formats)
    for start in ("", "\n", "  \n", "{% set x = 1 %}\n", "  {% if true %}a{% endif %}"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = start + clock + CHATML
        monkeypatch.setattr(chat_template_utils, "datetime", at.__class__)
        monkeypatch.setattr(chat_template_utils, "datetime", Frozen)
        then = tokenizer.apply_chat_template([say("user", "Hi")], tokenize=False)
        tokenizer.chat_template = stop_clock(tokenizer.chat_template, at)
        monkeypatch.setattr(chat_template_utils, "datetime", Later)
        assert tokenizer.apply_chat_template([say("user", "Hi")], tokenize=False) == then
        assert not reads_clock(tokenizer.chat_template)
        assert stop_clock(tokenizer.chat_template, Later.now()) == tokenizer.chat_template


class Frozen(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Frozen:
        return cls(2026, 11, 6, 7, 8, 9)


def test_a_template_without_a_clock_stays_as_it_is() -> None:
    assert stop_clock(CHATML, datetime(2026, 11, 6)) == CHATML
