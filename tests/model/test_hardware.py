"""What is computed in: by the machine's kind, decided once for all that must agree, and told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train.v2.api.result import Result

from rayrm.errors import DataError, TrainingError
from rayrm.model import hardware
from rayrm.model.engine import RewardModel
from rayrm.model.hardware import bf16_speedup, choose_dtype, cpu_has_bf16, fast_dtype
from rayrm.serving import loaded_models
from rayrm.serving.config import ServeConfig
from rayrm.serving.corpus import Corpus, Parts
from rayrm.serving.loaded_models import decide_dtype
from rayrm.serving.record import delete_record
from rayrm.training.config import TrainConfig
from rayrm.training.fit import claim, make_trainer, run_directory
from rayrm.training.run import with_dtype, write_config
from tests.makers import make_export
from tests.training.test_fit import configure, data

__all__ = ["data"]

ROOT = Path(__file__).parent.parent.parent

# Any x86 machine behaves under these as one that has AVX2 alone.
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}

X86 = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}
ARM = {"architecture": "arm64", "neon": True, "bf16": False}


def other(dtype: str) -> str:
    return {"bfloat16": "float32", "float32": "bfloat16"}[dtype]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/without_bf16.py found on a machine without bfloat16."""
    if "avx512_bf16" not in torch.cpu.get_capabilities():
        pytest.skip("the settings are those of an x86 CPU")
    directory = tmp_path_factory.mktemp("avx2")
    environment = {**os.environ, **AVX2, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "tests.without_bf16", str(directory)]
    subprocess.run(program, env=environment, check=True, cwd=ROOT)
    read: dict[str, Any] = json.loads((directory / "found.json").read_text())
    return read


@pytest.mark.slow
def test_without_bf16_in_hardware_auto_is_float32_wherever_it_may_be_asked(
    found: dict[str, Any],
) -> None:
    assert found["load"] == "float32", "whatever the weights have on disk"
    assert found["fit"] == {"note": "float32", "export": "float32"}
    assert found["corpus"] == "float32"
    assert found["serve"][:2] == ["float32"] * 2
    assert "dtype=float32" in found["serve's log"]


@pytest.mark.slow
def test_without_bf16_in_hardware_it_is_done_by_name_and_its_cost_told_once(
    found: dict[str, Any],
) -> None:
    assert found["by name"]["dtype"] == "bfloat16"
    (warning,) = found["by name"]["warnings"]
    times = re.search(r"slow in bfloat16.* ([\d.]+) times as long as in float32", warning)
    assert times and float(times[1]) > 1


@pytest.mark.slow
def test_a_replica_on_another_kind_of_machine_computes_what_was_decided_and_warns(
    found: dict[str, Any],
) -> None:
    assert found["serve"][2:] == ["bfloat16"] * 2
    warned = "elsewhere computes in bfloat16.* this machine is faster in float32"
    assert len(re.findall(warned, found["serve's log"])) == 2


@pytest.mark.parametrize(
    ("cpu", "settings", "has"),
    [
        (X86, {}, False),
        (X86 | {"avx512_f": True, "avx512_vnni": True}, {}, False),
        (X86 | {"avx512_bf16": True}, {}, True),
        (X86 | {"amx_bf16": True}, {}, True),
        (X86 | {"amx_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, False),
        (X86 | {"amx_bf16": True}, {"DNNL_MAX_CPU_ISA": "AVX2"}, False),
        (X86 | {"avx512_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        (X86 | {"avx512_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "ALL"}, True),
        (ARM, {}, False),
        (ARM | {"bf16": True}, {}, True),
        ({"architecture": "riscv64"}, {}, None),
    ],
)
def test_a_cpus_kind_says_whether_it_has_bf16(
    cpu: dict[str, Any],
    settings: dict[str, str],
    has: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert cpu_has_bf16() is has


def test_only_a_cpu_of_unknown_kind_is_timed_once_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "bf16_speedup", pytest.fail)
    for known, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(hardware, "cpu_has_bf16", lambda known=known: known)
        assert fast_dtype("cpu") == expected
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: None)
    for machine, speedup, expected in (("a", 2.1, "bfloat16"), ("b", 1.9, "float32")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        monkeypatch.setattr(hardware, "bf16_speedup", lambda speedup=speedup: speedup)
        assert fast_dtype("cpu") == expected
        monkeypatch.setattr(hardware, "bf16_speedup", pytest.fail)
        assert fast_dtype("cpu") == expected
    monkeypatch.undo()
    assert bf16_speedup() > 0


def test_by_name_only_what_is_slow_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "bf16_speedup", lambda: 0.125)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: True)
        assert choose_dtype("bfloat16", "cpu") == "bfloat16"
        assert choose_dtype("float32", "cpu") == "float32"
        monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: False)
        assert choose_dtype("float32", "cpu") == "float32"
        assert choose_dtype("auto", "cpu") == "float32"
    with pytest.warns(UserWarning, match=r"8\.0 times as long"):
        assert choose_dtype("bfloat16", "cpu") == "bfloat16"


def test_auto_is_what_the_machine_is_fast_in_whatever_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = [make_export(tmp_path / d, dtype=d) for d in ("bfloat16", "float32")]
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(hardware, "cpu_has_bf16", lambda has=has: has)
        for export in exports:
            assert RewardModel.load(export, "cpu").dtype == expected


@pytest.mark.usefixtures("cluster")
def test_the_first_replica_decides_for_its_application(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServeConfig(export="e")
    monkeypatch.setattr(loaded_models, "fast_dtype", lambda _: "bfloat16")
    assert decide_dtype("decided", config) == "bfloat16"
    monkeypatch.setattr(loaded_models, "fast_dtype", lambda _: "float32")
    assert decide_dtype("decided", config) == "bfloat16"
    assert "decided computes in bfloat16" in caplog.text
    named = config.model_copy(update={"dtype": "float32"})
    assert decide_dtype("decided", named) == "float32", "by name"
    delete_record("decided")
    assert decide_dtype("decided", config) == "float32"
    delete_record("decided")


@pytest.mark.usefixtures("cluster")
def test_all_ranks_of_a_run_that_is_restarted_compute_what_its_first_start_decided(
    base: Path, data: Path, tmp_path: Path
) -> None:
    config = configure(base, data, tmp_path, train={"dtype": "auto"}, cluster={"workers": 2})
    noted = other(fast_dtype("cpu"))
    write_config(with_dtype(config, noted), run_directory(config))
    result = make_trainer(config, run_directory(config), rank_dtypes).fit()
    assert isinstance(result, Result) and result.return_value == [noted] * 2


def rank_dtypes(values: dict[str, Any]) -> list[str]:
    import torch.distributed as dist
    from ray.train import get_context

    from rayrm.training.setup import decide_dtype

    config = decide_dtype(TrainConfig(**values), get_context().get_world_rank())
    everyone = [""] * 2
    dist.all_gather_object(everyone, config.train.dtype)
    return everyone


def test_a_run_of_before_goes_on_in_the_dtype_that_its_config_says(
    base: Path, data: Path, tmp_path: Path
) -> None:
    config = configure(base, data, tmp_path, train={"dtype": "bfloat16"})
    claim(config, run_directory(config))
    auto = with_dtype(config, "auto")
    assert claim(auto, run_directory(config)).train.dtype == "bfloat16"
    with pytest.raises(TrainingError, match=r"train\.dtype"):
        claim(with_dtype(config, "float32"), run_directory(config))


def test_a_corpus_goes_on_in_what_its_first_start_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "Name a fruit", "response": "plums"}\n')
    corpus = Corpus.survey([str(source)], "train", 8, to_parquet=False)
    config = ServeConfig(export=str(make_export(tmp_path, dtype="bfloat16")))

    def claimed(dtype: str) -> str:
        parts = Parts(tmp_path / "out.jsonl", corpus)
        named = config.model_copy(update={"dtype": dtype})
        return parts.claim(corpus.fingerprint, named).dtype

    monkeypatch.setattr("rayrm.serving.corpus._decide_dtype", lambda _: "float32")
    assert claimed("auto") == "float32"
    monkeypatch.setattr("rayrm.serving.corpus._decide_dtype", pytest.fail)
    assert claimed("auto") == claimed("float32") == "float32"
    with pytest.raises(DataError, match="dtype float32, now bfloat16"):
        claimed("bfloat16")
    record = tmp_path / "out.jsonl.parts/run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"dtype": "auto"}))
    assert claimed("auto") == claimed("bfloat16") == "bfloat16", "an older version's, as exported"
