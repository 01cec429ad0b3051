"""Reward models that rayrm did not make: scored as transformers does, or refused, never guessed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import serve
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from rayrm import RewardClient, RewardModel, ServeConfig, deploy
from rayrm.errors import ConfigError, ExportError, ModelError
from rayrm.model.foreign import open_model, pinned
from rayrm.model.net import check_max_length, load_config, quiet
from rayrm.rows import Row
from tests.makers import CHATML, tiny_tokenizer
from tests.tiny import FAMILIES

PROMPTS = ["Name three fruits.", "Hi", "Hi", "Hi"]
RESPONSES = ["apples", "Paris", "It is red and blue.", "x"]


def make_foreign(
    directory: Path,
    family: str = "llama",
    *,
    template: str | None = CHATML,
    pad: str | None = "<|pad|>",
    dtype: torch.dtype = torch.float32,
    shards: str = "5GB",
    **config: Any,
) -> Path:
    """A random sequence-classification model as transformers saves it, with the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = template, pad
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    settings = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **ids, **FAMILIES[family]}
    # As published models do, it embeds a few ids more than the tokenizer has.
    made = AutoConfig.for_model(family, vocab_size=len(tokenizer) + 6, **(settings | config))
    made.initializer_range = made.init_std = 0.2
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForSequenceClassification.from_config(made).to(dtype)
        model.save_pretrained(directory, max_shard_size=shards)
    tokenizer.save_pretrained(directory)
    return directory


def edit_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def load(path: Path | str, **options: Any) -> RewardModel:
    with pytest.warns(UserWarning, match="assumed"):
        return RewardModel.load(path, "cpu", **{"dtype": "float32", **options})


def warned(path: Path) -> str:
    with pytest.warns(UserWarning, match="assumed") as caught:
        open_model(path)
    (warning,) = caught
    return str(warning.message)


def theirs(directory: Path) -> PreTrainedModel:
    """transformers' own model in fp32. Without a pad id it takes the last token of a lone row."""
    softcap = getattr(AutoConfig.from_pretrained(directory), "attn_logit_softcapping", None)
    with quiet():
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager" if softcap else "sdpa"
        )
    model.config.pad_token_id = None
    model.eval()
    return model


