"""A draft folder round trip, and every way in which a folder may not be what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_cases import VOCAB, small_batch, small_draft, small_target
from dspark.cache.errors import DraftError
from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.folder import load_draft, save_draft

IDS = torch.tensor([2, 3, 5, 8, 13, 21, 34])


def drafts() -> list[DraftModel]:
    return [
        small_draft(),
        small_draft(draft_ids=IDS),
        small_draft(tied=False, markov_head_type="rnn"),
        small_draft(speculator_type="dflash", markov_rank=0, enable_confidence_head=False),
    ]


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("number", range(4))
def test_round_trip_gives_the_same_states(number: int, tmp_path: Path) -> None:
    model = drafts()[number]
    save_draft(tmp_path, model, dtype=torch.float32)
    again = load_draft(tmp_path, small_target())
    assert again.config == model.config
    batch = small_batch()
    with torch.no_grad():
        a, b = model(batch, model.plan(batch)), again(batch, again.plan(batch))
    assert torch.equal(a.h, b.h)
    if a.z is not None:
        assert torch.equal(a.z, b.z)
        assert torch.equal(a.confidence, b.confidence)
    assert torch.equal(model.frozen_head.draft_head, again.frozen_head.draft_head)
    files = sorted(tmp_path.iterdir())
    assert [p.name for p in files] == ["config.json", "model.safetensors"]
    assert files[0].stat().st_mode == files[1].stat().st_mode  # as any other file's


def test_what_is_in_the_file(tmp_path: Path) -> None:
    save_draft(tmp_path, small_draft(draft_ids=IDS))
    tensors = load_file(tmp_path / "model.safetensors")
    assert [name for name in tensors if "lm_head" in name] == ["lm_head.weight"]
    assert tensors["lm_head.weight"].shape == (7, 32)
    assert (tensors["d2t"] + torch.arange(7)).tolist() == IDS.tolist()
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].nonzero().flatten().tolist() == IDS.tolist()
    assert tensors["markov_head.markov_w2.weight"].shape == (7, 6)
    assert tensors["markov_head.markov_w1.weight"].shape == (VOCAB, 6)
    assert all(v.dtype == torch.bfloat16 for k, v in tensors.items() if k not in ("d2t", "t2d"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["vllm_servable"], config["draft_vocab_size"]) == (
        "bfloat16",
        True,
        7,
    )


def test_full_vocabulary_borrows_the_targets_matrices(tmp_path: Path) -> None:
    model = small_draft(tied=True)
    save_draft(tmp_path / "lean", model)
    assert not {"embed_tokens.weight", "lm_head.weight", "d2t"} & set(
        load_file(tmp_path / "lean" / "model.safetensors")
    )
    save_draft(tmp_path / "full", model, include_frozen=True)
    tensors = load_file(tmp_path / "full" / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], tensors["lm_head.weight"])
    load_draft(tmp_path / "full", small_target(tied=True))


def test_dflash_is_served_by_a_zero_markov_head(tmp_path: Path) -> None:
    save_draft(tmp_path, drafts()[3])
    tensors = load_file(tmp_path / "model.safetensors")
    rank = json.loads((tmp_path / "config.json").read_text())["markov_rank"]
    assert tensors["markov_head.markov_w1.weight"].shape == (VOCAB, rank)
    assert not tensors["markov_head.markov_w2.weight"].any()


def test_gated_is_marked_as_not_served(tmp_path: Path) -> None:
    save_draft(tmp_path, small_draft(markov_head_type="gated"))
    assert json.loads((tmp_path / "config.json").read_text())["vllm_servable"] is False


def test_overwrite_replaces_both_files(tmp_path: Path) -> None:
    save_draft(tmp_path, small_draft(1), dtype=torch.float32)
    second = small_draft(9, num_layers=1)
    save_draft(tmp_path, second, dtype=torch.float32)
    assert torch.equal(load_draft(tmp_path, small_target()).fc.weight, second.fc.weight)


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["layers.1.self_attn.k_norm.weight"]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["layers.2.self_attn.k_norm.weight"] = torch.zeros(16)


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors["fc.weight"] = torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"missing layers\.1\.self_attn\.k_norm"),
        (_add, r"unexpected layers\.2"),
        (_reshape, r"fc\.weight is \[32, 32\]"),
    ],
)
def test_tensors_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    save_draft(tmp_path, small_draft())
    edit(tmp_path, change)
    with pytest.raises(DraftError, match=message):
        load_draft(tmp_path, small_target())


def _no_d2t(tensors: dict[str, Tensor]) -> None:
    del tensors["d2t"]


def _ids_for_offsets(tensors: dict[str, Tensor]) -> None:
    tensors["d2t"] = IDS.clone() * 2


def _other_t2d(tensors: dict[str, Tensor]) -> None:
    tensors["t2d"][0] = True


def _other_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"][0, 0] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_d2t, "needs d2t"),
        (_ids_for_offsets, "offsets"),
        (_other_t2d, "different tokens"),
        (_other_head, "another model"),
    ],
)
def test_reduced_vocabulary_that_does_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    save_draft(tmp_path, small_draft(draft_ids=IDS))
    edit(tmp_path, change)
    with pytest.raises(DraftError, match=message):
        load_draft(tmp_path, small_target())


def test_folders_that_are_no_drafts(tmp_path: Path) -> None:
    with pytest.raises(DraftError, match=r"config\.json"):
        load_draft(tmp_path, small_target())
    save_draft(tmp_path, small_draft())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DraftError, match="safetensors"):
        load_draft(tmp_path, small_target())
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(DraftError, match="not JSON"):
        load_draft(tmp_path, small_target())
