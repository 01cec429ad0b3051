"""Preferences as ids: a table of groups on disk, encoded once, and the order they are trained in.

Text becomes ids up front, cached as Arrow under the user's cache by content, and is read from there
by every rank. Knows nothing of models or ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, load_from_disk
from datasets.utils.logging import disable_progress_bar
from numpy.typing import NDArray

from rayrm.data import Group, data_fingerprint
from rayrm.errors import DataError, EmptyResponse, RowError, RowTooLong
from rayrm.fingerprints import fingerprint_of_text
from rayrm.packing import Ids, TokenGroup
from rayrm.template import Overlong, Row, Template

# Part of the cache's key: goes up whenever the same groups would be encoded differently.
ENCODING = 3

# So many bad responses are told; the others are counted.
TOLD = 10


@dataclass(frozen=True)
class PreferenceGroup:
    """A group of ids and its N preferred pairs: chosen, rejected [N] index its responses.

    Pairs of one choice [N], counted from 0, are one response chosen before several.
    """

    tokens: TokenGroup
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    margin: NDArray[np.float32]
    label: NDArray[np.float32]
    choice: NDArray[np.int64]
    subset: str
    source: str

    @property
    def pairs(self) -> int:
        return len(self.chosen)

    @property
    def choices(self) -> int:
        return int(self.choice.max()) + 1


@dataclass
class EncodeReport:
    """What encoding did to the data; everything that is not trained on is counted here."""

    groups: int = 0
    pairs: int = 0
    truncated_groups: int = 0
    overlong_responses: int = 0
    empty_responses: int = 0
    dropped_pairs: int = 0
    identical_pairs: int = 0
    bad_responses: int = 0
    """That the template refuses, or drops something of."""
    bad: list[str] = field(default_factory=list)
    """One message for each of the first of them."""

    def __str__(self) -> str:
        counted = {k: v for k, v in asdict(self).items() if v and k != "bad"}
        counts = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in counted.items())
        first = f"; the first bad response: {self.bad[0]}" if self.bad else ""
        return f"encoded {counts}{first}"


@dataclass(frozen=True)
class PreferenceData:
    """Groups on disk, read one by one; fingerprint names the text they came from."""

    table: Dataset
    report: EncodeReport
    fingerprint: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> PreferenceGroup:
        row = self.table[index]
        return PreferenceGroup(
            TokenGroup(_ids(row["prefix"]), tuple(map(_ids, row["suffixes"]))),
            np.array(row["chosen"], dtype=np.int64),
            np.array(row["rejected"], dtype=np.int64),
            np.array(row["margin"], dtype=np.float32),
            np.array(row["label"], dtype=np.float32),
            np.array(row["choice"], dtype=np.int64),
            row["subset"],
            row["source"],
        )


def encode_groups(
    groups: Sequence[Group],
    template: Template,
    overlong: Overlong,
    *,
    on_bad_record: Literal["error", "skip"] = "error",
) -> PreferenceData:
    """Encode groups, or read them from the cache if the same ones were encoded before.

    overlong "truncate" cuts a group's prompt from the left so that its longest row fits
    max_length, the same for all of its responses; "error" leaves over-long responses out. Both are
    counted. on_bad_record "skip" counts a response that cannot be encoded at all, and leaves it out
    with the pairs it is in. Raises DataError where there is such a one otherwise, or nothing is
    left.
    """
    made_from = data_fingerprint(groups)
    text_to_ids = fingerprint_of_text(template.tokenizer, datetime.now())
    choices = [[p.choice for p in group.preferences] for group in groups]
    key = json.dumps([ENCODING, made_from, choices, asdict(template.spec), text_to_ids, overlong])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rayrm" / "encoded"
    directory = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not directory.exists():
        cache.mkdir(parents=True, exist_ok=True)
        report = EncodeReport()
        rows = list(_encode(groups, template, overlong, report))
        if not rows:
            raise DataError(f"no pair is left to train on: {report}")
        disable_progress_bar()
        partial = Path(tempfile.mkdtemp(dir=cache))
        Dataset.from_list(rows).save_to_disk(partial)
        (partial / "report.json").write_text(json.dumps(asdict(report)))
        try:
            partial.rename(directory)
        except OSError:
            if not directory.exists():
                raise
            shutil.rmtree(partial)  # another rank was first
    report = EncodeReport(**json.loads((directory / "report.json").read_text()))
    if report.bad and on_bad_record == "error":
        raise DataError(report.bad[0])
    return PreferenceData(load_from_disk(str(directory)), report, made_from)


def _encode(
    groups: Sequence[Group], template: Template, overlong: Overlong, report: EncodeReport
) -> Iterator[dict[str, Any]]:
    rows = [
        [Row(g.prompt, r, f, g.tools) for r, f in zip(g.responses, g.finished, strict=True)]
        for g in groups
    ]
    encoded = iter(template.encode([row for group in rows for row in group]))
    for group, group_rows in zip(groups, rows, strict=True):
        ids = _fit_group(
            [next(encoded) for _ in group_rows], group, group_rows, template, overlong, report
        )
        pairs = [p for p in group.preferences if p.chosen in ids and p.rejected in ids]
        report.dropped_pairs += len(group.preferences) - len(pairs)
        differ = [p for p in pairs if not np.array_equal(ids[p.chosen], ids[p.rejected])]
        report.identical_pairs += len(pairs) - len(differ)
        if not differ:
            continue
        kept = sorted({i for p in differ for i in (p.chosen, p.rejected)})
        tokens = TokenGroup.from_rows([ids[i] for i in kept])
        report.groups += 1
        report.pairs += len(differ)
        yield {
            "prefix": tokens.prefix,
            "suffixes": list(tokens.suffixes),
            "chosen": [kept.index(p.chosen) for p in differ],
            "rejected": [kept.index(p.rejected) for p in differ],
            "margin": [p.margin for p in differ],
            "label": [p.label for p in differ],
            "choice": np.unique([p.choice for p in differ], return_inverse=True)[1].tolist(),
            "subset": group.subset,
            "source": group.source,
        }


def _fit_group(
    encoded: Sequence[Ids | RowError],
    group: Group,
    rows: Sequence[Row],
    template: Template,
    overlong: Overlong,
    report: EncodeReport,
) -> dict[int, Ids]:
    """Rows by response index that fit max_length, after the group's one cut of its prompt."""
    ids: dict[int, Ids] = {}
    for i, result in enumerate(encoded):
        if isinstance(result, EmptyResponse):
            report.empty_responses += 1
        elif isinstance(result, RowTooLong):
            report.overlong_responses += 1
        elif isinstance(result, RowError):
            report.bad_responses += 1
            if len(report.bad) < TOLD:
                report.bad.append(f"{group.source}: response {i + 1}: {result}")
        elif isinstance(template.fit(rows[i], result, overlong)[0], RowTooLong):
            report.overlong_responses += 1
        else:
            ids[i] = result
    excess = max((len(x) for x in ids.values()), default=0) - template.spec.max_length
    if excess > 0:
        report.truncated_groups += 1
        return {i: x[excess:] for i, x in ids.items()}
    return ids


def _ids(values: list[int]) -> Ids:
    return np.array(values, dtype=np.int32)


@dataclass(frozen=True)
class Schedule:
    """Which groups make up which optimizer step: a function of seed, epoch and data alone."""

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
