"""Every backbone: packed groups = packed rows = one at a time = transformers, gradients too."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rayrm.errors import ConfigError, ModelError
from rayrm.model.net import (
    BACKBONES,
    RewardNet,
    check_max_length,
    find_model,
    load_base,
    load_config,
    load_weights,
    quiet,
    save_weights,
)
from rayrm.packing import Pack, TokenGroup
from tests.makers import make_base
from tests.tiny import (
    FAMILIES,
    byte_tokenizer,
    furthest,
    gradients,
    random_groups,
    scored,
    singles,
    tiny_model,
    transformers_rewards,
)

GROUPS = random_groups()
ROWS = [row for group in GROUPS for row in group.rows]

families = pytest.mark.parametrize("family", sorted(BACKBONES))

# The others' RMSNorm rounds its gradients to fp32 whatever it is given, Gemma 2's eager attention,
# which the reference needs for its soft cap, its weights.
FP64_THROUGHOUT = {"gpt2", "gpt_neox", "opt", "phi"}


def reference(net: RewardNet) -> RewardNet:
    """The same weights behind transformers' own attention and its own forward."""
    theirs = copy.deepcopy(net)
    softcap = getattr(net.model.config, "attn_logit_softcapping", None)
    theirs.model.set_attn_implementation("eager" if softcap else "sdpa")
    return theirs


@pytest.mark.parametrize("vocabulary", [300, 500])
def test_weights_of_another_vocabulary_are_refused_with_both_numbers(
    tmp_path: Path, vocabulary: int
) -> None:
    make_base(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    there = config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary}))
    for load in (
        lambda: load_base(str(tmp_path)),
        lambda: load_weights(tmp_path, torch.float32, torch.device("cpu")),
    ):
        with pytest.raises(ModelError, match=rf"\b({there}|{vocabulary})\b") as error:
            load()
        assert str(there) in str(error.value) and str(vocabulary) in str(error.value)


@pytest.mark.parametrize(
    ("added", "settings"),
    [
        ("<turn>", {}),
        ("<turn>", {"special": True, "chat_template": "<turn>{{ messages }}"}),
        ("<turn>", {"special": True, "eos_token": "<turn>"}),
        ("<turn>", {"special": True, "pad_token": "<turn>"}),
        ("<turn>", {"pad_token": None}),
    ],
    ids=["text", "in the template", "eos", "pad", "beside an added pad"],
)
def test_a_tokenizer_longer_than_the_embedding_is_refused_with_both_numbers(
    tmp_path: Path, added: str, settings: dict[str, Any]
) -> None:
    make_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    there = len(tokenizer)
    tokenizer.add_tokens([added], special_tokens=settings.pop("special", False))
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"'<turn>' is {there}.* embeddings for {there} tokens"):
        load_base(str(tmp_path))


