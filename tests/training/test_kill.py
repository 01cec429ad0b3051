"""Workers, drivers and nodes killed with SIGKILL: what it costs, and what it never costs.

Ray Train is given the product's loop here, on ranks of a class that notes what it does and kills
itself at chosen places.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.train import (
    Checkpoint,
    CheckpointConsistencyMode,
    get_all_reported_checkpoints,
    get_checkpoint,
)
from ray.train.v2._internal.execution.storage import StorageContext
from torch import Tensor

from rayrm import TrainConfig, fit
from rayrm.errors import TrainingError
from rayrm.model.export import publish, read_export
from rayrm.packing import TokenGroup
from rayrm.training import fit as train
from rayrm.training import loop
from rayrm.training.fit import TrainResult, claim, export_run, run_directory
from rayrm.training.loop import Rank, train_loop
from rayrm.training.progress import progress_bar
from tests.makers import make_base

pytestmark = pytest.mark.usefixtures("cluster")

COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, which has dropout."""
    return make_base(tmp_path_factory.mktemp("base"), "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "train.jsonl", seed=0)


def write_pairs(file: Path, seed: int) -> Path:
    """20 pairs of varied lengths."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(20):
        prompt, chosen, rejected = (
            " ".join(rng.choice(COLOURS, int(rng.integers(low, high))))
            for low, high in ((2, 12), (1, 9), (1, 9))
        )
        pair = {"prompt": f"{i} {prompt}", "chosen": f"{chosen} a", "rejected": f"{rejected} b"}
        lines.append(json.dumps(pair))
    file.write_text("\n".join(lines) + "\n")
    return file


def configure(base: Path, file: Path, storage: Path, **sections: dict[str, Any]) -> TrainConfig:
    """Ten steps of eight pairs (the last of an epoch of four), three an epoch, on two workers.

    bf16, dropout, a falling learning rate, a checkpoint every two steps.
    """
    values: dict[str, Any] = {
        "name": "run",
        "storage": str(storage),
        "model": {"path": str(base), "dropout": 0.1},
        "data": {"train": str(file), "max_length": 128},
        "train": {
            "epochs": 10 / 3,
            "groups_per_step": 8,
            "tokens_per_micro_batch": 64,
            "learning_rate": 3e-3,
            "checkpoint_every": 2,
            "dtype": "bfloat16",
            "export_dtype": "float32",
        },
        "cluster": {"workers": 2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return TrainConfig(**values)


class Noting(Rank):
    """A rank that notes what it does in a file of its own."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.notes = Path(config.storage.split("://")[-1], "notes")
        self.notes.mkdir(exist_ok=True)
        found = get_checkpoint()
        there = Path(config.storage, config.name).glob("checkpoint_step_*")
        self.note(
            "start",
            resumed=found and Path(found.path).name,
            there=sorted(directory.name for directory in there),
            node=ray.get_runtime_context().get_node_id(),
        )

    def note(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, "step": self.step, **values})
        with (self.notes / f"rank{self.rank}.jsonl").open("a") as file:
            file.write(line + "\n")

    def train_step(self) -> None:
        self.note("step")
        super().train_step()


class Doomed(Noting):
    """A rank that kills itself at two places, once each."""

    def die_once(self, where: str) -> None:
        try:
            (self.notes / where).touch(exist_ok=False)
        except FileExistsError:
            return
        self.note("death", micro_batches=self.micro_batches)
        os.kill(os.getpid(), signal.SIGKILL)

    def train_step(self) -> None:
        self.micro_batches = 0
        super().train_step()

    def forward(self, groups: Sequence[TokenGroup]) -> Tensor:
        """Rank 1 dies between the micro-batches of the fifth step, the second of epoch two."""
        if self.rank == 1 and self.step == 4 and self.micro_batches == 1:
            wait_for_uploads()
            self.die_once("step 5")
        self.micro_batches += 1
        return super().forward(groups)

    def save(self) -> None:
        self.note("save")
        StorageContext.persist_current_checkpoint = partialmethod(  # type: ignore[method-assign, assignment]
            upload, rank=self
        )
        super().save()
        if self.step == 8:
            wait_for_uploads()


