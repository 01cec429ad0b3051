"""Open third-party reward models, which have no rayrm.json, with an assumed record.

Plain sequence classification with one output is scored as transformers does, from safetensors only;
a model that computes its reward any other way is refused. What the model does not record (how its
rows were built, how long they may be) is assumed, and a warning lists it. Does not know how a model
is run.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from rayrm.errors import ExportError, ModelError, RowError
from rayrm.model.export import (
    RECORD,
    Export,
    hash_weights,
    load_template,
    read_export,
    read_identity,
    with_fingerprints,
)
from rayrm.model.net import IGNORED_WEIGHTS, load_config, longest_row, read_ends, weight_files
from rayrm.rows import Row
from rayrm.text.fingerprints import fingerprint
from rayrm.text.template import Template, TemplateSpec

_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def open_model(path: str | Path) -> tuple[Path, Export]:
    """Return a reward model's local directory and its record, read or else assumed with a warning.

    path: an export, or a directory or hub name (NAME or NAME@REVISION) of a Hugging Face
    sequence-classification model. Raises ExportError if no model is found or its files are missing
    or damaged, ModelError if rayrm cannot compute the model's rewards exactly.
    """
    if "://" in str(path):
        return read_export(path)
    hub = None if Path(path).exists() else _HUB_NAME.fullmatch(str(path))
    directory = _download(hub["name"], hub["revision"]) if hub else Path(path)
    if (directory / RECORD).exists():
        return read_export(directory)
    if not (directory / "config.json").exists():
        raise ExportError(
            f"no reward model at {directory.resolve()}: found neither {RECORD} (of an export) nor "
            "config.json (of a Hugging Face model)"
        )
    return directory, _assume(directory, hub["name"] if hub else directory.resolve().name)


def open_template(path: str | Path, max_length: int | None = None) -> tuple[Template, Export]:
    """Return the template that builds a reward model's rows, and its record.

    An export's weights are not read.

    Raises the same errors as open_model.
    """
    if "://" in str(path) or (Path(path) / RECORD).exists():
        directory, export = read_identity(str(path))
    else:
        directory, export = open_model(path)
    return load_template(directory, export, max_length), export


def pinned(path: str, directory: Path) -> str:
    """Return a path that opens the same model on any node: absolute, or with the hub's commit."""
    if Path(path).exists():
        return str(directory.resolve())
    return f"{path.partition('@')[0]}@{directory.name}"