def ids_of(model: RewardModel) -> list[torch.Tensor]:
    """Each row of PROMPTS and RESPONSES as our template builds it, [1, tokens]."""
    rows: dict[int, torch.Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = model.encode([Row(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    for group, owners in zip(encoded.groups, encoded.owners, strict=True):
        for row, owner in zip(group.rows, owners, strict=True):
            rows[owner] = torch.from_numpy(row.astype(np.int64))[None]
    return [rows[i] for i in range(len(rows))]


@torch.inference_mode()
def logits(model: PreTrainedModel, rows: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    return np.array([model(row).logits.item() for row in rows])


def assert_scored_as_by_transformers(directory: Path, **options: Any) -> RewardModel:
    model = load(directory, **options)
    rewards = model.score(PROMPTS, RESPONSES)
    assert rewards.errors == [None] * len(PROMPTS)
    expected = logits(theirs(directory), ids_of(model))
    assert expected.std() > 0.05, "rewards so alike prove nothing"
    np.testing.assert_allclose(rewards.values, expected, atol=1e-5 * max(1.0, expected.std()))
    return model


# Scored -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rewards_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    assert_scored_as_by_transformers(make_foreign(tmp_path, family))


def test_the_chat_template_is_the_tokenizers_up_to_the_end_of_turn(tmp_path: Path) -> None:
    model = load(make_foreign(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for prompt, response, row in zip(PROMPTS, RESPONSES, ids_of(model), strict=True):
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(rendered, str)
        assert rendered.endswith("<|im_end|>\n")
        assert tokenizer.decode(row[0]) == rendered.removesuffix("\n")
    said = warned(tmp_path)
    assert "chat template" in said and "'<|im_end|>'" in said and r"'<|im_end|>\n'" in said


def test_without_a_chat_template_rows_are_text(tmp_path: Path) -> None:
    model = assert_scored_as_by_transformers(make_foreign(tmp_path, "gpt2", template=None))
    decoded = [model.template.tokenizer.decode(row[0]) for row in ids_of(model)]
    assert decoded[1] == "Hi\nParis<|im_end|>"
    said = warned(tmp_path)
    assert "has no chat template" in said and "'<|im_end|>'" in said


def test_a_template_that_ends_where_it_should_is_not_called_doubtful(tmp_path: Path) -> None:
    make_foreign(tmp_path, template=CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    assert "only the model's makers know" not in warned(tmp_path)


def test_the_bias_of_a_head_is_part_of_the_reward(tmp_path: Path) -> None:
    make_foreign(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({"score.bias": torch.tensor([0.75])}))
    model = load(tmp_path)
    expected = logits(theirs(tmp_path), ids_of(model)) + 0.75
    np.testing.assert_allclose(model.score(PROMPTS, RESPONSES).values, expected, atol=1e-5)
    assert "bias is added" in warned(tmp_path)


@pytest.mark.parametrize("pad", ["<|im_end|>", None], ids=["pad = eos", "no pad"])
def test_rewards_are_at_the_last_token_whatever_pads(pad: str | None, tmp_path: Path) -> None:
    model = assert_scored_as_by_transformers(make_foreign(tmp_path, pad=pad))
    one_early = theirs(tmp_path)
    one_early.config.pad_token_id = model.net.model.config.pad_token_id
    gap = np.abs(logits(one_early, ids_of(model)) - model.score(PROMPTS, RESPONSES).values).max()
    assert (gap > 1e-3) == (pad is not None), "transformers would take the token before the end"
    assert ("the token before it" in warned(tmp_path)) == (pad is not None)


@pytest.mark.parametrize(
    ("on_disk", "assumed"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float32")]
)
def test_weights_and_head_of_half_the_size_are_read_exactly(
    on_disk: torch.dtype, assumed: str, tmp_path: Path
) -> None:
    assert_scored_as_by_transformers(make_foreign(tmp_path, dtype=on_disk), dtype="float32")
    head = load_file(tmp_path / "model.safetensors")["score.weight"]
    assert head.dtype == on_disk
    model = load(tmp_path, dtype="bfloat16")
    assert model.export and model.export.dtype == assumed
    ours = model.net.model.get_parameter("score.weight")
    assert ours.dtype == torch.float32
    assert torch.equal(ours, head.float())
    assert "the head is computed in float32" in warned(tmp_path)


def test_shards_and_a_language_models_leftover_head_are_scored(tmp_path: Path) -> None:
    make_foreign(tmp_path / "shards", shards="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_scored_as_by_transformers(tmp_path / "shards")
    make_foreign(tmp_path / "leftover")
    edit_weights(tmp_path / "leftover", lambda w: w.update({"lm_head.weight": torch.ones(4, 32)}))
    assert_scored_as_by_transformers(tmp_path / "leftover")


def test_rows_may_be_as_long_as_the_model_has_positions(tmp_path: Path) -> None:
    make_foreign(tmp_path, "gpt2")
    assert load(tmp_path).template.spec.max_length == 64
    assert load(tmp_path, max_length=40).template.spec.max_length == 40
    with pytest.raises(ConfigError, match="positions for 64"):
        load(tmp_path, max_length=65)
    assert "up to 64 tokens" in warned(tmp_path)


def test_the_version_is_of_the_weights(tmp_path: Path) -> None:
    first = load(make_foreign(tmp_path / "mine")).version
    assert first.startswith("mine@") and first in warned(tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    assert load(tmp_path / "copy").version.split("@")[1] == first.split("@")[1]
    edit_weights(tmp_path / "mine", lambda weights: weights["score.weight"].add_(1))
    assert load(tmp_path / "mine").version != first


def test_an_export_is_read_without_a_word(tiny_export: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RewardModel.load(tiny_export, "cpu", "float32").version.startswith("tiny@")


# Refused ------------------------------------------------------------------------------------------


def head_of_its_own(name: str) -> Callable[[Path], Any]:
    def edit(directory: Path) -> None:
        def rename(weights: dict[str, torch.Tensor]) -> None:
            weights[name] = weights.pop("score.weight")

        edit_weights(directory, rename)

    return edit


def two_heads(directory: Path) -> None:
    edit_weights(directory, lambda w: w.update({"v_head.weight": torch.ones(1, 32)}))


def no_weights_but_pickled(directory: Path) -> None:
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def larger_tokenizer(directory: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(7)])
    tokenizer.save_pretrained(directory)


def no_tokenizer(directory: Path) -> None:
    for file in directory.glob("token*"):
        file.unlink()


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "v_head": (head_of_its_own("v_head.summary.weight"), ModelError, r"with v_head\.summary"),
    "value_head": (head_of_its_own("value_head.weight"), ModelError, "without score.weight"),
    "regression_head": (head_of_its_own("regression_head.weight"), ModelError, "regression_head"),
    "a head of layers": (head_of_its_own("score.0.weight"), ModelError, r"with score\.0\.weight"),
    "two heads": (two_heads, ModelError, r"with v_head\.weight"),
    "another class": (
        lambda d: edit_config(d, architectures=["LlamaForRewardModel"]),
        ModelError,
        "is LlamaForRewardModel; rayrm scores LlamaForSequenceClassification",
    ),
    "no class": (lambda d: edit_config(d, architectures=None), ModelError, "no architecture"),
    "own code": (
        lambda d: edit_config(d, auto_map={"AutoModelForSequenceClassification": "rm.MyRM"}),
        ModelError,
        r"custom code \(rm\.MyRM\)",
    ),
    "unknown type": (lambda d: edit_config(d, model_type="mine"), ModelError, "config that can"),
    "an encoder": (lambda d: edit_config(d, model_type="bert"), ModelError, "'bert'.*causal"),
    "quantized": (
        lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}),
        ModelError,
        "quantized",
    ),
    "an adapter": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        ModelError,
        "merge it into its base",
    ),
    "a damaged config": (
        lambda d: (d / "config.json").write_text("{"),
        ExportError,
        r"config\.json is damaged",
    ),
    "pickled": (no_weights_but_pickled, ExportError, r"pytorch_model\.bin can run code"),
    "a git-lfs pointer": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec"),
        ExportError,
        "cannot be read as safetensors",
    ),
    "a larger tokenizer": (larger_tokenizer, ModelError, r"tokens, the model embeds \d+"),
    "no tokenizer": (no_tokenizer, ModelError, "no tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_plain_reward_model_is_refused_before_it_loads(
    case: str, tmp_path: Path
) -> None:
    break_it, error, said = REFUSED[case]
    break_it(make_foreign(tmp_path))
    with pytest.raises(error, match=said) as caught:
        open_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("labels", [2, 3])
def test_several_labels_are_refused(labels: int, tmp_path: Path) -> None:
    make_foreign(tmp_path, num_labels=labels)
    with pytest.raises(ModelError, match=f"{labels} outputs.*a reward is one number"):
        RewardModel.load(tmp_path)


def test_a_language_model_is_not_a_reward_model(tmp_path: Path) -> None:
    make_foreign(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="LlamaForCausalLM, without score"):
        RewardModel.load(tmp_path)


@pytest.mark.parametrize(
    ("layers", "said"),
    [(3, r"lacks weights: model\.layers\.2"), (1, r"does not use: model\.layers\.1")],
)
def test_a_backbone_of_another_depth_is_refused(layers: int, said: str, tmp_path: Path) -> None:
    make_foreign(tmp_path)
    edit_config(tmp_path, num_hidden_layers=layers)
    with pytest.raises(ModelError, match=said):
        load(tmp_path)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_attention_in_both_directions_is_refused(family: str, tmp_path: Path) -> None:
    make_foreign(tmp_path, family)
    edit_config(tmp_path, use_bidirectional_attention=True)
    with pytest.raises(ModelError, match=f"bidirectional '{family}'"):
        RewardModel.load(tmp_path)


def test_rows_that_would_turn_their_neighbours_positions_are_refused(tmp_path: Path) -> None:
    """Past its original length longrope changes the frequencies of everything in the forward."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    make_foreign(
        tmp_path,
        "phi3",
        rope_parameters=rope | {"original_max_position_embeddings": 48},
        original_max_position_embeddings=48,
        max_position_embeddings=128,
    )
    check_max_length(48, load_config(str(tmp_path)))
    with pytest.raises(ConfigError, match="positions for 48"):
        check_max_length(49, load_config(str(tmp_path)))
    assert_scored_as_by_transformers(tmp_path)


# Found --------------------------------------------------------------------------------------------


def test_nothing_there_is_named_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"{tmp_path}.*rayrm\.json.*config\.json"):
        RewardModel.load(tmp_path)
    with pytest.raises(ExportError, match=rf"{tmp_path}/no"):
        RewardModel.load(tmp_path / "no")


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reward model in a hub cache, as a download leaves it, and no network."""
    cached = tmp_path / "hub" / "models--someone--their-rm"
    snapshot = make_foreign(cached / "snapshots" / ("c0ffee" * 7)[:40])
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_name_is_scored_from_its_snapshot_and_pinned_to_its_commit(snapshot: Path) -> None:
    expected = load(snapshot).score(PROMPTS, RESPONSES).values
    for name in ("someone/their-rm", f"someone/their-rm@{snapshot.name}"):
        model = load(name)
        assert model.version.startswith("their-rm@")
        np.testing.assert_array_equal(model.score(PROMPTS, RESPONSES).values, expected)
        assert pinned(name, snapshot) == f"someone/their-rm@{snapshot.name}"
    assert pinned(str(snapshot), snapshot) == str(snapshot)


@pytest.mark.parametrize("name", ["someone/no-such-rm", "someone/their-rm@other"])
def test_a_hub_name_that_cannot_be_had_is_an_error_that_says_why(snapshot: Path, name: str) -> None:
    with pytest.raises(ExportError, match=rf"no reward model '{name[:16]}.*nothing at .*hub gave"):
        RewardModel.load(name)


def test_evaluate_takes_a_foreign_model_and_says_what_it_assumes(tmp_path: Path) -> None:
    make_foreign(tmp_path / "theirs")
    pair = {"prompt": "Hi", "chosen": "apples", "rejected": "pears"}
    (tmp_path / "test.jsonl").write_text(json.dumps(pair) + "\n")
    job = Path(__file__).parent.parent.parent / "jobs" / "evaluate.py"
    done = subprocess.run(
        [sys.executable, str(job), str(tmp_path / "theirs"), str(tmp_path / "test.jsonl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "theirs has no rayrm.json, so it is assumed" in done.stderr
    assert "accuracy" in done.stdout


@pytest.mark.usefixtures("cluster")
def test_a_foreign_model_is_served_as_it_is_scored(tmp_path: Path) -> None:
    make_foreign(tmp_path / "theirs")
    local = load(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="assumed"):
        deploy(ServeConfig(export=str(tmp_path / "theirs"), dtype="float32", app="foreign"))
    served = RewardClient("foreign").score(PROMPTS, RESPONSES)
    serve.delete("foreign")
    np.testing.assert_allclose(served.values, local.score(PROMPTS, RESPONSES).values, atol=1e-5)
    assert served.versions == [local.version] * len(PROMPTS)
    edit_config(tmp_path / "theirs", architectures=["LlamaForRewardModel"])
    with pytest.raises(ModelError, match="LlamaForRewardModel"):
        deploy(ServeConfig(export=str(tmp_path / "theirs"), dtype="float32", app="foreign"))
