"""Drafter types: the registry, and a new type made of one object and one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import small_training
from torch import Tensor

import dspark.cache
import stores
from dspark.cache.errors import DraftError, MismatchError, UsageError
from dspark.train.draft import types
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.dspark import DSpark
from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.folder import load_draft, trained_shapes
from dspark.train.loop import train
from dspark.train.objective.config import ObjectiveConfig


class Toy(DSpark):
    """Reads two of the store's layers, is trained by cross-entropy alone, and keeps one tensor
    under another name.
    """

    name = "toy"
    summary = "for a test"

    def layers(self, stored: Any, target: Any, asked: Any = None) -> tuple[int, ...]:
        if not {1, 4} <= set(stored):
            raise MismatchError(f"toy needs layers 1 and 4, the store has {list(stored)}")
        return 1, 4

    def objective(self, settings: Any) -> ObjectiveConfig:
        return ObjectiveConfig(
            ce=1.0, l1=0.0, kl=0.0, confidence=settings.confidence_head_alpha, decay=0.0
        )

    def recognises(self, flat: Mapping[str, Any]) -> bool:
        return False

    def served(
        self, tensors: dict[str, Tensor], config: DraftConfig, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {("toy.fc" if name == "fc.weight" else name): t for name, t in tensors.items()}

    def learnt(self, stored: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        return {("fc.weight" if name == "toy.fc" else name): t for name, t in stored.items()}

    def written(self, folder: Path, model: DraftModel) -> None:
        (folder / "toy.json").write_text(json.dumps({"layers": model.config.target_layer_ids}))


TOY = Toy()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "toy_type", sys.modules[__name__])
    monkeypatch.setitem(types.TYPES, "toy", "toy_type:TOY")
    types.drafter.cache_clear()


@pytest.mark.usefixtures("toy")
def test_a_type_is_one_object_and_one_line(tmp_path: Path) -> None:
    config = small_training(tmp_path, [40, 52, 61, 44, 58, 47], speculator_type="toy", max_steps=4)
    result = train(config)
    assert result["ce_loss"] > 0
    flat = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (flat["speculator_type"], flat["target_layer_ids"]) == ("toy", [1, 4])
    assert json.loads((tmp_path / "draft" / "toy.json").read_text()) == {"layers": [1, 4]}
    draft = load_draft(tmp_path / "draft", dspark.cache.open(config.cache).target)
    assert trained_shapes(draft.config)["toy.fc"] == (stores.HIDDEN, 2 * stores.HIDDEN)
    first, *_ = (tmp_path / "draft" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(first)
    # Cross-entropy alone, all slots alike, and the confidence loss.
    assert row["loss"] == pytest.approx(row["ce_loss"] + row["confidence_loss"], rel=1e-5)
    decoder = types.drafter("toy").decoder(draft)
    decoder.extend(torch.zeros(3, 2, stores.HIDDEN), torch.tensor([1, 2, 3]))
    assert decoder.draft(5).tokens.shape == (3,)
    assert decoder.length == 3


def test_unknown_types_are_refused() -> None:
    with pytest.raises(UsageError, match="expected one of dspark, dflash, spd, eagle3, peagle"):
        types.drafter("eagle9")
    with pytest.raises(DraftError, match="eagle9"):
        DraftConfig.from_flat({"speculator_type": "eagle9"})
