"""fit on tiny models: one curve however it is cut, resumed where it was, exported as trained."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ray.train import CheckpointConsistencyMode, get_all_reported_checkpoints
from ray.train.v2.api.result import Result
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from rayrm import RewardModel, TrainConfig, fit
from rayrm.commands.train import main
from rayrm.data.records import read_groups
from rayrm.errors import ConfigError, DataError, ExportError, ModelError, TrainingError
from rayrm.evaluation.evaluate import evaluate
from rayrm.model.export import read_record
from rayrm.rows import Row
from rayrm.training.checkpoint import consolidate, save_shards
from rayrm.training.config import TrainSection
from rayrm.training.dataset import PreferenceGroup
from rayrm.training.fit import TrainResult, check_places, claim, make_trainer, run_directory
from rayrm.training.loop import Rank, learning_rate, train_loop
from rayrm.training.setup import merge
from tests.shapes import QWEN3

pytestmark = pytest.mark.usefixtures("cluster")

COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 groups: pairs, and rankings of three, of varied lengths."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    records: list[dict[str, Any]] = []
    for i in range(14):
        words = " ".join(rng.choice(COLOURS, int(rng.integers(2, 12))))
        responses = [" ".join(rng.choice(COLOURS, int(rng.integers(1, 9)))) + str(j) for j in "abc"]
        if i % 3 == 0:
            records.append({"prompt": f"{i} {words}", "responses": responses, "ranks": [1, 2, 3]})
        else:
            chosen, rejected = responses[:2]
            records.append({"prompt": f"{i} {words}", "chosen": chosen, "rejected": rejected})
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def configure(base: Path, data: Path, storage: Path, **sections: dict[str, Any]) -> TrainConfig:
    """Three steps of five groups (the last of four) in fp32 on one CPU worker with ZeRO 0."""
    values: dict[str, Any] = {
        "name": "run",
        "storage": str(storage),
        "model": {"path": str(base)},
        "data": {"train": str(data), "eval": str(data), "max_length": 128},
        "train": {
            "groups_per_step": 5,
            "learning_rate": 3e-3,
            "warmup_steps": 1,
            "dtype": "float32",
            "export_dtype": "float32",
        },
        "deepspeed": {"zero_stage": 0},
        "cluster": {"workers": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return TrainConfig(**values)


def prepare(config: TrainConfig) -> None:
    """Make a rank in this process and start no worker; its errors come before its first step."""
    alone = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0
    )
    threads = torch.get_num_threads()
    store = Path(config.storage, "store")
    store.parent.mkdir(exist_ok=True)
    dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patched:
            for module in ("loop", "setup"):
                patched.setattr(f"rayrm.training.{module}.get_context", lambda: alone)
            Rank(config)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def every_stage(values: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """On each rank: three steps under every ZeRO stage, and what its shards consolidate to."""
    found: dict[int, dict[str, Any]] = {}
    for stage in range(4):
        values["deepspeed"]["zero_stage"] = stage
        rank = Rank(TrainConfig(**values))
        while rank.step < 3:
            rank.train_step()
        shards = f"{values['storage']}/stage{stage}"
        save_shards(rank.engine, shards, {})
        dist.barrier()
        found[stage] = {
            "losses": [h["loss"] for h in rank.history],
            "grad_norms": [h["grad_norm"] for h in rank.history],
            "head": consolidate(shards)["model.score.weight"].numpy(),
        }
    return found


def run_every_stage(config: TrainConfig) -> dict[int, dict[str, Any]]:
    result = make_trainer(config, run_directory(config), every_stage).fit()
    assert isinstance(result, Result) and result.return_value
    found: dict[int, dict[str, Any]] = result.return_value
    return found


@pytest.mark.slow
def test_losses_do_not_depend_on_zero_stage_workers_or_micro_batches(
    base: Path, data: Path, tmp_path: Path
) -> None:
    one = run_every_stage(configure(base, data, tmp_path / "one"))
    two = run_every_stage(
        configure(
            base,
            data,
            tmp_path / "two",
            train={"tokens_per_micro_batch": 64},
            cluster={"workers": 2},
        )
    )
    reference = one[0]
    assert reference["grad_norms"] == [None] * 3
    for stage in (1, 2, 3):
        for found in (one[stage], two[stage]):
            assert found["grad_norms"] == pytest.approx(one[1]["grad_norms"], rel=1e-3)
    assert len(reference["losses"]) == 3
    for found in (*one.values(), *two.values()):
        assert found["losses"] == pytest.approx(reference["losses"], abs=1e-4)
        np.testing.assert_allclose(found["head"], reference["head"], atol=1e-4)


@pytest.mark.slow
def test_the_head_trains_in_fp32_under_bf16_in_every_stage(
    base: Path, data: Path, tmp_path: Path
) -> None:
    config = configure(base, data, tmp_path, train={"dtype": "bfloat16"}, cluster={"workers": 2})
    for found in run_every_stage(config).values():
        head = torch.tensor(found["head"])
        assert head.dtype == torch.float32
        assert not torch.equal(head, head.bfloat16().float())


OBJECTIVES = [
    {"objective": "plackett_luce"},
    {"objective": "plackett_luce", "weighting": "prompt"},
    {"weighting": "prompt"},
]


def every_objective(values: dict[str, Any]) -> list[dict[str, Any]]:
    """On each rank: every objective trained, and its first loss by its definition."""
    found = []
    for loss in OBJECTIVES:
        rank = Rank(TrainConfig(**(values | {"loss": loss})))
        groups = [rank.train[i] for i in rank.schedule[0]]
        with torch.no_grad():
            rewards = [rank.forward([group.tokens]).tolist() for group in groups]
        while rank.step < rank.schedule.steps:
            rank.train_step()
        ranked = loss.get("objective") == "plackett_luce"
        by_group = [_losses(r, group, ranked) for r, group in zip(rewards, groups, strict=True)]
        if loss.get("weighting") == "prompt":
            defined = np.mean([np.mean(losses) for losses in by_group])
        else:
            defined = np.mean([x for losses in by_group for x in losses])
        found.append({"defined": float(defined), "history": rank.history})
    return found


def _losses(rewards: list[float], group: PreferenceGroup, ranked: bool) -> list[float]:
    """Of every pair, or of every choice, written out."""
    odds: dict[int, float] = {}
    keys = group.choice if ranked else range(group.pairs)
    for key, chosen, rejected in zip(keys, group.chosen, group.rejected, strict=True):
        odds[key] = odds.get(key, 1.0) + np.exp(rewards[rejected] - rewards[chosen])
    return [float(np.log(total)) for total in odds.values()]


@pytest.mark.slow
def test_every_objective_trains_and_its_steps_do_not_depend_on_how_they_are_cut(
    base: Path, data: Path, tmp_path: Path
) -> None:
    many: dict[str, Any] = {"epochs": 8, "schedule": "constant"}
    one = configure(base, data, tmp_path / "one", train=many)
    cut = many | {"epochs": 2, "tokens_per_micro_batch": 64}
    two = configure(base, data, tmp_path / "two", train=cut, cluster={"workers": 2})
    found = []
    for config in (one, two):
        result = make_trainer(config, run_directory(config), every_objective).fit()
        assert isinstance(result, Result) and result.return_value
        found.append(result.return_value)
    first_losses = []
    for whole, cut_up in zip(*found, strict=True):
        losses = [[h["loss"] for h in run["history"]] for run in (whole, cut_up)]
        assert losses[0][0] == pytest.approx(whole["defined"], abs=1e-5)
        assert losses[1] == pytest.approx(losses[0][:6], abs=1e-4)
        accuracy = [h["accuracy"] for h in whole["history"]]
        assert np.mean(accuracy[-3:]) > 0.9 > 0.8 > np.mean(accuracy[:3])
        first_losses.append(losses[0][0])
    assert len({round(loss, 4) for loss in first_losses}) == len(OBJECTIVES)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of one pair to 90: stars, chains, lone pairs and rankings, some of equal pairs."""
    rng = np.random.default_rng(1)

    def text(i: int) -> str:
        return " ".join(rng.choice(COLOURS, int(rng.integers(1, 9)))) + f" {i}"

    several = [text(i) for i in range(120)]
    compared = [(0, i) for i in range(1, 21)] + [(i, i + 1) for i in range(20, 50)]
    compared += [(i, i + 1) for i in range(60, 120, 2)]
    records: list[dict[str, Any]] = [
        {"prompt": "crowded", "chosen": several[a], "rejected": several[b], "label": label}
        for (a, b), label in zip(compared, rng.choice([1.0, 0.8, 0.5, 0.3], 80), strict=True)
    ]
    records += [{"prompt": f"{i} pink", "chosen": text(1), "rejected": text(2)} for i in range(3)]
    records.append({"prompt": "four", "responses": [*map(text, range(4))], "ranks": [1, 2, 2, 3]})
    return write(tmp_path_factory.mktemp("crowded") / "train.jsonl", records)


