"""What saves memory changes no result: each takes steps, resumes and exports on two workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.train import Checkpoint
from ray.train.v2.api.result import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rayrm import RewardModel, TrainConfig, fit
from rayrm.data.records import read_groups
from rayrm.errors import TrainingError
from rayrm.evaluation.evaluate import evaluate, score
from rayrm.model.export import read_export
from rayrm.packing import TokenGroup
from rayrm.training.checkpoint import consolidate, save_shards
from rayrm.training.fit import export_run, make_trainer, run_directory
from rayrm.training.loop import Rank
from rayrm.training.setup import merge
from tests.tiny import transformers_rewards

pytestmark = pytest.mark.usefixtures("cluster")

LORA = {"lora": {"rank": 4}}
RECOMPUTED = {"model": {"gradient_checkpointing": True}}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_stage": stage, **more}}


HPZ = {"zero_optimization": {"zero_hpz_partition_size": 2}}

FAST = {"lora, zero 0": LORA | zero(0), "lora, zero 3": LORA | zero(3)}
SLOW = {
    "all weights, zero 2": zero(2),
    "recomputed, zero 2": RECOMPUTED | zero(2),
    "recomputed, zero 3": RECOMPUTED | zero(3),
    "optimizer offload, zero 1": zero(1, offload_optimizer=True),
    "optimizer offload, zero 2": zero(2, offload_optimizer=True),
    "optimizer offload, zero 3": zero(3, offload_optimizer=True),
    "parameter offload, zero 3": zero(3, offload_optimizer=True, offload_param=True),
    "hpz, zero 3": zero(3, overrides=HPZ),
    "lora, zero 1": LORA | zero(1),
    "lora, zero 2": LORA | zero(2),
    "lora, recomputed, offload, zero 3": LORA
    | RECOMPUTED
    | zero(3, offload_optimizer=True, offload_param=True),
}

Trained = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 pairs of varied lengths: three steps of five."""
    rng = np.random.default_rng(0)
    words = ["red", "blue", "green", "black", "white", "pink", "grey"]

    def text(most: int) -> str:
        return " ".join(rng.choice(words, int(rng.integers(1, most))))

    records = [
        {"prompt": f"{i} {text(12)}", "chosen": f"{text(9)} a", "rejected": f"{text(9)} b"}
        for i in range(15)
    ]
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def configure(base: Path, data: Path, storage: Path, **sections: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "run",
        "storage": str(storage),
        "model": {"path": str(base)},
        "data": {"train": str(data), "eval": str(data), "max_length": 128},
        "train": {
            "groups_per_step": 5,
            "tokens_per_micro_batch": 64,  # several micro-batches a step
            "learning_rate": 3e-3,
            "dtype": "float32",
            "export_dtype": "float32",
        },
        "cluster": {"workers": 2},
    }
    return TrainConfig(**merge(values, sections))


def resume(config: TrainConfig, directory: str) -> Rank:
    """A rank that finds a checkpoint in the directory, as if Ray Train had told it of one."""
    with pytest.MonkeyPatch.context() as patched:
        checkpoint = Checkpoint.from_directory(directory)
        patched.setattr("rayrm.training.loop.get_checkpoint", lambda: checkpoint)
        return Rank(config)


