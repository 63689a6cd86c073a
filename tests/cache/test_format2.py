"""Format version 2: many writers, killed writers, rebuilt index and manifest, exactly stored
tokens, columns, version 1 stores.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import zarr

import dspark.cache
import stores
from dspark.cache import errors
from dspark.cache.codec import registry
from dspark.cache.codec.base import EXACT_TOKEN, ArraySpec, Tokens
from dspark.cache.files.atomic import remove
from dspark.cache.json_text import Json
from dspark.cache.repeats import Repeats
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.stores.rebuild import rebuild
from dspark.cache.stores.recode import recode
from dspark.cache.stores.verify import drop_damaged, verify
from dspark.cache.writer import StoreWriter
from dspark.tools import cli as tools

LENGTHS = [50, 3, 120, 77, 260, 9, 150, 31, 40, 22]
BLOCKS = 4  # of 3 rows
V1 = Path(__file__).parent / "data" / "v1_stores.tar.xz"


def contents(store: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
def test_any_writers_in_any_order_give_the_same_bytes(tmp_path: Path, writers: int) -> None:
    stores.write_store(tmp_path / "one", LENGTHS)
    samples, m = stores.token_samples(LENGTHS), stores.manifest()
    StoreWriter.create(tmp_path / "many", m, stores.frozen(), {"config_note.txt": b"x"}).close()
    order = list(range(BLOCKS))
    random.Random(writers).shuffle(order)
    open_ = [StoreWriter.resume(tmp_path / "many", m) for _ in range(writers)]
    for i, block in enumerate(order):
        stores.commit(open_[i % writers], block, samples)
    open_[-1].finish()
    for writer in open_:
        writer.close()
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_the_second_writer_of_a_part_leaves_the_first_ones(tmp_path: Path) -> None:
    samples, m = stores.token_samples(LENGTHS), stores.manifest()
    first = StoreWriter.create(tmp_path / "s", m, stores.frozen(), {})
    second = StoreWriter.resume(tmp_path / "s", m)
    stores.commit(first, 0, samples)
    before = contents(tmp_path / "s")
    stores.commit(second, 0, samples)  # the same bytes: what is there stays
    assert contents(tmp_path / "s") == before


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[2])
import stores
from dspark.cache.writer import StoreWriter
from pathlib import Path
path, lengths = Path(sys.argv[1]), [int(n) for n in sys.argv[3].split(",")]
m, samples = stores.manifest(), stores.token_samples(lengths)
if path.exists():
    writer = StoreWriter.resume(path, m)
else:
    writer = StoreWriter.create(path, m, stores.frozen(), {"config_note.txt": b"x"})
print("ready", flush=True)
with writer:
    for block in range(len(stores.blocks_of(samples, m.dump.block_rows))):
        if block not in writer.committed:
            stores.commit(writer, block, samples)
    writer.finish()
"""


def test_killed_at_random_moments_and_resumed_it_is_the_same_store(tmp_path: Path) -> None:
    """The campaign's short form (``make campaign`` runs 40 seeds)."""
    kill_campaign(tmp_path, seed=1, kills=2)


def kill_campaign(tmp_path: Path, seed: int, kills: int) -> None:
    """``kills`` writers of one store are killed at random moments; one more finishes it."""
    stores.write_store(tmp_path / "one", LENGTHS)
    rng = random.Random(seed)
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(tmp_path / "many"),
        str(Path(stores.__file__).parent),
        ",".join(map(str, LENGTHS)),
    ]
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            if rng.random() < 0.8:
                run.stdout.readline()  # else it may be killed while the store is created
            try:
                run.wait(rng.random() * 0.5)
            except subprocess.TimeoutExpired:
                os.kill(run.pid, signal.SIGKILL)
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert verify(tmp_path / "many").ok


def flip(path: Path, at: int = 9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "gone",
    [
        "index",
        "index/sample_row",
        "index/sample_row/c",
        "index/sample_key/c",
        "index/zarr.json",
        "flip",
    ],
)
def test_an_index_that_is_not_whole_is_an_error_and_made_again(tmp_path: Path, gone: str) -> None:
    store = tmp_path / "s"
    stores.write_store(store, LENGTHS)
    before = contents(store)
    if gone == "flip":
        flip(store / "index" / "sample_row" / "c" / "0")
    else:
        remove(store / gone)
    with pytest.raises(errors.DamagedCacheError, match="verify --rebuild-index"):
        len(dspark.cache.open(store))
    assert not (report := verify(store)).ok
    assert drop_damaged(store, report) == []  # nothing of the parts is
    assert run("verify", "--rebuild-index", store) == 0
    assert contents(store) == before


def run(*args: object) -> int:
    """Exit code of dspark-tools."""
    with pytest.raises(SystemExit) as done:
        tools.main([str(a) for a in args])
    return int(done.value.code or 0)


