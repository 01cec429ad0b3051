"""Score prompts and responses in one process with RewardModel.

Rows become ids, rows with the same prompt become groups, groups become packs, packs become rewards.
Does not know about Ray; each replica of the service holds a RewardModel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rayrm.config import OWN, at_home
from rayrm.errors import (
    ConfigError,
    InvalidRow,
    InvalidTokenIds,
    NonFiniteReward,
    RowError,
)
from rayrm.model.adapters import Adapter, load_backbone, read_adapters, with_adapter
from rayrm.model.export import Export, load_template
from rayrm.model.foreign import open_model
from rayrm.model.hardware import choose_dtype
from rayrm.model.net import DTYPES, RewardNet, check_max_length, load_weights
from rayrm.packing import Ids, Pack, TokenGroup, plan_packs, share_packs, split_group
from rayrm.rows import (
    Rewards,
    Row,
    Texts,
    Tools,
    check_names,
    check_served,
    is_ids,
    make_rows,
    prompt_key,
    warn_unnamed_ids,
)
from rayrm.text.fingerprints import fingerprint
from rayrm.text.template import Overlong, Template

# Tokens per pack: few enough to stay in a core's cache and to give every core a pack.
CPU_PACK = 2048


@dataclass(frozen=True)
class Encoded:
    """N rows as token ids, gathered into groups.

    owners[g][i]: index of the row of response i in group g; a row with an error is in no group.
    tokens: int64 [N], each row's length before its prompt was cut. errors: [N], None or the row's
    RowError. truncated, unfinished: bool [N], prompt cut, response without its end.
    """

    groups: list[TokenGroup]
    owners: list[list[int]]
    tokens: NDArray[np.int64]
    errors: list[RowError | None]
    truncated: NDArray[np.bool_]
    unfinished: NDArray[np.bool_]


class RewardModel:
    """A reward model that is loaded for scoring.

    version identifies its weights and how rows are built. export: its record, None if the model was
    assembled in this process. adapters: further rewards of the same rows, by name, on the same
    backbone. deterministic: a row's reward depends on its ids alone, bit for bit, on the same
    hardware, versions and settings of torch. Everything else that a kernel's sums could depend on
    is fixed: each row is a separate pack without a shared prefix, computed on one thread on CPU.
    """

    def __init__(
        self,
        net: RewardNet,
        template: Template,
        *,
        export: Export | None = None,
        overlong: Overlong = "error",
        tokens_per_pack: int = 8192,
        deterministic: bool = False,
    ) -> None:
        self.net = net.for_scoring()
        self.template = template
        self.export = export
        self.version = export.version if export else ""
        self.overlong: Overlong = overlong
        self.tokens_per_pack = tokens_per_pack
        self.deterministic = deterministic
        self.adapters: dict[str, RewardModel] = {}
        self.forwards = 0

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        *,
        adapters: Mapping[str, str | Path] | None = None,
        max_length: int | None = None,
        overlong: Overlong = "error",
        tokens_per_pack: int = 8192,
        deterministic: bool = False,
    ) -> RewardModel:
        """Load an export, or a third-party sequence-classification model.

        device auto: a GPU if one is available. dtype auto: bfloat16 if the device multiplies it in
        hardware, else float32, whatever dtype the weights have on disk. max_length defaults to the
        training's.

        adapters: further rewards, by name, as exports of LoRA runs with this export's base and
        template. This export is then loaded as an adapter too, and the base is loaded once.

        A third-party model is a directory or a hub name; a warning lists what is assumed about it.
        Raises ExportError if the directory is missing, has a newer format, holds pickled weights or
        does not match its record; ModelError for a model that cannot be scored exactly; ConfigError
        for an invalid dtype or max_length, and for adapters that cannot share a backbone.
        """
        if dtype not in ("auto", *DTYPES):
            raise ConfigError(f"dtype {dtype!r}: must be auto, {' or '.join(DTYPES)}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        path = at_home(str(path))
        make = partial(
            cls, overlong=overlong, tokens_per_pack=tokens_per_pack, deterministic=deterministic
        )
        if adapters:
            named = {name: at_home(str(adapter)) for name, adapter in adapters.items()}
            read = read_adapters(path, named, max_length)
            kind = DTYPES[choose_dtype(dtype, device)]
            return cls._on_one_backbone(read, torch.device(device), kind, make)
        directory, export = open_model(path)
        template = load_template(directory, export, max_length)
        kind = DTYPES[choose_dtype(dtype, device)]
        weights = load_weights(directory, kind, torch.device(device))
        check_max_length(template.spec.max_length, weights.config)
        return make(RewardNet(weights), template, export=export)

    @classmethod
    def _on_one_backbone(
        cls,
        read: dict[str, Adapter],
        device: torch.device,
        dtype: torch.dtype,
        make: Callable[..., RewardModel],
    ) -> RewardModel:
        own = read[OWN]
        backbone = load_backbone(own, dtype, device)
        check_max_length(own.template.spec.max_length, backbone.model.config)
        models = {}
        for name, adapter in read.items():
            models[name] = make(
                with_adapter(backbone, adapter), own.template, export=adapter.export
            )
            models[name].version = adapter.export.adapter_version
        model = models.pop(OWN)
        model.adapters = models
        return model

    @overload
    def score(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: None = None,
        groups: Sequence[Texts] | None = None,
        finished: Sequence[bool] | None = None,
        tools: Sequence[Tools | None] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
    ) -> Rewards: ...

    @overload
    def score(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: Sequence[str],
        groups: Sequence[Texts] | None = None,
        finished: Sequence[bool] | None = None,
        tools: Sequence[Tools | None] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
    ) -> dict[str, Rewards]: ...

    def score(
        self,
        prompts: Texts,
        responses: Texts | None = None,
        *,
        rewards: Sequence[str] | None = None,
        groups: Sequence[Texts] | None = None,
        finished: Sequence[bool] | None = None,
        tools: Sequence[Tools | None] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
    ) -> Rewards | dict[str, Rewards]:
        """Return the rewards of N responses, each to the prompt at the same index.

        groups: instead of responses, a list of responses for each prompt; rewards come in the same
        order, one group after the other. Equal prompts are computed once, unless the model is
        deterministic. A row is text, messages, or token ids, which are scored exactly as given.
        finished: False where the sampler cut the response off. tools: for each prompt the tools
        that it offers, as JSON schemas, or None. tokenizer: the tokenizer that made the ids, or its
        fingerprint; ids of another tokenizer become errors. rewards: names of rewards to return, as
        a dict of Rewards, instead of this model's own; "default" names its own, the other names are
        its adapters'. A bad row gets its RowError and NaN; the other rows are scored. Raises
        ValueError if the lists differ in length, UnknownReward if a name is unknown.
        """
        models = {name: self.named(name) for name in check_names(rewards)}
        rows = make_rows(prompts, responses, finished, groups, tools)
        warn_unnamed_ids(rows, tokenizer)
        encoded = self.encode(rows, tokenizer)
        scored = {
            name: model.collect(encoded, model.score_groups(encoded.groups))
            for name, model in models.items()
        }
        return scored[OWN] if rewards is None else scored

    @property
    def dtype(self) -> str:
        """The dtype that the backbone computes in: bfloat16 or float32."""
        return str(self.net.autocast or self.net.model.dtype).removeprefix("torch.")

    @property
    def rewards(self) -> dict[str, RewardModel]:
        """The model that computes each reward, by name."""
        return {OWN: self, **self.adapters}

    def named(self, reward: str) -> RewardModel:
        """Return the model that computes a reward. Raises UnknownReward."""
        check_served([reward], self.adapters)
        return self.rewards[reward]

    def encode(
        self, rows: Sequence[Row], tokenizer: str | PreTrainedTokenizerBase | None = None
    ) -> Encoded:
        """Turn rows into groups of ids, without using the weights."""
        errors: list[RowError | None] = [None] * len(rows)
        tokens = np.zeros(len(rows), dtype=np.int64)
        truncated = np.zeros(len(rows), dtype=bool)
        families: dict[object, list[int]] = {}
        ids: dict[int, Ids] = {}
        mismatch = self._mismatch(tokenizer)
        for i, (row, result) in enumerate(zip(rows, self.template.encode(rows), strict=True)):
            if mismatch and is_ids(row.response) and not isinstance(result, InvalidRow):
                result = mismatch
            if not isinstance(result, RowError):
                tokens[i] = len(result)
                result, truncated[i] = self.template.fit(row, result, self.overlong)
            if isinstance(result, RowError):
                errors[i] = result
                continue
            ids[i] = result
            # A cut row starts elsewhere: in one group with whole rows, no prefix would be shared.
            key = prompt_key(row.prompt, row.tools)
            family = i if self.deterministic else (key, bool(truncated[i]))
            families.setdefault(family, []).append(i)
        owners = list(families.values())
        return Encoded(
            groups=[TokenGroup.from_rows([ids[i] for i in family]) for family in owners],
            owners=owners,
            tokens=tokens,
            errors=errors,
            truncated=truncated,
            unfinished=np.array([not row.finished for row in rows], dtype=bool),
        )

    def score_groups(
        self, groups: Sequence[TokenGroup], *, progress: bool = False
    ) -> list[NDArray[np.float32]]:
        """Return the rewards of each group's responses, float32 [responses].

        progress: show a progress bar.
        """
        budget = 0 if self.deterministic else self.tokens_per_pack
        parts = [(g, r) for g, group in enumerate(groups) for r in split_group(group, budget)]
        pieces = [groups[g].part(r) for g, r in parts]
        values = [np.empty(len(group.suffixes), dtype=np.float32) for group in groups]
        plans = self._plan([piece.tokens for piece in pieces])
        scored = self._score_packs([[pieces[p] for p in plan] for plan in plans])
        scored = tqdm(scored, "scoring", len(plans), unit="pack", disable=not progress)
        for plan, rewards in zip(plans, scored, strict=True):
            taken = 0
            for p in plan:
                g, responses = parts[p]
                count = len(pieces[p].suffixes)
                values[g][responses.start : responses.stop] = rewards[taken : taken + count]
                taken += count
        return values

    def _plan(self, costs: Sequence[int]) -> list[list[int]]:
        """Return the indices of the pieces in each pack."""
        if self.deterministic:  # costliest first, so that no thread ends long after the rest
            return [[p] for p in sorted(range(len(costs)), key=lambda p: -costs[p])]
        if self._on_cpu:
            return plan_for_threads(costs, self.tokens_per_pack)
        return plan_packs(costs, self.tokens_per_pack)

    def _score_packs(self, packs: Sequence[Sequence[TokenGroup]]) -> Iterator[NDArray[np.float32]]:
        """Yield each pack's rewards, in order; on CPU one pack per thread runs at a time."""
        self.forwards += len(packs)
        threads = torch.get_num_threads()
        workers = min(threads, max(len(packs), 1)) if self._on_cpu else 1
        # Some kernels split their sums by the number of threads, which changes the rounding.
        share = 1 if self.deterministic and self._on_cpu else threads // workers
        if share == threads:
            yield from map(self._score_pack, packs)
            return
        try:
            with ThreadPoolExecutor(workers, "scoring", torch.set_num_threads, (share,)) as pool:
                yield from pool.map(self._score_pack, packs)
        finally:
            torch.set_num_threads(threads)  # also the default of threads started later

    @torch.inference_mode()
    def _score_pack(self, groups: Sequence[TokenGroup]) -> NDArray[np.float32]:
        return self.net.score_pack(Pack.from_groups(groups)).cpu().numpy()

    def collect(
        self,
        encoded: Encoded,
        values: Sequence[NDArray[np.float32]],
        failed: Sequence[Mapping[int, RowError]] | None = None,
    ) -> Rewards:
        """Return the groups' rewards in the order of the rows, with the errors of failed rows.

        failed: for each group, errors by index of the response.
        """
        rewards = np.full(len(encoded.errors), np.nan, dtype=np.float32)
        errors = list(encoded.errors)
        for g, owners in enumerate(encoded.owners):
            rewards[owners] = values[g]
            for r, error in (failed[g] if failed else {}).items():
                errors[owners[r]] = error
        for i in np.flatnonzero(~np.isfinite(rewards)):
            errors[i] = errors[i] or NonFiniteReward(f"the model gave {rewards[i]} for this row")
            rewards[i] = np.nan
        return Rewards(
            values=rewards,
            errors=errors,
            truncated=encoded.truncated,
            unfinished=encoded.unfinished,
            versions=[self.version] * len(errors),
        )

    @property
    def _on_cpu(self) -> bool:
        return self.net.model.device.type == "cpu"

    def _mismatch(self, tokenizer: str | PreTrainedTokenizerBase | None) -> InvalidTokenIds | None:
        if tokenizer is None:
            return None
        made_by = tokenizer if isinstance(tokenizer, str) else fingerprint(tokenizer)
        expected = self.template.spec.fingerprint
        # The exported tokenizer may have a pad token that the published one lacks.
        if made_by == expected or made_by == fingerprint(self.template.tokenizer):
            return None
        return InvalidTokenIds(
            f"the ids' tokenizer has fingerprint {made_by[:12]!r}…, the reward model's has "
            f"{expected[:12]}…: decode the ids and send text"
        )


def plan_for_threads(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Plan small packs of about equal cost, so that no thread waits for another."""
    shares = share_packs(costs, torch.get_num_threads(), min(budget, CPU_PACK))
    return [pack for turn in zip(*shares, strict=True) for pack in turn if pack]
