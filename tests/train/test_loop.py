"""The loop: resuming equals not stopping, seeds decide everything, wrong runs are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_trainings import small_training

import stores
from dspark.cache import errors
from dspark.cache.reader import open as open_store
from dspark.train.config import TrainConfig
from dspark.train.data.stream import Packed, Stream, pack, rng, split
from dspark.train.loop import train
from dspark.train.optim.adamw import MasterAdamW
from dspark.train.optim.base import AdamSettings, Snapshot, learning_rate

SHARING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
LENGTHS = [60, 80, 90, 30, 20, 100, 50, 64, 90, 77, 33, 40]
SPEED = {"tokens_per_second", "step_ms", "data_wait_fraction"}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small_training(tmp_path, LENGTHS, epochs=3, checkpoint_freq=0.5)


def rows(output: str | Path) -> list[dict[str, Any]]:
    text = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEED} for line in text]


class Stop(Exception):
    """Raised by a progress callback, in place of a crash."""


def test_resume_goes_on_exactly(config: TrainConfig, tmp_path: Path) -> None:
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    train(whole)

    def stop_at_5(step: int, total: int, text: str) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train(config, progress=stop_at_5)
    train(config, resume=True)
    assert len([r for r in rows(whole.output) if "validation" not in r]) >= 9
    assert rows(config.output) == rows(whole.output)
    a, b = (load_file(Path(o) / "model.safetensors") for o in (config.output, whole.output))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_second_signal_while_the_readers_end(config: TrainConfig) -> None:
    """It ends the process on the spot, wherever that is, and no error is raised there."""
    code = (
        "import os, signal, time\nfrom dspark.train import loop\n"
        "from dspark.train.config import TrainConfig\n"
        "class Slow(loop.Feed):\n"
        "    def __exit__(self, *error):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "loop.Feed = Slow\n"
        "stop = lambda step, total, text: step == 2 and os.kill(os.getpid(), signal.SIGTERM)\n"
        f"loop.train(TrainConfig.from_json({config.to_json()!r}, 'x'), progress=stop)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: stopped at once. Step 2 is saved" in done.stderr
    assert "Traceback" not in done.stderr


def test_kill_9_then_resume(config: TrainConfig, tmp_path: Path) -> None:
    """A killed process: what it leaves is resumed to the same curve."""
    whole = dataclasses.replace(
        config, output=str(tmp_path / "whole"), epochs=12, checkpoint_freq=1.0
    )
    config = dataclasses.replace(config, epochs=12, checkpoint_freq=1.0)
    train(whole)
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\nfrom "
        "dspark.train.config import TrainConfig\nfrom dspark.train.loop import train\n"
    )
    code += f"train(TrainConfig.from_json({config.to_json()!r}, 'x'))"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while (
        len(list((Path(config.output) / "checkpoints").glob("step_0*"))) < 2
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
        assert process.poll() is None, "finished before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert rows_whole(config.output) < len(rows(whole.output))
    train(config, resume=True)
    assert rows(config.output) == rows(whole.output)


def rows_whole(output: str) -> int:
    return (Path(output) / "metrics.jsonl").read_text().count("\n")


def test_the_same_seed_gives_the_same_draft_and_another_does_not(
    config: TrainConfig, tmp_path: Path
) -> None:
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        outputs.append(tmp_path / name)
        train(dataclasses.replace(config, output=str(outputs[-1]), seed=seed, max_steps=3))
    # Tensors and not bytes: the library writes the keys of a file's header in any order.
    a, b, c = (load_file(o / "model.safetensors") for o in outputs)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


def test_ctrl_c_saves_a_checkpoint_at_the_step_reached(config: TrainConfig) -> None:
    def interrupt(step: int, total: int, text: str) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    config = dataclasses.replace(config, checkpoint_freq=50.0, epochs=6)
    with pytest.raises(errors.Stopped):
        train(config, progress=interrupt)
    kept = sorted(p.name for p in (Path(config.output) / "checkpoints").iterdir())
    assert kept in (
        ["step_00000004"],
        ["step_00000005"],
    )  # the flag is read after the callback of the same step or the next


def test_wrong_runs_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, max_steps=2))
    with pytest.raises(errors.ExistsError, match="--resume"):
        train(config)
    with pytest.raises(errors.MismatchError, match="block_size: 3 there, 5 now"):
        train(dataclasses.replace(config, max_steps=2, block_size=5), resume=True)
    stores.write_store(tmp_path / "other.zarr", LENGTHS[:-1], seed=4)
    with pytest.raises(errors.MismatchError, match="a different store: .*samples: 12 there, 11 in"):
        train(
            dataclasses.replace(config, max_steps=2, cache=str(tmp_path / "other.zarr")),
            resume=True,
        )
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(errors.ExistsError, match="not a dspark training run"):
        train(dataclasses.replace(config, output=str(tmp_path / "notes")), overwrite=True)
    with pytest.raises(errors.UsageError, match="sample . has .* tokens, more than"):
        train(
            dataclasses.replace(
                config, output=str(tmp_path / "short"), total_seq_len=64, val_fraction=0.0
            )
        )
    with pytest.raises(errors.TrainError, match="no samples remain"):
        train(dataclasses.replace(config, output=str(tmp_path / "val"), val_fraction=0.9999))
    with pytest.raises(errors.UsageError, match="draft-vocab-size"):
        train(dataclasses.replace(config, output=str(tmp_path / "vocab"), draft_vocab_size=10**6))
    assert not (tmp_path / "short").exists()


def test_reduced_vocabulary_takes_the_most_frequent(config: TrainConfig) -> None:
    train(dataclasses.replace(config, draft_vocab_size=20, max_steps=2))
    draft = load_file(Path(config.output) / "model.safetensors")
    ids = (torch.arange(20) + draft["d2t"]).numpy()
    cache = open_store(config.cache)
    used, _ = split(cache.index["sample_key"], config.val_fraction)
    counts = np.zeros(stores.VOCAB, int)
    for i in used:
        tokens = cache.tokens(int(i))
        np.add.at(counts, tokens.input_ids[tokens.loss_mask], 1)
    assert counts[ids].min() >= np.delete(counts, ids).max()
    assert draft["t2d"].nonzero().flatten().tolist() == ids.tolist()


def test_a_non_finite_loss_stops_and_says_where(config: TrainConfig) -> None:
    with pytest.raises(errors.TrainError, match="step .*expected finite"):
        train(dataclasses.replace(config, lr=1e30, grad_clip=1e30, warmup_ratio=0.0))


@pytest.mark.parametrize(
    ("lr", "val_fraction", "found"),
    [
        (
            1e38,
            0.0,
            "after step 1 weight .* not finite",
        ),  # the first update has lr / (1 - 0.9), more than float32 holds
        (1e38, 0.2, "validation after step 1: ce_loss nan"),
        # finite weights whose products are not
        (1e30, 0.2, "validation after step 1: ce_loss nan"),
    ],
)
def test_what_the_last_update_made_is_looked_at_before_it_is_saved(
    config: TrainConfig, lr: float, val_fraction: float, found: str
) -> None:
    """The loss of the only step is finite: it is of the weights before the update."""
    with pytest.raises(errors.TrainError, match=found):
        train(
            dataclasses.replace(
                config, lr=lr, warmup_ratio=0.0, max_steps=1, val_fraction=val_fraction
            )
        )
    assert [row["step"] for row in rows(config.output)] == [1]
    assert np.isfinite(rows(config.output)[0]["loss"])
    assert not (Path(config.output) / "model.safetensors").exists()
    assert not (Path(config.output) / "checkpoints").exists()


def test_an_interrupt_saves_no_weights_that_are_not_finite(config: TrainConfig) -> None:
    """Between logged steps nobody looks at the loss."""

    def interrupt(step: int, total: int, text: str) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    config = dataclasses.replace(
        config, lr=1e38, warmup_ratio=0.0, checkpoint_freq=50.0, log_every=1000
    )
    with pytest.raises(
        (errors.TrainError, errors.Stopped), match="not finite. These weights were not"
    ):
        train(config, progress=interrupt)
    assert not (Path(config.output) / "checkpoints").exists()


@pytest.mark.parametrize(("value", "log_every"), [(1e38, 1), (1e38, 1000), (1e12, 1000)])
def test_a_state_that_cannot_be_stops_the_run_and_names_the_sample(
    config: TrainConfig, value: float, log_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm makes zeros of 1e38, so the loss does not tell."""
    real, bad = stores.states, 4

    def states(sample: Any, seed: int = 0) -> Any:
        aux, last = real(sample, seed)
        if sample.row == bad:
            aux[3, 0, 1] = value
        return aux, last

    shutil.rmtree(config.cache)
    with monkeypatch.context() as other:
        other.setattr(stores, "states", states)
        stores.write_store(Path(config.cache), LENGTHS)
    key = open_store(config.cache).index["sample_key"][bad].tobytes().hex()
    config = dataclasses.replace(config, val_fraction=0.0, log_every=log_every, checkpoint_freq=1.0)
    with pytest.raises(
        errors.TrainError, match=rf"step \d+ .*a state of \S+; samples 4 \(key {key}\) of"
    ):
        train(config)
    assert not (Path(config.output) / "checkpoints").exists()


