"""The dump whole: what is in the store, and that no way of stopping it changes that."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dump_runs import Wrapped, assert_same, corpus, files

import dspark.cache
from dspark.cache.codec.base import Codec
from dspark.cache.codec.centre import CALIBRATION
from dspark.cache.errors import (
    DataError,
    EngineError,
    ExistsError,
    MismatchError,
    Stopped,
    StoreWriteError,
    UsageError,
)
from dspark.cache.files.checksum import file_sha256
from dspark.cache.parts.part import PartJob
from dspark.cache.records import TokenSample, last_rows
from dspark.cache.writer import StoreWriter
from dspark.dump import plan as planning
from dspark.dump.centring import calibration_samples
from dspark.dump.config import DumpConfig
from dspark.dump.corpus.masks import MALFORMED
from dspark.dump.engines.engine import Captured, Engine, States
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.job import load_engine, prepare
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dump_targets import chat


def stops_after(
    n: int, error: type[BaseException]
) -> Callable[[planning.Plan, int | None], Engine]:
    """An engine that raises ``error`` at its ``n``-th sample."""
    count = Counter[str]()

    def before() -> None:
        count["samples"] += 1
        if count["samples"] == n:
            raise error("stop")

    return lambda plan, batch_tokens: Wrapped(load_engine(plan, batch_tokens), before)


def test_the_store_holds_what_the_target_says(config: DumpConfig, show: Display) -> None:
    out = dump(config, show)
    store = dspark.cache.open(config.output)
    made = [prepare(config).maker.make(r) for r in prepare(config).corpus.rows()]
    kept = [s for m in made for s in m.samples]
    assert len(store) == len(kept) == out["samples"] == 35
    assert out["dropped"] == {"no assistant turn": 5}
    assert (out["rows_read"], out["complete"], out["layers"]) == (40, True, [1, 2, 3])
    assert out["quality"]["aux_snr_db"][0] > 50
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    for i in (0, 17, 34):
        sample = store[i]
        assert sample.row == kept[i].row
        np.testing.assert_array_equal(sample.input_ids, kept[i].input_ids)
        np.testing.assert_array_equal(sample.loss_mask, kept[i].loss_mask)
        with torch.inference_mode():
            hidden = model(
                torch.from_numpy(sample.input_ids).long()[None], output_hidden_states=True
            ).hidden_states
        expected = torch.stack([hidden[j + 1][0] for j in (1, 2, 3)], dim=1).numpy()
        np.testing.assert_allclose(sample.aux, expected, rtol=2**-8, atol=1e-3)
        rows = sample.last_mask
        np.testing.assert_allclose(
            sample.last[rows], hidden[-1][0].numpy()[rows], rtol=2**-8, atol=1e-3
        )
        assert rows.sum() == (sample.loss_mask[:-1] & sample.loss_mask[1:]).sum()
    assert torch.equal(store.target.norm, model.model.norm.weight.detach())
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        p.name for p in (config.output / "target").iterdir()
    }
    log = config.output.with_name("hs.zarr.log").read_text()
    assert "self-check passed" in log
    assert "rows.jsonl:7: dropped: no assistant turn" in log


def test_the_same_dump_twice_is_the_same_store(
    config: DumpConfig, show: Display, tmp_path: Path
) -> None:
    dump(config, show)
    other = dataclasses.replace(config, output=tmp_path / "again.zarr")
    dump(other, show)
    assert_same(config.output, other.output)


def test_a_compact_dump_is_centred_on_rows_from_all_over_the_corpus(
    config: DumpConfig, show: Display, write_rows: Callable[..., Path]
) -> None:
    """Rows sorted by topic: the first hundred know nothing of the last hundred."""
    data = write_rows(
        [chat("u: cat cat cat", "a: the mat")] * 200 + [chat("u: 1 2 3 4 5", "a: 6 7 8 9 0")] * 200
    )
    config = dataclasses.replace(config, data=str(data), aux_bits=4, last_bits=8)
    job = prepare(config)
    assert job.plan.tokens is not None
    samples = calibration_samples(job.corpus, job.maker, 400, job.plan.tokens, CALIBRATION)
    rows = [s.row for s in samples]
    assert min(rows) < 10
    assert max(rows) > 390
    assert sum(r < 200 for r in rows) == pytest.approx(len(rows) / 2, abs=1)
    dump(config, show)
    store = dspark.cache.open(config.output)
    assert store.manifest.codec.calibration_sha256 == file_sha256(
        config.output / "calibration.safetensors"
    )
    aux = np.concatenate([store[i].aux for i in range(0, 400, 13)])
    mean = store.codec.aux.centre.tensors(64, torch.device("cpu"))[0].numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(aux.mean(0), mean, atol=0.25 * float(aux.std(0).mean()))
    assert "calibrated on" in config.output.with_name("hs.zarr.log").read_text()


@pytest.mark.parametrize(
    ("stop", "bits"),
    [(KeyboardInterrupt, (16, 16)), (RuntimeError, (16, 16)), (RuntimeError, (3, 4))],
)
def test_a_stopped_dump_resumes_to_the_same_store(
    config: DumpConfig,
    show: Display,
    tmp_path: Path,
    stop: type[BaseException],
    bits: tuple[int, int],
) -> None:
    config = dataclasses.replace(config, aux_bits=bits[0], last_bits=bits[1])
    whole = dataclasses.replace(config, output=tmp_path / "whole.zarr")
    dump(whole, show)
    with pytest.raises(Stopped if stop is KeyboardInterrupt else stop):
        dump(config, show, stops_after(20, stop))
    assert (
        0
        < len(list((config.output / "parts").glob("0*")))
        < len(list((whole.output / "parts").glob("0*")))
    )
    with pytest.raises(dspark.cache.errors.IncompleteCacheError):
        dspark.cache.open(config.output)
    dump(dataclasses.replace(config, resume=True), show)
    assert_same(config.output, whole.output)


def test_killed_and_resumed_is_byte_identical(
    tiny: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    data = write_rows(corpus(300))

    def command(output: Path, *more: str) -> list[str]:
        code = "from dspark.dump.cli import main; main()"
        return [
            sys.executable,
            "-c",
            code,
            "--model",
            str(tiny),
            "--data",
            str(data),
            "--output",
            str(output),
            "--part-tokens",
            "300",
            "--engine",
            "transformers",
            "--device",
            "cpu",
            "--aux-bits",
            "3",
            "--last-bits",
            "4",
            *more,
        ]

    whole, killed = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    subprocess.run(command(whole), check=True, capture_output=True)
    process = subprocess.Popen(
        command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list((killed / "parts").glob("0*"))) < 4:  # two are written at once, in any order
        assert process.poll() is None, "it finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    parts = len(list((killed / "parts").glob("0*")))
    assert 4 <= parts < len(list((whole / "parts").glob("0*")))
    resumed = subprocess.run(
        command(killed, "--resume", "--json"), check=True, capture_output=True, text=True
    )
    assert json.loads(resumed.stdout)["complete"] is True
    assert f"resuming: {parts} parts" in resumed.stderr.replace("\n", " ")
    assert_same(killed, whole)
    again = subprocess.run(command(killed, "--resume"), check=True, capture_output=True, text=True)
    assert "is complete" in again.stderr


def test_a_removed_part_is_written_again(config: DumpConfig, show: Display) -> None:
    dump(config, show)
    before = files(config.output)
    shutil.rmtree(config.output / "parts" / "000000000001")
    StoreWriter.resume(config.output, prepare(config).manifest).reopen()
    out = dump(dataclasses.replace(config, resume=True), show)
    assert 0 < out["new_tokens"] < out["tokens"]
    assert files(config.output) == before


def test_existing_output_and_other_plans_are_refused(
    config: DumpConfig, show: Display, write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(Stopped):
        dump(config, show, stops_after(20, KeyboardInterrupt))
    with pytest.raises(ExistsError, match="--resume to continue it"):
        dump(config, show)
    with pytest.raises(
        MismatchError, match=r"layers: store has \[1, 2, 3\], this run has \[0, 2\]"
    ):
        dump(dataclasses.replace(config, resume=True, layers=(0, 2)), show)
    other = write_rows(corpus(40, seed=1), "other.jsonl")
    with pytest.raises(
        MismatchError, match=r"source.id: store has 'rows.jsonl', this run has 'other.jsonl'"
    ):
        dump(dataclasses.replace(config, resume=True, data=str(other)), show)
    dump(dataclasses.replace(config, overwrite=True), show)
    assert len(dspark.cache.open(config.output)) == 35


def test_a_full_disk_stops_it_and_resume_goes_on(
    config: DumpConfig, show: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataclasses.replace(config, output=tmp_path / "whole.zarr")
    dump(whole, show)
    write = PartJob.write

    def full(self: PartJob, states: Any) -> Any:
        if self.index == 2:
            raise StoreWriteError("the disk is full")
        return write(self, states)

    with monkeypatch.context() as patch:
        patch.setattr(PartJob, "write", full)
        with pytest.raises(StoreWriteError, match="disk is full"):
            dump(config, show)
    dump(dataclasses.replace(config, resume=True), show)
    assert_same(config.output, whole.output)


def test_a_dump_that_cannot_fit_is_refused_before_weights_are_read(
    config: DumpConfig, show: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(config.output.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreWriteError, match=r"need about .* only 1 kB are free"):
        dump(config, show, lambda plan, batch_tokens: pytest.fail("the engine was started"))


def test_too_many_dropped_rows(
    config: DumpConfig, show: Display, write_rows: Callable[..., Path]
) -> None:
    data = write_rows([chat("u: hi there")] * 6 + corpus(4))
    with pytest.raises(
        DataError,
        match=r"rows.jsonl: 6 of the first 10 rows gave no sample \(no assistant turn: 6\)",
    ):
        dump(dataclasses.replace(config, data=str(data)), show)
    out = dump(dataclasses.replace(config, data=str(data), max_dropped=0.7, resume=True), show)
    assert out["samples"] == 4


def test_lines_that_are_no_row_are_dropped_and_counted(config: DumpConfig, show: Display) -> None:
    """In the report, the parts and the log, under the limit; what they hold changes nothing in
    their parts.
    """
    path, good = Path(str(config.data)), corpus(40)

    def rows(bad: bytes) -> None:
        lines = [json.dumps(row).encode() for row in good]
        lines[0], lines[3], lines[39] = bad, bad, b"[" * 2_000
        lines.insert(7, json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode())
        path.write_bytes(b"\n".join(lines))

    bad = b'{"messages": "\xff'
    rows(bad)
    with pytest.raises(DataError, match="41 rows gave no sample .*malformed row.*--max-dropped"):
        dump(dataclasses.replace(config, max_dropped=0.01), show)
    out = dump(dataclasses.replace(config, overwrite=True), show)
    assert out["dropped"][MALFORMED] == 3
    log = config.output.with_name(config.output.name + ".log").read_text()
    assert re.search(r"rows.jsonl:4: dropped: malformed row.*not JSON", log)
    first = config.output.rename(config.output.with_name("first.zarr"))
    rows(b"null".ljust(len(bad)))
    dump(config, show)
    assert_same(config.output / "parts", first / "parts")


@pytest.mark.parametrize("max_dropped", [0.5, 1.0])
def test_a_corpus_without_answers(
    config: DumpConfig, show: Display, write_rows: Callable[..., Path], max_dropped: float
) -> None:
    data = write_rows([chat("u: hi there")] * 6)
    with pytest.raises(DataError, match=r"rows.jsonl: .*no assistant turn"):
        dump(
            dataclasses.replace(config, data=str(data), max_dropped=max_dropped),
            show,
            lambda plan, n: pytest.fail("started"),
        )
    assert not config.output.exists()


def test_an_empty_corpus(
    config: DumpConfig, show: Display, write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match="no rows"):
        dump(dataclasses.replace(config, data=str(write_rows([]))), show)


def test_rows_that_are_dropped_have_parts_too(
    config: DumpConfig, show: Display, write_rows: Callable[..., Path]
) -> None:
    data = write_rows([*corpus(4), *[chat("u: hi there")] * 2])
    out = dump(dataclasses.replace(config, data=str(data), part_tokens=1), show)
    assert (out["rows_read"], out["samples"], out["parts"], out["dropped"]) == (
        6,
        4,
        6,
        {"no assistant turn": 2},
    )


def test_limit_and_truncation(config: DumpConfig, show: Display) -> None:
    out = dump(dataclasses.replace(config, limit=10, seq_length=60), show)
    assert out["rows_read"] == 10
    assert out["truncated"] > 0
    store = dspark.cache.open(config.output)
    assert max(len(store[i].input_ids) for i in range(len(store))) == 60


def test_tokenised_rows_need_no_tokenizer(
    config: DumpConfig, show: Display, tiny: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, bare / name)
    data = write_rows(
        [{"input_ids": [5, 6, 7, 8, 9 + i], "loss_mask": [0, 0, 1, 1, 1]} for i in range(4)]
    )
    plain = dataclasses.replace(config, model=str(bare), data=str(data))
    with pytest.raises(UsageError, match="--mask-token-id"):
        dump(plain, show)
    out = dump(dataclasses.replace(plain, mask_token_id=3), show)
    assert out["samples"] == 4
    assert dspark.cache.open(config.output).manifest.dump.mask_rule == "given"


def test_an_engine_whose_dump_differs_from_its_check_replaces_nothing(
    config: DumpConfig, show: Display
) -> None:
    """The self-check's own states are right, what the dump would store is not: the older store is
    still there, whole.
    """

    class Shifted(Wrapped):
        def stream(
            self, groups: Iterable[Sequence[TokenSample]], codec: Codec
        ) -> Iterator[Captured]:
            for captured in self.inner.stream(groups, codec):
                assert isinstance(captured.states, States)
                yield captured._replace(
                    states=States(captured.states.aux.roll(1, 0), captured.states.last)
                )

    dump(config, show)
    before = files(config.output)
    for change in ({"overwrite": True}, {"output": config.output.with_name("new.zarr")}):
        with pytest.raises(
            EngineError, match=r"coded states of sample \d, layer 1, differ from its states"
        ):
            dump(
                dataclasses.replace(config, **change),
                show,
                lambda plan, n: Shifted(load_engine(plan, n), lambda: None),
            )
    assert files(config.output) == before
    assert not config.output.with_name("new.zarr").exists()


@pytest.mark.parametrize(
    ("field", "words"),
    [("aux", "token 5 of its sample, layer 2, channel 7"), ("last", "the last state, channel 7")],
)
def test_a_state_that_is_not_finite_is_named(
    field: str, words: str, config: DumpConfig, show: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its row, token and layer; what was stored before it stays."""
    run = TransformersEngine._states
    config = dataclasses.replace(config, layers=(0, 2))

    def spoilt(self: TransformersEngine, batch: Sequence[TokenSample]) -> States:
        found = States(*(x.clone() for x in run(self, batch)))
        at = next((i for i, s in enumerate(batch) if s.row == 33), None)
        if at is not None:
            before = batch[:at]
            if field == "aux":
                found.aux[sum(len(s.input_ids) for s in before) + 5, 1, 7] = torch.nan
            else:
                found.last[sum(int(last_rows(s.loss_mask).sum()) for s in before), 7] = torch.nan
        return found

    monkeypatch.setattr(TransformersEngine, "_states", spoilt)
    with pytest.raises(EngineError, match=f"row 33 of .*, {words}: found nan"):
        dump(config, show)
    assert len(list((config.output / "parts").glob("0*"))) > 2


def test_what_is_no_store_is_not_overwritten(config: DumpConfig, show: Display) -> None:
    """And is refused before weights are read."""
    config.output.mkdir()
    (config.output / "mine.txt").write_text("mine")
    with pytest.raises(ExistsError, match="is not a dspark store"):
        dump(
            dataclasses.replace(config, overwrite=True),
            show,
            lambda *a: pytest.fail("weights were read"),
        )
    assert (config.output / "mine.txt").read_text() == "mine"