def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"no reward model {name!r}: nothing at {Path(name).absolute()}, and the hub gave: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _assume(directory: Path, name: str) -> Export:
    """Check that a directory without a record holds a reward model; return an assumed record."""
    _check_files(directory)
    config = load_config(str(directory))
    shapes = _check_weights(directory, config)
    tokenizer = _load_tokenizer(directory, config)
    form: Literal["chat", "text"] = "chat" if tokenizer.chat_template else "text"
    longest = longest_row(config)
    spec = TemplateSpec(
        format=form,
        separator="\n",
        max_length=longest,
        fingerprint=fingerprint(tokenizer),
        ends=read_ends(str(directory), tokenizer),
    )
    in_bf16 = all(
        dtype == "BF16" for key, (_, dtype) in shapes.items() if not key.startswith("score.")
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if in_bf16 else "float32"
    export = Export(
        name=name.rpartition("/")[2],
        dtype=dtype,
        template=spec,
        weights_sha256=hash_weights(directory),
    )
    export = with_fingerprints(directory, export)
    assumed = [
        *_assumed_of_rows(Template(tokenizer, spec), config),
        f"rows have up to {longest} tokens, the number of positions of the model",
        "the head is computed in float32",
    ]
    if "score.bias" in shapes:
        assumed.append("the head's bias is added, although transformers drops it on loading")
    warnings.warn(
        f"{name} has no {RECORD}, so it is assumed that: {'; '.join(assumed)}. Rows built in "
        "another way can be sent as token ids, which are scored as they are. Version "
        f"{export.version} is the hash of its weights, its config and its tokenizer's files.",
        stacklevel=4,
    )
    return export


def _assumed_of_rows(template: Template, config: PretrainedConfig) -> list[str]:
    (row,) = template.encode([Row("Hello", "Hi.")])
    if isinstance(row, RowError):
        raise ModelError(f"the tokenizer cannot build a row of a prompt and a response: {row}")
    last = template.tokenizer.convert_ids_to_tokens(int(row[-1]))
    if template.spec.format == "chat":
        rendered, kept = template.chat.closing
        assumed = [f"rows follow the tokenizer's chat template and end in {kept!r}"]
        if kept != rendered:
            assumed.append(
                f"training rows ended there, although the template renders {rendered!r}: only "
                "the model's makers know"
            )
    else:
        assumed = [
            f"rows are prompt, {template.spec.separator!r}, response and {last!r}, since the "
            "tokenizer has no chat template"
        ]
    if config.pad_token_id == row[-1]:
        assumed.append(
            f"the reward is read at that last token, although it is also the pad token ({last!r}): "
            "transformers would read the reward at the token before it"
        )
    return assumed


def _check_files(directory: Path) -> None:
    """Raise unless the files are a plain model's: safetensors, no custom code, not quantized."""
    raw = _read_json(directory / "config.json")
    if (directory / "adapter_config.json").exists():
        raise ModelError(f"{directory} holds an adapter: merge it into its base model first")
    own_code = raw.get("auto_map") or {}
    for name in {"AutoModel", "AutoModelForSequenceClassification"} & own_code.keys():
        raise ModelError(
            f"{directory} computes its reward with custom code ({own_code[name]}), which rayrm "
            "does not run: it scores plain sequence-classification models only"
        )
    if "quantization_config" in raw:
        raise ModelError(f"{directory} is quantized; rayrm scores weights in fp32, bf16 or fp16")
    if not any(directory.glob("*.safetensors")):
        pickled = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        raise ExportError(
            f"no *.safetensors in {directory}; rayrm reads no other weights"
            + (f": {', '.join(pickled)} can run code when loaded" if pickled else "")
        )


def _check_weights(directory: Path, config: PretrainedConfig) -> dict[str, tuple[list[int], str]]:
    """Return shapes and dtypes by name; raise unless they form a backbone and one linear head."""
    model: Any = AutoModelForSequenceClassification._model_mapping[type(config)]
    shapes = _read_shapes(directory)
    strange = sorted(
        key
        for key in shapes
        if not key.startswith(f"{model.base_model_prefix}.")
        and key not in ("score.weight", "score.bias")
        and not IGNORED_WEIGHTS.search(key)
    )
    if config.architectures != [model.__name__] or "score.weight" not in shapes or strange:
        found = ", ".join(config.architectures or ["no architecture"])
        heads = f", with {', '.join(strange[:5])}" if strange else ""
        missing = "" if "score.weight" in shapes else ", without score.weight"
        raise ModelError(
            f"{directory} is {found}{heads}{missing}; rayrm scores {model.__name__} with one "
            "linear head, score.weight: how any other head gives a reward is not recorded"
        )
    outputs = shapes["score.weight"][0][0]
    if outputs != 1:
        raise ModelError(
            f"{directory} has {outputs} outputs (num_labels): a reward is one number, and how to "
            "compute it from several outputs is not recorded"
        )
    return shapes


def _read_shapes(directory: Path) -> dict[str, tuple[list[int], str]]:
    shapes = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    part = weights.get_slice(key)
                    shapes[key] = part.get_shape(), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{file} cannot be read as safetensors: {error}") from None
    return shapes


def _load_tokenizer(directory: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} has no tokenizer that can be loaded: {error}") from None
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, the model embeds "
            f"{config.vocab_size}: they do not belong together, or the model was not resized"
        )
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise ExportError(f"{file} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ExportError(f"{file} is damaged: {type(values).__name__} instead of an object")
    return values
