"""Check from the states alone that the captured layers are in the order, and at the positions, that
they claim.

A residual stream changes little by little: of any three layers, neighbours are the most similar,
and a state is more similar to the last state of its own position than to that of the next one. With
channels brought to mean 0 and deviation 1 over the tokens (so that massive channels do not decide),
the correlation on SmolLM2-135M is 0.78 to 0.93 between one layer and the next, 0.42 to 0.46 between
the five layers of a dump, falling with distance, and with the last state of the same position 0.07
(layer 0) to 0.98 against 0.01 to 0.32 one position off.

Legend: N tokens, L aux layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dspark.dump.engines.engine import States

LEAST_TOKENS = 32  # fewer are not conclusive
MARGIN = 0.03  # of correlation; how much two orders may differ without a finding


def findings(
    states: Sequence[States], stored: Sequence[Sequence[int]], layers: Sequence[int]
) -> list[str]:
    """Return what is wrong with the aux layers of the samples ``states``; ``stored[i]``: positions
    of the rows of ``states[i].last``.
    """
    import torch

    aux = torch.cat(
        [s.aux[torch.tensor(p, device=s.aux.device)] for s, p in zip(states, stored, strict=True)]
    )
    last = torch.cat([s.last for s in states])
    if aux.shape[0] < LEAST_TOKENS:
        return []
    streams = [whitened(x) for x in [*aux.float().unbind(1), last.float()]]
    out = _order(
        torch.stack([torch.stack([(a * b).mean() for b in streams]) for a in streams]).tolist(),
        layers,
    )
    return out or _shift(streams, layers)


def whitened(x: torch.Tensor) -> torch.Tensor:
    """Return ``x[N, H]`` with mean 0 and deviation 1 per channel."""
    x = x - x.mean(0)
    return x / x.square().mean(0).sqrt().clamp(min=1e-6)


def _order(alike: list[list[float]], layers: Sequence[int]) -> list[str]:
    """Check the order. ``alike``: correlations of the aux layers, followed by the last state. In
    the right order, neighbours are the most similar.
    """

    def along(order: list[int]) -> float:
        path = [*order, len(layers)]
        return sum(alike[a][b] for a, b in pairwise(path))

    given = best = list(range(len(layers)))
    while True:
        tries = [best[::-1]]
        for i, j in combinations(range(len(layers)), 2):
            swapped = list(best)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            tries.append(swapped)
        better = max(tries, key=along)
        if along(better) <= along(best) + MARGIN:
            break
        best = better
    if best == given:
        return []
    names = ",".join(str(layers[i]) for i in best)
    return [
        f"the layers are not in the order of --layers {','.join(map(str, layers))}: judging by "
        f"their similarity, the states are those of layers {names}"
    ]


def _shift(streams: Sequence[torch.Tensor], layers: Sequence[int]) -> list[str]:
    last = streams[-1]
    out = []
    for layer, x in zip(layers, streams, strict=False):
        here = float((x * last).mean())
        for what, a, b in (("later", x[:-1], last[1:]), ("earlier", x[1:], last[:-1])):
            if float((a * b).mean()) > here + MARGIN:
                out.append(
                    f"the positions of layer {layer} are shifted by one: its states "
                    f"belong one position {what}"
                )
    return out