def test_a_snapshot_names_the_tensor_that_is_not_finite() -> None:
    def held(weight: float, moment: float) -> Snapshot:
        second = {"a": torch.ones(3), "b": torch.tensor([1.0, moment])}
        masters = {"a": torch.tensor([[0.0, weight]]), "none": torch.empty(0)}
        return Snapshot(masters, {"exp_avg": {"a": torch.ones(3)}, "exp_avg_sq": second}, 1)

    assert held(3e38, -3e38).non_finite() is None
    assert held(math.nan, 1.0).non_finite() == "weight a"
    assert held(-math.inf, 1.0).non_finite() == "weight a"
    assert held(1.0, math.inf).non_finite() == "exp_avg_sq b"


def test_pack_is_next_fit_and_keeps_the_order() -> None:
    rows = pack([0, 1, 2, 3, 4], np.array([5, 6, 3, 9, 1]), 10)
    assert list(rows) == [[0], [1, 2], [3, 4]]
    assert list(rows.ordered(np.array([2, 0, 1]))) == [[3, 4], [0], [1, 2]]
    two = Packed.joined([rows.first(2), rows.first(1)])
    assert list(two) == [[0], [1, 2], [0]]
    assert two.taken.tolist() == [0, 1, 2, 0]
    assert two[-1] == [0]
    assert list(two[1:]) == [[1, 2], [0]]
    assert list(pack([], np.array([5]), 8)) == []
    with pytest.raises(errors.UsageError, match="raise it to at least 9"):
        pack([3], np.array([5, 6, 3, 9, 1]), 8)


