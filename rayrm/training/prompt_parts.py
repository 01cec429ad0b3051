"""A prompt's preferences → parts of bounded size, of which an optimizer step takes whole ones.

Pure planning over which responses are compared: knows nothing of tokens, text, losses or ranks, so
that the parts are a function of data and config alone.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from rayrm.packing import plan_packs

Ints = NDArray[np.int64]


def split_pairs(chosen: Ints, rejected: Ints, atoms: Ints, limit: int | None) -> list[Ints]:
    """Pairs [N], chosen over rejected response, as indices in parts of at most `limit` pairs.

    Up to the limit (None: without one) all are one part. Above it no response is in two parts,
    unless the pairs that connect it are more than the limit by themselves: these are cut so that
    few responses are in several parts. Pairs of one atom [N] stay together whatever the limit.
    """
    if limit is None or len(chosen) <= limit:
        return [np.arange(len(chosen))]
    pieces: list[list[int]] = []
    for pairs in connected(chosen, rejected):
        pieces += _cut(pairs, chosen, rejected, atoms, limit)
    plans = plan_packs([len(piece) for piece in pieces], limit)
    parts = [sorted(pair for piece in plan for pair in pieces[piece]) for plan in plans]
    return [np.array(part) for part in sorted(parts)]


def connected(chosen: Ints, rejected: Ints) -> list[list[int]]:
    """Pairs by the connected part of the comparisons that they are in, in order of first pairs."""
    leader = {response: response for response in [*chosen.tolist(), *rejected.tolist()]}

    def find(response: int) -> int:
        while leader[response] != response:
            leader[response] = leader[leader[response]]
            response = leader[response]
        return response

    for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True):
        leader[find(a)] = find(b)
    parts: dict[int, list[int]] = {}
    for pair, response in enumerate(chosen.tolist()):
        parts.setdefault(find(response), []).append(pair)
    return list(parts.values())


def _cut(
    pairs: list[int], chosen: Ints, rejected: Ints, atoms: Ints, limit: int
) -> list[list[int]]:
    """Connected pairs in parts that grow by the atom that brings the fewest responses along.

    Pairs up to the limit grow into one part.
    """
    members: dict[int, list[int]] = {}
    for pair in pairs:
        members.setdefault(int(atoms[pair]), []).append(pair)
    responses = {
        atom: {*chosen[inside].tolist(), *rejected[inside].tolist()}
        for atom, inside in members.items()
    }
    near: dict[int, list[int]] = {}
    for atom, ends in responses.items():
        for response in ends:
            near.setdefault(response, []).append(atom)
    left = dict.fromkeys(members)
    parts = []
    for seed in members:
        if seed not in left:
            continue
        part: list[int] = []
        seen: set[int] = set()
        unseen: dict[int, int] = {}
        heap = [(0, seed)]
        while heap:
            _, atom = heappop(heap)
            if atom not in left:
                continue
            if part and len(part) + len(members[atom]) > limit:
                break
            del left[atom]
            part += members[atom]
            for response in responses[atom] - seen:
                seen.add(response)
                for other in near[response]:
                    if other in left:
                        unseen[other] = unseen.get(other, len(responses[other])) - 1
                        heappush(heap, (unseen[other], other))
        parts.append(part)
    return parts