def upload(storage: StorageContext, checkpoint: Checkpoint, name: str, rank: Doomed) -> Checkpoint:
    """What Ray Train does, but the first upload takes until the next save, and the fourth dies.

    It dies with all of rank 1's part and half a file of rank 0's uploaded.
    """
    place = Path(storage.build_checkpoint_path_from_name(name))
    if name.endswith("2"):
        wait_until(lambda: notes(rank.notes, rank.rank)[-1] == {"event": "save", "step": 4})
        time.sleep(0.5)
    if name.endswith("8") and rank.rank == 0 and not (rank.notes / "upload").exists():
        wait_until(lambda: [*place.rglob("*rank_1_*optim_states.pt")])
        file = next(Path(checkpoint.path).rglob("*rank_0_*optim_states.pt"))
        half = place / file.relative_to(checkpoint.path)
        half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        rank.die_once("upload")
    persisted = whole_upload(storage, checkpoint, name)
    if rank.rank == 0:
        file = next(place.rglob("*model_states.pt"))
        saved = torch.load(file, weights_only=False)["rayrm"]["step"]
        rank.note("uploaded", name=name, saved=saved)
    return persisted


whole_upload = StorageContext.persist_current_checkpoint


def dies(values: dict[str, Any], steps: Any) -> dict[str, Any]:
    """The product's loop, on ranks that die."""
    loop.Rank = Doomed  # type: ignore[misc]
    return train_loop(values, steps)


def wait_for_uploads() -> None:
    get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)


