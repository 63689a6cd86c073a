"""Which of a target's layers the drafter types read: before a dump, what a store must hold; before
a training, what it lacks.

Two conventions name a layer: ``--layers`` i = output of decoder layer i, 0-based;
``--target-layer-ids`` j = the state entering layer j (vLLM, speculators), j = i + 1. Here all are
outputs. Block drafts read any layers they are given; EAGLE-3 and P-EAGLE read three; an SPD head
reads the ends of its pipeline's stages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dspark.cache.errors import MismatchError, UsageError

BOTH = (
    "--layers i means the output of decoder layer i (0-based); --target-layer-ids j means the "
    "state entering layer j, so j = i + 1"
)

BLOCKS = ("dspark", "dflash")
THREE = ("eagle3", "peagle")
STAGES = 3  # default number of stages of a pipeline: the published SPD head's
READERS = (*BLOCKS, *THREE, "spd")
AUX = 3


def parse_ids(text: str, flag: str) -> tuple[int, ...]:
    """Parse ``"7,22,38"`` or ``"8 23 39"`` into ids, not yet checked against a target."""
    words = [w for w in re.split(r"[,\s]+", text.strip()) if w]
    if not words or not all(re.fullmatch(r"-?\d+", w) for w in words):
        raise UsageError(
            f'{flag}: found {text!r}, expected layer numbers such as 7,22,38 or "8 23 39". {BOTH}.'
        )
    return tuple(int(w) for w in words)


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Return five layers spread evenly from 1 to n-3 (36 layers: 1, 9, 17, 25, 33); fewer if the
    target has too few.
    """
    if num_layers <= 2:
        return (0,)
    first, last = 1, max(num_layers - 3, 1)
    count = min(5, last - first + 1)
    if count == 1:
        return (first,)
    return tuple(round(first + k * (last - first) / (count - 1)) for k in range(count))


def low_middle_high(num_layers: int) -> tuple[int, ...]:
    """Return EAGLE-3's three layers (36 layers: 1, 17, 32). Targets with fewer than six layers give
    three others; those with fewer than three give none.
    """
    if num_layers >= 6:
        return 1, num_layers // 2 - 1, num_layers - 4
    return tuple(range(num_layers))[-AUX:] if num_layers >= AUX else ()


def stage_ends(num_layers: int, stages: int = STAGES) -> tuple[int, ...]:
    """Return the last layer of each of ``stages`` equal stages (47 layers: 14, 30, 46)."""
    return tuple(sorted({num_layers * (k + 1) // stages - 1 for k in range(stages)} - {-1}))


def wanted(kind: str, num_layers: int) -> tuple[int, ...]:
    """Return the layers that a store only for drafts of this type would hold."""
    if kind in THREE:
        return low_middle_high(num_layers)
    return stage_ends(num_layers) if kind == "spd" else default_layers(num_layers)


def serving(
    kinds: Sequence[str], num_layers: int, blocks: tuple[int, ...] | None = None
) -> dict[str, tuple[int, ...]]:
    """Map each type to the layers it reads, so that one store serves all ``kinds`` with few layers.
    ``blocks``: what block drafts of this target read, if a recipe says so. EAGLE-3 and P-EAGLE
    choose their three among the block drafts' layers, if any: one more layer would cost a sixth of
    the store.
    """
    own = {
        kind: blocks if kind in BLOCKS and blocks else wanted(kind, num_layers) for kind in kinds
    }
    shared = next((own[kind] for kind in BLOCKS if kind in own), None)
    if shared is not None and len(shared) >= AUX:
        own |= {kind: nearest(shared, low_middle_high(num_layers)) for kind in THREE if kind in own}
    return own


def chosen(kind: str, stored: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return which of the ``stored`` layers a draft of this type reads. Raises MismatchError,
    naming the layers to dump, if they do not suffice.
    """
    usable = tuple(i for i in stored if i >= 0)
    if kind in THREE:
        if len(usable) < AUX:
            raise lacking(
                kind,
                f"reads {AUX} layers: one low, one middle, one high",
                stored,
                wanted(kind, num_layers),
            )
        return nearest(usable, low_middle_high(num_layers))
    if kind == "spd":
        if len(usable) < 2:
            raise lacking(
                kind,
                "needs the last layer of each of at least two stages",
                stored,
                wanted(kind, num_layers),
            )
        return usable
    return tuple(stored)


def lacking(kind: str, needs: str, stored: Sequence[int], layers: Sequence[int]) -> MismatchError:
    """Return the error for a store whose layers do not suffice for a type."""
    missing = [i for i in layers if i not in stored]
    return MismatchError(
        f"a draft of type {kind} {needs}; the store has {list(stored)} and lacks {missing} of "
        f"{list(layers)}. "
        f"dspark-dump --for {kind}, or --layers "
        f"{','.join(map(str, sorted({*layers, *stored} - {-1})))} for both"
    )


def remark(kind: str, read: Sequence[int], stored: Sequence[int], num_layers: int) -> str:
    """Return the line in which a training states its layers before it starts."""
    line = f"layers: {kind} reads {list(read)} of the store's {list(stored)}"
    others = [i for i in wanted(kind, num_layers) if i not in stored]
    if kind in BLOCKS or not others:
        return line
    return f"{line}; a dump with --for {kind} would also store {others}"


def nearest(stored: Sequence[int], wished: Sequence[int]) -> tuple[int, ...]:
    """Choose as many of ``stored`` (ascending) as are ``wished``, in ascending order, each as near
    to its wish as the others allow.
    """
    out: list[int] = []
    for k, wish in enumerate(wished):
        first = stored.index(out[-1]) + 1 if out else 0
        room = stored[first : len(stored) - (len(wished) - k - 1)]
        out.append(min(room, key=lambda i: (abs(i - wish), i)))
    return tuple(out)
