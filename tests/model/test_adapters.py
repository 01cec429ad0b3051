"""Several rewards on one backbone: each is its merged model's, and nothing is held twice."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from ray import serve
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rayrm import RewardClient, RewardModel, ServeConfig, TrainConfig, deploy
from rayrm.errors import ConfigError, EmptyResponse, ExportError, UnknownReward
from rayrm.model.export import ADAPTER, RECORD, read_adapter, read_export, read_record
from rayrm.rows import Rewards, make_rows
from rayrm.serving.application import build
from rayrm.serving.chunk import Chunk, Step
from rayrm.serving.operations import rollback
from rayrm.serving.record import read_record as read_served
from rayrm.serving.sending import Sending
from rayrm.serving.ticket import Caller, Ticket
from rayrm.serving.transports import Answer, Target
from rayrm.training.fit import write_export
from rayrm.training.setup import load_model
from tests.makers import make_base
from tests.service import samples_at, stats, texts, total, until
from tests.tiny import FAMILIES, byte_tokenizer, transformers_rewards

ROWS = texts(6, 3)
TRAINED = {"history": [], "data": "none", "data_fingerprint": "0" * 64}


def make_lora_export(directory: Path, base: Path, seed: int, **sections: Any) -> Path:
    """An export of adapters on the base and a head that are drawn by the seed, not trained."""
    given: dict[str, Any] = {
        "name": directory.name,
        "data": {"train": "none", "max_length": 256},
        "model": {"path": str(base)},
        "lora": {"rank": 4, "alpha": 12},
        "train": {"seed": seed, "export_dtype": "float32"},
    }
    config = TrainConfig(**{key: given.get(key, {}) for key in given} | sections)
    model, template = load_model(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)
    write_export(config, model, template, directory, 1, TRAINED)
    return directory


@pytest.fixture(scope="module")
def one_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def exports(one_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three rewards of one base, the first of which is to be the own one."""
    where = tmp_path_factory.mktemp("exports")
    names = ("own", "helpful", "harmless")
    return {n: make_lora_export(where / n, one_base, seed) for seed, n in enumerate(names)}


def adapters(exports: dict[str, Path]) -> dict[str, Path]:
    return {name: exports[name] for name in ("helpful", "harmless")}


@pytest.fixture(scope="module")
def model(exports: dict[str, Path]) -> RewardModel:
    return RewardModel.load(exports["own"], "cpu", "float32", adapters=adapters(exports))


@pytest.fixture(scope="module")
def merged(exports: dict[str, Path]) -> dict[str, Rewards]:
    """Of ROWS, by the merged models, each loaded by itself."""
    return {n: RewardModel.load(e, "cpu", "float32").score(*ROWS) for n, e in exports.items()}


