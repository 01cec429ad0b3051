"""Identify what a run trains on, so that its ranks, later starts and its export agree on it.

Does not know how data is read or encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from rayrm.errors import TrainingError
from rayrm.model.architecture import hash_config
from rayrm.text.fingerprints import fingerprint_of_text
from rayrm.text.template import Template
from rayrm.training.dataset import PreferenceData
from rayrm.training.lora import hash_frozen


@dataclass(frozen=True)
class Inputs:
    """What a rank trains on.

    data_fingerprint: hash of the training groups' text. text_to_ids: hash of the tokenizer and chat
    template (fingerprints.py). template: the TemplateSpec as a dict. groups: number of groups of
    the schedule. config_sha256: hash of what the base's config makes of weights (architecture.py).
    frozen_sha256: hash of the weights that are not trained.
    """

    data_fingerprint: str
    text_to_ids: str
    template: dict[str, Any]
    groups: int
    config_sha256: str
    frozen_sha256: str

    @classmethod
    def of(cls, model: PreTrainedModel, template: Template, data: PreferenceData) -> Inputs:
        return cls(
            data_fingerprint=data.fingerprint,
            text_to_ids=data.text_to_ids,
            template=asdict(template.spec),
            groups=len(data),
            config_sha256=hash_config(model.config.to_dict()),
            frozen_sha256=hash_frozen(model),
        )

    def check_ranks(self) -> None:
        """Raise TrainingError on every rank if the ranks' inputs differ, as between two nodes."""
        all_inputs: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_inputs, asdict(self))
        for rank, theirs in enumerate(all_inputs):
            differ = [key for key, value in all_inputs[0].items() if theirs[key] != value]
            if differ:
                raise TrainingError(
                    f"ranks 0 and {rank} do not train on the same ({', '.join(differ)} differ): "
                    "every node must read the same data, base model and tokenizer"
                )

    def check_resumed(self, state: Mapping[str, Any], base: str) -> None:
        """Raise TrainingError if a checkpoint's state was trained on other inputs.

        Older checkpoints lack some keys, which are not checked then.
        """
        trained = f"the checkpoint of step {state['step']} was trained"
        if state["data_fingerprint"] != self.data_fingerprint:
            raise TrainingError(
                f"{trained} on other data: data.train has changed since the run was started; give "
                "this run another name"
            )
        if not _same_ids(self.text_to_ids, self.template, state):
            raise TrainingError(
                f"{trained} on other ids: the tokenizer, chat template or generation_config.json "
                f"of {base} has changed since the run was started; restore it, or give this run "
                "another name"
            )
        if state.get("groups", self.groups) != self.groups:
            raise TrainingError(
                f"{trained} with other groups: train.pairs_per_group has changed since the run was "
                "started; set it back (null: every prompt is one group), or give this run another "
                "name"
            )
        check_config(self.config_sha256, state, base)
        check_frozen(self.frozen_sha256, state["frozen_sha256"], base)


def check_exported(
    model: PreTrainedModel, template: Template, trained: Mapping[str, Any], base: str
) -> None:
    """Raise TrainingError if the base, loaded again for the export, is not what was trained on.

    trained: the result of train_loop.
    """
    check_config(hash_config(model.config.to_dict()), trained, base)
    check_frozen(hash_frozen(model), trained["frozen_sha256"], base)
    now = fingerprint_of_text(template.tokenizer, datetime.now())
    if not _same_ids(now, asdict(template.spec), trained):
        raise TrainingError(
            f"the tokenizer, chat template or generation_config.json of {base} has changed since "
            "this run encoded its data, so the export would build other rows than it was trained "
            "on: restore it and start the run again, which then only exports"
        )


def check_config(found: str, recorded: Mapping[str, Any], base: str) -> None:
    """Raise TrainingError if the base's config is not the one that the run was started with."""
    if recorded.get("config_sha256", found) != found:
        raise TrainingError(
            f"config.json of {base} has changed since the run was started, or is read otherwise by "
            "this transformers, and the trained weights fit only the old one: restore it, or give "
            "this run another name"
        )


def check_frozen(found: str, recorded: str, base: str) -> None:
    """Raise TrainingError if a run's frozen weights are not those that it was started with."""
    if found != recorded:
        raise TrainingError(
            f"the weights of {base} are not those that the run was started with (sha256 "
            f"{found[:12]}… instead of {recorded[:12]}…), and its adapters fit only those: "
            "restore them, or give this run another name"
        )


def _same_ids(text_to_ids: str, template: dict[str, Any], recorded: Mapping[str, Any]) -> bool:
    found = {"text_to_ids": text_to_ids, "template": template}
    return all(recorded.get(key, value) == value for key, value in found.items())
