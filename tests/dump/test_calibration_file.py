"""``--calibration``: what a codec has learnt in one dump, taken to another; refused before weights
are read where it is not for that.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dump_runs import assert_same, corpus, files
from safetensors.torch import load_file, save_file

from dspark.cache.errors import DamagedCacheError, DsparkError, MismatchError, UsageError
from dspark.cache.files import bucket
from dspark.cache.files.calibration import Supplied
from dspark.cache.files.checksum import file_sha256
from dspark.cache.files.layout import CALIBRATION
from dspark.cache.files.place import place_of
from dspark.cache.files.urls import where
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.stores.merge import merge
from dspark.cache.writer import StoreWriter
from dspark.dump import begin
from dspark.dump import plan as planning
from dspark.dump.config import DumpConfig
from dspark.dump.engines.engine import Engine
from dspark.dump.job import plan_only
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dump_targets import save_target


def no_engine(plan: planning.Plan, batch_tokens: int | None) -> Engine:
    pytest.fail("weights were read")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DumpConfig:
    """How a store was made whose codec learnt from its corpus."""
    folder = tmp_path_factory.mktemp("made")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in corpus(45)))
    out = DumpConfig(
        model=str(save_target(folder / "target")),
        data=str(data),
        output=folder / "hs.zarr",
        codec="klt-2-2",
        layers=(0, 2),
        part_tokens=300,
        device="cpu",
    )
    dump(out, Display())
    return out


def test_it_gives_the_bytes_of_the_dump_that_made_it(
    made: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also outside its store, where no codec is named, and without a pass over the corpus; a later
    run may leave the flag out.
    """
    file = shutil.copy(made.output / CALIBRATION, tmp_path / "learnt.safetensors")
    again = dataclasses.replace(made, output=tmp_path / "again.zarr", calibration=file, codec=None)
    monkeypatch.setattr(
        begin, "captured", lambda *a: pytest.fail("states were captured to learn from")
    )
    out = dump(again, Display())
    assert (out["codec"], out["codec_why"]) == ("klt-2-2", "that of --calibration")
    assert_same(made.output, again.output)
    remove_last_part(again.output)
    dump(dataclasses.replace(made, output=again.output, resume=True), Display())
    assert_same(made.output, again.output)


def test_it_is_taken_from_a_store_wherever_that_is(
    made: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path / "objects"))
    bucket._pieces.cache_clear()
    learnt = (made.output / CALIBRATION).read_bytes()
    url = where("memory://bkt/learnt.zarr")
    place_of(url).write(CALIBRATION, learnt)
    for given in (made.output, url, url / CALIBRATION):
        found = Supplied.read(given)
        assert found.path.read_bytes() == learnt
        assert found.made_for.codec == "klt-2-2"
    with pytest.raises(UsageError, match=r"--calibration memory://bkt/no.zarr: no such object"):
        Supplied.read(where("memory://bkt/no.zarr"))


def remove_last_part(store: Path) -> None:
    shutil.rmtree(sorted((store / "parts").glob("[0-9]*"))[-1])
    StoreWriter(store, read_manifest(store), {}).reopen()


def test_a_corpus_that_is_too_short_to_learn_from_is_enough(
    made: DumpConfig, tmp_path: Path
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in corpus(6, seed=1)))
    config = dataclasses.replace(made, data=str(short), output=tmp_path / "short.zarr")
    with pytest.raises(UsageError, match="is calibrated on the corpus and needs"):
        dump(config, Display(), no_engine)
    dump(dataclasses.replace(config, calibration=made.output / CALIBRATION), Display())
    found = read_manifest(config.output).codec
    assert found == read_manifest(made.output).codec
    assert found.calibration_sha256 == file_sha256(config.output / CALIBRATION)