def near(rewards: Rewards, expected: Rewards) -> None:
    """Equal to 1e-5 of their standard deviation, and all there."""
    assert np.isfinite(rewards.values).all()
    np.testing.assert_allclose(
        rewards.values, expected.values, rtol=0, atol=1e-5 * float(expected.values.std())
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rewards_of_every_architecture_are_the_merged_models(
    model_type: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", model_type)
    own, other = (make_lora_export(tmp_path / f"run{s}", base, s) for s in (0, 1))
    model = RewardModel.load(own, "cpu", "float32", adapters={"other": other})
    scored = model.score(*ROWS, rewards=["default", "other"])
    for export, rewards in zip((own, other), scored.values(), strict=True):
        near(rewards, RewardModel.load(export, "cpu", "float32").score(*ROWS))


def test_several_rewards_come_by_name_and_each_with_its_version(
    model: RewardModel, exports: dict[str, Path], merged: dict[str, Rewards]
) -> None:
    scored = model.score(*ROWS, rewards=["harmless", "helpful"])
    assert list(scored) == ["harmless", "helpful"]
    for name, rewards in scored.items():
        near(rewards, merged[name])
        assert set(rewards.versions) == {read_record(str(exports[name])).adapter_version}
    assert np.abs(scored["harmless"].values - scored["helpful"].values).max() > 0.1
    near(model.score(*ROWS), merged["own"])
    alone = model.score(*ROWS, rewards=["default"])["default"]
    np.testing.assert_array_equal(alone.values, model.score(*ROWS).values)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_threads_score_different_rewards_at_once(model_type: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", model_type)
    runs = [make_lora_export(tmp_path / f"run{seed}", base, seed) for seed in range(3)]
    model = RewardModel.load(runs[0], "cpu", "float32", adapters={"a": runs[1], "b": runs[2]})
    names = ["default", "a", "b"]
    alone = model.score(*ROWS, rewards=names)
    with ThreadPoolExecutor(6) as threads:
        calls = threads.map(lambda name: model.score(*ROWS, rewards=[name]), names * 8)
        for scored in calls:
            ((name, rewards),) = scored.items()
            np.testing.assert_array_equal(rewards.values, alone[name].values)


def storages(model: RewardModel) -> set[int]:
    """Where the backbone's weights lie, both of transformers' layers and of the faster ones."""
    weights: list[torch.Tensor] = list(model.net.model.base_model.parameters())
    if model.net.decoder:
        for layer in model.net.decoder.layers:
            weights += [p.weight for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    return {weight.untyped_storage().data_ptr() for weight in weights}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_backbone_is_held_once(model_type: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", model_type)
    runs = [make_lora_export(tmp_path / f"run{seed}", base, seed) for seed in range(3)]
    model = RewardModel.load(runs[0], "cpu", "float32", adapters={"a": runs[1], "b": runs[2]})
    assert (model.net.decoder is None) == (model_type == "gpt2")
    own = storages(model)
    for adapter in model.adapters.values():
        assert storages(adapter) == own
    plain = RewardModel.load(runs[0], "cpu", "float32")
    assert len(own) == len(storages(plain))


def test_the_frozen_backbone_is_what_is_loaded(model: RewardModel, one_base: Path) -> None:
    held = model.adapters["helpful"].net.model.state_dict()
    frozen = load_file(one_base / "model.safetensors")
    assert frozen.keys() - held.keys() == {"lm_head.weight"}
    assert all(torch.equal(frozen[name], held[name]) for name in frozen.keys() & held.keys())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_peft_reads_the_adapter_and_gives_its_rewards(model_type: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", model_type)
    lora = {"rank": 4, "targets": ["c_fc"] if model_type == "gpt2" else ["q_proj", "mlp.up_proj"]}
    runs = [make_lora_export(tmp_path / "all", base, 0), tmp_path / "some"]
    make_lora_export(runs[1], base, 1, lora=lora)
    ours = RewardModel.load(runs[0], "cpu", "float32", adapters={"some": runs[1]})
    scored = ours.score(*ROWS, rewards=["default", "some"])
    groups = ours.encode(make_rows(*ROWS)).groups
    rows = [row for group in groups for row in group.rows]
    for run, rewards in zip(runs, scored.values(), strict=True):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        by_hand = PeftModel.from_pretrained(model, run / ADAPTER).eval()
        by_auto = AutoPeftModelForSequenceClassification.from_pretrained(
            run / ADAPTER, num_labels=1
        ).eval()
        for peft in (by_hand, by_auto):
            with torch.no_grad():
                theirs = transformers_rewards(peft, rows).numpy()
            atol = 1e-5 * float(rewards.values.std())
            np.testing.assert_allclose(rewards.values, theirs, rtol=0, atol=atol)


def test_in_bf16_adapters_are_no_further_off_than_merged_weights(
    one_base: Path, tmp_path: Path
) -> None:
    train = {"seed": 1, "export_dtype": "bfloat16"}
    runs = [make_lora_export(tmp_path / f"{n}", one_base, 1, train=train) for n in range(2)]
    exact = RewardModel.load(
        make_lora_export(tmp_path / "fp32", one_base, 1), "cpu", "float32"
    ).score(*ROWS)
    merged = RewardModel.load(runs[0], "cpu", "bfloat16").score(*ROWS)
    model = RewardModel.load(runs[0], "cpu", "bfloat16", adapters={"other": runs[1]})
    assert model.net.model.dtype == torch.bfloat16
    assert model.net.model.get_parameter("score.weight").dtype == torch.float32
    assert {b.dtype for b in model.net.model.buffers()} == {torch.float32}, "frequencies"
    off = np.abs(model.score(*ROWS).values - exact.values)
    assert 0 < off.mean() < 2 * np.abs(merged.values - exact.values).mean()
    wide = RewardModel.load(runs[0], "cpu", "float32", adapters={"other": runs[1]})
    off_in_fp32 = np.abs(wide.score(*ROWS).values - exact.values)
    assert off_in_fp32.mean() < off.mean()


def test_deterministic_rewards_do_not_depend_on_other_rows(exports: dict[str, Path]) -> None:
    model = RewardModel.load(
        exports["own"], "cpu", "float32", adapters=adapters(exports), deterministic=True
    )
    every = model.score(*ROWS, rewards=["helpful"])["helpful"].values
    each = [model.score([p], [r], rewards=["helpful"]) for p, r in zip(*ROWS, strict=True)]
    np.testing.assert_array_equal(every, [one["helpful"].values[0] for one in each])


def test_a_name_that_is_not_there_is_told_with_those_that_are(model: RewardModel) -> None:
    with pytest.raises(UnknownReward, match=r"'honest'; there are 'default', 'helpful', 'harm"):
        model.score(*ROWS, rewards=["helpful", "honest"])
    with pytest.raises(ValueError, match="give a list of names"):
        model.score(*ROWS, rewards=[])


def refused(own: Path, other: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        RewardModel.load(own, "cpu", "float32", adapters={"other": other})


def test_another_backbone_is_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    """By its weights, though it is almost the same, and by what its config says of them."""
    own = exports["own"]
    base = make_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    other = make_lora_export(tmp_path / "other", base, 1)
    where = r"adapters\.other: .* cannot share a backbone with .*own; they differ in"
    refused(own, other, ConfigError, rf"{where} the frozen backbone: sha256 .* \(.*base\)")
    config = json.loads((make_base(tmp_path / "turned") / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    (tmp_path / "turned/config.json").write_text(json.dumps(config))
    other = make_lora_export(tmp_path / "turned run", tmp_path / "turned", 1, name="turned")
    refused(own, other, ConfigError, rf"{where} config\.rope_parameters.*5000")
    train = {"export_dtype": "bfloat16"}
    other = make_lora_export(tmp_path / "bf16", tmp_path / "turned", 1, train=train)
    refused(own, other, ConfigError, rf"{where} train\.export_dtype: float32, bfloat16")


def test_another_template_is_refused(
    exports: dict[str, Path], one_base: Path, tmp_path: Path
) -> None:
    data = {"train": "none", "max_length": 128}
    other = make_lora_export(tmp_path / "shorter", one_base, 1, data=data)
    refused(exports["own"], other, ConfigError, "the template's max_length: 256, 128")
    RewardModel.load(exports["own"], "cpu", "float32", adapters={"other": other}, max_length=100)
    chat = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    data = {"train": "none", "max_length": 256, "chat_template": chat}
    other = make_lora_export(tmp_path / "other", one_base, 1, data=data)
    refused(exports["own"], other, ConfigError, "they differ in the chat template")


def test_a_base_that_is_not_the_one_trained_on_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    own, other = (make_lora_export(tmp_path / name, base, 0) for name in ("own", "other"))
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0] += 1e-3
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused(
        own, other, ExportError, r"base of .*own, .*base, is not what .* adapter\.base in rayrm"
    )
    record = json.loads((own / RECORD).read_text())
    record["adapter"]["base"] = str(moved)
    (own / RECORD).write_text(json.dumps(record))
    RewardModel.load(own, "cpu", "float32", adapters={"other": other})


def test_what_is_no_adapter_or_was_changed_is_refused(
    exports: dict[str, Path], tiny_export: Path, tmp_path: Path
) -> None:
    own = exports["own"]
    refused(own, tiny_export, ExportError, r"has no adapter: only exports of runs with lora\.rank")
    refused(tiny_export, own, ExportError, "has no adapter")
    changed = Path(shutil.copytree(exports["helpful"], tmp_path / "changed"))
    file = changed / ADAPTER / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.score.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    refused(own, changed, ExportError, "the adapter in .* is not the one rayrm.json records")


def test_a_base_whose_pad_token_had_to_be_added_is_the_same_again(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(["<eos>"], eos_token="<eos>")
    base = make_base(tmp_path / "base", vocab_size=len(tokenizer))
    for file in base.glob("*token*"):
        file.unlink()
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(base)
    own, other = (make_lora_export(tmp_path / f"{n}", base, n) for n in range(2))
    model = RewardModel.load(own, "cpu", "float32", adapters={"other": other})
    embeddings = model.net.model.get_input_embeddings()
    assert embeddings.num_embeddings == len(tokenizer) + 1
    near(model.score(*ROWS), RewardModel.load(own, "cpu", "float32").score(*ROWS))


def test_a_remote_adapter_is_fetched_without_merged_weights(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory, _ = read_adapter(f"file://{exports['own']}")
    assert directory.is_relative_to(tmp_path)
    weights = {file.relative_to(directory) for file in directory.rglob("*.safetensors")}
    assert weights == {Path(ADAPTER) / "adapter_model.safetensors"}
    others = {name: f"file://{path}" for name, path in adapters(exports).items()}
    model = RewardModel.load(f"file://{exports['own']}", "cpu", "float32", adapters=others)
    local = RewardModel.load(exports["own"], "cpu", "float32", adapters=adapters(exports))
    np.testing.assert_array_equal(model.score(*ROWS).values, local.score(*ROWS).values)


def test_versions_name_what_is_computed(exports: dict[str, Path], tmp_path: Path) -> None:
    """Merged weights keep their version; an adapter's is that of backbone, matrices and scale."""
    record = read_export(exports["own"])[1]
    assert record.adapter
    without = record.model_copy(update={"adapter": None})
    assert record.version == without.version != record.adapter_version
    assert len({read_record(str(e)).adapter_version for e in exports.values()}) == 3

    def version(**changes: Any) -> str:
        adapter = record.adapter.model_copy(update=changes)  # type: ignore[union-attr]
        return record.model_copy(update={"adapter": adapter}).adapter_version

    assert version(base="elsewhere") == record.adapter_version
    changed = {version(scale=1.0), version(weights_sha256="0"), version(backbone_sha256="0")}
    assert len(changed | {record.adapter_version}) == 4


def test_exports_of_before_are_read(tiny_export: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(tiny_export, tmp_path / "old"))
    values = json.loads((old / RECORD).read_text())
    del values["adapter"]
    (old / RECORD).write_text(json.dumps(values | {"format_version": 1}))
    assert read_export(old)[1].version == read_export(tiny_export)[1].version


APP = "adapters"


@pytest.fixture(scope="module")
def served(cluster: None, exports: dict[str, Path]) -> Iterator[RewardClient]:
    others = {name: str(path) for name, path in adapters(exports).items()}
    deploy(
        ServeConfig(
            export=str(exports["own"]),
            dtype="float32",
            adapters=others,
            app=APP,
            tokens_per_pack=512,
        ),
    )
    yield RewardClient(APP)
    serve.delete(APP)


def test_one_request_gets_several_rewards_through_a_replica(
    served: RewardClient, exports: dict[str, Path], merged: dict[str, Rewards]
) -> None:
    calls = total(APP, "calls")
    scored = served.score(*ROWS, rewards=["harmless", "default", "helpful"])
    assert list(scored) == ["harmless", "default", "helpful"]
    for name, rewards in scored.items():
        near(rewards, merged["own" if name == "default" else name])
        export = exports["own" if name == "default" else name]
        assert set(rewards.versions) == {read_record(str(export)).adapter_version}
    assert total(APP, "calls") == calls + 1, "the rows were sent once"
    near(served.score(*ROWS), merged["own"])
    assert served.score([], [], rewards=["helpful"])["helpful"].values.shape == (0,)


def test_rewards_arrive_by_name_where_names_were_asked_for(served: RewardClient) -> None:
    told: list[Any] = []
    scored = served.score(*ROWS, rewards=["helpful"], on_arrival=lambda *a: told.append(a))
    for places, rewards in told:
        np.testing.assert_array_equal(rewards["helpful"].values, scored["helpful"].values[places])
    told.clear()
    own = served.submit(*ROWS, on_arrival=lambda *a: told.append(a)).result()
    for places, rewards in told:
        np.testing.assert_array_equal(rewards.values, own.values[places])
    again = asyncio.run(served.score_async(*ROWS, rewards=["helpful"]))
    np.testing.assert_array_equal(again["helpful"].values, scored["helpful"].values)


def test_a_bad_row_has_its_error_in_every_reward(served: RewardClient) -> None:
    scored = served.score(["a", "a"], ["", "b"], rewards=["default", "helpful"])
    for rewards in scored.values():
        assert isinstance(rewards.errors[0], EmptyResponse) and rewards.errors[1] is None
        assert np.isnan(rewards.values[0]) and np.isfinite(rewards.values[1])


def test_a_row_is_computed_once_for_each_reward_and_remembered_for_that_one_alone(
    served: RewardClient,
) -> None:
    prompts, responses = ["What is new?"] * 3, ["This.", "That.", "This."]

    def work(rewards: list[str]) -> tuple[int, int, dict[str, Rewards]]:
        before = stats(APP)[0]
        scored = served.score(prompts, responses, rewards=rewards)
        after = stats(APP)[0]
        return (
            after["computed_tokens"] - before["computed_tokens"],
            after["rows_found"] - before["rows_found"],
            scored,
        )

    tokens, found, first = work(["helpful"])
    assert tokens > 0 and found == 0
    other_tokens, found, other = work(["harmless"])
    assert other_tokens == tokens and found == 0
    tokens_of_both, found, both = work(["harmless", "helpful"])
    assert tokens_of_both == 0 and found == 4  # two distinct rows of each
    for name, before in (("helpful", first), ("harmless", other)):
        np.testing.assert_array_equal(both[name].values, before[name].values)
    assert not np.allclose(first["helpful"].values, other["harmless"].values, atol=1e-2)
    all_tokens, _, _ = work(["helpful", "default"])
    assert all_tokens == tokens


def test_a_name_that_is_not_served_is_told_with_those_that_are(served: RewardClient) -> None:
    with pytest.raises(UnknownReward, match=r"'honest'; there are 'default', 'helpful', 'harm"):
        served.score(*ROWS, rewards=["honest"])
    with pytest.raises(ValueError, match="give a list of names"):
        served.score(*ROWS, rewards="helpful")


def test_each_reward_is_metered_by_its_name(served: RewardClient) -> None:
    names = ["default", "helpful", "harmless"]
    served.score(["A new row"], ["or two"], rewards=names)
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}"

    def means() -> list[float]:
        shown = [samples_at(url, "reward", name) for name in names]
        return [samples.get("serve_reward_mean", np.nan) for samples in shown]

    until(lambda: bool(np.isfinite(means()).all()))
    assert len(set(means())) == 3


def test_another_adapter_takes_over_and_a_step_has_one_version_of_each_reward(
    served: RewardClient, exports: dict[str, Path], merged: dict[str, Rewards]
) -> None:
    """By the same own export: what is served differs in its adapters alone."""
    before = served.score(*ROWS, rewards=["helpful"])["helpful"]
    pids = [replica["pid"] for replica in stats(APP)]
    record = read_served(APP)
    assert record is not None
    deploy(record.config.model_copy(update={"adapters": {"helpful": str(exports["harmless"])}}))
    assert [replica["pid"] for replica in stats(APP)] == pids, "no replica was replaced"
    after = served.score(*ROWS, rewards=["helpful"])["helpful"]
    near(after, merged["harmless"])
    assert set(before.versions) != set(after.versions)
    with pytest.raises(UnknownReward, match="there are 'default', 'helpful'"):
        served.score(*ROWS, rewards=["harmless"])
    own = served.score(*ROWS).versions[0]
    pinned = served.score(*ROWS, rewards=["helpful"], version=own)["helpful"]
    np.testing.assert_array_equal(pinned.values, after.values)
    rollback(APP)
    near(served.score(*ROWS, rewards=["helpful"])["helpful"], merged["helpful"])


class Noting:
    """Notes tickets, and every reward is 0."""

    name = "noting"

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []

    def caller(self, name: str | None) -> Caller:
        return Caller("me", "job", "")

    async def find(self, caller: Caller, rewards: tuple[str, ...], version: str) -> Target:
        return Target(1, 512, "pinned", rewards)

    async def call(self, target: Target, chunk: Chunk, ticket: Ticket) -> Answer:
        self.tickets.append(ticket)
        n = len(chunk.finished)
        no = np.zeros(n, dtype=bool)
        rewards = Rewards(np.zeros(n, np.float32), [None] * n, no, no, [""] * n)
        return Answer(dict.fromkeys(ticket.rewards, rewards), target.version)


def test_a_step_of_two_rewards_is_twice_the_work_that_replicas_are_told_of() -> None:
    def told(*rewards: str) -> int:
        transport = Noting()
        target = asyncio.run(transport.find(transport.caller(None), rewards, ""))
        sending = Sending(transport, target, "step", Caller("me", "job", ""))
        scored = asyncio.run(sending.send(Step(make_rows(*ROWS)), None, None))
        assert list(scored) == list(rewards)
        ticket = transport.tickets[0]
        assert ticket.rewards == rewards and ticket.version == "pinned"
        return ticket.outstanding

    assert told("helpful", "harmless") == 2 * told("default") > 0


def test_what_cannot_share_a_backbone_is_refused_before_anything_starts(
    exports: dict[str, Path], one_base: Path, tmp_path: Path
) -> None:
    data = {"train": "none", "max_length": 128}
    other = make_lora_export(tmp_path / "shorter", one_base, 1, data=data)
    config = {"export": str(exports["own"]), "app": "nothing"}
    with pytest.raises(ConfigError, match=r"adapters\.short: .* template's max_length: 256, 128"):
        deploy(ServeConfig(**config, adapters={"short": str(other)}))
    with pytest.raises(ConfigError, match=r"adapters\.default: .* `export`'s own reward"):
        ServeConfig(**config, adapters={"default": str(other)})
    with pytest.raises(ConfigError, match=r"adapters\.short = 'runs/x': must be absolute"):
        build({"export": "/x", "adapters": {"short": "runs/x"}})


def test_errors_cross_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(UnknownReward("no reward 'a'")))
    assert isinstance(error, UnknownReward) and str(error) == "no reward 'a'"
