"""What names a reward: an export's version and the caches' keys change with whatever makes ids."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from rayrm.data.records import Group, Preference, Text
from rayrm.errors import ExportError
from rayrm.model.engine import RewardModel
from rayrm.model.export import (
    RECORD,
    AdapterRecord,
    Export,
    load_template,
    read_export,
    read_identity,
)
from rayrm.model.net import load_base
from rayrm.rows import Row
from rayrm.text.fingerprints import fingerprint, fingerprint_of_text, fingerprint_text
from rayrm.text.sampled import sampled_row
from rayrm.text.template import Template, TemplateSpec
from rayrm.training.dataset import encode_groups
from tests.makers import CHATML, tiny_tokenizer

AT = datetime(2026, 11, 6)


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A change to one of an export's JSON files."""

    def apply(directory: Path) -> None:
        values = json.loads((directory / name).read_text())
        change(values)
        (directory / name).write_text(json.dumps(values))

    return apply


def edit_template(template: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "chat_template.jinja").write_text(template)


def add_tool_template(directory: Path) -> None:
    more = directory / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text(UPPER)


UPPER = CHATML.replace("m['content']", "m['content'] | upper")
WHOLE = {"Sequence": {"id": "A", "type_id": 0}}
BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "BOS", "type_id": 0}}, WHOLE],
    "pair": [WHOLE, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"BOS": {"id": "BOS", "ids": [0], "tokens": ["<|im_start|>"]}},
}

