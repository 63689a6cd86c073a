"""What bench/learn.py tries, against what it claims to be; that its variants are paired, its calls
go on and its processes share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stores
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch

FLAGS = (
    "--recipe none --num-layers 1 --block-size 3 --markov-rank 4 --total-seq-len 128 "
    "--rows-per-step 1 --max-anchors 64 --optimizer muon "
    "--lr 2e-2 --val-fraction 0.3 --no-tensorboard --val-rows 2 --device cpu "
    """--loss-fn '{"ce": 0.1, "l1": 0.9}'"""
)
OWN = ("learn", "learn_board", "learn_lab", "learn_variants", "feed", "common")


@pytest.fixture
def learn(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import learn

    yield learn
    for name in OWN:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learn") / "hs.zarr"
    stores.write_store(path, [40 + 7 * (i % 9) for i in range(24)])
    return path


@pytest.fixture
def args(tmp_path: Path, store: Path) -> argparse.Namespace:
    return argparse.Namespace(
        store=store, out=tmp_path / "out", model=None, seconds=0.0, budget=1e9,
        rows=5, seeds="0,1", base="anchors=50", variants="thin,again,twice", ladder="2", pays=-1.0,
        keep=True,
        also=["again=", "twice=heads=2 anchors=20 block=failure mix=0.5"], show=False, train=FLAGS,
        name="learn", results=tmp_path, against="wsd", probe=1,
    )  # fmt: skip


def trainings(learn: Any, args: argparse.Namespace) -> Any:
    plan = learn.Plan(args, learn.Board(args.out / "board"))
    return learn.Trainings(args, plan, lambda text: None)


def lab_of(learn: Any, args: argparse.Namespace) -> Any:
    """With its rows, and nothing timed."""
    lab = learn.Lab(learn.prepare(learn.config(args.store, args.train)), args.rows)
    lab.wait()
    return lab


def row(size: int) -> Batch:
    """Two documents with supervised runs, every eligible position an anchor, two blocks of
    padding.
    """
    mask = np.zeros(180, np.bool_)
    mask[5:60] = mask[70:100] = mask[100:160] = True
    doc = np.repeat([0, 1, -1], [100, 65, 15]).astype(np.int32)
    can = rules.eligible(mask, doc)
    return Batch.build(
        input_ids=np.arange(180),
        loss_mask=mask,
        doc=doc,
        aux=torch.zeros(180, 1, 4),
        last=torch.zeros(int(can.sum()), 4),
        anchors=np.flatnonzero(can),
        block_size=size,
        pad_anchors_to=int(can.sum()) + 2,
    )


def test_failure_is_the_mean_over_the_slots_before(learn: Any) -> None:
    batch = row(4)
    alpha = torch.rand(batch.counted.shape, generator=torch.Generator().manual_seed(0))
    found = sys.modules["learn_variants"].after_failure(alpha * batch.counted, batch)
    wrong: dict[int, list[float]] = {}
    for a, b in batch.counted.nonzero().tolist():
        wrong.setdefault(int(batch.label_index[a, b]), []).append(1 - float(alpha[a, b]))
    everything = [x for values in wrong.values() for x in values]
    expected = [
        float(np.mean(wrong.get(int(anchor), everything)))
        for anchor in batch.anchors[batch.anchor_valid]
    ]
    np.testing.assert_allclose(found[batch.anchor_valid], expected, rtol=1e-5)


def test_changes_are_joined_the_better_first(learn: Any) -> None:
    joined = sys.modules["learn_variants"].joined
    assert joined(["ce=0.3 l1=0.7", "thin=1", "kl=0.3", "thin=2"]) == "ce=0.3 l1=0.7 thin=1"
    assert joined([]) == ""


def test_principal_parts_keep_the_nearest_neighbours(learn: Any) -> None:
    torch.manual_seed(0)
    low = torch.randn(50, 3) @ torch.randn(3, 16)
    found = sys.modules["learn_variants"].principal(low, 5, 0.02)
    assert found.shape == (50, 5)
    assert float(found.std()) == pytest.approx(0.02, rel=1e-3)
    # three directions hold all: distances are those of the embedding, up to one factor
    ratio = torch.cdist(found, found) / torch.cdist(low, low).clamp(min=1e-9)
    off = ~torch.eye(50, dtype=torch.bool)
    torch.testing.assert_close(ratio[off], ratio[0, 1].expand(off.sum()), rtol=1e-3, atol=0)


def test_thinned_rows_have_the_same_gradient_on_average(
    learn: Any, args: argparse.Namespace
) -> None:
    lab, parse = lab_of(learn, args), sys.modules["learn_variants"].Variant.parse
    whole, thin = parse("wsd", "", lab.run), parse("thin", "thin=1", lab.run)
    held = lab.rows[0]
    size, chances = held.host.block_size, sys.modules["learn_variants"].chances

    def gradient(v: Any, held: Any) -> torch.Tensor:
        lab.reset(0, v)
        lab.learn(v, held)
        flat = torch.cat([b.gradients.clone() for b in lab.run.optimizer._buckets])
        lab.run.optimizer.step(0.0)
        return flat

    exact = gradient(whole, held)
    anchors = held.host.anchors[held.host.anchor_valid].numpy()
    some = [held.with_blocks(anchors, 0, chances(thin, size), seed) for seed in range(24)]
    kept = np.mean([int(h.per_slot.sum()) for h in some]) / int(held.per_slot.sum())
    assert 0.7 < kept < 0.9  # mean of exp(-k / 4), k < 3: 0.80
    found = torch.stack([gradient(thin, h) for h in some])
    apart = float((found - exact).norm(dim=1).mean())
    assert apart > 0
    # The mean of 24 draws is some 5 times nearer than one of them.
    assert float((found.mean(0) - exact).norm()) < 0.35 * apart


def test_rows_of_fewer_anchors_share_out_those_drawn(learn: Any, args: argparse.Namespace) -> None:
    lab = lab_of(learn, args)
    v = sys.modules["learn_variants"].Variant.parse("few", "anchors=20", lab.run)
    sets = lab.rows_of(v)
    for at, held in enumerate(lab.rows):
        real = held.host.anchors[held.host.anchor_valid].tolist()
        parts = [group[at].blocks["anchors"][group[at].blocks["anchor_valid"]] for group in sets]
        assert all(part.numel() <= 20 for part in parts)
        if len(real) >= 60:
            together = [int(x) for part in parts for x in part]
            assert len(together) == 60 == len(set(together) & set(real))


def test_variants_are_paired_and_a_second_call_goes_on(
    learn: Any, args: argparse.Namespace
) -> None:
    first = trainings(learn, args)
    first.work()
    rows = first.plan.rows()
    assert not [row for row in rows if "error" in row]
    done = {(row["name"], row["seed"]) for row in rows}
    every = ["wsd", "cosine", "thin", "again", "twice", learn.KEPT]
    assert done == {(n, s) for n in every for s in (0, 1)} | {("steps-2", 0)}
    by = {(row["name"], row["seed"]): row for row in rows}
    assert by["steps-2", 0]["steps"] == 2
    for seed in (0, 1):
        keys = ("tau", "walk", "accept_rate", "walk_accept", "steps")
        same = {k: by["again", seed][k] for k in keys}
        assert same == {k: by["wsd", seed][k] for k in keys}
        drafts = [
            load_file(args.out / "drafts" / f"{n}-{seed}" / "model.safetensors")
            for n in ("wsd", "again", "twice")
        ]
        assert all(torch.equal(drafts[0][n], drafts[1][n]) for n in drafts[0])
        assert not torch.equal(drafts[0]["fc.weight"], drafts[2]["fc.weight"])
    args.seeds, args.budget = "0,1,2", -1.0
    again = trainings(learn, args)
    again.work()
    assert again.plan.rows() == rows
    text = learn.table(rows)
    assert "| again | 2 |" in text
    assert "+0.0 ± 0.0 %" in text


def test_changes_are_of_the_same_seeds(learn: Any) -> None:
    rows = [
        {"name": n, "seed": s, "walk": w}
        for n, s, w in [("wsd", 0, 2.0), ("wsd", 1, 3.0), ("x", 0, 2.2), ("x", 1, 3.6), ("x", 2, 9)]
    ]
    mean, error, count = learn.paired(rows, "x", "wsd")
    assert (count, mean) == (2, pytest.approx(0.15))
    assert error == pytest.approx(0.05)
    assert math.isnan(learn.paired(rows, "x", "cosine")[0])


def test_a_job_is_one_processs(learn: Any, tmp_path: Path) -> None:
    one, two = learn.Board(tmp_path), learn.Board(tmp_path)
    assert one.claim("a")
    assert not one.claim("a")
    (tmp_path / "b.claim").write_text(str(os.getppid()))
    assert not two.claim("b")  # that process runs
    (tmp_path / "b.claim").write_text(str(2**22 + 1))
    assert two.claim("b")  # and this one never did
    two.put("b", [1.5])
    assert one.get("b") == [1.5]
    assert not one.claim("b")
    assert one.once("b", lambda: None) == [1.5]
    one.arrive("begun")
    assert not one.await_all("ready", of="begun", wait=0)
    one.put(f"begun.{2**22 + 1}", True)  # never ran
    one.arrive("ready")
    assert two.await_all("ready", of="begun", wait=0)


def test_layers_begin_as_the_targets(learn: Any, args: argparse.Namespace) -> None:
    run = lab_of(learn, args).run
    config = dataclasses.replace(run.model.config)
    masters = {n: p.detach().float() for n, p in run.model.trained()}
    count = 5
    theirs = {
        f"model.layers.{i}.{n.removeprefix('layers.0.')}": torch.full_like(t, float(i + 1))
        for i in range(count)
        for n, t in masters.items()
        if n.startswith("layers.0.") and "_norm." not in n.replace("layernorm", "")
    }
    found = sys.modules["learn_variants"].of_layers(config, theirs, count, masters)
    assert float(found["layers.0.mlp.up_proj.weight"].mean()) == 1.0
    columns = found["layers.0.self_attn.q_norm.weight"]
    assert columns.unique().item() == pytest.approx(config.hidden_size**0.5)
    aux = torch.randn(2, found["fc.weight"].shape[1])
    torch.testing.assert_close(aux @ found["fc.weight"].T, aux[:, -config.hidden_size :])
    assert set(found) <= set(masters)
    assert all(t.shape == masters[n].shape for n, t in found.items())


def test_what_beats_the_new_loss_is_kept_with_it(learn: Any, args: argparse.Namespace) -> None:
    args.variants, args.also, args.against = "kl-0.3,kl-1,decay-3,heads-3", [], "kl-0.3"
    args.pays, board = 0.01, learn.Board(args.out / "board")
    found = {"wsd": (3.0, 2.5), "cosine": (2.8, 2.3), "kl-0.3": (3.1, 2.6), "kl-1": (2.9, 2.8)}
    found |= {"decay-3": (3.1, 2.65), "heads-3": (3.1, 2.61)}
    for name, (tau, walk) in found.items():
        board.put(f"{name}-0", {"name": name, "seed": 0, "tau": tau, "walk": walk})
    plan = learn.Plan(args, board)
    assert list(plan.gains()) == ["decay-3", "heads-3"]  # kl-1 loses tau to wsd
    assert plan.kept() == "decay=3 ce=0.1 kl=0.3 l1=0.6"
    jobs = [(name, seed) for name, _, seed in plan.jobs()]
    assert jobs.index((learn.KEPT, 1)) < jobs.index(("kl-0.3", 1)) < jobs.index(("decay-3", 1))
