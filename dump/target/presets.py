"""Presets: what a dump of a known target needs to know, as data (``presets.json``), so that ``--model`` alone is enough.

A preset holds the target's shapes, so that a plan of it needs no network, and the recipe (layers, length, corpus). It is
checked against the target's own config before weights are loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dspark.cache.errors import UsageError
from dspark.dump.target.layers import Shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Recipe of one target. ``layers``: output of decoder layer i. None = the general default applies.

    ``confirmed``: the shapes were read in the target's own config; where they were not, its config wins.
    """

    name: str
    shapes: Shapes
    layers: tuple[int, ...]
    seq_length: int
    assistant_pattern: str | None = None
    data: str | None = None
    mask_token_id: int | None = None
    confirmed: bool = True


@cache
def presets() -> dict[str, Preset]:
    """Every preset by model id."""
    raw = json.loads((Path(__file__).parent / "presets.json").read_text())
    out = {}
    for name, entry in raw.items():
        shapes = Shapes(
            **{k: entry.pop(k) for k in ("hidden_size", "vocab_size", "num_layers", "max_positions")}
        )
        entered = entry.pop("target_layer_ids", None)
        layers = tuple(j - 1 for j in entered) if entered else tuple(entry.pop("layers"))
        out[name] = Preset(name=name, shapes=shapes, layers=layers, **entry)
    return out


def find(model: str) -> Preset | None:
    """The preset of a model id, or of a local folder that carries the last part of one (``/models/GLM-5.2-FP8``)."""
    if model in presets():
        return presets()[model]
    folder = Path(model)
    if folder.is_dir():
        for name, preset in presets().items():
            if name.split("/")[-1] == folder.resolve().name:
                return preset
    return None


def check_shapes(preset: Preset, found: Shapes) -> None:
    """Refuse a preset whose shapes are not the target's, if they are known to be right."""
    if not preset.confirmed:
        return
    if (preset.shapes.hidden_size, preset.shapes.vocab_size, preset.shapes.num_layers) != (
        found.hidden_size,
        found.vocab_size,
        found.num_layers,
    ):
        raise UsageError(
            f"the preset {preset.name} has hidden size, vocabulary and layers "
            f"{preset.shapes.hidden_size}, {preset.shapes.vocab_size}, {preset.shapes.num_layers}; this target's config has "
            f"{found.hidden_size}, {found.vocab_size}, {found.num_layers}. Rename the folder, or pass the right --model."
        )
