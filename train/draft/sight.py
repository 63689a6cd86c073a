"""What a draft layer's queries may see, and its form in config.json (``layer_types``,
``sliding_window``, ``is_causal``).

A layer attends fully, or through a sliding window of W tokens: a query at position p sees the keys
at p-W+1..p, of the context and of its own block, as vLLM serves it. Sliding layers are causal
within the block, full ones see it in both directions, unless ``is_causal`` sets one rule for all
(vLLM 0.32, ``_dflash_layer_causal``). A window that is not causal reaches W-1 tokens in both
directions (``_maybe_symmetrize_window``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.cache.errors import DraftError, UsageError

FULL, SLIDING = "full_attention", "sliding_attention"
# What ``--layer-types`` takes beside the names of config.json.
SHORT = {"full": FULL, "sliding": SLIDING}


@dataclass(frozen=True, slots=True)
class Sight:
    """``window`` W: a query sees itself and the W-1 tokens before it; None = all of its context.
    ``causal``: it sees no later slot of its block.
    """

    window: int | None = None
    causal: bool = False


def layer_kinds(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Return ``names``, short or as in config.json, as config.json has them. Raises UsageError for
    an unknown name.
    """
    kinds = tuple(SHORT.get(name, name) for name in names)
    if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise UsageError(f"{where}: {unknown[0]!r}; only {FULL} and {SLIDING} are implemented")
    return kinds


def canonical(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return () if all layers attend fully, as ``DraftConfig`` requires."""
    return tuple(kinds) if SLIDING in kinds else ()


def asked(num_layers: int, window: int | None, kinds: Sequence[str]) -> tuple[str, ...]:
    """``layer_types`` of a draft for ``--sliding-window`` and ``--layer-types``: the window alone
    applies to all layers. Raises UsageError.
    """
    if window is None and SLIDING in kinds:
        raise UsageError("--layer-types names sliding layers; set --sliding-window for them")
    if window is not None and kinds and SLIDING not in kinds:
        raise UsageError("--sliding-window is given, but --layer-types names no sliding layer")
    return canonical(kinds or ([FULL] if window is None else [SLIDING]) * num_layers)


def sights(
    num_layers: int, kinds: Sequence[str], window: int | None, causal: bool | None
) -> tuple[Sight, ...]:
    """Return one sight per layer. ``kinds`` as from ``canonical``, ``causal`` as ``is_causal`` in
    config.json.
    """

    def of(kind: str) -> Sight:
        sliding = kind == SLIDING
        return Sight(window if sliding else None, sliding if causal is None else causal)

    return tuple(map(of, kinds or [FULL] * num_layers))


def read(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``DraftConfig`` about attention in a flat config.json. Raises
    DraftError, naming the key.
    """
    names = flat.get("layer_types") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DraftError(f"config.json has layer_types {names!r}; expected a list of names")
    try:
        kinds = canonical(layer_kinds(names, "config.json has layer_types"))
    except UsageError as wrong:
        raise DraftError(str(wrong)) from wrong
    causal = flat.get("is_causal")
    if causal is not None and not isinstance(causal, bool):
        raise DraftError(f"config.json has is_causal = {causal!r}; expected true or false")
    window = flat.get("sliding_window") if kinds else None
    if kinds and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise DraftError(
            f"config.json has sliding layers and sliding_window = {window!r}; expected a number "
            "of tokens"
        )
    # False is what layers with full attention do anyway.
    return {
        "layer_types": kinds,
        "sliding_window": window,
        "is_causal": causal if kinds or causal else None,
    }


def written(
    num_layers: int, kinds: Sequence[str], window: int | None, causal: bool | None
) -> dict[str, Any]:
    """Return the keys of config.json that ``read`` understands."""
    out: dict[str, Any] = {"layer_types": list(kinds or [FULL] * num_layers)}
    if kinds:
        # transformers drops the window of a Qwen3 config without the second key.
        out |= {"sliding_window": window, "use_sliding_window": True}
    return out if causal is None else out | {"is_causal": causal}
