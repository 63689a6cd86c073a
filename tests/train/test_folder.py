"""The folder of a run: what lies there is read with care and replaced only when the new run is
ready.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import small_training

import stores
from dspark.cache import errors
from dspark.cache import open as open_store
from dspark.cache.files import atomic
from dspark.train.config import TrainConfig
from dspark.train.loop import train
from dspark.train.optim.base import Snapshot
from dspark.train.run import checkpoint, folder
from dspark.train.run.folder import read_record

LENGTHS = [60, 80, 90, 30, 20, 100]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a":', "is not JSON (Expecting value"),
        (b"\xff\xfe", "is not JSON (.*codec"),
        (b"[1]", "a JSON list"),
        (None, "No such file"),
    ],
)
def test_a_record_that_is_no_record_is_named(
    tmp_path: Path, content: bytes | None, found: str
) -> None:
    path = tmp_path / "training.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.DraftError, match=f"training.json .*{found.replace('(', '[(]')}"):
        read_record(path)


def test_a_record_is_read(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"samples": 3}')
    assert read_record(tmp_path / "store.json") == {"samples": 3}


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small_training(
        tmp_path,
        LENGTHS,
        max_steps=2,
        checkpoint_freq=0.2,
        val_fraction=0.0,
        log_every=10,
        device="cpu",
    )


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"total_seq_len": 64}, errors.UsageError),  # shorter than a sample
        ({"loss_fn": "{"}, errors.UsageError),
        ({"device": "gpu"}, errors.UsageError),
        ({"draft_vocab_size": 10**6}, errors.UsageError),
        ({"cache": "nowhere.zarr"}, errors.NotACacheError),
        ({"val_fraction": 0.9999}, errors.TrainError),
    ],
)
def test_overwrite_deletes_nothing_for_a_run_that_is_refused(
    config: TrainConfig, wrong: dict[str, object], error: type[Exception]
) -> None:
    train(config)
    before = files(Path(config.output))
    with pytest.raises(error):
        train(dataclasses.replace(config, **wrong), overwrite=True)  # type: ignore[arg-type]
    assert files(Path(config.output)) == before


def test_overwrite_leaves_nothing_of_the_old_training(config: TrainConfig) -> None:
    train(config)
    output = Path(config.output)
    (output / "calibration.json").write_text("{}")
    (output / "plots").mkdir()
    (output / "plots" / "a.png").write_text("")
    (output / "link").symlink_to(output.parent / "hs.zarr")
    train(dataclasses.replace(config, max_steps=1, seed=3), overwrite=True)
    assert sorted(p.name for p in output.iterdir()) == [
        "checkpoints",
        "config.json",
        "history.json",
        "metrics.jsonl",
        "model.safetensors",
        "store.json",
        "train.log",
        "train.yaml",
        "training.json",
    ]
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step_00000001"]
    assert read_record(output / "training.json")["seed"] == 3
    # what a link leads to is not the training's
    assert (output.parent / "hs.zarr" / "zarr.json").is_file()


def test_a_deletion_that_was_cut_short_can_be_done_again(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config)

    def full(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(folder.shutil, "rmtree", full)
        with pytest.raises(errors.StoreWriteError, match="draft .*Input/output error"):
            train(config, overwrite=True)
    train(config, overwrite=True)
    assert (Path(config.output) / "model.safetensors").is_file()


def test_a_store_inside_the_training_is_not_deleted_with_it(config: TrainConfig) -> None:
    train(config)
    inside = Path(config.output) / "hs.zarr"
    Path(config.cache).rename(inside)
    with pytest.raises(errors.UsageError, match="would delete .*hs.zarr"):
        train(dataclasses.replace(config, cache=str(inside)), overwrite=True)
    assert (inside / "zarr.json").is_file()


@pytest.mark.parametrize("below", [False, True])
def test_an_output_that_is_a_file_is_named(
    config: TrainConfig, tmp_path: Path, below: bool
) -> None:
    (tmp_path / "notes").write_text("mine")
    output = tmp_path / "notes" / "draft" if below else tmp_path / "notes"
    for overwrite in (False, True):
        with pytest.raises(errors.UsageError, match="--output .*notes is a file"):
            train(dataclasses.replace(config, output=str(output)), overwrite=overwrite)
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "error", "found"),
    [
        ('{"a":', errors.DraftError, "training.json is not JSON"),
        ("{}", errors.UsageError, "training.json names no cache"),
        ('{"cache": "x", "lr": "fast"}', errors.UsageError, "training.json: lr is 'fast'"),
        ('{"cache": "x", "betas": 0.9}', errors.UsageError, "training.json: betas is 0.9"),
    ],
)
def test_resuming_what_cannot_be_read_names_the_file(
    config: TrainConfig, content: str, error: type[Exception], found: str
) -> None:
    train(config)
    (Path(config.output) / "training.json").write_text(content)
    with pytest.raises(error, match=found):
        train(config, resume=True)
    train(config, overwrite=True)
    assert json.loads((Path(config.output) / "training.json").read_text())["lr"] == config.lr


def test_without_tensorboard_training_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = list[str]()
    train(
        small_training(tmp_path, [40, 52, 61, 44], max_steps=2, tensorboard=True), say=said.append
    )
    assert [line for line in said if "--logger tensorboard: not installed" in line]
    assert (tmp_path / "draft" / "model.safetensors").exists()
    assert not (tmp_path / "draft" / "tensorboard").exists()


def flip(path: Path, at: int) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_in_a_checkpoint_is_not_resumed(config: TrainConfig, name: str) -> None:
    train(dataclasses.replace(config, max_steps=2))
    saved = Path(config.output) / "checkpoints" / "step_00000002"
    flip(saved / name, -5)
    with pytest.raises(
        errors.TrainError, match=f"{name}: size and crc32c are .* Remove that folder"
    ):
        train(dataclasses.replace(config, max_steps=2), resume=True)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda s: s["position"].update(step=1), "stored crc32c"),
        (lambda s: s.pop("crc32c"), "has no checksums, as those of earlier releases"),
        (lambda s: s.update(store="0" * 64), "stored crc32c"),
    ],
)
def test_an_edited_state_is_not_resumed(config: TrainConfig, change: Any, found: str) -> None:
    train(dataclasses.replace(config, max_steps=2))
    path = Path(config.output) / "checkpoints" / "step_00000002" / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(errors.TrainError, match=found):
        train(dataclasses.replace(config, max_steps=2), resume=True)


def test_a_checkpoint_under_another_name_is_not_resumed(config: TrainConfig) -> None:
    train(dataclasses.replace(config, max_steps=2))
    saved = Path(config.output) / "checkpoints"
    (saved / "step_00000002").rename(saved / "step_00000009")
    with pytest.raises(errors.TrainError, match="is for step 2, but the folder is step_00000009"):
        train(dataclasses.replace(config, max_steps=2), resume=True)


@pytest.mark.parametrize("store_json", [True, False])
def test_other_states_of_the_same_counts_are_another_store(
    config: TrainConfig, store_json: bool
) -> None:
    """Each sample has the tokens, the mask and the counts that it had, but other states."""
    train(dataclasses.replace(config, max_steps=2))
    store, output = Path(config.cache), Path(config.output)
    manifest = open_store(store).manifest
    shutil.rmtree(store)
    stores.write_store(store, LENGTHS, states_seed=9)
    assert open_store(store).manifest.counts == manifest.counts
    if not store_json:
        (output / "store.json").unlink()
    with pytest.raises(
        errors.MismatchError, match="content: '" if store_json else "its states or masks differ"
    ):
        train(dataclasses.replace(config, max_steps=2), resume=True)


def test_a_checkpoint_saved_again_never_leaves_none(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--keep-checkpoints 1``: whatever call the second save dies in, one of the two is there."""
    train(dataclasses.replace(config, max_steps=2, keep_checkpoints=1))
    folder_ = Path(config.output) / "checkpoints"
    position = checkpoint.read_state(folder_ / "step_00000002").position
    snapshot = Snapshot({"a": torch.zeros(2)}, {"exp_avg": {"a": torch.zeros(2)}}, 2)
    calls = ["_renameat2", "fsync_path", "fsync_tree", "remove"]
    for step, call in itertools.product((2, 3), calls):
        for at in range(4):
            count = itertools.count()

            real = getattr(atomic, call)

            def die(*given: Any, real: Any = real, count: Any = count, at: int = at) -> Any:
                if next(count) == at:
                    raise KeyboardInterrupt
                return real(*given)

            with monkeypatch.context() as broken, suppress(KeyboardInterrupt):
                broken.setattr(atomic, call, die)
                checkpoint.save(folder_, dataclasses.replace(position, step=step), snapshot, 1, "")
            assert checkpoint.found(folder_)
            checkpoint.read_state(checkpoint.found(folder_)[-1])


def test_overwrite_that_was_killed_is_finished_by_the_next(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(dataclasses.replace(config, max_steps=2))
    config = dataclasses.replace(config, max_steps=1)

    def die(output: Path) -> None:
        (output / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(errors.Stopped, match="partly deleted"):
        broken.setattr(folder, "_clear", die)
        train(config, overwrite=True)
    with pytest.raises(errors.ExistsError, match="Use --overwrite again"):
        train(dataclasses.replace(config, max_steps=2), resume=True)
    train(config, overwrite=True)
    assert [p.name for p in (Path(config.output) / "checkpoints").iterdir()] == ["step_00000001"]
    train(config, resume=True)
