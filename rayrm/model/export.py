"""Read, write and publish exports: Hugging Face classification directories with a rayrm.json.

An export is all that passes from training to serving. rayrm.json records how rows are built, the
weights' hash, the evaluation and where the model came from; it is written last, so a directory that
has one is complete. Does not know how a model is trained or run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from pyarrow import ArrowInvalid, fs
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import AutoTokenizer

from rayrm.errors import ExportError
from rayrm.files import cache_directory, move_directory, whole_file
from rayrm.model.architecture import CONFIG, fingerprint_config
from rayrm.text.clock import reads_clock, stop_clocks
from rayrm.text.fingerprints import SETTINGS, TEMPLATE, fingerprint_text, read_chat_templates
from rayrm.text.template import Template, TemplateSpec

# Version 2 added adapter; 3 added text_to_ids and the template's rule, thoughts and ends; 4 added
# config_sha256.
FORMAT_VERSION = 4
RECORD = "rayrm.json"

# Day that the clocks of templates from the hub show: Llama 3.1's without a clock writes this one.
DATE_OF_HUB = datetime(2024, 7, 26, tzinfo=UTC)

# Age in seconds from which another write is sure to change a file's timestamps.
SETTLED_S = 10.0

# Suffixes of weight files: large, so remote ones are compared by their size only.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")

# Tokens with which known models end a text or a turn.
_KNOWN_ENDS = set(
    [
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<eos>",
        "</s>",
    ]
)

# Subdirectory of a LoRA run's export with the unmerged adapter, in peft's format.
ADAPTER = "adapter"


class AdapterRecord(BaseModel):
    """The record of an export's adapter and of the base that it belongs to.

    base: the model whose backbone was frozen. backbone_sha256: over that backbone's weights in the
    export's dtype. weights_sha256: over the adapter's weights. scale: factor of the adapter's
    low-rank products.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    backbone_sha256: str
    weights_sha256: str
    scale: float


