"""Recipes: settings known to train a good draft for a target, as data (``recipes.json``), so that
``--cache`` alone is enough.

A recipe only sets defaults: a flag on the command line takes precedence. Settings are
``TrainConfig`` fields, ``targets`` are the model ids that it is chosen for, ``shapes`` their hidden
sizes and numbers of layers, ``source`` where its numbers come from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import MismatchError, UsageError
from dspark.train.config import TrainConfig
from dspark.train.draft.types import drafter

if TYPE_CHECKING:
    from dspark.cache.manifest import TargetInfo

AUTO, NONE = "auto", "none"
# What a recipe may not say: these belong to a run and its machine.
OF_A_RUN = {
    "cache",
    "caches",
    "output",
    "device",
    "dtype",
    "workers",
    "compile",
    "strategy",
    "recipe",
    "init_from",
    "tensorboard",
    "logger",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    targets: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    source: str
    settings: Mapping[str, Any]

    def fits(self, target: str) -> bool:
        """Tell whether ``target`` is one of its ids, or a path or id that ends like one
        (``/models/Qwen3-4B``).
        """
        own = {t.lower() for t in self.targets} | {t.split("/")[-1].lower() for t in self.targets}
        return target.lower() in own or target.rstrip("/").split("/")[-1].lower() in own

    def check_fits(self, target: TargetInfo, where: str) -> None:
        """Raise MismatchError for a target that is neither one of the recipe's nor of the same
        shape: a fine-tuned target has another name, but fits.
        """
        if self.fits(target.id) or (target.hidden_size, target.num_layers) in self.shapes:
            return
        own = next((r.name for r in recipes().values() if r.fits(target.id)), None)
        do = f"Its own recipe is {own}" if own else "No recipe is known for it: leave --recipe out"
        raise MismatchError(
            f"--recipe {self.name} is for {', '.join(self.targets)}; the target of {where} is "
            f"{target.id} (hidden size {target.hidden_size}, {target.num_layers} layers). "
            f"{do}; with any target, its settings can be given as flags."
        )


def parse(text: str, where: str) -> dict[str, Recipe]:
    """Parse recipes by name. Raises UsageError for unknown training settings."""
    allowed = {f.name for f in dataclasses.fields(TrainConfig)} - OF_A_RUN
    out = {}
    for name, entry in json.loads(text).items():
        if set(entry) != {"targets", "shapes", "source", "settings"}:
            raise UsageError(
                f"{where}: {name} has {sorted(entry)}; expected targets, shapes, source and "
                "settings"
            )
        if unknown := sorted(set(entry["settings"]) - allowed):
            raise UsageError(
                f"{where}: {name} sets {', '.join(unknown)}, which a recipe cannot set"
            )
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in entry["settings"].items()
        }
        TrainConfig(cache="", **settings)
        out[name] = Recipe(
            name,
            tuple(entry["targets"]),
            tuple((h, n) for h, n in entry["shapes"]),
            entry["source"],
            settings,
        )
    return out


@cache
def recipes() -> dict[str, Recipe]:
    """Return every recipe by name."""
    path = Path(__file__).parent / "recipes.json"
    return parse(path.read_text(), path.name)


def configure(given: Mapping[str, Any], recipe: str = AUTO) -> TrainConfig:
    """Return the config of a run from the ``given`` settings (including ``cache``) and a recipe's
    for the others. ``auto`` uses the recipe of the store's target if there is one, else the general
    defaults; ``none`` always uses those.
    """
    from dspark.cache.stored_manifest import read_manifest

    chosen: Recipe | None = None
    if recipe == AUTO:
        target = read_manifest(given["cache"]).target.id
        chosen = next((r for r in recipes().values() if r.fits(target)), None)
    elif recipe != NONE:
        by_name = {name.lower(): r for name, r in recipes().items()}
        if recipe.lower() not in by_name:
            raise UsageError(
                f"--recipe {recipe}: expected {AUTO}, {NONE} or one of {', '.join(recipes())}"
            )
        chosen = by_name[recipe.lower()]
        chosen.check_fits(read_manifest(given["cache"]).target, given["cache"])
    kind = drafter(str(given.get("speculator_type", TrainConfig(cache="").speculator_type)))
    if chosen is None:
        return TrainConfig(**{**kind.defaults, **given})
    own = {**chosen.settings, **kind.defaults}
    meant = own.get("optimizer", TrainConfig(cache="").optimizer)
    if given.get("optimizer", meant) != meant:
        for setting in ("lr", "betas"):  # found for the recipe's optimizer
            own.pop(setting, None)
    return TrainConfig(**{**own, **given, "recipe": chosen.name})
