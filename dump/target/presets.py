"""Presets: what a dump of a known target needs to know, as data (``presets.json``), so that
``--model`` alone is enough.

A preset holds the target's sizes, so that a plan of it needs no network, and the recipe (layers,
length, corpus), each with its source.
It is checked against the target's own config before weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dspark.cache.errors import UsageError
from dspark.dump.target.layers import Shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Recipe of one target. ``layers``: output of decoder layer i. None = the general default
    applies.

    ``config``: what its text config says, as far as a plan needs it. ``confirmed``: read in the
    target's own config or its class's defaults; if not, the target's config takes precedence.
    ``weight_bytes``: size of the checkpoint. ``sources``: where each value comes from.
    """

    name: str
    config: Mapping[str, Any]
    layers: tuple[int, ...]
    seq_length: int
    sources: Mapping[str, str]
    assistant_pattern: str | None = None
    data: str | None = None
    mask_token_id: int | None = None
    weight_bytes: int | None = None
    confirmed: bool = True

    @property
    def shapes(self) -> Shapes:
        c = self.config
        return Shapes(
            hidden_size=c["hidden_size"],
            vocab_size=c["vocab_size"],
            num_layers=c["num_hidden_layers"],
            max_positions=c["max_position_embeddings"],
        )


@cache
def presets() -> dict[str, Preset]:
    """Return every preset by model id. A number without a source is a bug in this release
    (KeyError).
    """
    raw = json.loads((Path(__file__).parent / "presets.json").read_text())
    out = {}
    for name, entry in raw.items():
        for key in set(entry) - {"sources", "confirmed"}:
            entry["sources"][key]
        entered = entry.pop("target_layer_ids", None)
        layers = tuple(j - 1 for j in entered) if entered else tuple(entry.pop("layers"))
        out[name] = Preset(name=name, layers=layers, **entry)
    return out


def find(model: str) -> Preset | None:
    """Return the preset of a model id, or of a local folder named like the last part of one
    (``/models/GLM-5.2-FP8``).
    """
    if model in presets():
        return presets()[model]
    folder = Path(model)
    if folder.is_dir():
        for name, preset in presets().items():
            if name.split("/")[-1] == folder.resolve().name:
                return preset
    return None


def check_shapes(preset: Preset, found: Shapes) -> None:
    """Refuse a preset whose shapes differ from the target's, if the preset's are confirmed."""
    if not preset.confirmed:
        return
    if (preset.shapes.hidden_size, preset.shapes.vocab_size, preset.shapes.num_layers) != (
        found.hidden_size,
        found.vocab_size,
        found.num_layers,
    ):
        raise UsageError(
            f"the preset {preset.name} has hidden size, vocabulary and layers "
            f"{preset.shapes.hidden_size}, {preset.shapes.vocab_size}, "
            f"{preset.shapes.num_layers}; this target's config has "
            f"{found.hidden_size}, {found.vocab_size}, {found.num_layers}. Rename the folder, or "
            "pass the right --model."
        )