class Export(BaseModel):
    """The contents of rayrm.json.

    text_to_ids: hash of how the tokenizer's files turn text into ids (fingerprints.py).
    config_sha256: hash of what config.json makes of the weights (architecture.py). Both are
    computed from the files whenever the export is read. adapter: record of the unmerged adapter of
    a LoRA run, None without LoRA. reward_mean, reward_std: over the held-out responses, None
    without held-out data. evaluation: summarize's dict. rounding: mean_abs and max_abs, how far the
    rewards of `rows` held-out rows moved when the weights were rounded to dtype and computed in the
    run's dtype. history: the figures of every optimizer step. provenance: base model, data
    fingerprint, config and versions.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    name: str
    dtype: Literal["bfloat16", "float32"]
    template: TemplateSpec
    weights_sha256: str
    text_to_ids: str = ""
    config_sha256: str = ""
    adapter: AdapterRecord | None = None
    reward_mean: float | None = None
    reward_std: float | None = None
    evaluation: dict[str, Any] = {}
    rounding: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    provenance: dict[str, Any] = {}

    @property
    def version(self) -> str:
        """Name and content hash; equal exactly if the same rows get the same rewards."""
        return self._named(self.weights_sha256)

    @property
    def adapter_version(self) -> str:
        """Version of the adapter on its backbone, which rounds differently from merged weights.

        Only for exports that have an adapter.
        """
        assert self.adapter
        return self._named(
            f"{self.adapter.backbone_sha256}{self.adapter.weights_sha256}{self.adapter.scale}"
        )

    @property
    def old_versions(self) -> set[str]:
        """Versions of this export and its adapter by formats 1 to 3, which hashed fewer fields.

        A serving record with one of them stays valid: the weights are the same.
        """
        spec = asdict(self.template)
        of_format_2 = {k: spec[k] for k in ("format", "separator", "max_length", "fingerprint")}
        hashed = [json.dumps(of_format_2), json.dumps(spec) + self.text_to_ids]
        hashes = [self.weights_sha256]
        if adapter := self.adapter:
            hashes.append(f"{adapter.backbone_sha256}{adapter.weights_sha256}{adapter.scale}")
        return {self._hashed(weights + self.dtype + more) for weights in hashes for more in hashed}

    def has_version(self, version: str) -> bool:
        """Return whether the export, or its adapter on its backbone, has or had that version."""
        names = {self.version, *self.old_versions}
        return version in (names | {self.adapter_version} if self.adapter else names)

    def _named(self, weights: str) -> str:
        template = json.dumps(asdict(self.template))
        return self._hashed(weights + self.dtype + template + self.text_to_ids + self.config_sha256)

    def _hashed(self, content: str) -> str:
        return f"{self.name}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def write(self, directory: Path) -> None:
        with whole_file(directory / RECORD) as file:
            file.write(f"{self.model_dump_json(indent=2)}\n".encode())


def read_export(path: str | Path) -> tuple[Path, Export]:
    """Fetch an export if it is remote; return its local directory and its record.

    Checks the hash of the weights. Raises ExportError.
    """
    directory = _fetch(str(path)) if "://" in str(path) else Path(path)
    record = directory / RECORD
    if not record.exists():
        raise ExportError(f"no export at {directory.resolve()}: looked for {RECORD} in it")
    export = _parse(record.read_bytes(), record)
    pickled = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise ExportError(
            f"{directory} holds pickled weights ({', '.join(pickled)}), which can run code when "
            "they are loaded: only safetensors are read"
        )
    found = hash_weights(directory)
    if found != export.weights_sha256:
        raise ExportError(
            f"the weights in {directory} are not the ones {RECORD} records: sha256 {found[:12]}…, "
            f"recorded {export.weights_sha256[:12]}…"
        )
    return directory, with_fingerprints(directory, export)


def read_identity(path: str) -> tuple[Path, Export]:
    """Return the directory and record of an export at a path or URI, without its weights.

    Like read_export, but weights are neither fetched nor read. Raises ExportError.
    """
    directory = _fetch(path, merged=False) if "://" in path else Path(path)
    return directory, with_fingerprints(directory, read_record(str(directory)))


def load_template(directory: Path, export: Export, max_length: int | None = None) -> Template:
    """Load the template that builds the rows of the reward model in a directory.

    max_length replaces the export's. Raises ExportError if the tokenizer cannot be loaded.
    """
    spec = replace(export.template, max_length=max_length or export.template.max_length)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ExportError(f"{directory} has no tokenizer that can be loaded: {error}") from None
    stop_clocks(tokenizer, clock_of(directory, export.provenance))
    if export.format_version < 3:  # does not record the base's end tokens
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        spec = replace(spec, ends=tuple(sorted(special & _KNOWN_ENDS)))
    return Template(tokenizer, spec)


def clock_of(directory: Path, provenance: Mapping[str, Any]) -> datetime:
    """Return the day at which to stop a chat template's clock: the export's or its files' date.

    Files of the hub are dated by their download, which differs between nodes: DATE_OF_HUB instead.
    """
    if created := provenance.get("created"):
        moment = datetime.fromisoformat(created)
    elif directory.parent.name == "snapshots":
        moment = DATE_OF_HUB
    else:
        files = [f for f in (directory / name for name in (TEMPLATE, *SETTINGS)) if f.exists()]
        moment = datetime.fromtimestamp(files[0].stat().st_mtime if files else 0, UTC)
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def with_fingerprints(directory: Path, export: Export) -> Export:
    """Return the record with text_to_ids and config_sha256 of the files in the directory."""
    at = clock_of(directory, export.provenance)
    if any(map(reads_clock, read_chat_templates(directory).values())):
        warnings.warn(
            f"the chat template in {directory} reads the clock, but rewards must not depend on the "
            f"date: its clock is stopped at {at:%d %B %Y}",
            stacklevel=4,
        )
    try:
        found = fingerprint_text(directory, at)
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"the tokenizer's files in {directory} are damaged: {error!r}") from None
    try:
        config = fingerprint_config(directory)
    except (OSError, ValueError) as error:
        raise ExportError(f"{directory / CONFIG} is missing or damaged: {error}") from None
    return export.model_copy(update={"text_to_ids": found, "config_sha256": config})


def read_adapter(path: str | Path) -> tuple[Path, Export]:
    """Return an export's local directory and record, for the use of its adapter alone.

    Like read_export, but checks the adapter's hash; merged weights are neither fetched nor read.
    Raises ExportError, also if the export has no adapter.
    """
    remote = "://" in str(path)
    directory = _fetch(str(path), merged=False) if remote else Path(path)
    export = read_record(str(directory))
    if export.adapter is None:
        raise ExportError(
            f"{path} has no adapter: only exports of runs with lora.rank above 0 have one, since "
            f"format version 2 (this one has version {export.format_version})"
        )
    found, recorded = hash_weights(directory / ADAPTER), export.adapter.weights_sha256
    if found != recorded:
        raise ExportError(
            f"the adapter in {directory / ADAPTER} is not the one {RECORD} records: sha256 "
            f"{found[:12]}…, recorded {recorded[:12]}…"
        )
    return directory, with_fingerprints(directory, export)


def read_record(path: str) -> Export:
    """Return only the record of an export at a path or URI. Raises ExportError."""
    try:
        filesystem, inside = fs.FileSystem.from_uri(
            path if "://" in path else str(Path(path).absolute())
        )
        with filesystem.open_input_file(f"{inside}/{RECORD}") as record:
            return _parse(record.read(), f"{path}/{RECORD}")
    except (ArrowInvalid, FileNotFoundError) as error:
        raise ExportError(f"no export at {path}: {error}") from None


def _parse(content: bytes, where: object) -> Export:
    try:
        values = json.loads(content)
        if values["format_version"] > FORMAT_VERSION:
            raise ExportError(
                f"{where} has format version {values['format_version']}; this rayrm reads up to "
                f"{FORMAT_VERSION}: install a newer rayrm"
            )
        return Export(**values)
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        ValidationError,
    ) as error:
        raise ExportError(f"{where} is damaged: {error}") from None


def hash_weights(directory: Path) -> str:
    """Return the sha256 over the safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(hash_file(file))
    return digest.hexdigest()