def train_and_resume(
    values: dict[str, Any], variants: dict[str, Any], other_base: str = ""
) -> dict[str, Trained]:
    """On each rank: every variant for three steps, and again from what it saved after two.

    At last, what resuming the last one on another base model says.
    """
    found = {}
    for name, sections in variants.items():
        config = TrainConfig(**merge(values, sections))
        shards = f"{values['storage']}/{name}"
        whole = Rank(config)
        for _ in range(2):
            whole.train_step()
        save_shards(whole.engine, f"{shards}/two", whole.state())
        whole.train_step()
        save_shards(whole.engine, f"{shards}/whole", {})
        dist.barrier()
        resumed = resume(config, f"{shards}/two")
        resumed.train_step()
        save_shards(resumed.engine, f"{shards}/resumed", {})
        dist.barrier()
        a, b = (consolidate(f"{shards}/{which}") for which in ("whole", "resumed"))
        groups = [resumed.train[i] for i in range(5)]
        resumed.engine.eval()
        with torch.no_grad():
            rewards = resumed.forward([group.tokens for group in groups]).numpy()
        found[name] = {
            "losses": [h["loss"] for h in whole.history],
            "grad_norms": [h["grad_norm"] for h in whole.history],
            "resumed_losses": [h["loss"] for h in resumed.history],
            "resumed_exactly": a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a),
            "saved": sorted(a),
            "in_effect": {
                "offload_optimizer": whole.engine.zero_cpu_offload(),
                "offload_param": whole.engine.zero_offload_param() is not None,
                "recomputed": whole.engine.module.model.is_gradient_checkpointing,
                "hpz": whole.engine.zero_hpz_partition_size() > 1,
            },
            "groups": [group.tokens for group in groups],
            "rewards": rewards,
            "shards": f"{shards}/resumed",
            "run": {
                "history": resumed.history,
                "data": str(resumed.train.report),
                **asdict(resumed.inputs),
            },
        }
    if other_base:
        on_other = TrainConfig(**merge(values, sections | {"model": {"path": other_base}}))
        with pytest.raises(TrainingError) as caught:
            resume(on_other, f"{shards}/two")
        found["another base"] = {"said": str(caught.value)}
    return found


def run(config: TrainConfig, variants: dict[str, Any], other_base: str = "") -> dict[str, Trained]:
    on_each_rank = partial(train_and_resume, variants=variants, other_base=other_base)
    result = make_trainer(config, run_directory(config), on_each_rank).fit()
    assert isinstance(result, Result) and result.return_value
    found: dict[str, Trained] = result.return_value
    return found


