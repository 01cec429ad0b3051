"""Adapters change no reward before they are trained, and merging them changes none after."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rayrm.errors import ConfigError, TrainingError
from rayrm.model.net import RewardNet
from rayrm.training.checkpoint import load_trained
from rayrm.training.config import LoraSection, TrainConfig
from rayrm.training.inputs import check_frozen
from rayrm.training.lora import add_adapters, hash_frozen, merge_adapters
from rayrm.training.setup import load_model
from tests.makers import make_base
from tests.tiny import FAMILIES, gradients, random_groups, scored, tiny_model

LORA = LoraSection(rank=4, alpha=8)
PACKS = [random_groups()]


def adapted(model_type: str, lora: LoraSection = LORA) -> RewardNet:
    """A tiny model whose adapters are far from 0."""
    net = tiny_model(model_type)
    add_adapters(net.model, lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3, generator=generator)
    return net


def trainable(net: RewardNet) -> set[str]:
    return {name for name, weight in net.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_untrained_adapters_change_no_reward(model_type: str) -> None:
    net = tiny_model(model_type)
    before = scored(net, PACKS)
    add_adapters(net.model, LORA, seed=0)
    assert torch.equal(scored(net, PACKS), before)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_merged_rewards_are_the_trained_ones_under_the_base_models_names(model_type: str) -> None:
    base, net = tiny_model(model_type), adapted(model_type)
    trained = scored(net, PACKS)
    assert (trained - scored(base, PACKS)).abs().max() > 0.1
    merge_adapters(net.model)
    torch.testing.assert_close(scored(net, PACKS), trained, rtol=0, atol=1e-10)
    before, after = base.state_dict(), net.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(before[name].ndim == 2 for name in changed)
    assert not any(part in name for name in changed for part in ("embed", "wte", "wpe", "score"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_exactly_the_adapters_and_the_one_head_are_trained(model_type: str) -> None:
    net = adapted(model_type)
    assert {n for n in trainable(net) if "lora_" not in n} == {"model.score.weight"}
    assert all("lora_" not in n for n, p in net.named_parameters() if not p.requires_grad)
    grads = gradients(net, scored(net, PACKS))
    assert grads.keys() == trainable(net)
    assert all(float(g.abs().max()) > 0 for g in grads.values())


def test_every_linear_layer_of_the_backbone_gets_an_adapter_or_those_that_are_named() -> None:
    def layers(net: RewardNet) -> set[str]:
        return {name.split(".")[-4] for name in trainable(net) if "lora_A" in name}

    every = {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert layers(adapted("llama")) == every
    named = LoraSection(rank=2, targets=["q_proj", "mlp.up_proj"])
    assert layers(adapted("llama", named)) == {"q_proj", "up_proj"}


@pytest.mark.parametrize("target", ["qproj", "score", "embed_tokens", "mlp", "all-linear"])
def test_a_target_that_is_no_linear_layer_is_refused_with_those_that_are(target: str) -> None:
    lora = LoraSection(rank=2, targets=["q_proj", target])
    with pytest.raises(ConfigError, match=rf"lora\.targets.*{target}.*down_proj.*q_proj"):
        add_adapters(tiny_model("llama").model, lora, seed=0)


def test_adapters_are_drawn_by_the_seed_and_by_nothing_else() -> None:
    def first(seed: int) -> torch.Tensor:
        torch.rand(1)
        net = tiny_model("llama")
        before = torch.get_rng_state()
        add_adapters(net.model, LORA, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return next(weight for name, weight in net.named_parameters() if "lora_A" in name)

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))


def test_adapters_head_and_merge_are_fp32(tmp_path: Path) -> None:
    config = TrainConfig(
        name="run",
        data={"train": "a.jsonl", "max_length": 128},
        model={"path": str(make_base(tmp_path))},
        lora={"rank": 4},
    )
    model, _ = load_model(config)
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    merge_adapters(model)
    assert {w.dtype for w in model.parameters()} == {torch.float32}


def test_without_peft_the_config_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    data = {"train": "a.jsonl"}
    with pytest.raises(ConfigError, match=r"lora\.rank = 8 .*peft.*pip install 'rayrm\[lora\]'"):
        TrainConfig(name="run", data=data, lora={"rank": 8})
    assert TrainConfig(name="run", data=data).lora.rank == 0


def test_a_checkpoint_holds_all_that_is_trained_and_nothing_of_another_model() -> None:
    net, other = adapted("llama"), tiny_model("llama", seed=1)
    add_adapters(other.model, LORA, seed=1)
    state = {name: weight for name, weight in net.state_dict().items() if name in trainable(net)}
    load_trained(state, other)
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, net.state_dict()[name]) == (name in state or "norm" in name)
    for wrong in (
        {"score.weight": 0},
        {"model.layers.0.self_attn.q_proj.lora_A.default.weight": 0},
    ):
        lacking = {n: w for n, w in state.items() if n.removeprefix("model.") not in wrong}
        with pytest.raises(TrainingError, match="of another model"):
            load_trained(lacking, other)
    with pytest.raises(TrainingError, match=r"differs in 1 weights .model\.more"):
        load_trained(state | {"model.more": torch.ones(1)}, other)


def test_another_base_model_under_the_adapters_is_refused() -> None:
    net = adapted("llama")
    recorded = hash_frozen(net)
    for name, weight in net.named_parameters():
        if name in trainable(net):
            weight.data += 1
    check_frozen(hash_frozen(net), recorded, "base")
    net.model.get_input_embeddings().get_parameter("weight").data[0, 0] += 1e-6
    with pytest.raises(TrainingError, match="weights of base are not those"):
        check_frozen(hash_frozen(net), recorded, "base")