def test_a_manifest_is_made_again_from_the_parts(tmp_path: Path) -> None:
    store = tmp_path / "s"
    stores.write_store(store, LENGTHS)
    digest = read_manifest(store).digest()
    (store / "zarr.json").write_text("{}")
    with pytest.raises(errors.DamagedCacheError, match="--rebuild-index"):
        verify(store)
    assert run("verify", "--rebuild-index", store) == 0
    made = read_manifest(store)
    assert (made.complete, made.digest()) == (True, digest)
    # Without an index nothing says that these parts are all: that is for a resumed dump to find
    # out.
    shutil.rmtree(store / "index")
    (store / "zarr.json").unlink()
    assert not rebuild(store).complete
    writer = StoreWriter.resume(store, made)
    assert sorted(writer.committed) == list(range(BLOCKS))
    assert writer.finish().complete
    assert verify(store).ok
    shutil.rmtree(store / "parts" / "000000000003")
    with pytest.raises(errors.DamagedCacheError, match="parts are missing"):
        rebuild(store)


def test_a_foreign_manifest_costs_no_part(tmp_path: Path) -> None:
    stores.write_store(tmp_path / "s", LENGTHS)
    recode(tmp_path / "s", tmp_path / "4", codec="rotated-4-4")
    before = contents(tmp_path / "s")
    shutil.copy(tmp_path / "4" / "zarr.json", tmp_path / "s" / "zarr.json")
    shutil.copy(
        tmp_path / "4" / "calibration.safetensors", tmp_path / "s" / "calibration.safetensors"
    )
    report = verify(tmp_path / "s")
    assert "no part has the manifest's plan" in "".join(report.findings)
    assert drop_damaged(tmp_path / "s", report) == []
    rebuild(tmp_path / "s")
    assert verify(tmp_path / "s").ok
    after = contents(tmp_path / "s")
    assert [n for n in before if n.startswith("parts/") and after.get(n) != before[n]] == []
    # One foreign part among others is damage.
    shutil.rmtree(tmp_path / "s" / "parts" / "000000000001")
    shutil.copytree(
        tmp_path / "4" / "parts" / "000000000001", tmp_path / "s" / "parts" / "000000000001"
    )
    assert verify(tmp_path / "s").damaged == {"000000000001"}


def test_blocks_without_samples_are_parts_like_others(tmp_path: Path) -> None:
    samples, m = stores.token_samples(LENGTHS), stores.manifest()
    some = [s for s in samples if s.row not in (0, 1, 2, 6, 7, 8)]
    with StoreWriter.create(tmp_path / "s", m, stores.frozen(), {}) as writer:
        for i in range(BLOCKS):
            stores.commit(writer, i, some)
        writer.finish()
    assert verify(tmp_path / "s").ok
    assert [s.row for s in dspark.cache.open(tmp_path / "s")] == [3, 4, 5, 9]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("call", ["open", "stat", "pread", "fstat"])
def test_what_cannot_be_read_now_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """One call on one part's files fails once."""
    store = tmp_path / "s"
    stores.write_store(store, LENGTHS)
    before, real, failed = contents(store), getattr(os, call), []

    def once(what: object, *args: object, **more: object) -> object:
        name = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
        if "000000000002/" in name and not failed:
            failed.append(name)
            raise OSError(code, os.strerror(code), name)
        return real(what, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, once)
        report = verify(store)
    assert failed
    assert (report.damaged, report.unreadable, report.verdict) == (
        set(),
        {"000000000002"},
        "UNREADABLE",
    )
    assert "cannot be read now" in report.findings[0]
    assert drop_damaged(store, report) == []
    assert contents(store) == before
    assert verify(store).ok


@pytest.mark.parametrize("name", ["target", "parts", "parts/000000000001", "index", "zarr.json"])
def test_links_within_a_store_are_refused(tmp_path: Path, name: str) -> None:
    stores.write_store(tmp_path / "s", LENGTHS)
    (tmp_path / "s" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "s" / name).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    with pytest.raises(errors.DamagedCacheError, match="a link"):
        cache = dspark.cache.open(tmp_path / "s")
        list(cache)
    with pytest.raises(errors.DamagedCacheError, match="a link"):
        drop_damaged(tmp_path / "s", verify(tmp_path / "s"))
    assert contents(tmp_path) == before


def test_an_incomplete_store_is_read_with_any_of_its_parts(tmp_path: Path) -> None:
    store = tmp_path / "s"
    samples = stores.write_store(store, LENGTHS)
    report = verify(store)
    report.findings.append("pretend")
    report.damaged = {"000000000001"}
    drop_damaged(store, report)
    with pytest.raises(errors.IncompleteCacheError):
        dspark.cache.open(store)
    half = dspark.cache.open(store, allow_incomplete=True)
    assert [s.row for s in half] == [0, 1, 2, *range(6, len(LENGTHS))]
    np.testing.assert_array_equal(half[4].input_ids, samples[7].input_ids)


