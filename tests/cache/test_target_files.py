"""The target's files beside the states: damage is refused, named, and repaired by the run that can
write them again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import dspark.cache
import stores
from dspark.cache.errors import DamagedCacheError, MismatchError
from dspark.cache.files.checksum import file_sha256
from dspark.cache.manifest import CodecInfo, TokenizerInfo
from dspark.cache.stores.recode import recode
from dspark.cache.stores.verify import drop_damaged, verify
from dspark.cache.writer import StoreWriter

LENGTHS = [50, 3, 120, 77]
FILES = {"tokenizer.json": b'{"model": 1}', "chat_template.jinja": b"{{ messages }}"}
TOKENIZER = TokenizerInfo(
    sha256=hashlib.sha256(FILES["tokenizer.json"]).hexdigest(),
    chat_template_sha256=hashlib.sha256(FILES["chat_template.jinja"]).hexdigest(),
)
PLAN = stores.manifest(tokenizer=TOKENIZER)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "hs.zarr"
    samples = stores.token_samples(LENGTHS)
    with StoreWriter.create(path, PLAN, stores.frozen(), FILES) as writer:
        for block in range(2):
            stores.commit(writer, block, samples)
        writer.finish()
    return path


def flip(path: Path) -> None:
    """One bit, in the last byte: of the weights' values, of a text's end."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def contents(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def test_damaged_weights_are_not_handed_out(store: Path) -> None:
    assert dspark.cache.open(store).target.tied
    flip(store / "target" / "model.safetensors")
    with pytest.raises(
        DamagedCacheError,
        match=r"model.safetensors: sha256 is \w{64}, the manifest says \w{64}. Run .*verify "
        r"--drop-damaged .*--resume",
    ):
        _ = dspark.cache.open(store).target
    (store / "target" / "model.safetensors").unlink()
    with pytest.raises(DamagedCacheError, match=r"No such file.*--resume"):
        _ = dspark.cache.open(store).target


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        *itertools.product(["model.safetensors", "tokenizer.json", "config.json"], [False, True]),
        ("chat_template.jinja", False),
    ],
)
def test_verify_finds_what_is_not_the_manifests_and_a_resumed_run_writes_it_again(
    store: Path, name: str, gone: bool
) -> None:
    assert verify(store).ok
    before = contents(store)
    file = store / "target" / name
    if gone:
        file.unlink()
    else:
        flip(file)
    report = verify(store)
    (finding,) = report.findings
    assert str(file) in finding
    assert finding.endswith("--resume, which restores what is missing.")
    assert drop_damaged(store, report) == [f"target/{name}"]
    assert not file.exists()
    assert not dspark.cache.open(store, allow_incomplete=True).manifest.complete
    with StoreWriter.resume(store, PLAN) as writer:
        assert writer.restore_target(stores.frozen(), FILES) == [name]
        assert writer.restore_target(stores.frozen(), FILES) == []
        writer.finish()
    assert contents(store) == before


def test_a_file_that_only_the_run_knows_is_written_again(store: Path) -> None:
    (store / "target" / "chat_template.jinja").unlink()
    assert StoreWriter.resume(store, PLAN).restore_target(stores.frozen(), FILES) == [
        "chat_template.jinja"
    ]
    assert (store / "target" / "chat_template.jinja").read_bytes() == FILES["chat_template.jinja"]


def test_weights_of_another_target_are_refused_and_change_nothing(store: Path) -> None:
    flip(store / "target" / "model.safetensors")
    before = contents(store)
    with pytest.raises(
        MismatchError,
        match=r"model.safetensors must be written again.*\n.*this run/model.safetensors: sha256 is",
    ):
        StoreWriter.resume(store, PLAN).restore_target(stores.frozen(seed=1), FILES)
    assert contents(store) == before


def test_a_sound_store_is_not_gone_on_with_by_another_target(store: Path) -> None:
    before, writer = contents(store), StoreWriter.resume(store, PLAN)
    assert writer.restore_target(stores.frozen(), FILES) == []
    other = stores.frozen(seed=1)
    with pytest.raises(
        MismatchError, match=r"not the one .* is (\w{64}), the manifest says (\w{64})"
    ) as caught:
        writer.restore_target(other, FILES)
    assert writer.manifest.target.weights_sha256 in str(caught.value)
    assert other.save(store.parent / "other") in str(caught.value)
    assert contents(store) == before


@pytest.mark.parametrize("tied", [True, False])
def test_the_hash_of_weights_is_that_of_the_file_they_would_make(
    tmp_path: Path, tied: bool
) -> None:
    """Whichever release of safetensors wrote its header."""
    one, path = stores.frozen(), tmp_path / "model.safetensors"
    frozen = dataclasses.replace(
        one, tied=tied, lm_head=one.lm_head.clone(), norm=one.norm.bfloat16()
    )
    written = frozen.save(path)
    assert frozen.sha256_in(path) == written
    save_file(load_file(path), path, {"format": "pt", "by": "another release"})
    assert frozen.sha256_in(path) == file_sha256(path)
    for changed in ("embed_tokens", "norm", *(() if tied else ("lm_head",))):
        other = dataclasses.replace(frozen, **{changed: -getattr(frozen, changed)})
        assert other.sha256_in(path) != file_sha256(path)
    assert dataclasses.replace(frozen, tied=not tied).sha256_in(path) != file_sha256(path)


def test_a_damaged_source_is_not_recoded(store: Path, tmp_path: Path) -> None:
    flip(store / "target" / "tokenizer.json")
    with pytest.raises(DamagedCacheError, match="tokenizer.json: sha256 is"):
        recode(store, tmp_path / "small.zarr", aux_bits=4, last_bits=4)
    assert not (tmp_path / "small.zarr").exists()


def test_a_recoded_store_gets_its_targets_files_again_from_the_source(
    store: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small.zarr"
    recode(store, small, aux_bits=4, last_bits=4)
    before = contents(small)
    flip(small / "target" / "model.safetensors")
    drop_damaged(small, verify(small))
    recode(store, small, aux_bits=4, last_bits=4, resume=True)
    assert contents(small) == before


def test_a_missing_part_is_one_to_be_written_again(store: Path, tmp_path: Path) -> None:
    (store / "parts" / "000000000000").rename(tmp_path / "kept")
    report = verify(store)
    assert report.damaged == {"000000000000"}
    assert drop_damaged(store, report) == ["000000000000"]


def test_a_difference_between_plans_is_short(store: Path) -> None:
    """Parameters by the kilobyte are no message; another codec's parameters are no difference of
    their own.
    """
    codec = CodecInfo(name="rotated-4-4", params={"levels": "x" * 5000})
    with pytest.raises(
        MismatchError, match="codec.name: store has 'lossless', this run has 'rotated-4-4'"
    ) as caught:
        PLAN.same_plan(dataclasses.replace(PLAN, codec=codec), "hs.zarr")
    assert "params" not in str(caught.value)
    mine = dataclasses.replace(codec, params={"levels": "y" * 5000})
    with pytest.raises(MismatchError, match=r"codec.params.levels: store has 'xxx") as caught:
        dataclasses.replace(PLAN, codec=codec).same_plan(
            dataclasses.replace(PLAN, codec=mine), "hs.zarr"
        )
    assert len(str(caught.value)) < 500
