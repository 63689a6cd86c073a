"""Two processes train what one does, with DDP, with shared masters and with FSDP2, and go on from
each other's checkpoints; one that fails stops both.

On a CPU with gloo; NCCL takes the same calls. bench/scaling.py compares the curves on two GPUs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stores
from dspark.cache import errors
from dspark.train.config import TrainConfig
from dspark.train.distributed import World
from dspark.train.loop import train

# Rows of 100 tokens: an epoch's last step has fewer rows than there are ranks, and some rows hold
# no anchor (one supervised token).
LENGTHS = [60, 80, 90, 3, 20, 100, 50, 64, 90, 77, 33, 40, 98, 3]
SPEED = {"tokens_per_second", "step_ms", "data_wait_fraction"}


class Stop(Exception):
    """Raised by a progress callback, in place of a crash."""


def settings(folder: Path, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "epochs": 2,
        "num_layers": 1,
        "block_size": 3,
        "markov_rank": 4,
        "total_seq_len": 100,
        "rows_per_step": 3,
        "max_anchors": 16,
        "checkpoint_freq": 0.5,
        "log_every": 1,
        "val_fraction": 0.2,
        "lr": 1e-2,
        "tensorboard": False,
        "device": "cpu",
    }
    return TrainConfig(cache=str(folder / "hs.zarr"), **{**base, **changes})


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    text = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEED} for line in text]


def torchrun(*args: str, processes: int = 2) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *args,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    stores.write_store(path / "hs.zarr", LENGTHS)
    return path


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    """The same training by one process, by two, stopped by one kind and resumed by the other; all
    jobs of two in one launch.
    """
    names = (
        "one ddp fsdp2 two_one one_two broken muon_one muon zero zero_one one_zero muon_zero "
        "half half_zero half_fsdp2 unread killed files muon_fsdp2 muon_back full last"
    )
    at = {n: settings(folder, output=str(folder / n)) for n in names.split()}
    for name in ("muon_one", "muon", "muon_zero", "muon_fsdp2", "muon_back"):
        at[name] = dataclasses.replace(at[name], optimizer="muon", lr=2e-2)
    for name in ("half", "half_zero", "half_fsdp2"):
        at[name] = dataclasses.replace(at[name], dtype="bfloat16", epochs=1, lr=1e-3)
    for name in ("ddp", "muon", "half"):
        at[name] = dataclasses.replace(at[name], strategy="ddp")
    at["muon_fsdp2"] = dataclasses.replace(at["muon_fsdp2"], strategy="fsdp2")
    at["half_fsdp2"] = dataclasses.replace(at["half_fsdp2"], strategy="fsdp2")
    at["fsdp2"] = dataclasses.replace(at["fsdp2"], strategy="fsdp2", activation_checkpointing=True)
    resumed = dataclasses.replace(at["one_two"], strategy="fsdp2")
    train(at["one"])
    train(at["muon_one"])

    def stop(step: int, total: int, text: str) -> None:
        if step == 5:
            raise Stop

    for name in ("one_two", "one_zero", "unread"):
        with pytest.raises(Stop):
            train(at[name], progress=stop)
    jobs = [
        {"config": at["ddp"].to_json()},
        {"config": at["fsdp2"].to_json()},
        {"config": dataclasses.replace(at["two_one"], strategy="ddp").to_json(), "stop": 5},
        {"config": resumed.to_json(), "resume": True},
        {"config": at["broken"].to_json(), "break_rank": 1},
        {
            "config": dataclasses.replace(
                at["broken"], rows_per_step=1, output=str(folder / "few")
            ).to_json()
        },
        {"config": at["muon"].to_json()},
        {"config": at["zero"].to_json(), "overlap": True},
        {"config": at["zero_one"].to_json(), "stop": 5},
        {"config": at["one_zero"].to_json(), "resume": True},
        *(
            {"config": at[name].to_json(), "overlap": name.endswith("_zero")}
            for name in ("muon_zero", "half", "half_zero", "half_fsdp2")
        ),
        {
            "config": at["unread"].to_json(),
            "resume": True,
            "break_load": 1,
        },
        {
            "config": dataclasses.replace(at["killed"], workers=1, epochs=200).to_json(),
            "kill_reader": 1,
        },
        {"config": at["files"].to_json(), "break_take": 1},
        {"config": at["muon_fsdp2"].to_json()},
        {
            "config": dataclasses.replace(at["muon_back"], strategy="fsdp2").to_json(),
            "stop": 5,
        },
        {"config": at["full"].to_json(), "break_save": True},
        {"config": dataclasses.replace(at["last"], max_steps=1).to_json(), "break_save": True},
    ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    script = str(Path(__file__).with_name("ranks_script.py"))
    done = subprocess.run(
        torchrun(script, str(file)), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("two_one", "zero_one", "muon_back"):
        train(at[name], resume=True)
    raised = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in (0, 1)]
    return {"at": at, "raised": raised}


def alike(config: TrainConfig, like: TrainConfig, rel: float) -> None:
    ours, theirs = rows(config), rows(like)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=rel, abs=1e-6), (key, a["step"])


@pytest.mark.parametrize(
    "name",
    [
        *("ddp", "fsdp2", "two_one", "one_two", "zero", "zero_one", "one_zero"),
        *("muon", "muon_zero", "muon_fsdp2", "muon_back"),
    ],
)
def test_any_number_of_ranks_and_any_strategy_train_the_same(
    runs: dict[str, Any], name: str
) -> None:
    """``muon``: each rank orthogonalises a share of the matrices. ``muon_back``: stopped on two
    ranks that hold rows of them, resumed by one process.
    """
    one, other = runs["at"]["muon_one" if name.startswith("muon") else "one"], runs["at"][name]
    assert [raised[:4] for raised in runs["raised"]] == [[None, None, ["Stop", "", None], None]] * 2
    assert [raised[6:14] for raised in runs["raised"]] == [
        [None, None, ["Stop", "", None], *[None] * 5]
    ] * 2
    assert [raised[17:19] for raised in runs["raised"]] == [[None, ["Stop", "", None]]] * 2
    assert sum("validation" in r for r in rows(one)) >= 4
    alike(other, one, rel=1e-4)
    assert min(r["loss"] for r in rows(one) if "loss" in r) < 0.9 * rows(one)[0]["loss"]
    ours, theirs = (load_file(Path(c.output) / "model.safetensors") for c in (other, one))
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        torch.testing.assert_close(
            ours[tensor].float(), theirs[tensor].float(), rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize("name", ["half_zero", "half_fsdp2"])
def test_no_strategy_changes_anything_in_bfloat16(runs: dict[str, Any], name: str) -> None:
    """All take the same products and add up in float32. The norm that gradients are clipped by is
    summed in another order, which on some processors rounds a weight the other way.
    """
    alike(runs["at"][name], runs["at"]["half"], rel=2e-4)


def test_what_fails_on_one_rank_stops_all_with_its_words(runs: dict[str, Any]) -> None:
    first, second = (raised[4] for raised in runs["raised"])
    assert second[0] == "DamagedCacheError"
    assert first[0] == "PeerError"
    assert first[1] == f"rank 1: {second[1]}"
    assert first[2] == 1


def test_a_checkpoint_that_cannot_be_written_stops_all_before_the_next(
    runs: dict[str, Any],
) -> None:
    """Rank 0 writes it in a thread; all stop at the same step, after one more validation if the
    thread was slow.
    """
    for job, name, most in ((19, "full", 2), (20, "last", 1)):
        first, second = (raised[job] for raised in runs["raised"])
        assert first[0] == "StoreWriteError"
        assert second == ["PeerError", f"rank 0: {first[1]}", 1]
        config = runs["at"][name]
        assert 1 <= sum("validation" in row for row in rows(config)) <= most
        assert not list((Path(config.output) / "checkpoints").glob("*"))


def test_a_checkpoint_that_one_rank_cannot_read_stops_all_with_its_words(
    runs: dict[str, Any],
) -> None:
    """Nobody may be left waiting in a collective: shared masters are read by each rank for
    itself.
    """
    first, second = (raised[14] for raised in runs["raised"])
    assert "cannot be read" in second[1]
    assert first == ["PeerError", f"rank 1: {second[1]}", 1]


def test_a_reader_that_is_killed_stops_all_with_its_words(runs: dict[str, Any]) -> None:
    first, second = (raised[15] for raised in runs["raised"])
    assert second[0] == "TrainError"
    assert "was killed by SIGKILL" in second[1]
    assert first == ["PeerError", f"rank 1: {second[1]}", 1]


def test_an_error_of_one_rank_of_any_kind_loses_no_row_of_the_steps_before(
    runs: dict[str, Any],
) -> None:
    """Rank 1 fails to take step 6; the ranks read step 5's numbers, which no checkpoint asked for,
    together first.
    """
    first, second = (raised[16] for raised in runs["raised"])
    assert second[:2] == ["OSError", "too many open files"]
    assert first == ["PeerError", "rank 1: too many open files", 1]
    assert [r["step"] for r in rows(runs["at"]["files"]) if "loss" in r] == [1, 2, 3, 4, 5]


def test_fewer_rows_than_processes_are_refused(runs: dict[str, Any]) -> None:
    first, second = (raised[5] for raised in runs["raised"])
    assert first[0] == "UsageError"
    assert "multiple of 2" in first[1]
    assert second == ["PeerError", f"rank 0: {first[1]}", 2]


def test_rows_that_accumulate_equal_one_row_that_holds_them_all(folder: Path) -> None:
    """Four documents in one row of 400 tokens, or one or two in each of several rows: one loss, one
    gradient.
    """
    wide = settings(
        folder, output=str(folder / "wide"), total_seq_len=1000, max_anchors=0, rows_per_step=1
    )
    narrow = dataclasses.replace(
        wide, output=str(folder / "narrow"), total_seq_len=100, rows_per_step=100
    )
    train(wide)
    train(narrow)
    alike(narrow, wide, rel=1e-4)


def start(config: TrainConfig, *flags: str, processes: int = 2) -> subprocess.Popen[str]:
    usual = TrainConfig(cache="").to_json() | {"tensorboard": False}
    given = {k: v for k, v in config.to_json().items() if v != usual[k]}
    args = [text for k, v in given.items() for text in (f"--{k.replace('_', '-')}", str(v))]
    command = torchrun("-m", "dspark.train", *args, "--no-tensorboard", *flags, processes=processes)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def checkpoints(config: TrainConfig) -> list[str]:
    return sorted(p.name for p in (Path(config.output) / "checkpoints").glob("step_*"))


def wait_for(what: Any, process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids that torchrun started, in no order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks through /proc")
def test_sigterm_saves_and_a_killed_rank_takes_the_run_with_it(folder: Path) -> None:
    config = settings(
        folder, output=str(folder / "long"), epochs=2000, checkpoint_freq=1.0, log_every=5
    )
    process = start(config)
    wait_for(
        lambda: (Path(config.output) / "metrics.jsonl").is_file() and len(rows(config)) > 1, process
    )
    for rank in ranks_of(process):
        os.kill(rank, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.count("error: stopped.") == 1  # the first rank speaks for both
    log = (Path(config.output) / "train.log").read_text()
    saved = checkpoints(config)[-1]
    assert f"interrupted at step {int(saved[5:])}; saved" in log

    process = start(config, "--resume")
    wait_for(lambda: checkpoints(config)[-1] > saved, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    config = dataclasses.replace(config, log_every=1000)
    reached = int(checkpoints(config)[-1][5:])

    def stop(step: int, total: int, text: str) -> None:
        assert step == reached + 1
        raise Stop

    with pytest.raises(Stop):
        train(config, resume=True, progress=stop)


def test_one_process_is_a_world_of_its_own(folder: Path) -> None:
    assert World().sum([1.5, 2]) == [1.5, 2]
    with pytest.raises(errors.UsageError, match="torchrun"):
        train(settings(folder, output=str(folder / "none"), strategy="ddp"))
