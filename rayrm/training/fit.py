"""Start or resume a training run on Ray Train, and publish its export: fit(config).

Knows the files of a run and of an export. Does not know what the ranks do (loop.py).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from pyarrow import fs
from ray.exceptions import RayActorError
from ray.train import Checkpoint
from ray.train.constants import RAY_TRAIN_ENABLE_STATE_TRACKING
from ray.train.v2.api.config import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.result import Result
from ray.train.v2.torch.torch_trainer import TorchTrainer
from transformers import PreTrainedModel

from rayrm.data.records import read_groups
from rayrm.data.sources import absolute
from rayrm.errors import ConfigError, ExportError, RayrmError, TrainingError
from rayrm.evaluation.evaluate import ScoredGroup, score
from rayrm.evaluation.report import PAGE, Evaluated, write_report
from rayrm.model.engine import RewardModel
from rayrm.model.export import (
    ADAPTER,
    RECORD,
    Export,
    hash_weights,
    publish,
    read_record,
    with_fingerprints,
    write_model_card,
)
from rayrm.model.net import DTYPES, RewardNet, save_weights
from rayrm.text.template import Template
from rayrm.training.checkpoint import consolidate, load_trained
from rayrm.training.config import ClusterSection, TrainConfig, TrainSection
from rayrm.training.inputs import check_exported
from rayrm.training.loop import train_loop
from rayrm.training.lora import export_adapter, merge_adapters
from rayrm.training.progress import progress_bar
from rayrm.training.run import read_config, with_date, with_decisions, with_dtype, write_config
from rayrm.training.setup import load_model

log = logging.getLogger(__name__)

# Fields that may change when a run resumes: they affect speed, memory and records, not the result.
RESUMABLE_CHANGES: dict[str, Any] = {
    "cluster": True,
    "model": {"gradient_checkpointing"},
    "train": {
        "tokens_per_micro_batch",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "tensorboard",
    },
}

# Number of held-out groups that are also scored with the weights before rounding.
ROUNDING_GROUPS = 64

# Where Ray unpacks the files that a job uploads; Ray may delete them at any time.
UPLOADS = "/runtime_resources/working_dir_files/"


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run: its export, the evaluation of the export, and its history.

    export: path or URI of the export. metrics: evaluation on held-out data (empty without any).
    history: a dict per optimizer step with step, loss, accuracy, margin, learning_rate, grad_norm,
    pairs, tokens, tokens_unshared, seconds, and eval_* if the step was evaluated. grad_norm is None
    under ZeRO 0, accuracy and margin are None if no pair has a winner. report: path or URI of the
    page on metrics and history (None without held-out data).
    """

    export: str
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    report: str | None


def fit(config: TrainConfig) -> TrainResult:
    """Train, export and evaluate a model; the same name in the same storage resumes the run.

    Starts Ray if it is not running. A finished run is not trained again: its result is returned.
    Raises ConfigError, DataError, ModelError, ExportError, or TrainingError.
    """
    run = run_directory(config)
    if UPLOADS in run:
        raise ConfigError(
            f"storage = {config.storage!r} is in the job's copy of its working directory, which "
            "Ray deletes: give an absolute path that all nodes share, or a URI"
        )
    config = claim(config, run)
    if exists(f"{run}/export/{RECORD}"):
        log.warning("run %r is finished, its export is at %s/export", config.name, run)
        return read_result(run)
    check_places(run)
    config = with_absolute_paths(config)
    if not ray.is_initialized():
        ray.init()
    # Ray Train reads it on the driver; without it the dashboard does not list the run.
    os.environ.setdefault(RAY_TRAIN_ENABLE_STATE_TRACKING, "1")
    try:
        with progress_bar(f"training {config.name}") as steps:
            trained = make_trainer(config, run, partial(train_loop, steps=steps)).fit()
    except TrainingFailedError as error:
        raise first_cause(error) from error
    except RayActorError as error:
        raise TrainingError(f"Ray Train's controller of {run} died: {error}") from error
    cpus = export_cpus(config.cluster)
    export = ray.remote(export_run).options(
        num_cpus=cpus,
        num_gpus=config.cluster.gpus_per_worker,
        label_selector=config.cluster.labels or None,
        runtime_env={"env_vars": worker_environment(config)},
    )
    assert isinstance(trained, Result) and trained.return_value
    checkpoint, step = select_checkpoint(config.train, trained)
    config = with_dtype(config, trained.return_value["dtype"])
    log.info("run %r computed in %s", config.name, config.train.dtype)
    ray.get(export.remote(config, run, checkpoint, step, trained.return_value, cpus))
    return read_result(run)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute paths, because workers run in other directories."""
    data = config.data.model_copy(
        update={
            "train": [absolute(path) for path in config.data.train],
            "eval": [absolute(path) for path in config.data.eval],
        }
    )
    local = Path(config.model.path)
    model = config.model
    if local.is_dir():
        model = model.model_copy(update={"path": str(local.absolute())})
    storage = run_directory(config).removesuffix(f"/{config.name}")
    return config.model_copy(update={"data": data, "model": model, "storage": storage})


def make_trainer(
    config: TrainConfig, run: str, loop: Callable[[dict[str, Any]], Any]
) -> TorchTrainer:
    """Return the Ray Train trainer that runs `loop` on this config's workers."""
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        loop,
        train_loop_config=config.model_dump(mode="json"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
            label_selector=cluster.labels or None,
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=run.removesuffix(f"/{config.name}"),
            checkpoint_config=retention(config.train),
            failure_config=FailureConfig(max_failures=cluster.retries),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
    )


