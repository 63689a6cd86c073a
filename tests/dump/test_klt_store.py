"""Stores in the transform codec, whole: dumped, read back, recoded, verified, trained from; and
corpora too small for it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from dump_runs import corpus
from safetensors.torch import load_file as safetensors

import dspark.cache
from dspark.cache.codec.klt.codec import Klt
from dspark.cache.errors import DamagedCacheError, EngineError, UsageError
from dspark.cache.files.layout import CALIBRATION
from dspark.cache.quality import snr_db
from dspark.cache.stores.recode import recode
from dspark.cache.stores.verify import verify
from dspark.dump import begin, run
from dspark.dump.config import DumpConfig
from dspark.dump.job import prepare
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dspark.tools.stores.info import info
from dspark.train.data.batch import Batch
from dspark.train.data.row import PackedRow
from dump_targets import save_target

CODEC = "klt-2-2-2"


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same corpus in 16 bits and in the transform codec, and too short a one."""
    folder = tmp_path_factory.mktemp("klt")
    out = {"model": save_target(folder / "model")}
    for name, rows in (("data", 150), ("short", 6)):
        out[name] = folder / f"{name}.jsonl"
        out[name].write_text("".join(json.dumps(row) + "\n" for row in corpus(rows)))
    for name in ("lossless", CODEC):
        out[name] = folder / f"{name}.zarr"
        dump(config(out, output=out[name], codec=name), Display())
    return out


def config(stores: dict[str, Path], data: str = "data", **changes: Any) -> DumpConfig:
    settings: dict[str, Any] = {
        "part_tokens": 1024,
        "batch_tokens": 512,
        "layers": (0, 2),
        **changes,
    }
    return DumpConfig(
        model=str(stores["model"]),
        data=str(stores[data]),
        engine="transformers",
        device="cpu",
        **settings,
    )


def test_what_is_read_is_near_what_was_captured(stores: dict[str, Path]) -> None:
    exact, ours = dspark.cache.open(stores["lossless"]), dspark.cache.open(stores[CODEC])
    assert isinstance(ours.codec, Klt)
    assert ours.codec.name == CODEC
    assert len(exact) == len(ours)
    assert least_snr(exact, ours) > 9.0
    assert not verify(stores[CODEC]).findings
    log = stores[CODEC].with_name(stores[CODEC].name + ".log").read_text()
    for line in (r"learnt in seconds: states [\d.]+, moments ", r"calibrated on .*learning [\d.]+"):
        assert re.search(line, log)


