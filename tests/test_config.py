"""A wrong config says the key, the value and what is allowed, before any model loads."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from rayrm.errors import ConfigError, RayrmError
from rayrm.serving.config import ServeConfig
from rayrm.training.config import TrainConfig
from tests.tiny import write_lines


def values(**sections: dict[str, Any]) -> dict[str, Any]:
    return {"name": "run", "data": {"train": "a.jsonl"}} | sections


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "c.yaml", "name: run", "data:", "  train: a.jsonl")


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(path, overrides)
    return str(caught.value)


def test_one_path_may_stand_for_the_list() -> None:
    assert TrainConfig(**values()).data.train == ["a.jsonl"]
    several = TrainConfig(**values(data={"train": ["a", "b"], "eval": "c"}))
    assert (several.data.train, several.data.eval) == (["a", "b"], ["c"])


def test_an_unknown_key_is_named_with_the_nearest_and_all_allowed(minimal: Path) -> None:
    message = refusal(minimal, "--train.learning_rat", "1")
    assert "train.learning_rat" in message
    assert "did you mean 'learning_rate'" in message and "groups_per_step" in message
    message = refusal(minimal, "--trian.learning_rate", "1")
    assert "'trian'" in message and "did you mean 'train'" in message
    assert "did you mean" not in refusal(minimal, "--train.qqqq", "1")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train.learning_rate", "fast", "number"),
        ("train.learning_rate", "-1.0", "greater than 0"),
        ("train.schedule", "step", "'cosine', 'linear' or 'constant'"),
        ("train.dtype", "float16", "'auto', 'bfloat16' or 'float32'"),
        ("train.groups_per_step", "0", "greater than or equal to 1"),
        ("train.groups_per_step", "1.5", "integer"),
        ("train.seed", "-1", "greater than or equal to 0"),
        ("deepspeed.zero_stage", "4", "0, 1, 2 or 3"),
        ("loss.label_smoothing", "0.5", "less than 0.5"),
        ("loss.objective", "dpo", "'bradley_terry', 'plackett_luce' or 'rao_kupper'"),
        ("loss.weighting", "group", "'pair' or 'prompt'"),
        ("data.overlong", "ignore", "'truncate'"),
        ("data.train", "[]", "at least 1 item"),
        ("name", "a/b", "pattern"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(
    minimal: Path, key: str, value: str, allowed: str
) -> None:
    message = refusal(minimal, f"--{key}", value)
    assert key in message and value.strip("[]") in message and allowed in message
    assert len(message) < 300, "one problem in one line"


def test_all_problems_are_told_at_once(minimal: Path) -> None:
    message = refusal(minimal, "--train.epochs", "0", "--cluster.workers", "0", "--model.pth", "x")
    assert all(key in message for key in ("train.epochs", "cluster.workers", "model.pth"))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert "data is required" in refusal(write_lines(tmp_path / "c.yaml", "name: run"))
    message = refusal(write_lines(tmp_path / "c.yaml", "name: run", "data: {}"))
    assert "data.train is required" in message


def test_evaluating_on_nothing_is_refused(minimal: Path) -> None:
    message = refusal(minimal, "--train.eval_every", "5")
    assert "train.eval_every" in message and "data.eval" in message


@pytest.mark.parametrize("term", ["centering", "label_smoothing"])
def test_a_ranking_with_a_term_of_pairs_is_refused(minimal: Path, term: str) -> None:
    ranked = ["--loss.objective", "plackett_luce", "--loss.weighting", "prompt"]
    TrainConfig.load(minimal, ranked)
    message = refusal(minimal, *ranked, f"--loss.{term}", "0.1")
    assert f"loss.{term} = 0.1" in message and "'bradley_terry'" in message


def test_checkpoints_that_could_not_be_compared_are_refused(minimal: Path) -> None:
    best = ("--data.eval", "b.jsonl", "--train.keep_best", "loss")
    for every in (("0", "0"), ("10", "0"), ("0", "10"), ("10", "20"), ("15", "10")):
        flags = ("--train.checkpoint_every", every[0], "--train.eval_every", every[1])
        message = refusal(minimal, *best, *flags)
        assert "train.keep_best" in message and f"{every[0]} and {every[1]}" in message
    TrainConfig.load(minimal, [*best, "--train.checkpoint_every=20", "--train.eval_every=10"])
    message = refusal(minimal, "--train.export_checkpoint", "best")
    assert "train.export_checkpoint" in message and "train.keep_best" in message


@pytest.mark.parametrize(
    ("key", "stage", "allowed"),
    [("offload_optimizer", "0", "1, 2 or 3"), ("offload_param", "2", "zero_stage 3, not 2")],
)
def test_offloading_what_is_not_sharded_is_refused(
    minimal: Path, key: str, stage: str, allowed: str
) -> None:
    zero = ("--deepspeed.zero_stage", stage, f"--deepspeed.{key}", "true")
    message = refusal(minimal, *zero)
    assert f"deepspeed.{key} needs" in message and allowed in message


def test_overrides_have_their_types(minimal: Path) -> None:
    config = TrainConfig.load(
        minimal,
        [
            *("--train.learning_rate", "3e-5"),
            *("--train.groups_per_step", "32"),
            *("--model.gradient_checkpointing", "true"),
            "--data.separator=\\n=",
            *("--data.train", "[b.jsonl, c.jsonl]"),
            *("--train.betas", "[0.9, 0.95]"),
            *("--deepspeed.overrides.zero_optimization.reduce_bucket_size", "1000"),
        ],
    )
    assert config.train.learning_rate == 3e-5
    assert config.train.groups_per_step == 32
    assert config.model.gradient_checkpointing is True
    assert config.data.separator == "\\n="
    assert config.data.train == ["b.jsonl", "c.jsonl"]
    assert config.train.betas == (0.9, 0.95)
    assert config.deepspeed.overrides == {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert config.name == "run" and config.data.max_length == 1024


@pytest.mark.parametrize(
    "path", ["*.jsonl", "day=1/a.jsonl", "s3://bucket/x=y/*.parquet", "@home", "%x", "[a"]
)
def test_an_override_that_is_not_yaml_is_taken_as_it_stands(minimal: Path, path: str) -> None:
    assert TrainConfig.load(minimal, ["--model.path", path]).model.path == path
    assert TrainConfig.load(minimal, [f"--model.path={path}"]).model.path == path


# Text that means something else in YAML, and text of which YAML would take something away.
WORDS = ["2026", "1.50", "1e3", "0x1f", "on", "no", "true", "null", "~x", "2026-11-26", "12:30:45"]
LINES = [
    "a: b",
    "# a",
    "a #b",
    " ",
    "",
    "\n\n",
    "\nA: ",
    "[a]",
    "{a: 1}",
    "- a",
    "'a",
    '"',
    "*a",
    "&a b",
]


@pytest.mark.parametrize("text", [*WORDS, *LINES])
def test_text_stays_as_it_is_typed(minimal: Path, text: str) -> None:
    assert TrainConfig.load(minimal, ["--data.separator", text]).data.separator == text
    config = ServeConfig.load("e", ["--app", text, f"--labels.zone={text}"])
    assert (config.app, config.labels) == (text, {"zone": text})
    if text != "null":  # so a field that may be empty is emptied
        config = ServeConfig.load("e", ["--http.token_env", text])
        assert config.http.token_env == text


@pytest.mark.parametrize("word", ["2026", "on", "1.50", "2026-11-26", "null"])
def test_names_and_lists_of_them_stay_as_they_are_typed(minimal: Path, word: str) -> None:
    config = TrainConfig.load(
        minimal,
        [
            *("--name", word),
            *("--storage", word),
            *("--data.train", word),
            *("--data.eval", f"[{word}, b.jsonl]"),
            *("--lora.targets", f"- {word}"),
            *("--cluster.labels", f"{{zone: {word}}}"),
        ],
    )
    assert (config.name, config.storage, config.data.train) == (word, word, [word])
    assert (config.data.eval, config.lora.targets) == ([word, "b.jsonl"], [word])
    assert config.cluster.labels == {"zone": word}


def test_yamls_quotes_may_be_around_text(minimal: Path) -> None:
    for typed, text in (('"\\n"', "\n"), ("'on'", "on"), ('"a: b"', "a: b")):
        assert TrainConfig.load(minimal, ["--data.separator", typed]).data.separator == text


def test_what_is_not_text_is_yaml(minimal: Path) -> None:
    set_first = ["--http.token_file", "a", "--http.token_file", "null", "--max_length", "null"]
    config = ServeConfig.load("e", [*set_first, "--http.enabled", "on", "--deterministic", "no"])
    assert config.http.token_file is None and config.max_length is None
    assert config.http.enabled is True and config.deterministic is False
    overrides = ["--deepspeed.overrides", "{a: 1, b: on}", "--train.keep_best", "null"]
    train = TrainConfig.load(minimal, [*overrides, "--train.learning_rate", "1e-3"])
    assert train.deepspeed.overrides == {"a": 1, "b": True}
    assert train.train.keep_best is None and train.train.learning_rate == 1e-3


def test_paths_begin_at_the_users_home(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["--storage", "~/runs", "--model.path", "~/base", "--data.train", "[~/a, b, hub:a/b]"]
    config = TrainConfig.load(
        minimal, [*paths, "--data.eval", "~/*.jsonl", "--data.separator", "~"]
    )
    assert (config.storage, config.model.path) == ("/home/me/runs", "/home/me/base")
    assert config.data.train == ["/home/me/a", "b", "hub:a/b"]
    assert config.data.eval == ["/home/me/*.jsonl"] and config.data.separator == "~"
    assert TrainConfig.load(minimal, ["--storage", "~"]).storage == "/home/me"
    served = ServeConfig(
        export="~/export", adapters={"a": "~/a", "b": "s3://b/~"}, http={"token_file": "~/token"}
    )
    assert (served.export, served.http.token_file) == ("/home/me/export", "/home/me/token")
    assert served.adapters == {"a": "/home/me/a", "b": "s3://b/~"}
    assert ServeConfig.load("~/export").export == "/home/me/export"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainConfig.load("~/c.yaml").name == "run"
    write_lines(tmp_path / "s.yaml", "export: e", "app: b")
    assert ServeConfig.load("~/s.yaml").app == "b"


@pytest.mark.parametrize("gpus", ["0", "0.25", "1"])
def test_a_replica_takes_one_gpu_or_less(gpus: str) -> None:
    assert ServeConfig.load("e", ["--gpus_per_replica", gpus]).gpus_per_replica == float(gpus)


@pytest.mark.parametrize("gpus", ["1.5", "2"])
def test_gpus_that_a_replica_would_not_use_are_refused(gpus: str) -> None:
    with pytest.raises(ConfigError, match=rf"gpus_per_replica = {gpus}: a replica .* one GPU"):
        ServeConfig.load("e", ["--gpus_per_replica", gpus])


@pytest.mark.parametrize(
    "overrides", [["--train.epochs"], ["train.epochs", "1"], ["--name.x", "1"], ["3"]]
)
def test_overrides_that_are_not_pairs_are_refused(minimal: Path, overrides: list[str]) -> None:
    message = refusal(minimal, *overrides)
    assert overrides[0] in message


@pytest.mark.parametrize("content", ["a: [", "- a\n- b", "", "just text", "a: b: c"])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert str(path) in refusal(path)


def test_a_missing_config_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    assert str(tmp_path / "no.yaml") in refusal(tmp_path / "no.yaml")
    assert str(tmp_path) in refusal(tmp_path)


def test_a_section_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.yaml", "name: run", "data: a.jsonl")
    assert "data" in refusal(path)
    assert "data" in refusal(path, "--data.train", "b.jsonl")


def test_config_errors_are_value_errors_and_cross_processes(minimal: Path) -> None:
    with pytest.raises(ValueError) as caught:
        TrainConfig.load(minimal, ["--train.epochs", "0"])
    assert isinstance(caught.value, RayrmError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is ConfigError and str(again) == str(caught.value)


def test_a_config_survives_json_and_two_levels_hold_everything(minimal: Path) -> None:
    config = TrainConfig.load(minimal, ["--train.epochs", "0.5"])
    dumped = config.model_dump(mode="json")
    assert TrainConfig(**dumped) == config
    for name, section in dumped.items():
        for key, value in (section if isinstance(section, dict) else {}).items():
            assert not isinstance(value, dict) or key in ("labels", "overrides"), (name, key)


def test_a_serve_config_is_an_export_or_a_file(tmp_path: Path) -> None:
    config = ServeConfig.load("runs/x/export", ["--replicas", "2", "--labels.zone", "b"])
    assert (config.export, config.replicas, config.labels) == ("runs/x/export", 2, {"zone": "b"})
    path = write_lines(tmp_path / "s.yaml", "export: e", "app: b")
    assert ServeConfig.load(path).app == "b"
    with pytest.raises(ConfigError, match=r"replica.*did you mean 'replicas'"):
        ServeConfig.load("e", ["--replica", "2"])