def refusals(
    made: DumpConfig, tmp_path: Path
) -> dict[str, tuple[dict[str, Any], type[DsparkError], str]]:
    """What is asked for -> the flags that differ, the error and its words."""
    file = made.output / CALIBRATION
    tensors = load_file(file)
    bare, cut, other = (tmp_path / f"{n}.safetensors" for n in ("bare", "cut", "other"))
    save_file(tensors, bare)
    cut.write_bytes(file.read_bytes()[:-9])
    save_file(tensors, other, {"dspark": '{"codec": "klt-2-2"}'})
    in_store = tmp_path / "store" / CALIBRATION
    shutil.copytree(made.output, in_store.parent)
    save_file({**tensors, "more": tensors["shape"] + 1}, in_store)
    target = str(save_target(tmp_path / "wider", intermediate_size=160))
    return {
        "no file": ({"calibration": tmp_path / "none"}, UsageError, "none: No such file"),
        "another folder": ({"calibration": tmp_path}, UsageError, "No such file or directory"),
        "no safetensors": (
            {"calibration": Path(str(made.data))},
            UsageError,
            "not a calibration file",
        ),
        "cut": ({"calibration": cut}, UsageError, "not a calibration file"),
        "says nothing": ({"calibration": bare}, UsageError, "does not say what it was made for"),
        "says too little": ({"calibration": other}, DamagedCacheError, "missing keys"),
        "not its store's": (
            {"calibration": in_store},
            DamagedCacheError,
            "the store that contains it says",
        ),
        "codec": (
            {"codec": "klt-3-2"},
            MismatchError,
            "codec: it is for klt-2-2, this run has klt-3-2",
        ),
        "nothing to learn": (
            {"codec": "lossless"},
            MismatchError,
            "codec: it is for klt-2-2, this run has lossless",
        ),
        "layers": (
            {"layers": (0, 3)},
            MismatchError,
            r"layers: it is for \[0, 2\], this run has \[0, 3\]",
        ),
        "target": (
            {"model": target},
            MismatchError,
            "target: it is for .*, whose config differs",
        ),
    }


@pytest.mark.parametrize("dry", [False, True], ids=["dump", "dry run"])
def test_what_is_not_for_this_dump_is_refused_before_weights_are_read(
    made: DumpConfig, tmp_path: Path, dry: bool
) -> None:
    for name, (flags, error, words) in refusals(made, tmp_path).items():
        config = dataclasses.replace(
            made,
            output=tmp_path / "out.zarr",
            **{"calibration": made.output / CALIBRATION, **flags},
        )
        with pytest.raises(error, match=words):
            plan_only(config) if dry else dump(config, Display(), no_engine)
            pytest.fail(f"{name} was taken")
        assert not config.output.exists(), name


def test_other_weights_of_the_same_shape_begin_no_store(made: DumpConfig, tmp_path: Path) -> None:
    target = Path(shutil.copytree(made.model, tmp_path / "target"))
    tensors = load_file(target / "model.safetensors")
    save_file(
        {n: t + 1 / 64 for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    config = dataclasses.replace(
        made, model=str(target), output=tmp_path / "o.zarr", calibration=made.output / CALIBRATION
    )
    with pytest.raises(MismatchError, match="not the one that the calibration was made for"):
        dump(config, Display())
    assert not config.output.exists()


def test_another_calibration_does_not_go_on_with_a_store(made: DumpConfig, tmp_path: Path) -> None:
    store, other = tmp_path / "hs.zarr", tmp_path / "other.safetensors"
    shutil.copytree(made.output, store)
    tensors = load_file(store / CALIBRATION)
    from safetensors import safe_open

    with safe_open(store / CALIBRATION, "pt") as file:
        save_file({n: t + (n == "aux_mean") for n, t in tensors.items()}, other, file.metadata())
    before = files(store)
    with pytest.raises(MismatchError, match="codec.calibration_sha256: store has "):
        dump(
            dataclasses.replace(made, output=store, calibration=other, resume=True),
            Display(),
            no_engine,
        )
    assert files(store) == before


def test_regenerated_answers_take_a_calibration_that_is_there(made: DumpConfig) -> None:
    config = dataclasses.replace(made, regenerate=True, part_tokens=None, dry_run=True)
    with pytest.raises(UsageError, match="is calibrated on answers, and with --regenerate"):
        plan_only(config)
    assert (
        plan_only(dataclasses.replace(config, calibration=made.output / CALIBRATION)).codec
        == "klt-2-2"
    )


@pytest.mark.parametrize("part_tokens", [None, 300])
def test_a_corpus_of_longer_rows_can_be_appended(
    made: DumpConfig, tmp_path: Path, part_tokens: int | None
) -> None:
    """Its rows per part are those of the store, not what its own length asks for."""
    chats = [r["messages"] for r in corpus(13) if len(r["messages"]) > 1]
    chats = [[m for chat in chats[i : i + 5] for m in chat] for i in (0, 5)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats * 6))
    config = dataclasses.replace(made, data=str(data), output=tmp_path / "long.zarr")
    config = dataclasses.replace(config, part_tokens=part_tokens, calibration=made.output)
    dump(config, Display())
    merge(tmp_path / "both.zarr", [made.output, config.output])
    other = dataclasses.replace(config, part_tokens=40, output=tmp_path / "short.zarr")
    dump(other, Display())
    with pytest.raises(MismatchError, match="(?s)run.block_rows: .*without --part-tokens"):
        merge(tmp_path / "no.zarr", [made.output, other.output])