def test_special_tokens_that_no_row_has_need_no_embedding(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has one of an image, which its models of text have no embedding for."""
    make_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    model, again, _ = load_base(str(tmp_path))
    assert len(again) == model.config.vocab_size + 1


def test_every_backbone_has_a_tiny_config() -> None:
    assert set(FAMILIES) == BACKBONES


@families
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_rewards_and_gradients_are_those_of_transformers_however_packed(
    family: str, dtype: torch.dtype, tolerance: float
) -> None:
    net = tiny_model(family, dtype)
    theirs = reference(net)
    expected = transformers_rewards(theirs.model, ROWS)
    wanted = gradients(theirs, expected)
    spread = float(expected.detach().std())
    assert spread > 0.05, "rewards so alike prove nothing"
    lone = singles(GROUPS)
    for packs in ([GROUPS], [lone], [[row] for row in lone], [GROUPS[:2], GROUPS[2:]]):
        rewards = scored(net, packs)
        within = max(tolerance, 1e-6 if family == "gemma2" else 0.0)
        assert (rewards - expected).abs().max() <= within * max(1.0, spread)
        within = tolerance if family in FP64_THROUGHOUT else max(tolerance, 1e-6)
        assert furthest(wanted, gradients(net, rewards)) <= within


@families
def test_packing_changes_no_reward_in_fp64(family: str) -> None:
    net = tiny_model(family)
    alone = scored(net, [[row] for row in singles(GROUPS)])
    torch.testing.assert_close(scored(net, [GROUPS]), alone, rtol=0, atol=1e-11)


@families
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    net = tiny_model(family)
    plain = gradients(net, scored(net, [GROUPS]))
    net.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert furthest(plain, gradients(net, scored(net, [GROUPS]))) <= 1e-12


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_order_of_groups_and_of_responses_changes_nothing(family: str) -> None:
    net = tiny_model(family)
    rewards = scored(net, [GROUPS])
    grads = gradients(net, (rewards**2).sum()[None])
    backwards = [TokenGroup.from_rows(group.rows[::-1]) for group in GROUPS[::-1]]
    turned = scored(net, [backwards]).flip(0)
    torch.testing.assert_close(turned, rewards, rtol=0, atol=1e-11)
    assert furthest(grads, gradients(net, (turned**2).sum()[None])) <= 1e-11


def test_rewards_depend_on_the_prompt_and_on_every_token_of_the_response() -> None:
    net = tiny_model("llama")
    row = ROWS[2]
    (reward,) = scored(net, [[TokenGroup.from_rows([row])]]).tolist()
    for place in range(len(row)):
        other = row.copy()
        other[place] = 3 + (other[place] - 2) % 90
        (changed,) = scored(net, [[TokenGroup.from_rows([other])]]).tolist()
        assert abs(reward - changed) > 1e-6, place


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_bf16_autocast_gives_fp32_rewards_from_an_fp32_head(family: str) -> None:
    net = tiny_model(family, torch.float32)
    exact = scored(net, [GROUPS]).detach()
    mixed = RewardNet(net.model, torch.bfloat16)
    rewards = scored(mixed, [GROUPS])
    assert rewards.dtype == torch.float32
    assert (rewards != rewards.bfloat16().float()).any(), "rounded to bf16 on the way"
    assert 0 < (rewards - exact).abs().max() < 0.2 * max(1.0, float(exact.std()))
    rewards.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mixed.parameters() if p.grad is not None)


def test_the_head_is_applied_outside_autocast() -> None:
    """An fp32 head on the very vectors that the backbone gave."""
    net = RewardNet(tiny_model("llama", torch.float32).model, torch.bfloat16)
    pooled: list[torch.Tensor] = []
    head = net.model.get_submodule("score")
    head.register_forward_pre_hook(lambda _, args: pooled.append(args[0].detach()))
    rewards = scored(net, [GROUPS]).detach()
    assert pooled[0].dtype == torch.float32
    torch.testing.assert_close(rewards, (pooled[0] @ head.get_parameter("weight").T)[:, 0])


@families
def test_saved_weights_are_read_alike_by_transformers_and_by_us(
    family: str, tmp_path: Path
) -> None:
    net = tiny_model(family, torch.float32)
    net.model.config.id2label = {0: "LABEL_0"}
    expected = scored(net, [GROUPS]).detach()
    save_weights(net.model, net.model.state_dict(), tmp_path, torch.float32)
    ours = load_weights(tmp_path, torch.float32, torch.device("cpu"))
    assert torch.equal(scored(RewardNet(ours), [GROUPS]), expected)
    implementation = "eager" if family == "gemma2" else "sdpa"
    with quiet():
        theirs = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation=implementation
        ).eval()
    spread = max(1.0, float(expected.std()))
    assert (transformers_rewards(theirs, ROWS) - expected).abs().max() <= 1e-5 * spread


def test_a_bf16_export_keeps_its_head_in_fp32(tmp_path: Path) -> None:
    net = tiny_model("llama", torch.float32)
    head = net.model.get_parameter("score.weight").detach().clone()
    assert not torch.equal(head.bfloat16().float(), head)
    save_weights(net.model, net.model.state_dict(), tmp_path, torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        dtypes = {name: weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert dtypes.pop("score.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    for dtype in (torch.bfloat16, torch.float32):
        model = load_weights(tmp_path, dtype, torch.device("cpu"))
        assert torch.equal(model.get_parameter("score.weight"), head)
        assert model.base_model.get_parameter("embed_tokens.weight").dtype == dtype
        assert scored(RewardNet(model), [GROUPS]).dtype == torch.float32


def test_a_sharded_export_loads_its_head_in_fp32(tmp_path: Path) -> None:
    net = tiny_model("llama", torch.float32)
    state = {
        k: v if k == "score.weight" else v.bfloat16() for k, v in net.model.state_dict().items()
    }
    with quiet():
        net.model.save_pretrained(tmp_path, state_dict=state, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load_weights(tmp_path, torch.bfloat16, torch.device("cpu"))
    head, saved = (m.get_parameter("score.weight") for m in (model, net.model))
    assert torch.equal(head, saved)


def test_config_says_one_regression_label_by_id2label_alone(tmp_path: Path) -> None:
    model, _, _ = load_base(str(make_base(tmp_path / "base")))
    save_weights(model, model.state_dict(), tmp_path / "out", torch.float32)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == {"0": "LABEL_0"}
    assert written["problem_type"] == "regression"
    assert "num_labels" not in written
    assert written["pad_token_id"] == 2 != written["eos_token_id"]


def test_a_new_head_has_std_one_over_root_width_plus_one_and_follows_the_seed(
    tmp_path: Path,
) -> None:
    base = LlamaConfig(vocab_size=260, hidden_size=1024, intermediate_size=8, num_hidden_layers=1)
    with quiet():
        model: Any = LlamaForSequenceClassification(base).base_model
        model.save_pretrained(tmp_path)
    byte_tokenizer(["</s>", "<pad>"], eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path)
    drawn = (load_base(str(tmp_path), seed=s)[0] for s in (0, 0, 1))
    first, again, other = (model.get_parameter("score.weight") for model in drawn)
    assert first.shape == (1, 1024) and first.dtype == torch.float32
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(float(first.detach().std()) * math.sqrt(1025) - 1) < 0.1


def test_an_existing_head_is_kept(tmp_path: Path) -> None:
    model, tokenizer, _ = load_base(str(make_base(tmp_path / "base")), seed=3)
    out = tmp_path / "trained"
    save_weights(model, model.state_dict(), out, torch.float32)
    tokenizer.save_pretrained(out)
    kept, _, _ = load_base(str(out), seed=4)
    head, trained = (m.get_parameter("score.weight") for m in (kept, model))
    assert torch.equal(head, trained)


def test_a_head_with_a_bias_is_refused_for_training(tmp_path: Path) -> None:
    model, tokenizer, _ = load_base(str(make_base(tmp_path / "base")))
    out = tmp_path / "biased"
    state = model.state_dict() | {"score.bias": torch.ones(1)}
    save_weights(model, state, out, torch.float32)
    tokenizer.save_pretrained(out)
    with pytest.raises(ModelError, match=r"bias.*remove score\.bias"):
        load_base(str(out))


def test_a_head_of_two_outputs_is_refused(tmp_path: Path) -> None:
    make_base(tmp_path)
    config = load_config(str(tmp_path))
    config.id2label = {0: "a", 1: "b"}
    with quiet():
        LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises((ModelError, RuntimeError)):
        load_base(str(tmp_path))


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    make_base(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks weights: model\.layers\.2"):
        load_base(str(tmp_path))


def test_an_encoder_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'bert'.*causal attention.*llama"):
        load_config(str(tmp_path))


def test_dropout_is_off_unless_configured(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    config = load_config(str(tmp_path), dropout=0.3)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.3, 0.3, 0)


def test_a_pad_token_that_had_to_be_added_gets_an_embedding(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>")
    size = len(tokenizer)
    with quiet():
        GPT2LMHeadModel(
            GPT2Config(vocab_size=size, n_embd=8, n_layer=1, n_head=1, n_positions=16)
        ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, padded, _ = load_base(str(tmp_path))
    assert model.config.pad_token_id == padded.pad_token_id == size
    embeddings = model.base_model.get_submodule("wte")
    assert model.config.vocab_size == embeddings.num_embeddings == size + 1
    ids = np.arange(size, dtype=np.int32)[:10]
    with torch.no_grad():
        ours = RewardNet(model.eval()).score_pack(Pack.from_groups([TokenGroup.from_rows([ids])]))
    assert ours.isfinite().all()


def test_rows_longer_than_the_positions_are_refused_before_training() -> None:
    check_max_length(16, GPT2Config(n_positions=16))
    with pytest.raises(ConfigError, match="max_length 17: the model has positions for 16"):
        check_max_length(17, GPT2Config(n_positions=16))


def test_a_missing_model_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no config.json in {tmp_path}"):
        find_model(str(tmp_path))
    missing = tmp_path / "not there"
    with pytest.raises(ModelError, match=str(missing)):
        find_model(str(missing))


@pytest.mark.parametrize("model_type", sorted(BACKBONES))
def test_no_dropout_of_a_backbone_is_left_on(model_type: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type)
    drops = [key for key in config.to_dict() if "drop" in key]
    for key in drops:
        setattr(config, key, 0.3)
    config.save_pretrained(tmp_path)
    off, on = (load_config(str(tmp_path), dropout=rate) for rate in (0.0, 0.1))
    assert [getattr(off, key) for key in drops] == [0.0] * len(drops)
    assert {getattr(on, key) for key in drops} <= {0.0, 0.1}