def write(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


BUDGETS = [8, 150, 1_000_000]


def note(tokens: list[int], _: torch.nn.Module, given: tuple[Any, ...]) -> None:
    tokens.append(len(given[0]))


def every_budget(values: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """On each rank: all steps under every budget, and the tokens of each forward by who made it."""
    found: dict[int, dict[str, Any]] = {}
    for budget in BUDGETS:
        values["train"]["tokens_per_micro_batch"] = budget
        rank = Rank(TrainConfig(**values))
        tokens: list[int] = []
        rank.engine.module.register_forward_pre_hook(partial(note, tokens))
        while rank.step < rank.schedule.steps:
            rank.train_step()
        rank.evaluate()
        everyone: list[list[int]] = [[]] * rank.world_size
        dist.all_gather_object(everyone, tokens)
        shards = f"{values['storage']}/budget{budget}"
        save_shards(rank.engine, shards, {})
        dist.barrier()
        data = [*(rank.train[i] for i in range(len(rank.train)))]
        assert rank.held_out is not None
        data += [rank.held_out[i] for i in range(len(rank.held_out))]
        found[budget] = {
            "history": rank.history,
            "forwards": [(len(t), max(t)) for t in everyone],
            "longest": max(len(row) for group in data for row in group.tokens.rows),
            "weights": {n: w.numpy() for n, w in consolidate(shards).items()},
            "pairs": [group.pairs for group in data[: len(rank.train)]],
        }
    return found


CROWDED_LOSSES: list[dict[str, Any]] = [
    {"centering": 0.01, "weighting": "prompt"},
    {"objective": "plackett_luce"},
]


@pytest.mark.parametrize(
    ("stage", "loss"),
    [
        (0, CROWDED_LOSSES[0]),
        pytest.param(3, CROWDED_LOSSES[0], marks=pytest.mark.slow),
        pytest.param(2, CROWDED_LOSSES[1], marks=pytest.mark.slow),
    ],
    ids=["pairs, zero 0", "pairs, zero 3", "choices, zero 2"],
)
def test_a_step_is_the_same_however_small_the_pieces_it_is_cut_into(
    base: Path, crowded: Path, tmp_path: Path, stage: int, loss: dict[str, Any]
) -> None:
    """And no forward holds more than the budget, or one row; every rank makes as many."""
    if "objective" in loss:
        records = [json.loads(line) for line in crowded.read_text().splitlines()]
        hard = [{k: v for k, v in record.items() if k != "label"} for record in records]
        crowded = write(tmp_path / "hard.jsonl", hard)
    train = {"groups_per_step": 2, "pairs_per_group": 24, "eval_every": 1}
    config = configure(
        base,
        crowded,
        tmp_path,
        train=train,
        loss=loss,
        deepspeed={"zero_stage": stage},
        cluster={"workers": 2},
    )
    result = make_trainer(config, run_directory(config), every_budget).fit()
    assert isinstance(result, Result) and result.return_value
    found = result.return_value
    whole = found[BUDGETS[-1]]
    assert max(whole["pairs"]) == 24 and sum(whole["pairs"]) == 88 and len(whole["pairs"]) == 8
    assert max(largest for _, largest in whole["forwards"]) > 600
    for budget, cut in found.items():
        counts, largest = zip(*cut["forwards"], strict=True)
        assert len(set(counts)) == 1
        assert max(largest) <= max(budget, cut["longest"])
        for one, other in zip(whole["history"], cut["history"], strict=True):
            for figure in ("loss", "accuracy", "margin"):
                assert other[figure] == pytest.approx(one[figure], abs=2e-6)
            assert other["pairs"] == one["pairs"] and other["tokens"] == one["tokens"]
        for name, weight in whole["weights"].items():
            np.testing.assert_allclose(cut["weights"][name], weight, rtol=0, atol=1e-4)


def test_training_learns_what_it_is_shown(base: Path, data: Path, tmp_path: Path) -> None:
    """And, since its storage is a URI, that the report goes where the storage path says."""
    config = configure(base, data, tmp_path, train={"epochs": 8, "checkpoint_every": 9})
    result = fit(config.model_copy(update={"storage": f"file://{tmp_path}"}))
    assert result.report == f"file://{tmp_path}/run/report/report.html"
    assert (tmp_path / "run/report/report.html").exists()
    history = result.history
    assert history[-1]["step"] == 24
    assert np.mean([h["accuracy"] for h in history[-3:]]) > 0.9
    assert np.mean([h["accuracy"] for h in history[:3]]) < 0.8


@pytest.fixture(scope="module")
def trained(
    base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, TrainResult]:
    """A finished run of two workers."""
    storage = tmp_path_factory.mktemp("trained")
    config = configure(base, data, storage, train={"eval_every": 3}, cluster={"workers": 2})
    return config, fit(config)


def test_trained_rewards_are_exported_and_what_is_exported_was_evaluated(
    data: Path, trained: tuple[TrainConfig, TrainResult]
) -> None:
    config, result = trained
    groups, read = read_groups(str(data))
    assert result.report == f"{config.storage}/run/report/report.html"
    page = Path(result.report).read_text()
    assert f"{data}: {read}" in page and f"<td>{result.metrics['accuracy']:.3f}</td>" in page
    assert len([*Path(result.report).parent.glob("*.png")]) == page.count("data:image/png") == 7
    model = RewardModel.load(result.export, "cpu", "float32")
    again = evaluate(model, groups)
    assert again.keys() == result.metrics.keys()
    for key in ("accuracy", "loss", "margin", "ece", "reward_mean", "reward_std"):
        assert again[key] == pytest.approx(result.metrics[key], abs=1e-6)
    assert result.history[-1]["eval_loss"] == pytest.approx(again["loss"], abs=1e-5)
    theirs = AutoModelForSequenceClassification.from_pretrained(result.export, dtype=torch.float32)
    prompts = [g.prompt for g in groups for _ in g.responses]
    responses = [r for g in groups for r in g.responses]
    ours = model.score(prompts, responses).values
    rows = model.encode([*map(Row, prompts, responses)])
    with torch.no_grad():
        for group, owners in zip(rows.groups, rows.owners, strict=True):
            for ids, owner in zip(group.rows, owners, strict=True):
                logit = theirs(torch.from_numpy(ids.astype(np.int64))[None]).logits.item()
                assert ours[owner] == pytest.approx(logit, abs=1e-5 * max(1.0, float(ours.std())))


def test_the_loop_evaluates_as_the_export_is_evaluated_over_long_rows_too(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Rows of 20 to 70 tokens where 40 fit, beside one another; pairs that are equal as ids."""
    rng = np.random.default_rng(3)

    def text(words: int) -> str:
        return " ".join(rng.choice(COLOURS, words))

    records: list[dict[str, Any]] = [
        {"prompt": f"{i} {text(7)}", "responses": [text(1), text(4), text(6)], "ranks": [1, 2, 3]}
        for i in range(12)
    ]
    records += [{"prompt": "same", "chosen": "red", "rejected": "red<|im_end|>"}] * 3
    records.append({"prompt": "half", "chosen": "red", "rejected": "blue", "label": 0.5})
    held_out = write(tmp_path / "held_out.jsonl", records)
    train = {"eval_every": 1, "tokens_per_micro_batch": 64}
    config = configure(base, data, tmp_path, train=train)
    config.data.eval, config.data.max_length = [str(held_out)], 40
    result = fit(config)
    assert 12 < result.metrics["truncated"] < 36
    assert result.metrics["failed_pairs"] == 0 and result.metrics["accuracy"] % (1 / 37) > 0
    for figure in ("accuracy", "loss", "margin"):
        ours, theirs = result.history[-1][f"eval_{figure}"], result.metrics[figure]
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_held_out_pairs_without_a_winner_end_in_figures_that_are_not_there(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = [json.loads(line) | {"label": 0.5} for line in data.read_text().splitlines()]
    undecided = write(tmp_path / "undecided.jsonl", records)
    settings = {"epochs": 0.34, "eval_every": 1}
    config = configure(base, undecided, tmp_path, train=settings)
    file = tmp_path / "config.yaml"
    file.write_text(config.model_dump_json())  # JSON is YAML
    monkeypatch.setattr("sys.argv", ["train.py", str(file)])
    main()
    printed = capsys.readouterr().out
    assert "held-out accuracy: n/a on 0 pairs" in printed
    result = fit(config)
    (step,) = result.history
    assert step["accuracy"] is None and step["eval_accuracy"] is None and step["loss"] > 0
    assert result.metrics["accuracy"] is None and result.metrics["reward_std"] > 0
    assert "No pair has a winner" in Path(result.report or "").read_text()
    assert "held-out rewards" in (Path(result.export) / "README.md").read_text()
    best = {"keep_best": "accuracy", "checkpoint_every": 1, "eval_every": 1}
    with pytest.raises(
        DataError, match=r"undecided\.jsonl: no held-out pair has a winner.*keep_best"
    ):
        prepare(configure(base, undecided, tmp_path / "best", train=best))


def test_ids_without_an_embedding_are_found_before_training(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """In the data: a special token that no template writes needs none otherwise."""
    longer = Path(shutil.copytree(base, tmp_path / "longer"))
    tokenizer = AutoTokenizer.from_pretrained(longer)
    there = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(longer)
    records = data.read_text() + json.dumps({"prompt": "p", "chosen": "<image>", "rejected": "b"})
    held_out = tmp_path / "images.jsonl"
    held_out.write_text(records)
    config = configure(longer, data, tmp_path)
    config.data.eval = [str(held_out)]
    with pytest.raises(ModelError, match=rf"token id {there}; .* embeddings for {there} tokens"):
        prepare(config)


def test_an_export_builds_rows_as_its_run_did_although_the_base_changed_meanwhile(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(base, tmp_path / "base"))
    template = own / "chat_template.jinja"
    template.write_text(QWEN3)
    GenerationConfig(eos_token_id=[0, 1]).save_pretrained(own)
    config = configure(own, data, tmp_path, train={"epochs": 0.34})
    config.data.thoughts = "drop"

    def changes(values: dict[str, Any], steps: Any) -> dict[str, Any]:
        trained = train_loop(values, steps)
        template.write_text(QWEN3 + "!")
        return trained

    with monkeypatch.context() as patched:
        patched.setattr("rayrm.training.fit.train_loop", changes)
        with pytest.raises(TrainingError, match=f"of {own} has changed since this run encoded"):
            fit(config)
    template.write_text(QWEN3)
    spec = read_record(fit(config).export).template
    assert (spec.rule, spec.thoughts, spec.ends) == ("continue", "drop", ("<|im_start|>",))


def test_what_is_in_the_way_of_an_export_is_found_before_training(
    base: Path, data: Path, tmp_path: Path
) -> None:
    config = configure(base, data, tmp_path)
    others = tmp_path / "run/export"
    others.mkdir(parents=True)
    check_places(run_directory(config))  # a rename takes the place of an empty directory
    (others / "model.safetensors").touch()
    with pytest.raises(ExportError, match=f"{others} would be in the way"):
        fit(config)
    (others / "model.safetensors").unlink()
    (tmp_path / "run/report").touch()
    with pytest.raises(ExportError, match="run/report would be in the way"):
        fit(config)


def test_a_finished_run_is_not_trained_again_and_says_so(
    trained: tuple[TrainConfig, TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    config, first = trained
    written = (Path(first.export) / "rayrm.json").stat().st_mtime_ns
    second = fit(config)
    assert second == first
    assert (Path(first.export) / "rayrm.json").stat().st_mtime_ns == written
    assert "is finished" in caplog.text
    other = config.train.model_copy(update={"learning_rate": 1.0})
    with pytest.raises(TrainingError, match=r"train\.learning_rate"):
        fit(config.model_copy(update={"train": other}))


@pytest.mark.slow
def test_the_same_name_resumes_where_the_run_was_cut_off(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(configure(base, data, tmp_path / "whole", cluster={"workers": 2}))
    config = configure(
        base, data, tmp_path / "cut", train={"checkpoint_every": 1}, cluster={"workers": 2}
    )
    with monkeypatch.context() as patched:
        patched.setattr("rayrm.training.fit.train_loop", _stop_after_two_steps)
        with pytest.raises(TrainingError, match="cut off"):
            fit(config)
    assert {p.name for p in (tmp_path / "cut/run").glob("checkpoint*")} == {
        "checkpoint_step_000002",
        "checkpoint_manager_snapshot.json",
    }
    resumed = fit(config)
    assert [h["step"] for h in resumed.history] == [1, 2, 3]
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in whole.history]
    ours, theirs = (RewardModel.load(r.export, "cpu", "float32") for r in (resumed, whole))
    assert ours.version.split("@")[1] == theirs.version.split("@")[1]


def _stop_after_two_steps(values: dict[str, Any], steps: Any) -> dict[str, Any]:
    rank = Rank(TrainConfig(**values))
    for _ in range(2):
        rank.train_step()
        rank.save()
    get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
    raise TrainingError("cut off")


def test_a_name_in_use_by_another_config_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    config = configure(base, data, tmp_path)
    claim(config, run_directory(config))
    faster = configure(
        base, data, tmp_path, cluster={"workers": 2}, train={"tokens_per_micro_batch": 64}
    )
    claim(faster, run_directory(faster))
    other = configure(base, data, tmp_path, train={"learning_rate": 1.0})
    with pytest.raises(TrainingError, match=r"train\.learning_rate"):
        fit(other)


def test_a_run_from_before_prompts_were_split_goes_on_with_whole_ones(
    base: Path, crowded: Path, tmp_path: Path
) -> None:
    """Its record does not name the field; a run that does is not changed under its checkpoints."""
    config = configure(base, crowded, tmp_path, train={"checkpoint_every": 1})
    run = run_directory(config)
    assert claim(config, run).train.pairs_per_group == 64
    record = tmp_path / "run/config.json"
    noted = json.loads(record.read_text())
    del noted["train"]["pairs_per_group"]
    record.write_text(json.dumps(noted))
    assert claim(config, run).train.pairs_per_group is None
    for asked in (None, 63):
        other = configure(
            base, crowded, tmp_path, train={"pairs_per_group": asked, "checkpoint_every": 1}
        )
        if asked is None:
            assert claim(other, run).train == other.train
        else:
            with pytest.raises(TrainingError, match=r"train\.pairs_per_group"):
                claim(other, run)


@pytest.mark.slow
def test_a_checkpoint_of_other_groups_is_not_resumed(
    base: Path, crowded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the record of the config is gone, which would have told."""
    with monkeypatch.context() as patched, pytest.raises(TrainingError, match="cut off"):
        patched.setattr("rayrm.training.fit.train_loop", _stop_after_two_steps)
        fit(
            configure(
                base, crowded, tmp_path, train={"pairs_per_group": None, "groups_per_step": 1}
            )
        )
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(
        TrainingError, match=r"step 2 was trained with other groups: train\.pairs_per"
    ):
        fit(configure(base, crowded, tmp_path, train={"groups_per_step": 1}))


def test_a_choice_of_more_pairs_than_a_group_may_have_is_refused_with_its_numbers(
    base: Path, tmp_path: Path
) -> None:
    best = {"prompt": "p", "chosen": "best", "rejected": [f"{i}" for i in range(9)]}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    data = write(tmp_path / "best.jsonl", [pair, best])
    sections: dict[str, Any] = {"loss": {"objective": "plackett_luce"}}
    train = {"pairs_per_group": 8, "epochs": 0.1}
    with pytest.raises(DataError, match=r"best\.jsonl:2: .* 9 others.*pairs_per_group is 8.* to 9"):
        prepare(configure(base, data, tmp_path, train=train, **sections))


def test_nan_stops_training_and_names_step_rank_and_rows(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Warm-up begins at 0: the second step has the first update, after which nothing is finite."""
    config = configure(base, data, tmp_path, train={"learning_rate": 1e30, "clip": 0})
    rows = r"step 3: the loss is not finite; .* infinite: rank 0: .*train\.jsonl:\d+"
    with pytest.raises(TrainingError, match=rows):
        fit(config)
    assert not (tmp_path / "run/export").exists()


@pytest.mark.slow
def test_paths_are_those_of_the_caller_not_of_the_workers(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    config = configure(base, Path(data.name), Path("runs"), train={"epochs": 0.34})
    assert fit(config).export == str(data.parent / "runs/run/export")


def test_a_ranking_that_is_more_than_an_order_is_refused_and_named(
    base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "soft.jsonl"
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    records = [pair, {**pair, "prompt": "q", "label": 0.8}, {**pair, "prompt": "r", "margin": 1}]
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    config = configure(base, data, tmp_path, loss={"objective": "plackett_luce"})
    with pytest.raises(DataError, match=r"soft\.jsonl:2.*label 0\.8.*plackett_luce"):
        prepare(config)


@pytest.mark.slow
def test_a_record_that_the_template_refuses_is_skipped_where_that_is_asked_for(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Its template writes no names."""
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    bad = {"prompt": [{"role": "user", "content": "Hi", "name": "ann"}], **answers}
    file = tmp_path / "with_bad.jsonl"
    file.write_text(data.read_text() + json.dumps(bad) + "\n")
    config = configure(base, file, tmp_path, train={"epochs": 0.34})
    config.data.on_bad_record = "skip"
    record = json.loads((Path(fit(config).export) / "rayrm.json").read_text())
    told = record["provenance"]["data"]
    assert "14 groups" in told and "2 bad responses; the first bad response: " in told
    assert "with_bad.jsonl:15: response 1" in told


def test_storage_in_what_a_job_uploaded_is_refused(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    upload.mkdir(parents=True)
    monkeypatch.chdir(upload)
    with pytest.raises(ConfigError, match=r"storage = 'runs' .*absolute path"):
        fit(configure(base, data, Path("runs")))
    assert not list(upload.iterdir())


def test_missing_data_and_models_are_typed_errors_that_say_where(
    base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        fit(configure(base, tmp_path / "nowhere.jsonl", tmp_path / "a"))
    with pytest.raises(ModelError, match=r"config\.json"):
        prepare(configure(tmp_path, data, tmp_path / "b"))


def test_learning_rates_follow_the_named_schedule() -> None:
    def rates(schedule: str) -> list[float]:
        train = TrainSection(learning_rate=1.0, warmup_steps=2, schedule=schedule)
        return [learning_rate(train, step, 6) for step in range(6)]

    assert rates("constant") == [0, 0.5, 1, 1, 1, 1]
    assert rates("linear") == [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([0, 0.5, 1, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_deepspeed_overrides_are_merged_section_by_section() -> None:
    merged = merge({"zero": {"stage": 2}, "clip": 1}, {"zero": {"bucket": 5}, "clip": 0})
    assert merged == {"zero": {"stage": 2, "bucket": 5}, "clip": 0}