def wait_until(condition: Callable[[], object], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def notes(directory: Path, rank: int) -> list[dict[str, Any]]:
    lines = (directory / f"rank{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps_of_each_start(directory: Path) -> list[list[int]]:
    """The steps, from 1, that rank 0 began."""
    starts: list[list[int]] = []
    for note in notes(directory, 0):
        if note["event"] == "start":
            starts.append([])
        elif note["event"] == "step":
            starts[-1].append(note["step"] + 1)
    return starts


def weights(result: TrainResult) -> str:
    return read_export(result.export)[1].weights_sha256


def curve(result: TrainResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in h.items() if k != "seconds"} for h in result.history]


def test_ray_train_resumes_killed_workers_and_ends_with_the_same_weights(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO 2; the test of a driver that is killed has ZeRO 3."""
    sections = {"deepspeed": {"zero_stage": 2}, "cluster": {"workers": 2, "retries": 2}}
    whole = fit(configure(base, data, tmp_path / "whole", **sections))
    monkeypatch.setattr("rayrm.training.fit.train_loop", dies)
    resumed = fit(configure(base, data, tmp_path, **sections))
    assert curve(resumed) == curve(whole)
    assert weights(resumed) == weights(whole)
    check_cost(tmp_path / "notes")


def check_cost(directory: Path) -> None:
    """Each death cost the steps since the last whole checkpoint, and nothing else."""
    assert steps_of_each_start(directory) == [[1, 2, 3, 4, 5], [5, 6, 7, 8], [7, 8, 9, 10]]
    deaths = [
        note for rank in (0, 1) for note in notes(directory, rank) if note["event"] == "death"
    ]
    assert [death["step"] for death in deaths] == [8, 4]
    assert deaths[1]["micro_batches"] == 1
    last = [note for note in notes(directory, 0) if note["event"] == "start"][-1]
    assert last["resumed"] == "checkpoint_step_000006"
    assert last["there"] == ["checkpoint_step_000006", "checkpoint_step_000008"]
    for note in notes(directory, 0):
        if note["event"] == "uploaded":  # and not what was saved after it, while it was uploaded
            assert note["name"] == f"checkpoint_step_{note['saved']:06d}"


@pytest.mark.slow
def test_fit_in_another_process_resumes_and_ends_with_the_same_weights(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"deepspeed": {"zero_stage": 3}}
    whole = fit(configure(base, data, tmp_path / "whole", **sections))
    own, own_base = Path(shutil.copy(data, tmp_path)), shutil.copytree(base, tmp_path / "base")
    config = configure(own_base, own, tmp_path, **sections)
    with monkeypatch.context() as patched:
        patched.setattr("rayrm.training.fit.train_loop", dies)
        with pytest.raises(TrainingError, match="died"):
            fit(config)
    write_pairs(own, seed=1)
    with pytest.raises(TrainingError, match="step 4 was trained on other data"):
        fit(config)
    shutil.copy(data, own)
    template = own_base / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    with pytest.raises(TrainingError, match="step 4 was trained on other ids"):
        fit(config)
    shutil.copy(base / template.name, template)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, config.model_dump_json(), address()])
    try:
        wait_until(lambda: (tmp_path / "notes/upload").exists() or driver.poll() is not None)
        assert driver.poll() is None
    finally:
        driver.kill()
        driver.wait()
    with monkeypatch.context() as patched:
        patched.setattr("rayrm.training.fit.train_loop", dies)
        patched.setattr("rayrm.training.fit.export_run", export_dies)
        resumed = fit(config)
    assert (tmp_path / "notes/export").exists()
    assert curve(resumed) == curve(whole)
    assert weights(resumed) == weights(whole)
    check_cost(tmp_path / "notes")


def address() -> str:
    return str(ray.get_runtime_context().gcs_address)


DRIVER = """
import sys
import ray
from tests.training.test_kill import TrainConfig, dies, fit, train
ray.init(sys.argv[2], log_to_driver=False)
train.train_loop = dies
fit(TrainConfig.model_validate_json(sys.argv[1]))
"""


def export_dies(config: TrainConfig, run: str, *rest: Any) -> None:
    """The product's export, killed once with half of it at its place."""

    def publish_half(directory: Path, target: str) -> None:
        mark = Path(config.storage, "notes/export")
        if not mark.exists():
            mark.touch()
            move = shutil.move

            def half(source: Path, staged: Path) -> None:
                staged.mkdir()
                file = source / "model.safetensors"
                (staged / file.name).write_bytes(file.read_bytes()[:1000])
                os.kill(os.getpid(), signal.SIGKILL)

            shutil.move = half  # type: ignore[assignment]
            publish(directory, target)
            shutil.move = move
        publish(directory, target)

    train.publish = publish_half  # type: ignore[attr-defined]
    export_run(config, run, *rest)


@pytest.mark.slow
def test_what_a_kill_left_half_uploaded_does_not_get_into_a_later_checkpoint(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_last = {"epochs": 8 / 3, "checkpoint_every": 0}
    with monkeypatch.context() as patched:
        patched.setattr("rayrm.training.fit.train_loop", dies)
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes/step 5").touch()
        with pytest.raises(TrainingError, match="died"):
            fit(configure(base, data, tmp_path, train=only_last))
    left = tmp_path / "run/checkpoint_step_000008"
    assert [*left.rglob("*rank_1_*optim_states.pt")]
    fit(configure(base, data, tmp_path, train=only_last, cluster={"workers": 1}))
    assert not [*left.rglob("*rank_1_*optim_states.pt")]


@pytest.mark.slow
def test_the_best_checkpoints_and_the_latest_are_kept_and_the_best_is_exported(
    base: Path, data: Path, tmp_path: Path
) -> None:
    config = configure(
        base,
        data,
        tmp_path,
        data={"eval": str(write_pairs(tmp_path / "eval.jsonl", seed=1))},
        train={
            "eval_every": 1,
            "checkpoint_every": 1,
            "keep_checkpoints": 2,
            "keep_best": "loss",
            "export_checkpoint": "best",
            "schedule": "constant",
        },
        cluster={"workers": 1},
    )
    result = fit(config)
    losses = [h["eval_loss"] for h in result.history]
    best = sorted(range(1, 11), key=lambda step: losses[step - 1])
    assert best[0] != 10, "the best is not the last"
    kept = {int(p.name[-6:]) for p in (tmp_path / "run").glob("checkpoint_step_*")}
    assert kept == {*best[:2], 10}
    assert read_export(result.export)[1].provenance["step"] == best[0]
    assert result.metrics["loss"] == pytest.approx(losses[best[0] - 1], abs=0.02)
    assert result.metrics["loss"] != pytest.approx(losses[-1], abs=0.02)


def test_a_damaged_list_of_checkpoints_is_an_error_that_names_the_run(
    base: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint_manager_snapshot.json").write_text('{"ray_ver')
    with pytest.raises(TrainingError, match=f"{tmp_path}/run died") as error:
        fit(configure(base, data, tmp_path))
    assert "CheckpointManagerInitializationError" in str(error.value)


def test_a_run_killed_while_it_notes_its_config_can_be_started_again(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    config = configure(base, data, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TrainConfig, "model_dump_json", killed)
        claim(config, run_directory(config))
    claimed = claim(config, run_directory(config))
    noted = json.loads((tmp_path / "run/config.json").read_text())
    assert TrainConfig(**noted) == claimed


def test_the_bar_outlives_the_process_that_counts_its_steps() -> None:
    with progress_bar("test") as steps:
        ray.get(steps.put.remote(1, 3, ""))
        ray.kill(steps, no_restart=False)
        while ray.get(steps.get.remote()) != (0, 0, ""):
            pass  # the old process is not dead yet
        ray.get(steps.put.remote(2, 3, ""))
        assert ray.get(steps.get.remote()) == (2, 3, "")