def hash_file(file: Path) -> bytes:
    """Return the sha256 of a file, kept in the user's cache until the file changes.

    The hash of a file written within the last SETTLED_S seconds is not kept: another write could
    leave its timestamps unchanged.
    """
    status = file.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    known_by = f"{file.resolve()} {status.st_ino} {status.st_size} {times}"
    memo = cache_directory("hashes") / hashlib.sha256(known_by.encode()).hexdigest()
    if memo.exists():
        return memo.read_bytes()
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").digest()
    if time.time() - max(times) / 1e9 > SETTLED_S:
        with whole_file(memo) as remembered:
            remembered.write(found)
    return found


def write_model_card(directory: Path, export: Export) -> None:
    """Write README.md with the front matter that the Hugging Face hub reads."""
    evaluation, provenance = export.evaluation, export.provenance
    accuracy = evaluation.get("accuracy")
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags: [reward-model, rayrm]",
        f"base_model: {provenance['base_model']}",
        "---",
        f"# {export.name}",
        "",
        "A reward model: one scalar for a prompt and a response, higher is better.",
        "",
        "| | |",
        "|---|---|",
        f"| version | `{export.version}` |",
        f"| base model | {provenance['base_model']} |",
        f"| rows | {export.template.format}, up to {export.template.max_length} tokens |",
        f"| backbone | {export.dtype}, head float32 |",
        f"| training data | {provenance['data']} (`{provenance['data_fingerprint'][:12]}`) |",
    ]
    if accuracy is not None:
        lines.append(f"| held-out accuracy | {accuracy:.3f} on {evaluation['pairs']} pairs |")
    if evaluation and export.reward_mean is not None:
        lines.append(
            f"| held-out rewards | mean {export.reward_mean:.3f}, std {export.reward_std:.3f} |"
        )
    if export.adapter:
        lines.append(
            f"| unmerged adapter | `{ADAPTER}/`, for peft; version `{export.adapter_version}` |"
        )
    if export.rounding:
        lines.append(
            f"| reward change by rounding to {export.dtype} | {export.rounding['mean_abs']:.2g} on "
            f"average, {export.rounding['max_abs']:.2g} at most, on {export.rounding['rows']} "
            "held-out rows |"
        )
    use = f"""
```python
from rayrm import RewardModel

rewards = RewardModel.load("path/to/this/directory").score([prompt], [response])
```

`{RECORD}` holds the full evaluation, the training curve and the config. transformers loads the
directory as `AutoModelForSequenceClassification`; pass `dtype="float32"` to keep the head in fp32.
"""
    (directory / "README.md").write_text("\n".join(lines) + "\n" + use)