OTHER_IDS: dict[str, Callable[[Path], object]] = {
    "chat template": edit_template(UPPER),
    "merges": edit("tokenizer.json", lambda t: t["model"].update(merges=t["model"]["merges"][:20])),
    "normalizer": edit("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
    "pre-tokenizer": edit(
        "tokenizer.json", lambda t: t["pre_tokenizer"].update(add_prefix_space=True)
    ),
    "adds BOS": edit("tokenizer.json", lambda t: t.update(post_processor=BOS)),
    "strips beside a special token": edit(
        "tokenizer.json", lambda t: t["added_tokens"][1].update(lstrip=True)
    ),
    "a template of its own for tools": add_tool_template,
    "EOS": edit("tokenizer_config.json", lambda t: t.update(eos_token="<|im_start|>")),
    "BOS setting": edit("tokenizer_config.json", lambda t: t.update(add_bos_token=True)),
}


def edit_config(**values: Any) -> Callable[[Path], object]:
    return edit("config.json", lambda config: config.update(values))


OTHER_MODEL: dict[str, Callable[[Path], object]] = {
    "rotary base": edit_config(rope_parameters={"rope_type": "default", "rope_theta": 30.0}),
    "epsilon of the norms": edit_config(rms_norm_eps=0.1),
    "activation": edit_config(hidden_act="gelu"),
}
SAME_MODEL: dict[str, Callable[[Path], object]] = {
    "name and origin": edit_config(_name_or_path="there", transformers_version="4.1"),
    "stored dtype": edit_config(dtype="float16", torch_dtype="float16"),
    "pad, BOS and EOS": edit_config(pad_token_id=3, bos_token_id=4, eos_token_id=5),
    "generation": edit_config(use_cache=False),
    "name of the output": edit_config(id2label={"0": "reward"}, label2id={"reward": 0}),
}
SAME_IDS: dict[str, Callable[[Path], object]] = {
    "padding": edit(
        "tokenizer.json",
        lambda t: t.update(
            padding={
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 2,
                "pad_type_id": 0,
                "pad_token": "<|pad|>",
            }
        ),
    ),
    "truncation": edit(
        "tokenizer.json",
        lambda t: t.update(
            truncation={
                "direction": "Right",
                "max_length": 9,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        ),
    ),
    "padding side": edit("tokenizer_config.json", lambda t: t.update(padding_side="left")),
    "length": edit("tokenizer_config.json", lambda t: t.update(model_max_length=9)),
    "spelling": edit("tokenizer.json", lambda t: t.update(version=t.pop("version"))),
}


def copy(export: Path, to: Path) -> Path:
    return Path(shutil.copytree(export, to))


@pytest.mark.parametrize("change", OTHER_IDS)
def test_whatever_makes_other_ids_of_text_makes_another_version(
    tiny_export: Path, tmp_path: Path, change: str
) -> None:
    changed = copy(tiny_export, tmp_path / "changed")
    OTHER_IDS[change](changed)
    before, after = (read_export(d)[1] for d in (tiny_export, changed))
    assert before.version != after.version
    assert before.name == after.name and before.weights_sha256 == after.weights_sha256
    assert before.template.fingerprint == after.template.fingerprint, "ids mean the same"


@pytest.mark.parametrize("change", OTHER_MODEL)
def test_a_config_that_makes_other_rewards_of_the_weights_makes_another_version(
    tiny_export: Path, tmp_path: Path, change: str
) -> None:
    changed = copy(tiny_export, tmp_path / "changed")
    OTHER_MODEL[change](changed)
    before, after = (RewardModel.load(d, "cpu", "float32") for d in (tiny_export, changed))
    assert before.version != after.version
    assert after.export and before.version not in after.export.old_versions
    rows = ["What is it?"], ["A long answer, and another word."]
    assert not np.array_equal(before.score(*rows).values, after.score(*rows).values)


def test_the_config_of_an_adapter_s_backbone_is_part_of_its_version() -> None:
    spec = TemplateSpec("chat", "\n", 256, "f" * 64)
    adapter = AdapterRecord(base="b", backbone_sha256="c", weights_sha256="d", scale=1.0)
    one, other = (
        Export(
            name="r", dtype="bfloat16", template=spec, weights_sha256="w", adapter=adapter
        ).model_copy(update={"config_sha256": found})
        for found in ("1", "2")
    )
    assert one.adapter_version != other.adapter_version


@pytest.mark.parametrize("change", SAME_IDS | SAME_MODEL)
def test_what_makes_the_same_rewards_does_not_change_the_version(
    tiny_export: Path, tmp_path: Path, change: str
) -> None:
    changed = copy(tiny_export, tmp_path / "changed")
    (SAME_IDS | SAME_MODEL)[change](changed)
    before, after = (RewardModel.load(d, "cpu", "float32") for d in (tiny_export, changed))
    assert before.version == after.version
    rows = ["What is it?"], ["A long answer, and longer than nine tokens."]
    assert np.array_equal(before.score(*rows).values, after.score(*rows).values)


def test_a_tokenizer_that_was_used_with_padding_keeps_its_fingerprint(tmp_path: Path) -> None:
    fresh, used = tiny_tokenizer(), tiny_tokenizer()
    used(["a", "longer"], padding=True, truncation=True, max_length=3)
    used.padding_side = "left"
    assert fingerprint_of_text(fresh, AT) == fingerprint_of_text(used, AT)
    used.save_pretrained(tmp_path)
    assert fingerprint_text(tmp_path, AT) == fingerprint_of_text(fresh, AT)
    assert fingerprint_of_text(AutoTokenizer.from_pretrained(tmp_path), AT) == fingerprint_text(
        tmp_path, AT
    )


def test_an_added_pad_is_no_part_of_what_turns_text_into_ids() -> None:
    padded = tiny_tokenizer()
    padded.add_special_tokens({"pad_token": "<|other pad|>"})
    bare = tiny_tokenizer()
    bare.pad_token = None
    assert fingerprint_of_text(padded, AT) == fingerprint_of_text(bare, AT)
    padded.add_tokens(["more"])
    assert fingerprint_of_text(padded, AT) != fingerprint_of_text(bare, AT)


def test_an_added_pad_does_not_change_what_ids_mean() -> None:
    padded, bare = tiny_tokenizer(), tiny_tokenizer()
    before = fingerprint(padded)
    padded.add_special_tokens({"pad_token": "<|other pad|>"})
    assert fingerprint(padded) == before == fingerprint(bare)
    padded.add_tokens(["more"])
    assert fingerprint(padded) != before
    padded.pad_token = "more"
    assert fingerprint(padded) != before, "<|other pad|> is in the middle now"


def test_a_token_that_pads_and_ends_is_part_of_what_ids_mean(tmp_path: Path) -> None:
    """GPT-2 has its EOS last, and people pad with it."""
    ended, padded = tiny_tokenizer(), tiny_tokenizer()
    for tokenizer in (ended, padded):
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    before, text = fingerprint(padded), fingerprint_of_text(padded, AT)
    padded.pad_token = "<|endoftext|>"
    assert fingerprint(padded) == before == fingerprint(ended)
    assert fingerprint_of_text(padded, AT) == text


def test_ids_of_a_tokenizer_with_an_added_pad_are_scored(tiny_export: Path) -> None:
    model = RewardModel.load(tiny_export, "cpu", "float32")
    padded = AutoTokenizer.from_pretrained(tiny_export)
    padded.add_special_tokens({"pad_token": "<|other pad|>"})
    assert model.score([[5, 6]], [[7]], tokenizer=padded).errors == [None]
    # A record may hold a fingerprint by the older formula, which covered every pad.
    spec = replace(model.template.spec, fingerprint="older")
    model.template = replace(model.template, spec=spec)
    assert model.score([[5, 6]], [[7]], tokenizer=padded).errors == [None]
    assert model.score([[5, 6]], [[7]], tokenizer="older").errors == [None]


def test_the_version_at_a_uri_is_that_of_the_files_there_now(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = copy(tiny_export, tmp_path / "remote")
    uri = f"fsspec+file://{remote}"
    here = read_export(tiny_export)[1].version
    assert read_export(uri)[1].version == read_identity(uri)[1].version == here
    edit_template(UPPER)(remote)
    directory, changed = read_export(uri)
    assert changed.version == read_identity(uri)[1].version != here
    assert (directory / "chat_template.jinja").read_text() == UPPER


def test_an_export_of_format_2_has_the_rewards_it_had_and_is_known_by_its_old_version(
    tiny_export: Path, tmp_path: Path
) -> None:
    old = copy(tiny_export, tmp_path / "old")
    record = json.loads((old / RECORD).read_text())
    del record["text_to_ids"]
    record["template"] = {
        k: record["template"][k] for k in ("format", "separator", "max_length", "fingerprint")
    }
    (old / RECORD).write_text(json.dumps(record | {"format_version": 2}))
    before, after = (RewardModel.load(d, "cpu", "float32") for d in (tiny_export, old))
    rows = ["What is it?"] * 2, ["A thing.", "<think>Hm"]
    assert np.array_equal(before.score(*rows).values, after.score(*rows).values)
    assert after.export and after.version == before.version not in after.export.old_versions
    # The ids of these rows, as the code before format version 3 built them.
    turns: Text = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A fruit?"},
        {"role": "assistant", "content": "An apple."},
        {"role": "user", "content": "A colour?"},
    ]
    ids = after.template.encode(
        [
            Row("What is it?", "A thing."),
            Row("What is it?", "  A thing.\n", False),
            Row("Hi", "<think>\nHm\n</think>\n\nParis"),
            Row(turns, "Red."),
        ]
    )
    digest = hashlib.sha256(b"".join(np.asarray(row, np.int32).tobytes() for row in ids))
    assert digest.hexdigest().startswith("ae955455b1616d15")
    # sha256 of weights, dtype and these four fields, as format versions 1 and 2 named it.
    spec = TemplateSpec("chat", "\n", 256, "f" * 64)
    pinned = Export(name="r", dtype="bfloat16", template=spec, weights_sha256="w")
    of_format_3 = pinned.version  # without config_sha256
    assert pinned.old_versions == {"r@e60802140806", of_format_3}
    assert pinned.model_copy(update={"config_sha256": "c"}).old_versions == pinned.old_versions


def test_damaged_tokenizer_files_are_named(tiny_export: Path, tmp_path: Path) -> None:
    changed = copy(tiny_export, tmp_path / "changed")
    (changed / "tokenizer.json").write_text("{")
    with pytest.raises(ExportError, match=r"tokenizer's files in .* are damaged"):
        read_export(changed)


# The cache of encoded groups ----------------------------------------------------------------------


def tokenizer(change: Callable[[PreTrainedTokenizerBase], object]) -> PreTrainedTokenizerBase:
    made = tiny_tokenizer()
    change(made)
    return made


def set_backend(**parts: Any) -> Callable[[PreTrainedTokenizerBase], object]:
    def change(made: PreTrainedTokenizerBase) -> None:
        values = json.loads(made.backend_tokenizer.to_str())
        for name, part in parts.items():
            values[name] = part(values[name]) if callable(part) else part
        made._tokenizer = Tokenizer.from_str(json.dumps(values))

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "chat_template", UPPER),
        set_backend(model=lambda model: {**model, "merges": model["merges"][:20]}),
        set_backend(normalizer={"type": "Lowercase"}),
        set_backend(pre_tokenizer=lambda p: {**p, "add_prefix_space": True}),
    ],
    ids=["chat template", "merges", "normalizer", "pre-tokenizer"],
)
def test_encoded_data_is_not_read_for_another_tokenizer(
    change: Callable[[PreTrainedTokenizerBase], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    group = Group("A prompt", ["The one", "Xy"], [Preference(0, 1)], [True, True], "", "f:1")
    for made in (tiny_tokenizer(), tokenizer(change)):
        template = Template(made, TemplateSpec("chat", "\n", 64, fingerprint(made)))
        (encoded,) = (d[0] for d in [encode_groups([group], template, "truncate")])
        direct = template.encode([Row(group.prompt, response) for response in group.responses])
        for cached, ids in zip(encoded.tokens.rows, direct, strict=True):
            assert isinstance(ids, np.ndarray) and np.array_equal(cached, ids)
    assert len(list((tmp_path / "rayrm" / "encoded").iterdir())) == 2


# The clock ----------------------------------------------------------------------------------------


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Tomorrow:
        return cls(2031, 1, 2)


def test_an_export_with_a_clock_is_fixed_to_its_files_date_and_says_so(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked = copy(tiny_export, tmp_path / "clocked")
    edit_template("{{ strftime_now('%d %b %Y') }}" + CHATML)(clocked)
    day = datetime(2026, 3, 4, 5, tzinfo=UTC).timestamp()
    os.utime(clocked / "chat_template.jinja", (day, day))
    with pytest.warns(UserWarning, match="stopped at 04 March 2026"):
        model = RewardModel.load(clocked, "cpu", "float32")
    (ids,) = model.template.encode([Row("q", "a")])
    assert isinstance(ids, np.ndarray)
    assert str(model.template.tokenizer.decode(ids)).startswith("04 Mar 2026")
    first = model.score(["q"], ["a"])

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    with pytest.warns(UserWarning, match="stopped"):
        again = RewardModel.load(clocked, "cpu", "float32").score(["q"], ["a"])
    assert first.versions == again.versions and np.array_equal(first.values, again.values)
    os.utime(clocked / "chat_template.jinja", (day + 86400, day + 86400))
    with pytest.warns(UserWarning, match="05 March"):
        assert RewardModel.load(clocked, "cpu", "float32").version != model.version


def test_a_model_of_the_hub_has_the_same_clock_wherever_it_was_downloaded(
    tiny_export: Path, tmp_path: Path
) -> None:
    versions = set()
    for node, day in (("a", 3e8), ("b", 9e8)):
        (tmp_path / node / "snapshots").mkdir(parents=True)
        snapshot = copy(tiny_export, tmp_path / node / "snapshots" / "c0ffee")
        edit_template("{{ strftime_now('%d %b %Y') }}" + CHATML)(snapshot)
        os.utime(snapshot / "chat_template.jinja", (day, day))
        with pytest.warns(UserWarning, match="stopped at 26 July 2024"):
            versions.add(read_export(snapshot)[1].version)
    assert len(versions) == 1


def test_a_clock_in_a_base_s_template_shows_the_day_that_the_run_was_started(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers, and what renders by it, gives the exported template's text on any day."""
    clock = "Today is {{ strftime_now('%d %B %Y') }}.\n" + CHATML
    _, made, _ = load_base(str(base), chat_template=clock, date=date(2026, 3, 4))
    made.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    text = exported.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert isinstance(text, str) and text.startswith("Today is 04 March 2026.\n<|im_start|>user")


def test_an_old_export_takes_the_usual_ends_for_ends(tiny_export: Path, tmp_path: Path) -> None:
    old = copy(tiny_export, tmp_path / "old")
    edit(RECORD, lambda record: record.update(format_version=2))(old)
    made = AutoTokenizer.from_pretrained(old)
    made.add_special_tokens({"extra_special_tokens": ["<|endoftext|>"]})
    made.save_pretrained(old)
    directory, export = read_export(old)
    template = load_template(directory, export)
    template.tokenizer.chat_template += "{% if add_generation_prompt %}<|im_start|>a\n{% endif %}"
    assert sampled_row(template, "q", "Paris.<|endoftext|>") == Row("q", "Paris.", True)