def test_rows_out_of_their_block_are_refused(tmp_path: Path) -> None:
    writer = StoreWriter.create(tmp_path / "s", stores.manifest(), stores.frozen(), {})
    with pytest.raises(errors.MismatchError, match="expected at most 3 rows, starting at 3"):
        writer.job(1, [], writer.block(1, 2, 6, dropped={}, truncated=0))
    writer.commit(0, [], writer.block(0, 0, 3, dropped={"no assistant turn": 3}, truncated=0))
    writer.commit(2, [], writer.block(2, 6, 9, dropped={}, truncated=0))
    with pytest.raises(errors.MismatchError, match="no whole block 1"):
        writer.finish()


# -- a codec of another kind -----------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """Half of the difference to the token's embedding in int8, columns; massive tokens exactly. No
    codec for use.
    """

    name: str = "toy"
    pack: str = "zstd"
    step: float = 0.05
    bits: tuple[None, None] = (None, None)
    needs_tokens: bool = True
    needs_calibration: bool = True

    @property
    def params(self) -> Json:
        return {"limit": 100}

    def arrays(self, layers: int, hidden: int) -> dict[str, ArraySpec]:
        return {
            "aux_q": ArraySpec("int8", hidden, self.pack, layers=layers, order="columns", chunk=16),
            "last_q": ArraySpec("int16", hidden, self.pack, axis="last", order="columns"),
            "exact_aux": ArraySpec("float32", hidden, self.pack, axis="exact", layers=layers),
        }

    def calibration_tokens(self, layers: int, hidden: int) -> int:
        return 100

    def least_tokens(self, layers: int, hidden: int) -> int:
        return 0

    def learnt_bytes(self, layers: int, hidden: int) -> int:
        return 0

    def fitting_bytes(self, layers: int, hidden: int, vocab: int) -> int:
        return 0

    def disk_bytes(
        self, layers: int, hidden: int, last_share: float = 1.0, repeats: Repeats | None = None
    ) -> float:
        return layers * hidden + 2 * last_share * hidden

    def encode(
        self, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens | None = None
    ) -> dict[str, torch.Tensor]:
        assert tokens is not None
        guess = tokens.embedding[tokens.input_ids][:, None]
        exact = (aux.abs().amax((1, 2)) > 100).nonzero()[:, 0]
        q = ((aux - guess) / self.step).round().clamp(-127, 127).to(torch.int8)
        q[exact] = 0
        near = (last - tokens.embedding[tokens.input_ids[tokens.last_token + 1]]) / 0.001
        return {
            "aux_q": q,
            "last_q": near.round().to(torch.int16),
            "exact_aux": aux[exact].float(),
            EXACT_TOKEN: exact,
        }

    def decode(
        self,
        coded: Mapping[str, torch.Tensor],
        hidden: int,
        tokens: Tokens | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert tokens is not None
        aux = coded["aux_q"].float() * self.step + tokens.embedding[tokens.input_ids][:, None]
        aux[coded[EXACT_TOKEN].long()] = coded["exact_aux"]
        last = (
            coded["last_q"].float() * 0.001
            + tokens.embedding[tokens.input_ids[tokens.last_token + 1]]
        )
        return aux.to(dtype or torch.float32), last.to(dtype or torch.float32)

    def calibrated(
        self, aux: torch.Tensor, last: torch.Tensor, tokens: Tokens | None = None
    ) -> Toy:
        assert tokens is not None
        return replace(self, step=float(aux[1:].abs().median()) / 16)

    def calibration(self) -> dict[str, torch.Tensor]:
        return {"step": torch.tensor([self.step], dtype=torch.float64)}

    def repacked(self, pack: str) -> Toy:
        return replace(self, pack=pack)


class ToyFamily:
    def names(self) -> list[str]:
        return ["toy"]

    def make(self, name: str, pack: str) -> Toy:
        return Toy(pack=pack)

    def load(
        self,
        name: str,
        params: Json,
        pack: str,
        calibration: Mapping[str, torch.Tensor],
        where: str,
    ) -> Toy:
        made = Toy(pack=pack)
        return replace(made, step=float(calibration["step"])) if calibration else made


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One module and one line of the registry."""
    module = ModuleType("toy_codec")
    module.FAMILY = ToyFamily()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_codec", module)
    monkeypatch.setitem(registry.FAMILIES, "toy", "toy_codec")