def _fetch(uri: str, *, merged: bool = True) -> Path:
    """Copy a remote export into the user's cache, once per content; return the directory.

    merged=False leaves out the merged weights. The record and the tokenizer's files are read each
    time: they may change while the weights stay the same.
    """
    try:
        remote, path = fs.FileSystem.from_uri(uri)
    except ArrowInvalid as error:
        raise ExportError(f"no export at {uri}: {error}") from None
    if remote.get_file_info(f"{path}/{RECORD}").type == fs.FileType.NotFound:
        raise ExportError(f"no export at {uri}: looked for {RECORD} in it")
    files = _files(remote, path)
    small = {name: file for name, file in files.items() if not name.endswith(_WEIGHTS)}
    read = {name: _read(remote, file) for name, file in small.items()}
    large = [[name, files[name].size] for name in sorted(files.keys() - small.keys())]
    digest = hashlib.sha256(json.dumps(large).encode())
    for name in sorted(read):
        digest.update(f"{name} {len(read[name])} ".encode() + read[name])
    content = digest.hexdigest()[:16] + ("" if merged else "-adapter")
    cache = cache_directory("exports")
    if not (cache / content).exists():
        partial = Path(tempfile.mkdtemp(dir=cache))
        for name, file in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if name in read:
                (partial / name).write_bytes(read[name])
            elif merged or "/" in name:
                fs.copy_files(file.path, str(partial / name), source_filesystem=remote)
        _rename(partial, cache / content)
    return cache / content


def _files(remote: fs.FileSystem, path: str) -> dict[str, fs.FileInfo]:
    """Return the files of a remote directory by their path inside it."""
    found = remote.get_file_info(fs.FileSelector(path, recursive=True))
    return {str(Path(f.path).relative_to(path)): f for f in found if f.is_file}


def _read(remote: fs.FileSystem, file: fs.FileInfo) -> bytes:
    with remote.open_input_file(file.path) as content:
        return bytes(content.read())


def publish(directory: Path, target: str) -> None:
    """Move a finished export to its target: by one rename, or to a URI with rayrm.json last.

    Raises ExportError if something else is at the target; the message says where the export is.
    """
    if "://" not in target:
        staged = Path(target).with_name(f".{Path(target).name}.{uuid4().hex}")
        shutil.move(directory, staged)
        _rename(staged, Path(target))
        return
    remote, path = fs.FileSystem.from_uri(target)
    record = (directory / RECORD).read_bytes()
    if remote.get_file_info(f"{path}/{RECORD}").type != fs.FileType.NotFound:
        with remote.open_input_file(f"{path}/{RECORD}") as published:
            _check_same(published.read(), record, target, directory)
        return
    (directory / RECORD).unlink()
    remote.create_dir(path, recursive=True)
    fs.copy_files(str(directory), path, destination_filesystem=remote)
    with remote.open_output_stream(f"{path}/{RECORD}") as out:
        out.write(record)


def _rename(source: Path, target: Path) -> None:
    if not move_directory(source, target):
        there = target / RECORD
        published = there.read_bytes() if there.exists() else b""
        _check_same(published, (source / RECORD).read_bytes(), target, source)
        shutil.rmtree(source)  # another process published the same export first


def _check_same(published: bytes, record: bytes, target: object, kept: Path) -> None:
    if not published or _parse(published, target).version != _parse(record, kept).version:
        raise ExportError(
            f"{target} exists and is not this export, which is at {kept}: move one of the two away"
        )
