"""The folder of a run: what lies there is read with care and replaced only when the new run is ready."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from small_trainings import small_training

from dspark.cache import errors
from dspark.train.config import TrainConfig
from dspark.train.loop import train
from dspark.train.run import folder
from dspark.train.run.folder import read_record


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a":', "is not JSON (Expecting value"),
        (b"\xff\xfe", "is not JSON (.*codec"),
        (b"[1]", "a JSON list"),
        (None, "No such file"),
    ],
)
def test_a_record_that_is_no_record_is_named(tmp_path: Path, content: bytes | None, found: str) -> None:
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
    lengths = [60, 80, 90, 30, 20, 100]
    return small_training(
        tmp_path, lengths, max_steps=2, checkpoint_freq=0.2, val_fraction=0.0, log_every=10, device="cpu"
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
        "checkpoints", "config.json", "history.json", "metrics.jsonl", "model.safetensors", "store.json", "train.log", "train.yaml", "training.json",
    ]  # fmt: skip
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step_00000001"]
    assert read_record(output / "training.json")["seed"] == 3
    assert (output.parent / "hs.zarr" / "zarr.json").is_file()  # what a link leads to is not the training's


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
def test_an_output_that_is_a_file_is_named(config: TrainConfig, tmp_path: Path, below: bool) -> None:
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
        ('{"cache": "x", "betas": 0.9}', errors.UsageError, "training.json: betas are 0.9"),
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
    train(small_training(tmp_path, [40, 52, 61, 44], max_steps=2, tensorboard=True), say=said.append)
    assert [line for line in said if "--logger tensorboard: not installed" in line]
    assert (tmp_path / "draft" / "model.safetensors").exists()
    assert not (tmp_path / "draft" / "tensorboard").exists()