@pytest.mark.usefixtures("toy")
def test_a_new_codec_is_a_module_and_a_line(tmp_path: Path) -> None:
    """Predicted from tokens, columns, exact tokens stored once, calibrated: through recode, verify,
    reading and back.
    """
    source, made = tmp_path / "s", tmp_path / "toy"
    stores.write_store(source, LENGTHS)
    recode(source, made, codec="toy")
    assert verify(made).ok
    a, b = dspark.cache.open(source), dspark.cache.open(made)
    assert b.manifest.codec.name == "toy"
    assert isinstance(b.codec, Toy)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.input_ids, y.input_ids)
        massive = np.abs(x.aux).max((1, 2)) > 100
        assert massive[0]
        np.testing.assert_array_equal(x.aux[massive], y.aux[massive])
        assert np.abs(x.last - y.last).max() < 1e-3
    part = zarr.open_group(made / "parts" / "000000000001", mode="r")
    assert part["aux_q"].shape[0] == sum(LENGTHS[3:6])
    assert [f.to_dict()["name"] for f in part["aux_q"].filters] == ["transpose"]  # type: ignore[union-attr]
    # A foreign reader: by the document, without ours.
    learnt = dspark.cache.open(made).codec.step  # type: ignore[attr-defined]
    ids, q = np.asarray(part["input_ids"]), np.asarray(part["aux_q"])
    theirs = q * np.float32(learnt) + stores.frozen().embed_tokens.numpy()[ids][:, None]
    at, row, start = (
        np.asarray(part[n]) for n in ("exact_position", "exact_row", "sample_exact_start")
    )
    first = np.asarray(part["sample_start"])
    for i in range(3):
        for p, r in zip(at[start[i] : start[i + 1]], row[start[i] : start[i + 1]], strict=True):
            theirs[first[i] + p] = np.asarray(part["exact_aux"])[r]
    np.testing.assert_allclose(b[3].aux, theirs[: LENGTHS[3]], rtol=1e-6, atol=1e-5)
    again = tmp_path / "again"
    recode(made, again, codec="lossless")
    assert len(dspark.cache.open(again)) == len(LENGTHS)


# -- version 1 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def version_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of every codec, written by the last release of version 1, and sha256s of what that
    release read from them.
    """
    folder = tmp_path_factory.mktemp("v1")
    with tarfile.open(V1) as archive:
        archive.extractall(folder, filter="data")
    return folder


NAMES = [
    "16-16-zstd",
    "16-16-none",
    "8-8-zstd",
    "4-4-zstd",
    "4-4-plain-none",
    "3-4-zstd",
    "2-4-zstd",
    "4-8-none",
]


def hashes(store: Path) -> list[dict[str, object]]:
    def h(x: np.ndarray) -> str:  # type: ignore[type-arg]
        return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:32]

    arrays = ("input_ids", "loss_mask", "aux", "last")
    return [
        {"row": s.row, "key": s.key.hex(), **{n: h(getattr(s, n)) for n in arrays}}
        for s in dspark.cache.open(store)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_version_1_store_is_read_as_before_and_recoded_to_version_2(
    version_1: Path, tmp_path: Path, name: str
) -> None:
    store, want = (
        version_1 / name,
        json.loads((version_1 / "expected.json").read_text())[name]["samples"],
    )
    assert hashes(store) == want
    assert verify(store).ok
    old = dspark.cache.open(store)
    codec, pack = old.manifest.codec.name, old.manifest.codec.pack
    made = recode(store, tmp_path / "two", codec=codec, pack=pack)
    assert made.format_version == 2
    assert hashes(tmp_path / "two") == want
    assert made.counts == replace(old.manifest.counts, parts=made.counts.parts)
    assert made.quality == old.manifest.quality
    new = dspark.cache.open(tmp_path / "two")
    for i in range(len(old)):
        a, b = old.read(i).states, new.read(i).states
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[n], b[n]) for n in a)
    assert verify(tmp_path / "two").ok
    # packed in the other way, and back: every code as it was
    if codec not in ("rotated-3-4", "rotated-2-4"):
        other = "none" if pack == "zstd" else "zstd"
        recode(tmp_path / "two", tmp_path / "other", codec=codec, pack=other)
        recode(tmp_path / "other", tmp_path / "back", codec=codec, pack=pack)
        assert contents(tmp_path / "back") == contents(tmp_path / "two")


def test_a_version_1_store_is_not_gone_on_with(version_1: Path) -> None:
    with pytest.raises(errors.MismatchError, match="format version 1.*dspark-tools recode"):
        StoreWriter.resume(version_1 / "4-4-zstd", stores.manifest())
    report = verify(version_1 / "4-4-zstd")
    report.findings, report.damaged = ["pretend"], {"00000000"}
    with pytest.raises(errors.UsageError, match="cannot be repaired by this release"):
        drop_damaged(version_1 / "4-4-zstd", report)