def test_a_gpu_is_warmed_from_the_self_check_on_until_the_codec_is_learnt(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def told(module: Any, name: str) -> None:
        real = getattr(module, name)

        def tell(*args: Any, **named: Any) -> Any:
            done.append(name)
            return real(*args, **named)

        monkeypatch.setattr(module, name, tell)

    @contextmanager
    def warming(codec: Klt, *of: object) -> Iterator[Callable[[], None]]:
        done.append(f"warming {codec.name} {of}")
        try:
            yield lambda: done.append("ready")
        finally:
            done.append("end")

    monkeypatch.setattr(begin, "warming", warming)
    for module, name in ((run, "check"), (begin, "captured"), (Klt, "calibrated")):
        told(module, name)
    dump(config(stores, output=tmp_path / "a.zarr", codec=CODEC), Display())
    start = f"warming {CODEC} (2, 64, 'cpu', 'float32')"
    assert done == [start, "check", "captured", "ready", "calibrated", "end"]

    done.clear()  # nothing is left to learn
    dump(config(stores, output=tmp_path / "b.zarr", calibration=stores[CODEC]), Display())
    assert done == [start.replace("'cpu'", "None"), "check", "end"]

    def broken(*of: object) -> None:
        raise EngineError("a check that fails")

    done.clear()
    monkeypatch.setattr(run, "check", broken)
    with pytest.raises(EngineError, match="a check that fails"):
        dump(config(stores, output=tmp_path / "c.zarr", codec=CODEC), Display())
    assert done == [start, "end"]


def least_snr(exact: dspark.cache.Cache, ours: dspark.cache.Cache) -> float:
    """The lower of both fields' signal-to-noise ratios in dB, over all samples."""
    pairs = [(exact[i], ours[i]) for i in range(len(exact))]
    found = []
    for name in ("aux", "last"):
        a, b = (np.concatenate([getattr(p[k], name).reshape(-1) for p in pairs]) for k in (0, 1))
        found.append(snr_db(torch.from_numpy(a), torch.from_numpy(b)) or np.inf)
    return min(found)


def test_recoding_the_exact_store_is_as_good(stores: dict[str, Path], tmp_path: Path) -> None:
    made = recode(stores["lossless"], tmp_path / "out.zarr", codec=CODEC)
    assert made.codec.name == CODEC
    assert made.complete
    exact = dspark.cache.open(stores["lossless"])
    assert least_snr(exact, dspark.cache.open(tmp_path / "out.zarr")) > 9.0


def test_a_calibration_that_the_plan_has_no_hash_of_is_refused(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    recode(stores["lossless"], tmp_path / "out.zarr", codec="klt-1-1")
    path = tmp_path / "out.zarr" / CALIBRATION
    path.write_bytes((stores[CODEC] / CALIBRATION).read_bytes())
    with pytest.raises(DamagedCacheError, match="sha256 is .* Put the file with the sha256"):
        dspark.cache.open(tmp_path / "out.zarr")
    path.unlink()
    with pytest.raises(DamagedCacheError, match="No such file .* Put the file with the sha256"):
        dspark.cache.open(tmp_path / "out.zarr")


def test_what_is_measured_foretells_the_store(stores: dict[str, Path]) -> None:
    """The bits that calibration aimed at, on samples that it held out, are those of the disk but
    for zstd's and short parts' excess.
    """
    found = info(stores[CODEC])
    assert 2.0 < found["aux_bits_measured"] < 3.5


def test_a_row_is_decoded_as_its_samples_are(stores: dict[str, Path]) -> None:
    """Training from coded states is training from the decoded ones: a packed row with padding gives
    the states that the reader gives.
    """
    cache = dspark.cache.open(stores[CODEC])
    read = [cache.read(i) for i in (3, 0, 7)]
    sizes = [len(s.tokens.input_ids) for s in read]
    used, size = sum(sizes), sum(sizes) + 5
    ids, mask = np.zeros(size, np.int64), np.zeros(size, np.bool_)
    doc = np.full(size, -1, np.int32)
    ids[:used] = np.concatenate([s.tokens.input_ids for s in read])
    mask[:used] = np.concatenate([s.tokens.loss_mask for s in read])
    doc[:used] = np.repeat(np.arange(3, dtype=np.int32), sizes)
    states = [cache.decoded(s) for s in read]
    rows = sum(len(last) for _, last in states)
    batch = Batch.build(
        input_ids=ids, loss_mask=mask, doc=doc, aux=torch.empty(size, 0), last=torch.empty(rows, 0),
        anchors=np.array([sizes[0] - 4]), block_size=3,
    )  # fmt: skip
    placed = PackedRow.build(batch, read, used).place(cache, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(placed.aux[:used], torch.cat([aux for aux, _ in states]))
    torch.testing.assert_close(placed.last, torch.cat([last for _, last in states]))


def test_a_small_corpus_takes_the_rotated_code_and_says_so(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    plan = prepare(config(stores, "short", output=tmp_path / "a.zarr")).plan
    assert plan.codec == "rotated-4-4"
    assert any("klt-1-1-2 is calibrated on the corpus and needs" in line for line in plan.lines())
    report = dump(config(stores, "short", output=tmp_path / "a.zarr"), Display())
    assert report["codec"] == "rotated-4-4"
    assert "needs" in report["codec_why"]
    # The store says what it is, also to a run that goes on with it.
    again = dump(config(stores, "short", output=tmp_path / "a.zarr", resume=True), Display())
    assert again["complete"]


@pytest.mark.parametrize("name", ["klt-1-1-2", "small"])
def test_a_codec_that_was_asked_for_is_not_replaced(
    stores: dict[str, Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match=r"needs [\d,]+ tokens"):
        prepare(config(stores, "short", output=tmp_path / "a.zarr", codec=name))


def test_the_default_is_the_transform_codec_where_it_can_be_calibrated(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    plan = prepare(config(stores, output=tmp_path / "a.zarr")).plan
    assert (plan.codec, plan.codec_why) == ("klt-1-1-2", None)
    assert plan.calibration_tokens > 0
    bits = prepare(config(stores, output=tmp_path / "a.zarr", aux_bits=3)).plan
    assert bits.codec == "rotated-3-4"
    plain = dataclasses.replace(config(stores, output=tmp_path / "a.zarr"), pack="none")
    assert prepare(plain).plan.codec == "rotated-4-4"


def test_answers_of_the_target_are_not_calibrated_on(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    settings = config(stores, output=tmp_path / "a.zarr", part_tokens=None, regenerate=True)
    assert prepare(settings).plan.codec == "rotated-4-4"
    with pytest.raises(UsageError, match="--regenerate"):
        prepare(dataclasses.replace(settings, codec="klt-1-1"))


def test_a_foreign_reader_decodes_by_the_document(stores: dict[str, Path]) -> None:
    """docs/format.md in plain zarr, safetensors and numpy; shares nothing with the package but what
    it is held against.
    """
    store = dspark.cache.open(stores[CODEC])
    read = Foreign(stores[CODEC])
    part = zarr.open_group(sorted((stores[CODEC] / "parts").iterdir())[0], mode="r")
    found = list(read.samples(part))
    assert len(found) > 2
    exact = 0
    for i, (ids, aux, last, stored_exactly) in enumerate(found):
        ours = store[i]
        np.testing.assert_array_equal(ours.input_ids, ids)
        np.testing.assert_allclose(ours.aux, aux, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(ours.last[ours.last_mask], last, rtol=1e-3, atol=1e-3)
        exact += stored_exactly
    assert exact == np.asarray(part["exact_position"]).size


class Foreign:
    """A reader of the transform codec, written from the document."""

    def __init__(self, path: Path) -> None:
        learnt = safetensors(path / CALIBRATION)
        self.learnt = {
            n: t.float().numpy() if t.is_floating_point() else t.numpy() for n, t in learnt.items()
        }
        self.layers, self.hidden, self.context = self.learnt["shape"].tolist()
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        name = attributes["dspark"]["plan"]["codec"]["name"]  # klt-A-L-C
        self.coarse = float(name.split("-")[3])
        weights = safetensors(next((path / "target").glob("*.safetensors")))
        self.embedding = weights["embed_tokens.weight"].float().numpy()

    def coefficients(self, field: str, code: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """``kind``: 1 where the last state of a row's token is not stored, else 0."""
        step, offsets = self.learnt[f"{field}_numbers"][0], self.learnt[f"{field}_offsets"]
        step = step * np.where(kind == 1, self.coarse, 1)
        out, at, band = [], 0, 0
        for count, (cells, n) in zip(
            self.learnt[f"{field}_columns"].tolist(),
            [(255, 1), (15, 2), (5, 3), (3, 5)],
            strict=True,
        ):
            data = code[:, at : at + count // n].astype(np.int64)
            at += count // n
            for k in range(count):
                byte = data[:, k // n]
                q = byte // cells ** (k % n) % cells - cells // 2
                q = np.where(byte >= cells**n, 0, q)
                near, far = offsets[2 * kind, band + k // 30], offsets[2 * kind + 1, band + k // 30]
                size = np.abs(q) + np.where(np.abs(q) == 1, near, far)
                out.append(np.where(q == 0, 0, np.sign(q) * size) * step)
            band += -(-count // 30)
        return np.stack(out, 1).astype(np.float32)

    def rows(self, field: str, y: np.ndarray, features: np.ndarray) -> np.ndarray:
        mean, deviation, back, predict = (
            self.learnt[f"{field}_{n}"] for n in ("mean", "deviation", "back", "predict")
        )
        return mean + deviation * (y @ back + features @ predict)

    def samples(self, part: Any) -> Any:
        """Of each sample: ids, ``aux`` [S, L, H], stored last states [m, H], tokens stored
        exactly.
        """
        a = {n: np.asarray(part[n]) for n in part.array_keys()}
        values = lambda x: (x.astype(np.uint32) << 16).view(np.float32)  # noqa: E731
        for i in range(len(a["sample_row"])):
            begin, end = a["sample_start"][i : i + 2]
            first, past = a["sample_last_start"][i : i + 2]
            ids, mask = a["input_ids"][begin:end], a["loss_mask"][begin:end]
            e = self.embedding[ids]
            before = np.concatenate([np.zeros_like(e[:1]), e[:-1]])
            at = np.flatnonzero(mask[:-1] & mask[1:])
            kind = np.ones(len(ids), dtype=np.int64)
            kind[at] = 0
            y = self.coefficients("aux", a["aux_code"][begin:end], kind)
            aux = self.rows("aux", y, np.concatenate([e, before], 1)).reshape(
                -1, self.layers, self.hidden
            )
            near = np.concatenate([y[at, : self.context], before[at], e[at], e[at + 1]], 1)
            fine = np.zeros(past - first, dtype=np.int64)
            y = self.coefficients("last", a["last_code"][first:past], fine)
            last = self.rows("last", y, near)
            own = slice(*a["sample_exact_start"][i : i + 2])
            for p, r in zip(a["exact_position"][own], a["exact_row"][own], strict=True):
                aux[p] = values(a["exact_aux"][r])
                last[at == p] = values(a["exact_last"][r])
            yield ids, aux, last, own.stop - own.start