def test_rows_are_the_same_for_any_number_of_ranks_and_workers(config: TrainConfig) -> None:
    cache = open_store(config.cache)
    samples = np.arange(len(cache))

    def anchors(rank: int, world: int, workers: int = 0) -> list[list[list[int]]]:
        stream = Stream(
            cache, samples, seed=3, total_seq_len=256, rows_per_step=3, block_size=3, max_anchors=16
        )
        steps = stream.steps_from(1, workers=workers, rank=rank, world=world)
        return [
            [[*r.batch.anchors.tolist(), *r.batch.input_ids.tolist()] for r in step]
            for step in steps
        ]

    whole = anchors(0, 1)
    halves = [anchors(0, 2), anchors(1, 2)]
    together = [
        [step[j // 2] for j in range(n) for step in [a if j % 2 == 0 else b]]
        for a, b, n in zip(*halves, map(len, whole), strict=True)
    ]
    assert together == whole
    assert anchors(0, 1, workers=1) == whole


def test_anchors_do_not_depend_on_the_row_a_sample_lands_in(config: TrainConfig) -> None:
    """With room for all eligible anchors of a sample, packing changes nothing about it; the draw is
    keyed by sample.
    """
    assert (rng(1, 2, 0, 5).random(4) == rng(1, 2, 0, 5).random(4)).all()
    assert (rng(1, 2, 0, 5).random(4) != rng(1, 2, 0, 6).random(4)).all()
    assert (rng(1, 2, -1, 5).random(4) != rng(1, 2, 1, 5).random(4)).all()


def test_split_sends_equal_prompts_to_one_side() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (2000, 16)).astype(np.uint8)
    keys[1000:] = keys[:1000]
    train_ids, held_out = split(keys, 0.1)
    assert 120 < held_out.size < 280
    assert set(held_out[held_out < 1000] + 1000) == set(held_out[held_out >= 1000])
    assert sorted([*train_ids, *held_out]) == list(range(2000))


def test_learning_rate_table() -> None:
    rate = [learning_rate(s, 100, 1.0, 0.04, 0.1) for s in range(100)]
    assert rate[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rate[4] == 1.0
    assert rate[52] == pytest.approx(0.55, abs=1e-9)
    assert rate[99] == pytest.approx(0.1, abs=1e-3)


def test_bf16_model_with_fp32_masters_follows_the_fp32_optimizer() -> None:
    """Two rows accumulate in fp32, and many small updates do not vanish in bf16."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(8, 8, generator=g).bfloat16()
    p16 = torch.nn.Parameter(start.clone())
    p32 = torch.nn.Parameter(start.float())
    settings = AdamSettings(betas=(0.9, 0.95), weight_decay=0.0, clip=1e9)
    half, full = MasterAdamW([("w", p16)], settings), MasterAdamW([("w", p32)], settings)
    for _ in range(50):
        for _ in range(2):
            x = torch.randn(8, 8, generator=g).bfloat16()
            (p16 * x).sum().backward()
            (p32 * x.float()).sum().backward()
        half.step(1e-4)
        full.step(1e-4)
    torch.testing.assert_close(half.masters["w"], full.masters["w"], atol=1e-6, rtol=0)
    assert torch.equal(p16, half.masters["w"].bfloat16())


def test_buckets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small buckets, one large one, and torch's own AdamW with its own clipping on separate
    tensors.
    """
    shapes = [(7, 5), (3,), (40, 3), (1,)]

    def trained(bucket: int | None) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        named = [
            (str(i), torch.nn.Parameter(torch.randn(s, generator=g))) for i, s in enumerate(shapes)
        ]
        tensors = [p for _, p in named]
        if bucket is None:
            theirs = torch.optim.AdamW(tensors, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
        else:
            monkeypatch.setattr("dspark.train.optim.flat.BUCKET", bucket)
            ours = MasterAdamW(named, AdamSettings(betas=(0.9, 0.95), weight_decay=0.1, clip=1.0))
        for _ in range(5):
            sum((p * torch.randn(p.shape, generator=g)).sum() for p in tensors).backward()  # type: ignore[union-attr]
            if bucket is None:
                torch.nn.utils.clip_grad_norm_(tensors, 1.0)
                theirs.step()
                theirs.zero_grad()
            else:
                ours.step(0.01)
        return [p.detach() for p in tensors]

    expected = trained(None)
    for bucket in (1, 50, 1 << 20):
        for a, b in zip(trained(bucket), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_of_another_draft_is_refused(config: TrainConfig) -> None:
    settings = AdamSettings(betas=(0.9, 0.95), weight_decay=0.0, clip=1.0)
    optimizer, other = (
        MasterAdamW([("w", torch.nn.Parameter(torch.ones(n)))], settings) for n in (3, 4)
    )
    with pytest.raises(errors.TrainError, match=r"w \[3\] there, \[4\] here"):
        other.load(optimizer.snapshot())


def test_the_memory_that_a_run_says_it_takes(config: TrainConfig) -> None:
    """Weights, masters, gradients and moments are counted to the byte; recomputing makes a row
    cheaper.
    """
    from dspark.train.distributed import World
    from dspark.train.run import memory
    from dspark.train.run.setup import prepare

    run = prepare(config)
    count = sum(p.numel() for _, p in run.model.trained())
    found = memory.estimate_memory(run)
    assert found.trained == 16 * count
    assert found.frozen == 4 * stores.VOCAB * stores.HIDDEN  # tied: one matrix
    run.model.make_room()
    assert (
        memory.estimate_memory(run).frozen
        == found.frozen + 4 * stores.VOCAB * run.model.config.markov_rank
    )
    lean = memory.estimate_memory(
        prepare(dataclasses.replace(config, activation_checkpointing=True, num_layers=1))
    )
    deep = memory.row_bytes(
        dataclasses.replace(run.model.config, num_layers=5), 256, 16, 4, recompute=False
    )
    assert (
        memory.row_bytes(
            dataclasses.replace(run.model.config, num_layers=5), 256, 16, 4, recompute=True
        )
        < deep / 2
    )
    assert lean.trained == found.trained
    assert f"{count / 1e6:.1f} M" in memory.describe(run)
    assert "readers" not in memory.describe(run)  # no row is read ahead
    # Master and two moments.
    assert run.optimizer.snapshot_bytes() == 12 * count
    assert f"written from (first process): {12 * count / 1e9:.2f} GB" in memory.describe(run)
    assert "for 11 rows of 0.00 GB (2 readers)" in memory.describe(
        dataclasses.replace(run, workers=2)
    )
    # Of four ranks, float32: weight and gradient whole, two moments shared out; FSDP2 also shards
    # the master and the summed gradient, and holds twice what shares a product.
    twice = sum(p.numel() for n, p in run.model.trained() if n.split(".")[-2] in SHARING) / count
    assert twice > 0.1
    for strategy, expected in (("ddp", 16), ("zero", 8 + 8 / 4), ("fsdp2", 8 + 16 / 4 + 4 * twice)):
        of_four = dataclasses.replace(
            run,
            world=World(0, 4, local_size=4),
            config=dataclasses.replace(config, strategy=strategy),
        )
        assert memory.estimate_memory(of_four).trained == pytest.approx(expected * count, abs=1)
