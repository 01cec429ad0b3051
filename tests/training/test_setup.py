"""A rank starts with what config and base model say, and all ranks start with the same."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from transformers import GenerationConfig

from rayrm import TrainConfig
from rayrm.errors import TrainingError
from rayrm.model.architecture import hash_config
from rayrm.rows import Row
from rayrm.text.fingerprints import fingerprint_of_text
from rayrm.training.inputs import Inputs, check_exported
from rayrm.training.lora import hash_frozen
from rayrm.training.setup import decide_dtype, load_model
from tests.makers import make_base
from tests.shapes import QWEN3

CLOCK = "{{ strftime_now('%d %B %Y') }}"


def configure(base: Path, **data: Any) -> TrainConfig:
    values = {"train": ["x.jsonl"], "date": "2026-03-04", "max_length": 64, **data}
    return TrainConfig(name="run", model={"path": str(base)}, data=values)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Its template has a clock and rewrites answers, and it ends texts with two tokens."""
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(CLOCK + QWEN3)
    GenerationConfig(eos_token_id=[0, 1]).save_pretrained(base)
    return base


def test_the_template_has_what_config_and_base_say(base: Path) -> None:
    _, template = load_model(configure(base))
    assert (template.spec.rule, template.spec.thoughts) == ("continue", "keep")
    assert template.spec.ends == ("<|im_start|>",)
    (ids,) = template.encode([Row("q", "a")])
    assert isinstance(ids, np.ndarray)
    assert str(template.tokenizer.decode(ids)).startswith("04 March 2026<|im_start|>user")

    _, template = load_model(configure(base, thoughts="drop", rule="template", format="chat"))
    assert (template.spec.rule, template.spec.thoughts) == ("template", "drop")
    (base / "chat_template.jinja").unlink()
    _, template = load_model(configure(base))
    assert (template.spec.format, template.spec.rule) == ("text", "template")


@pytest.mark.parametrize("file", ["chat_template.jinja", "generation_config.json", "config.json"])
def test_a_base_that_changed_while_it_was_trained_is_not_exported(base: Path, file: str) -> None:
    config = configure(base)
    model, template = load_model(config)
    trained = {
        "text_to_ids": fingerprint_of_text(template.tokenizer, datetime(2026, 3, 5)),
        "template": asdict(template.spec),
        "config_sha256": hash_config(model.config.to_dict()),
        "frozen_sha256": hash_frozen(model),
    }
    check_exported(*load_model(config), trained, str(base))
    if file == "chat_template.jinja":
        (base / file).write_text(QWEN3 + "!")
    elif file == "config.json":
        config_file = base / file
        values = json.loads(config_file.read_text())
        config_file.write_text(json.dumps(values | {"rms_norm_eps": 0.1}))
    else:
        GenerationConfig(eos_token_id=[1]).save_pretrained(base)
    with pytest.raises(TrainingError, match=f"of {base} has changed since"):
        check_exported(*load_model(config), trained, str(base))


INPUTS: dict[str, Any] = {
    "data_fingerprint": "d",
    "text_to_ids": "t",
    "template": {"format": "chat", "ends": ("a", "b")},
    "groups": 7,
    "config_sha256": "c",
    "frozen_sha256": "f",
}
DIFFERENCES: list[dict[str, Any]] = [
    {},
    {"text_to_ids": "other"},
    {"data_fingerprint": "other", "groups": 8},
]


def test_a_rank_says_what_the_run_computes_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(tmp_path)
    config.train.dtype = "float32"
    with caplog.at_level("INFO", "rayrm.training.setup"):
        assert decide_dtype(config, rank=0).train.dtype == "float32"
        decide_dtype(config, rank=1)
    assert [r.message for r in caplog.records] == ["run computes in float32"], "by one rank"


def check_every_difference(rank: int, store: str, said: Any) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    for other in DIFFERENCES:
        try:
            Inputs(**(INPUTS | other if rank == 1 else INPUTS)).check_ranks()
        except TrainingError as error:
            said.put(str(error))
        else:
            said.put("")
    dist.destroy_process_group()


def test_ranks_that_do_not_train_on_the_same_are_refused(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    said = [spawn.Queue(), spawn.Queue()]
    ranks = [
        spawn.Process(target=check_every_difference, args=(rank, f"{tmp_path}/store", said[rank]))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for other in DIFFERENCES:
        first, second = (queue.get(timeout=240) for queue in said)
        assert first == second, "every rank says the same"
        expected = f"ranks 0 and 1 do not train on the same ({', '.join(other)} differ)"
        assert first.startswith(expected) if other else first == ""
    for process in ranks:
        process.join()
