"""Recipes: what is known to train a good draft of a target, as data (``recipes.json``), so that ``--cache`` alone is enough.

A recipe sets defaults and nothing else: a flag given on the command line wins. Settings are ``TrainConfig`` fields, ``targets`` the
model ids that it is chosen for, ``source`` where its numbers are from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dspark.cache.errors import UsageError
from dspark.train.config import TrainConfig

AUTO, NONE = "auto", "none"
# What a recipe may not say: these belong to a run and its machine.
OF_A_RUN = {
    "cache",
    "output",
    "device",
    "dtype",
    "workers",
    "compile",
    "strategy",
    "recipe",
    "tensorboard",
    "logger",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    targets: tuple[str, ...]
    source: str
    settings: Mapping[str, Any]

    def fits(self, target: str) -> bool:
        """Whether ``target`` is one of its ids, or a path or id that ends as one does (``/models/Qwen3-4B``)."""
        own = {t.lower() for t in self.targets} | {t.split("/")[-1].lower() for t in self.targets}
        return target.lower() in own or target.rstrip("/").split("/")[-1].lower() in own


def parse(text: str, where: str) -> dict[str, Recipe]:
    """Recipes by name. Raises UsageError for settings that are no setting of a training."""
    allowed = {f.name for f in dataclasses.fields(TrainConfig)} - OF_A_RUN
    out = {}
    for name, entry in json.loads(text).items():
        if set(entry) != {"targets", "source", "settings"}:
            raise UsageError(f"{where}: {name} has {sorted(entry)}; expected targets, source and settings")
        if unknown := sorted(set(entry["settings"]) - allowed):
            raise UsageError(f"{where}: {name} sets {', '.join(unknown)}, which no recipe can")
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in entry["settings"].items()
        }
        TrainConfig(cache="", **settings)
        out[name] = Recipe(name, tuple(entry["targets"]), entry["source"], settings)
    return out


@cache
def recipes() -> dict[str, Recipe]:
    """Every recipe by name."""
    path = Path(__file__).parent / "recipes.json"
    return parse(path.read_text(), path.name)


def configure(given: Mapping[str, Any], recipe: str = AUTO) -> TrainConfig:
    """The config of a run from the settings that were ``given`` (``cache`` among them) and a recipe's for the others.

    ``auto`` takes the recipe of the store's target if there is one, else the general defaults; ``none`` always those.
    """
    chosen: Recipe | None = None
    if recipe == AUTO:
        from dspark.cache.reader import read_manifest

        target = read_manifest(given["cache"]).target.id
        chosen = next((r for r in recipes().values() if r.fits(target)), None)
    elif recipe != NONE:
        by_name = {name.lower(): r for name, r in recipes().items()}
        if recipe.lower() not in by_name:
            raise UsageError(f"--recipe {recipe}: expected {AUTO}, {NONE} or one of {', '.join(recipes())}")
        chosen = by_name[recipe.lower()]
    if chosen is None:
        return TrainConfig(**given)
    own = dict(chosen.settings)
    meant = own.get("optimizer", TrainConfig(cache="").optimizer)
    if given.get("optimizer", meant) != meant:
        for setting in ("lr", "betas"):  # found for the recipe's optimizer
            own.pop(setting, None)
    return TrainConfig(**{**own, **given, "recipe": chosen.name})
