"""Split a prompt's pairs into parts of bounded size; an optimizer step takes whole parts.

Plans only by which responses are compared. Does not know about tokens, text, losses or ranks, so
that the parts depend on data and config only.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from rayrm.packing import plan_packs

Ints = NDArray[np.int64]


def split_pairs(chosen: Ints, rejected: Ints, atoms: Ints, limit: int | None) -> list[Ints]:
    """Split pairs into parts of at most `limit` pairs, and return the pair indices of each part.

    chosen, rejected [N]: the responses of each pair. atoms [N]: pairs with the same atom stay
    together, even above the limit. Up to the limit (None: no limit) all pairs are one part. Above
    it, parts share no response, except where more pairs than the limit are connected: these are
    cut so that few responses are in several parts.
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
    """Return the pair indices of each connected component of the comparisons, by first pair."""
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
    """Split connected pairs into parts; each grows by the atom that adds the fewest responses.

    Up to the limit, the pairs become one part.
    """
    members: dict[int, list[int]] = {}
    for pair in pairs:
        members.setdefault(int(atoms[pair]), []).append(pair)
    responses = {
        atom: {*chosen[indices].tolist(), *rejected[indices].tolist()}
        for atom, indices in members.items()
    }
    atoms_of: dict[int, list[int]] = {}
    for atom, in_atom in responses.items():
        for response in in_atom:
            atoms_of.setdefault(response, []).append(atom)
    remaining = set(members)
    parts = []
    for seed in members:
        if seed not in remaining:
            continue
        part: list[int] = []
        seen: set[int] = set()
        unseen: dict[int, int] = {}
        heap = [(0, seed)]
        while heap:
            _, atom = heappop(heap)
            if atom not in remaining:
                continue
            if part and len(part) + len(members[atom]) > limit:
                break
            remaining.remove(atom)
            part += members[atom]
            for response in responses[atom] - seen:
                seen.add(response)
                for other in atoms_of[response]:
                    if other in remaining:
                        unseen[other] = unseen.get(other, len(responses[other])) - 1
                        heappush(heap, (unseen[other], other))
        parts.append(part)
    return parts
