"""A training on several stores: which samples an epoch takes, that it is resumed exactly, and what
is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_trainings import small_training

import stores
from dspark.cache.codec import registry
from dspark.cache.errors import MismatchError, Stopped, TrainError, UsageError
from dspark.cache.joined import JoinedCache
from dspark.cache.reader import open as open_store
from dspark.tools.publish.export import export
from dspark.train.cli import config_of
from dspark.train.config import TrainConfig, with_passes
from dspark.train.data.stream import VALIDATION_EPOCH, Stream, pack, rng
from dspark.train.loop import train
from dspark.train.run.setup import prepare

SHORT, LONG = [40, 30, 50, 20, 60], [33, 44, 55, 66, 77, 21, 34, 45]


def two(folder: Path) -> JoinedCache:
    """A lossless store of 5 samples and a rotated one of 8, of one target."""
    stores.write_store(folder / "own.zarr", SHORT)
    rotated = stores.codec_info(registry.make("rotated-4-4"))
    stores.write_store(folder / "general.zarr", LONG, m=stores.manifest(codec=rotated))
    return JoinedCache([open_store(folder / name) for name in ("own.zarr", "general.zarr")])


def stream(cache: Any, **changes: Any) -> Stream:
    samples = changes.pop("samples", np.arange(len(cache)))
    settings: dict[str, Any] = {
        "seed": 3,
        "total_seq_len": 128,
        "rows_per_step": 2,
        "block_size": 3,
        "max_anchors": 8,
    }
    return Stream(cache, samples, **(settings | changes))


def test_an_epoch_takes_each_store_its_passes(tmp_path: Path) -> None:
    cache = two(tmp_path)
    mixed = stream(cache, passes=(1.0, 0.25))
    epochs = [[i for row in mixed.plan(epoch) for i in row] for epoch in range(4)]
    for taken in epochs:
        assert sorted(i for i in taken if i < 5) == list(range(5))
        assert len([i for i in taken if i >= 5]) == 2
    assert sorted(i for taken in epochs for i in taken if i >= 5) == list(
        range(5, 13)
    )  # all, before one comes again
    for row in mixed.plan(1):
        assert len({cache.of(i) for i in row}) == 1
    again = stream(cache, passes=(1.0, 0.25))
    assert list(again.plan(2)) == list(mixed.plan(2)) != list(mixed.plan(1))
    often = Counter(i for row in stream(cache, passes=(2.5, 1.0)).plan(0) for i in row)
    assert sum(often[i] for i in range(5)) == 12
    assert {often[i] for i in range(5)} == {2, 3}
    order = [cache.of(row[0]) for row in stream(cache, passes=(3.0, 2.0)).plan(0)]
    assert order != sorted(order)  # the rows of both are shuffled


def test_a_single_store_keeps_its_order(tmp_path: Path) -> None:
    cache = two(tmp_path).stores[1]
    for epoch in (0, 3):
        order = rng(3, 1, epoch).permutation(np.arange(len(cache)))
        assert list(stream(cache).plan(epoch)) == list(pack(order, cache.lengths, 128))


def test_the_first_rows_of_a_validation_are_of_every_store(tmp_path: Path) -> None:
    cache = two(tmp_path)
    first = stream(cache, max_rows=3).plan(VALIDATION_EPOCH)
    assert {cache.of(row[0]) for row in first} == {0, 1}
    whole = stream(cache).plan(VALIDATION_EPOCH)
    assert sorted(i for row in whole for i in row) == list(range(13))


def test_rows_are_decoded_by_their_own_store(tmp_path: Path) -> None:
    cache = two(tmp_path)
    mixed = stream(cache, passes=(1.0, 2.0))
    seen = set()
    for step in mixed.steps_from(0):
        for row in step:
            batch = row.place(cache, torch.device("cpu"), torch.float32)
            seen.add(row.store)
            store = cache.stores[row.store]
            ids = batch.input_ids[batch.doc == 0].numpy()
            own = next(
                i for i in range(len(store)) if np.array_equal(store.tokens(i).input_ids, ids)
            )
            assert np.array_equal(batch.aux[: len(ids)].numpy(), store[own].aux)
    assert seen == {0, 1}
    for i in (0, 4, 5, 12):
        assert np.array_equal(cache.tokens(i).input_ids, cache.read(i).tokens.input_ids)
    with pytest.raises(IndexError, match="13 of 13"):
        cache.read(13)


def mixed_training(folder: Path, output: str, **changes: Any) -> TrainConfig:
    config = small_training(
        folder, SHORT, val_fraction=0.0, total_seq_len=128, max_steps=6, checkpoint_freq=0.5
    )
    if not (folder / "general.zarr").exists():
        rotated = stores.codec_info(registry.make("rotated-4-4"))
        stores.write_store(folder / "general.zarr", LONG, m=stores.manifest(codec=rotated))
    both = (config.cache, f"{folder / 'general.zarr'}=0.5")
    return dataclasses.replace(config, caches=both, output=str(folder / output), **changes)


def test_a_mixed_training_is_resumed_exactly_and_recorded(tmp_path: Path) -> None:
    whole = mixed_training(tmp_path, "whole")
    said: list[str] = []
    train(whole, say=said.append)
    assert "0.5 times 8 samples" in "".join(said)
    again = (
        mixed_training(tmp_path / "again", "draft")
        if (tmp_path / "again").mkdir() is None
        else whole
    )
    again = dataclasses.replace(again, cache=whole.cache, caches=whole.caches)

    def stop(step: int, total: int, text: str) -> None:
        if step == 3:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        train(again, progress=stop)
    other = (whole.caches[0], whole.caches[1].replace("=0.5", "=0.75"))
    with pytest.raises(MismatchError, match="passes"):
        train(dataclasses.replace(again, caches=other), resume=True)
    with pytest.raises(MismatchError, match="passes"):
        train(dataclasses.replace(again, caches=()), resume=True)
    train(again, resume=True)
    a, b = (load_file(Path(config.output) / "model.safetensors") for config in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    record = json.loads((tmp_path / "whole" / "store.json").read_text())
    assert (record["samples"], len(record["stores"]), "codec" in record) == (13, 2, False)
    out = tmp_path / "out"
    export(whole.output, str(out), pictures=False)
    card = (out / "README.md").read_text()
    assert "dspark-train --cache ./hs.zarr --cache ./hs2.zarr=0.5" in card
    assert "samples of store 2" in card


def test_stores_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    config = mixed_training(tmp_path, "draft")
    odd = {
        "other.zarr": ({"seed": 7}, "weights_sha256"),
        "layers.zarr": ({"m": stores.manifest(layers=[1, 2, 3])}, "layers"),
    }
    for name, (settings, said) in odd.items():
        stores.write_store(tmp_path / name, SHORT, **settings)
        with pytest.raises(MismatchError, match=f"{name}.*{said}"):
            prepare(dataclasses.replace(config, caches=(config.cache, str(tmp_path / name))))
    with pytest.raises(UsageError, match="twice"):
        prepare(dataclasses.replace(config, caches=(config.cache, config.cache + "=2")))
    stores.write_store(tmp_path / "bare.zarr", [2, 2])
    with pytest.raises(TrainError, match=r"bare\.zarr: no two neighbouring"):
        prepare(dataclasses.replace(config, caches=(config.cache, str(tmp_path / "bare.zarr"))))
    with pytest.raises(UsageError, match="passes"):
        dataclasses.replace(config, caches=("a.zarr=0",))
    assert not Path(config.output).exists()


def test_what_cache_may_say(tmp_path: Path) -> None:
    assert with_passes("a=b/c.zarr") == ("a=b/c.zarr", 1.0)
    assert with_passes("s3://b/a=1.zarr=0.3") == ("s3://b/a=1.zarr", 0.3)
    config = mixed_training(tmp_path, "draft")
    words = ["--recipe", "none", "--cache", config.cache]
    assert (config_of(words).cache, config_of(words).caches) == (config.cache, ())
    both = config_of([*words, "--cache", config.caches[1]])
    assert (both.cache, both.stores) == (
        config.cache,
        ((config.cache, 1.0), (str(tmp_path / "general.zarr"), 0.5)),
    )
    once = config_of(["--recipe", "none", "--cache", config.cache + "=0.5"])
    assert once.stores == ((config.cache, 0.5),)