@pytest.fixture(scope="module")
def other_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model but for one weight, which no adapter is at."""
    other = Path(shutil.copytree(base, tmp_path_factory.mktemp("other") / "base"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


@pytest.fixture(scope="module")
def fast(
    base: Path, other_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    return run(configure(base, data, tmp_path_factory.mktemp("fast")), FAST, str(other_base))


@pytest.fixture(scope="module")
def slow(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return run(configure(base, data, tmp_path_factory.mktemp("slow")), SLOW)


def export(config: TrainConfig, trained: Trained) -> Path:
    directory = Path(config.storage) / "run"
    directory.mkdir(parents=True)
    shards = Checkpoint.from_directory(trained["shards"])
    export_run(config, str(directory), shards, 3, trained["run"], cpus=1)
    return directory / "export"


def by_transformers(export: Path, groups: Sequence[TokenGroup]) -> NDArray[np.float32]:
    model = AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32).eval()
    with torch.no_grad():
        return transformers_rewards(model, [row for g in groups for row in g.rows]).numpy()


def check(config: TrainConfig, trained: Trained) -> Path:
    """Steps were taken; resumed is uninterrupted; exported, in transformers too, is trained."""
    assert len(set(trained["losses"])) == 3
    assert trained["resumed_losses"] == trained["losses"] and trained["resumed_exactly"]
    directory, groups = export(config, trained), trained["groups"]
    near = 1e-5 * max(1.0, float(trained["rewards"].std()))
    ours = np.concatenate(RewardModel.load(directory, "cpu", "float32").score_groups(groups))
    np.testing.assert_allclose(ours, trained["rewards"], rtol=0, atol=near)
    np.testing.assert_allclose(by_transformers(directory, groups), ours, rtol=0, atol=near)
    return directory


@pytest.mark.parametrize("name", FAST)
def test_lora_steps_resumes_and_exports(
    name: str, fast: dict[str, Trained], base: Path, data: Path, tmp_path: Path
) -> None:
    exported = check(configure(base, data, tmp_path, **FAST[name]), fast[name])
    assert {n for n in fast[name]["saved"] if "lora_" not in n} == {"model.score.weight"}
    before, after = (load_file(d / "model.safetensors") for d in (base, exported))
    assert after["score.weight"].dtype == torch.float32
    for weight in before.keys() & after.keys():
        adapted = weight.endswith("_proj.weight")
        assert torch.equal(before[weight], after[weight]) != adapted, weight
    shared = RewardModel.load(exported, "cpu", "float32", adapters={"again": exported})
    for model in (shared, shared.adapters["again"]):
        ours = np.concatenate(model.score_groups(fast[name]["groups"]))
        near = 1e-5 * max(1.0, float(ours.std()))
        np.testing.assert_allclose(ours, fast[name]["rewards"], rtol=0, atol=near)


def test_lora_is_the_same_under_zero_0_and_3(fast: dict[str, Trained]) -> None:
    one, two = fast["lora, zero 0"], fast["lora, zero 3"]
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-5)
    np.testing.assert_allclose(one["rewards"], two["rewards"], atol=1e-4)


def test_adapters_are_neither_trained_on_nor_merged_into_another_base(
    fast: dict[str, Trained], other_base: Path, data: Path, tmp_path: Path
) -> None:
    assert "are not those that the run was started with" in fast["another base"]["said"]
    name, sections = next(iter(FAST.items()))
    with pytest.raises(TrainingError, match=f"weights of {other_base} are not those"):
        export(configure(other_base, data, tmp_path, **sections), fast[name])


def test_the_record_says_how_far_rounding_moved_rewards(
    fast: dict[str, Trained], base: Path, data: Path, tmp_path: Path
) -> None:
    name, sections = next(iter(FAST.items()))
    groups, _ = read_groups(str(data))
    rewards = []
    for dtype in ("float32", "bfloat16"):
        config = configure(base, data, tmp_path / dtype, **sections, train={"export_dtype": dtype})
        directory = export(config, fast[name])
        scored = score(RewardModel.load(directory, "cpu", "float32"), groups)
        rewards.append(np.concatenate([group.rewards for group in scored]))
    _, record = read_export(directory)
    shift = np.abs(rewards[1] - rewards[0])
    assert record.rounding["rows"] == 30 == len(shift)
    assert record.rounding["mean_abs"] == pytest.approx(shift.mean(), abs=1e-5)
    assert record.rounding["max_abs"] == pytest.approx(shift.max(), abs=1e-5)
    assert shift.mean() > 1e-4
    assert "reward change by rounding to bfloat16" in (directory / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_what_saves_memory_steps_resumes_and_exports_the_same(
    name: str,
    fast: dict[str, Trained],
    slow: dict[str, Trained],
    base: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    config = configure(base, data, tmp_path, **SLOW[name])
    check(config, slow[name])
    assert slow[name]["in_effect"] == {
        "offload_optimizer": config.deepspeed.offload_optimizer,
        "offload_param": config.deepspeed.offload_param,
        "recomputed": config.model.gradient_checkpointing,
        "hpz": config.deepspeed.overrides == HPZ,
    }
    reference = fast["lora, zero 0"] if "lora" in name else slow["all weights, zero 2"]
    assert slow[name]["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert slow[name]["grad_norms"] == pytest.approx(
        fast["lora, zero 3"]["grad_norms"] if "lora" in name else reference["grad_norms"], rel=1e-3
    )
    np.testing.assert_allclose(slow[name]["rewards"], reference["rewards"], atol=1e-4)


@pytest.mark.slow
def test_lora_is_the_same_on_one_worker(
    fast: dict[str, Trained], base: Path, data: Path, tmp_path: Path
) -> None:
    one = run(configure(base, data, tmp_path, cluster={"workers": 1}), FAST)
    for name, trained in one.items():
        assert trained["losses"] == pytest.approx(fast[name]["losses"], abs=1e-5)
        np.testing.assert_allclose(trained["rewards"], fast[name]["rewards"], atol=1e-4)


@pytest.mark.slow
def test_a_lora_run_in_bf16_is_evaluated_as_exported(
    base: Path, data: Path, tmp_path: Path
) -> None:
    train = {"dtype": "bfloat16", "export_dtype": "bfloat16"}
    result = fit(configure(base, data, tmp_path, **LORA, **zero(3), train=train))
    assert [h["step"] for h in result.history] == [1, 2, 3]
    directory, record = read_export(result.export)
    assert load_file(directory / "model.safetensors")["score.weight"].dtype == torch.float32
    again = evaluate(RewardModel.load(directory, "cpu", "bfloat16"), read_groups(str(data))[0])
    assert again["reward_mean"] == pytest.approx(result.metrics["reward_mean"], abs=1e-6)
    assert again["loss"] == pytest.approx(result.metrics["loss"], abs=1e-6)
    assert record.rounding["rows"] == 30 and record.rounding["mean_abs"] > 1e-4