def retention(train: TrainSection) -> CheckpointConfig:
    """Return which checkpoints Ray Train keeps; the latest is always kept."""
    if train.keep_best is None:
        return CheckpointConfig(num_to_keep=train.keep_checkpoints)
    return CheckpointConfig(
        num_to_keep=train.keep_checkpoints,
        checkpoint_score_attribute=f"eval_{train.keep_best}",
        checkpoint_score_order="min" if train.keep_best == "loss" else "max",
    )


def select_checkpoint(train: TrainSection, trained: Result) -> tuple[Checkpoint, int]:
    """Return the checkpoint to export, and its step."""
    if train.export_checkpoint == "best":
        assert trained.best_checkpoints
        checkpoint, figures = trained.best_checkpoints[-1]  # sorted by retention's score
        return checkpoint, figures["step"]
    assert trained.checkpoint and trained.metrics
    return trained.checkpoint, trained.metrics["step"]


def export_cpus(cluster: ClusterSection) -> float:
    """Return the CPUs for the export: those of one worker, or of all workers on a single node."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    return cluster.cpus_per_worker * (cluster.workers if nodes == 1 else 1)


def export_run(
    config: TrainConfig,
    run: str,
    checkpoint: Checkpoint,
    step: int,
    trained: dict[str, Any],
    cpus: float,
) -> None:
    """Write the model of a checkpoint, evaluate what was written, and publish it with a report."""
    torch.set_num_threads(max(1, int(cpus)))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "export"
        with checkpoint.as_directory() as shards:
            model, template = trained_model(config, shards, trained)
        export = write_export(config, model, template, directory, step, trained)
        if config.data.eval:
            evaluate_export(config, run, model, template, directory, export)
        write_model_card(directory, export)
        publish(directory, f"{run}/export")  # last, since an export marks the run as finished


def write_export(
    config: TrainConfig,
    model: PreTrainedModel,
    template: Template,
    directory: Path,
    step: int,
    trained: dict[str, Any],
) -> Export:
    """Merge the model's adapters, write weights, tokenizer and record, and return the record."""
    dtype = DTYPES[config.train.export_dtype]
    adapter = None
    if config.lora.rank:
        folder = directory / ADAPTER
        adapter = export_adapter(model, config.lora, config.model.path, dtype, folder)
        merge_adapters(model)
    save_weights(model, model.state_dict(), directory, dtype)
    template.tokenizer.save_pretrained(directory)
    export = Export(
        name=config.name,
        dtype=config.train.export_dtype,
        template=template.spec,
        weights_sha256=hash_weights(directory),
        adapter=adapter,
        history=trained["history"],
        provenance={
            "base_model": config.model.path,
            "step": step,
            "data": trained["data"],
            "data_fingerprint": trained["data_fingerprint"],
            "config": config.model_dump(mode="json"),
            "versions": {p: version(p) for p in ("ray", "torch", "transformers", "deepspeed")},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    export = with_fingerprints(directory, export)
    export.write(directory)
    return export


def evaluate_export(
    config: TrainConfig,
    run: str,
    model: PreTrainedModel,
    template: Template,
    directory: Path,
    export: Export,
) -> None:
    """Add held-out metrics to an export's record, and write the report on them to the run."""
    data = config.data
    device = "cuda" if config.cluster.gpus_per_worker else "cpu"
    groups, read = read_groups(data.eval, split="test", on_bad_record=data.on_bad_record)
    exact = RewardModel(RewardNet(model).to(device), template, overlong=data.overlong_rows)
    unrounded = score(exact, groups[:ROUNDING_GROUPS])
    dtype = config.train.dtype
    written = RewardModel.load(directory, device, dtype, overlong=data.overlong_rows)
    evaluated = Evaluated(export.version, score(written, groups), export.history)
    export.evaluation = evaluated.figures
    export.reward_mean = export.evaluation["reward_mean"]
    export.reward_std = export.evaluation["reward_std"]
    export.rounding = compare(unrounded, evaluated.scored[:ROUNDING_GROUPS])
    export.write(directory)
    with tempfile.TemporaryDirectory() as report:
        write_report(Path(report), groups, [evaluated], f"{', '.join(data.eval)}: {read}")
        storage, path = fs.FileSystem.from_uri(run)
        storage.create_dir(f"{path}/report", recursive=True)
        fs.copy_files(report, f"{path}/report", destination_filesystem=storage)


def trained_model(
    config: TrainConfig, shards: str, trained: dict[str, Any]
) -> tuple[PreTrainedModel, Template]:
    """Load the fp32 model, adapters not merged, and its template from a directory of shards."""
    model, template = load_model(config)
    check_exported(model, template, trained, config.model.path)
    load_trained(consolidate(shards), RewardNet(model))
    return model, template


def compare(exact: Sequence[ScoredGroup], rounded: Sequence[ScoredGroup]) -> dict[str, Any]:
    """Return how far the export's rewards are from those of its fp32 weights, computed in fp32."""
    shift = np.concatenate(
        [
            np.abs(after.rewards - before.rewards)
            for before, after in zip(exact, rounded, strict=True)
        ]
    )
    shift = shift[np.isfinite(shift)]
    if not len(shift):
        return {}
    return {"rows": len(shift), "mean_abs": float(shift.mean()), "max_abs": float(shift.max())}


def read_result(run: str) -> TrainResult:
    export = read_record(f"{run}/export")
    page = f"{run}/report/{PAGE}"
    return TrainResult(
        export=f"{run}/export",
        metrics=export.evaluation,
        history=export.history,
        report=page if exists(page) else None,
    )


def run_directory(config: TrainConfig) -> str:
    """Return the directory of the run's checkpoints and export: an absolute path or a URI."""
    storage = config.storage if "://" in config.storage else str(Path(config.storage).resolve())
    return f"{storage.rstrip('/')}/{config.name}"


def exists(path: str) -> bool:
    filesystem, inside = fs.FileSystem.from_uri(path)
    return bool(filesystem.get_file_info(inside).type != fs.FileType.NotFound)


def check_places(run: str) -> None:
    """Raise ExportError if a path that the run writes to when it ends is taken."""
    filesystem, path = fs.FileSystem.from_uri(run)
    report, export = filesystem.get_file_info([f"{path}/report", f"{path}/export"])
    taken = [f"{run}/report"] if report.type == fs.FileType.File else []
    # A remote directory without a record may be left from a killed upload.
    unfinished = export.type == fs.FileType.Directory and "://" in run
    empty = export.type == fs.FileType.Directory and not filesystem.get_file_info(
        fs.FileSelector(export.path)
    )
    if export.type != fs.FileType.NotFound and not (unfinished or empty):
        taken.append(f"{run}/export")
    if taken:
        raise ExportError(
            f"{' and '.join(taken)} would be in the way of what the run writes when it ends: "
            "move it elsewhere, or give this run another name"
        )


def claim(config: TrainConfig, run: str) -> TrainConfig:
    """Record the config in the run's directory, or check it against the one recorded there.

    Returns the config with open fields (dtype, date, rule) set as the run's first start decided.
    Raises TrainingError if the run was started with another config.
    """
    recorded = read_config(run)
    if recorded is None or recorded.data.date is None:
        write_config(with_date(recorded or config), run)
        return claim(config, run)
    config = with_decisions(config, recorded)
    mine = _flat(config.model_dump(mode="json", exclude=RESUMABLE_CHANGES))
    theirs = _flat(recorded.model_dump(mode="json", exclude=RESUMABLE_CHANGES))
    differ = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
    if differ:
        raise TrainingError(
            f"{run} was started with another config (differs in {', '.join(differ)}): give this "
            "run another name, or remove the directory"
        )
    return config


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values as JSON by dotted key."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = json.dumps(value)
    return flat


def first_cause(error: TrainingFailedError) -> Exception:
    """Return the typed error that a rank raised, or else Ray's report as a TrainingError."""
    failures = getattr(error, "worker_failures", {}).values()
    for failure in failures:
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, RayrmError):
            return cause
    return TrainingError(str(error))


def worker_environment(config: TrainConfig) -> dict[str, str]:
    """Return the environment of workers: quiet, and without accelerators if no GPU is requested."""
    environment = {
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if config.cluster.gpus_per_worker == 0:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment
