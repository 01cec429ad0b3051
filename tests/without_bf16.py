"""What is computed in on this machine, in everything that may choose: as JSON.

Run by test_hardware.py under settings that take the CPU's bfloat16 away, in a process of its own.

    python -m tests.without_bf16 DIRECTORY
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private import worker

from rayrm import RewardModel, ServeConfig, fit
from rayrm.model.export import read_record
from rayrm.serving import loaded_models
from rayrm.serving.corpus import Parts, score_corpus
from rayrm.serving.operations import deploy
from rayrm.training.run import read_config
from tests.makers import make_base, make_export
from tests.service import stats
from tests.training.test_fit import configure
from tests.training.test_kill import write_pairs


def by_name(export: Path) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = RewardModel.load(export, "cpu", "bfloat16")
    return {"dtype": model.dtype, "warnings": [str(w.message) for w in caught]}


def trained(directory: Path) -> dict[str, Any]:
    data = write_pairs(directory / "pairs.jsonl", seed=0)
    sections: dict[str, Any] = {
        "train": {"dtype": "auto", "epochs": 0.25},
        "cluster": {"workers": 2},
    }
    result = fit(configure(make_base(directory / "base"), data, directory, **sections))
    noted, provenance = read_config(str(directory / "run")), read_record(result.export).provenance
    assert noted
    return {"note": noted.train.dtype, "export": provenance["config"]["train"]["dtype"]}


def served(export: Path) -> list[str]:
    """By replicas that decide, and by some of an application that was decided elsewhere."""
    config = ServeConfig(export=str(export), replicas=2)
    deploy(config)
    dtypes = [replica["dtype"] for replica in stats(config.app)]
    loaded_models.fast_dtype = lambda device: "bfloat16"  # type: ignore[attr-defined]
    elsewhere = config.model_copy(update={"app": "elsewhere"})
    loaded_models.decide_dtype(elsewhere.app, elsewhere)
    deploy(elsewhere)
    return dtypes + [replica["dtype"] for replica in stats(elsewhere.app)]


def scored(directory: Path, export: Path) -> str:
    source = directory / "in.jsonl"
    source.write_text(json.dumps({"prompt": "Name a fruit", "response": "plums"}))
    Parts.join = lambda self: None  # type: ignore[method-assign]
    score_corpus(ServeConfig(export=str(export), replicas=1), str(source), directory / "out.jsonl")
    dtype: str = json.loads((directory / "out.jsonl.parts/run.json").read_text())["dtype"]
    return dtype


def main(directory: Path) -> None:
    export = make_export(directory, dtype="bfloat16")
    found: dict[str, Any] = {
        "load": RewardModel.load(export, "cpu").dtype,
        "by name": by_name(export),
    }
    ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    found |= {"fit": trained(directory), "corpus": scored(directory, export)}
    found["serve"] = served(export)
    assert worker._global_node
    logs = Path(worker._global_node.get_logs_dir_path(), "serve").glob("replica_*.log")
    found["serve's log"] = "".join(log.read_text() for log in logs)
    serve.shutdown()
    ray.shutdown()
    (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
