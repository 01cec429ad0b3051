"""Encode preference groups to token ids on disk, and define the order they are trained in.

Text is encoded once, before training, into an Arrow table in the user's cache, keyed by content;
every rank reads it from there. Does not know about models or ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, load_from_disk
from datasets.utils.logging import disable_progress_bar
from numpy.typing import NDArray

from rayrm.data.records import Group, data_fingerprint
from rayrm.errors import DataError, EmptyResponse, RowError, RowTooLong
from rayrm.files import cache_directory, keep_first
from rayrm.packing import Ids, TokenGroup, plan_packs
from rayrm.rows import Row
from rayrm.text.fingerprints import fingerprint_of_text
from rayrm.text.template import Overlong, Template
from rayrm.training.split_pairs import connected, split_pairs

# Part of the cache key. Increase it whenever the same groups would be encoded differently.
ENCODING = 5

# Number of bad responses that are listed; the rest are only counted.
LISTED_BAD_RESPONSES = 10


@dataclass(frozen=True)
class PreferenceGroup:
    """The token ids of a prompt's responses and N preferred pairs, for all or part of a prompt.

    chosen, rejected [N]: indices of responses. margin, label [N]: label is the probability that
    chosen wins. choice [N], from 0: pairs with the same choice are one response chosen over
    several. tie [N]: the two were judged equal. prompt_pairs, prompt_choices: numbers of pairs and
    choices over all parts of the prompt. subset, source: those of the prompt's records.
    """

    tokens: TokenGroup
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    margin: NDArray[np.float32]
    label: NDArray[np.float32]
    choice: NDArray[np.int64]
    tie: NDArray[np.bool_]
    prompt_pairs: int
    prompt_choices: int
    subset: str
    source: str

    @property
    def pairs(self) -> int:
        return len(self.chosen)

    @property
    def choices(self) -> int:
        return int(self.choice.max()) + 1

    def part(self, pairs: NDArray[np.int64]) -> PreferenceGroup:
        """Return the group of these pairs, given by ascending index, and the responses in them."""
        if len(pairs) == self.pairs:
            return self
        chosen, rejected = self.chosen[pairs], self.rejected[pairs]
        kept = np.unique([chosen, rejected])
        prefix, suffixes = self.tokens.prefix, self.tokens.suffixes
        return replace(
            self,
            tokens=TokenGroup.from_rows([np.concatenate([prefix, suffixes[i]]) for i in kept]),
            chosen=np.searchsorted(kept, chosen),
            rejected=np.searchsorted(kept, rejected),
            margin=self.margin[pairs],
            label=self.label[pairs],
            choice=np.unique(self.choice[pairs], return_inverse=True)[1],
            tie=self.tie[pairs],
        )

    def decided(self) -> PreferenceGroup:
        """Return the group with all its responses, but only pairs with a winner and ties."""
        kept = (self.label != 0.5) | self.tie
        choice = np.unique(self.choice[kept], return_inverse=True)[1]
        return replace(
            self,
            chosen=self.chosen[kept],
            rejected=self.rejected[kept],
            margin=self.margin[kept],
            label=self.label[kept],
            choice=choice,
            tie=self.tie[kept],
            prompt_pairs=int(kept.sum()),
            prompt_choices=len(np.unique(choice)),
        )

    def pieces(self, budget: int) -> list[PreferenceGroup]:
        """Split into parts of at most `budget` tokens that share no response.

        A part may exceed the budget if pairs connect all its responses.
        """
        if self.tokens.tokens <= budget:
            return [self]
        parts = [np.array(pairs) for pairs in connected(self.chosen, self.rejected)]
        lengths = np.array([len(suffix) for suffix in self.tokens.suffixes])
        responses = [np.unique([self.chosen[pairs], self.rejected[pairs]]) for pairs in parts]
        costs = [int(lengths[indices].sum()) for indices in responses]
        plans = plan_packs(costs, budget - len(self.tokens.prefix))
        return [self.part(np.sort(np.concatenate([parts[i] for i in plan]))) for plan in plans]


@dataclass
class EncodeReport:
    """The counts of everything that encoding kept, changed or left out."""

    groups: int = 0
    pairs: int = 0
    split_groups: int = 0
    truncated_groups: int = 0
    overlong_responses: int = 0
    empty_responses: int = 0
    dropped_pairs: int = 0
    identical_pairs: int = 0
    prompts_without_thoughts: int = 0
    """Prompts of which the template drops thoughts of earlier turns, by design."""
    bad_responses: int = 0
    """Responses that the template refuses or partly drops."""
    bad: list[str] = field(default_factory=list)
    """Messages about the first bad responses."""

    def __str__(self) -> str:
        counted = {k: v for k, v in asdict(self).items() if v and k != "bad"}
        counts = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in counted.items())
        first = f"; the first bad response: {self.bad[0]}" if self.bad else ""
        return f"encoded {counts}{first}"


@dataclass(frozen=True)
class PreferenceData:
    """Encoded groups, or parts of groups, on disk that are read one at a time.

    fingerprint: hash of their text. text_to_ids: hash of what turned it into ids (fingerprints.py).
    """

    table: Dataset
    report: EncodeReport
    fingerprint: str
    text_to_ids: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> PreferenceGroup:
        row = self.table[index]
        return PreferenceGroup(
            tokens=TokenGroup(_ids(row["prefix"]), tuple(map(_ids, row["suffixes"]))),
            chosen=np.array(row["chosen"], dtype=np.int64),
            rejected=np.array(row["rejected"], dtype=np.int64),
            margin=np.array(row["margin"], dtype=np.float32),
            label=np.array(row["label"], dtype=np.float32),
            choice=np.array(row["choice"], dtype=np.int64),
            tie=np.array(row["tie"], dtype=np.bool_),
            prompt_pairs=row["prompt_pairs"],
            prompt_choices=row["prompt_choices"],
            subset=row["subset"],
            source=row["source"],
        )

    @property
    def largest_id(self) -> int:
        """Return the largest token id of all rows."""
        prefix_ids = pc.list_flatten(self.table.data.column("prefix"))
        suffixes = pc.list_flatten(self.table.data.column("suffixes"))
        suffix_ids = pc.list_flatten(suffixes)
        largest = [pc.max(prefix_ids).as_py(), pc.max(suffix_ids).as_py()]
        return int(max(i for i in largest if i is not None))

    @property
    def undecided(self) -> bool:
        """Return whether no pair has a winner, because every label is 0.5."""
        labels = pc.list_flatten(self.table.data.column("label"))
        return bool(pc.all(pc.equal(labels, 0.5)).as_py())


def encode_groups(
    groups: Sequence[Group],
    template: Template,
    overlong: Overlong,
    *,
    cut_alike: bool = True,
    pairs_per_group: int | None = None,
    whole_choices: bool = False,
    on_bad_record: Literal["error", "skip"] = "error",
) -> PreferenceData:
    """Encode groups, or read them from the cache if the same groups were encoded before.

    cut_alike, for training: overlong "truncate" cuts a group's prompt from the left, the same for
    all its responses, so that the longest row fits max_length; pairs of identical rows are dropped.
    Without cut_alike, every row is cut separately, as in serving, and identical pairs stay.
    overlong "error" drops over-long responses. A group with more pairs than pairs_per_group is
    split into parts; whole_choices keeps the pairs of a choice in one part. on_bad_record "skip"
    drops responses that cannot be encoded, and their pairs. Everything dropped is counted. Raises
    DataError if a response cannot be encoded and on_bad_record is "error", or if no pair is left.
    """
    made_from = data_fingerprint(groups)
    text_to_ids = fingerprint_of_text(template.tokenizer, datetime.now())
    choices = [[p.choice for p in group.preferences] for group in groups]
    options = [overlong, cut_alike, pairs_per_group, whole_choices]
    key = json.dumps([ENCODING, made_from, choices, asdict(template.spec), text_to_ids, options])
    cache = cache_directory("encoded")
    directory = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not directory.exists():
        report = EncodeReport()
        rows = [
            _as_row(part)
            for group in _encode(groups, template, overlong, cut_alike, report)
            for part in _split(group, pairs_per_group, whole_choices, report)
        ]
        if not rows:
            raise DataError(f"no pair is left of the data from {groups[0].source} on: {report}")
        disable_progress_bar()
        partial = Path(tempfile.mkdtemp(dir=cache))
        Dataset.from_list(rows).save_to_disk(partial)
        (partial / "report.json").write_text(json.dumps(asdict(report)))
        keep_first(partial, directory)
    report = EncodeReport(**json.loads((directory / "report.json").read_text()))
    if report.bad and on_bad_record == "error":
        raise DataError(report.bad[0])
    return PreferenceData(load_from_disk(str(directory)), report, made_from, text_to_ids)


def _encode(
    groups: Sequence[Group],
    template: Template,
    overlong: Overlong,
    cut_alike: bool,
    report: EncodeReport,
) -> Iterator[PreferenceGroup]:
    """Yield the groups that have pairs left, as ids; count everything in `report`."""
    rows = [
        [
            Row(group.prompt, response, finished, group.tools)
            for response, finished in zip(group.responses, group.finished, strict=True)
        ]
        for group in groups
    ]
    encoded = iter(template.encode([row for group in rows for row in group]))
    for group, group_rows in zip(groups, rows, strict=True):
        ids = _fit_group(
            [next(encoded) for _ in group_rows],
            group,
            group_rows,
            template,
            overlong,
            cut_alike,
            report,
        )
        pairs = [p for p in group.preferences if p.chosen in ids and p.rejected in ids]
        report.dropped_pairs += len(group.preferences) - len(pairs)
        if cut_alike:
            differ = [p for p in pairs if not np.array_equal(ids[p.chosen], ids[p.rejected])]
            report.identical_pairs += len(pairs) - len(differ)
            pairs = differ
        if not pairs:
            continue
        kept = sorted({i for p in pairs for i in (p.chosen, p.rejected)})
        choice = np.unique([p.choice for p in pairs], return_inverse=True)[1]
        report.groups += 1
        report.pairs += len(pairs)
        report.prompts_without_thoughts += template.dropped_thoughts(group_rows[kept[0]]) > 0
        yield PreferenceGroup(
            tokens=TokenGroup.from_rows([ids[i] for i in kept]),
            chosen=np.searchsorted(kept, [p.chosen for p in pairs]),
            rejected=np.searchsorted(kept, [p.rejected for p in pairs]),
            margin=np.array([p.margin for p in pairs], dtype=np.float32),
            label=np.array([p.label for p in pairs], dtype=np.float32),
            choice=choice,
            tie=np.array([p.tie for p in pairs], dtype=np.bool_),
            prompt_pairs=len(pairs),
            prompt_choices=int(choice.max()) + 1,
            subset=group.subset,
            source=group.source,
        )


def _split(
    group: PreferenceGroup, limit: int | None, whole_choices: bool, report: EncodeReport
) -> list[PreferenceGroup]:
    atoms = group.choice if whole_choices else np.arange(group.pairs)
    parts = split_pairs(group.chosen, group.rejected, atoms, limit)
    if len(parts) > 1:
        report.split_groups += 1
    return [group.part(pairs) for pairs in parts]


def _as_row(group: PreferenceGroup) -> dict[str, Any]:
    columns = {f.name: getattr(group, f.name) for f in fields(group) if f.name != "tokens"}
    return {"prefix": group.tokens.prefix, "suffixes": list(group.tokens.suffixes), **columns}


def _fit_group(
    encoded: Sequence[Ids | RowError],
    group: Group,
    rows: Sequence[Row],
    template: Template,
    overlong: Overlong,
    cut_alike: bool,
    report: EncodeReport,
) -> dict[int, Ids]:
    """Return the ids of the responses that fit max_length, by response index.

    With cut_alike, the prompt is cut the same for the whole group, else row by row. Counts the
    responses left out in `report`.
    """
    ids: dict[int, Ids] = {}
    cut = False
    for i, result in enumerate(encoded):
        if isinstance(result, EmptyResponse):
            report.empty_responses += 1
        elif isinstance(result, RowTooLong):
            report.overlong_responses += 1
        elif isinstance(result, RowError):
            report.bad_responses += 1
            if len(report.bad) < LISTED_BAD_RESPONSES:
                report.bad.append(f"{group.source}: response {i + 1}: {result}")
        else:
            fitted, shorter = template.fit(rows[i], result, overlong)
            if isinstance(fitted, RowError):
                report.overlong_responses += 1
            else:
                ids[i] = result if cut_alike else fitted
                cut = cut or shorter
    if cut:
        report.truncated_groups += 1
    if not (cut and cut_alike):
        return ids
    alike, _ = template.fit_alike([rows[i] for i in ids], list(ids.values()), overlong)
    fits = {i: row for i, row in zip(ids, alike, strict=True) if not isinstance(row, RowError)}
    report.overlong_responses += len(ids) - len(fits)
    return fits


def _ids(values: list[int]) -> Ids:
    return np.array(values, dtype=np.int32)


@dataclass(frozen=True)
class Schedule:
    """A mapping from optimizer steps to groups, determined by seed, epoch and data only."""

    groups: int
    groups_per_step: int
    epochs: float
    seed: int
    fingerprint: str
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.groups / self.groups_per_step)

    @property
    def steps(self) -> int:
        return max(1, round(self.epochs * self.steps_per_epoch))

    def __getitem__(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            rng = np.random.default_rng([self.seed, epoch, int(self.fingerprint[:16], 16)])
            self._orders[epoch] = rng.permutation(self.groups)
        start = place * self.groups_per_step
        return [int(i) for i in self._orders[epoch][start : start + self.groups_per_step]]
