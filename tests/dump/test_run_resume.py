"""``--resume`` of a store that is whole, or whose target is damaged: checked first, repaired where
it can be.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dump_runs import corpus, files

from dspark.cache.errors import DsparkError, MismatchError, TargetError
from dspark.cache.files.atomic import remove
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.stores.verify import drop_damaged, verify
from dspark.cache.writer import StoreWriter
from dspark.dump import plan as planning
from dspark.dump.config import DumpConfig
from dspark.dump.engines.engine import Engine
from dspark.dump.job import prepare
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dump_targets import save_target


def no_engine(plan: planning.Plan, batch_tokens: int | None) -> Engine:
    pytest.fail("weights were read")


def test_the_same_command_on_a_whole_store_reads_no_weights(
    config: DumpConfig, show: Display, capsys: pytest.CaptureFixture[str]
) -> None:
    compact = dataclasses.replace(config, aux_bits=4, last_bits=4)
    done = dump(compact, show)
    before = files(config.output)
    for parts in (compact.part_tokens, None):  # not given: the store's
        out = dump(dataclasses.replace(compact, resume=True, part_tokens=parts), show, no_engine)
        assert (out["complete"], out["samples"], out["new_tokens"]) == (True, done["samples"], 0)
        assert "nothing to resume" in capsys.readouterr().err.replace("\n", " ")
        # Of no concern to a store that was not regenerated.
        foreign = config.output.with_name(config.output.name + ".answers")
        foreign.mkdir(exist_ok=True)
    assert foreign.is_dir()
    assert files(config.output) == before


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "nosuchmodel"}, TargetError, "--model nosuchmodel: no config could be read"),
        (
            {"aux_bits": 4},
            MismatchError,
            "codec.name: store has 'lossless', this run has 'rotated-4-16'",
        ),
        ({"seq_length": 99}, MismatchError, "run.seq_length: store has .*, this run has 99"),
        (
            {"layers": (0, 2)},
            MismatchError,
            r"layers: store has \[1, 2, 3\], this run has \[0, 2\]",
        ),
        ({"limit": 10}, MismatchError, "source.limit: store has None, this run has 10"),
        (
            {"data": "other.jsonl"},
            MismatchError,
            "source.id: store has 'rows.jsonl', this run has 'other.jsonl'",
        ),
        ({"data": "nowhere.jsonl"}, DsparkError, "nowhere.jsonl"),
    ],
)
def test_another_command_on_a_whole_store_is_refused(
    config: DumpConfig,
    show: Display,
    write_rows: Callable[..., Path],
    change: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    dump(config, show)
    before = files(config.output)
    folder = write_rows(corpus(40, seed=1), "other.jsonl").parent
    if "data" in change:
        change = {"data": str(folder / change["data"])}
    with pytest.raises(error, match=words):
        dump(dataclasses.replace(config, resume=True, **change), show, no_engine)
    assert files(config.output) == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("dropped", [True, False], ids=["dropped", "left there"])
def test_damaged_weights_are_written_again(
    config: DumpConfig, show: Display, capsys: pytest.CaptureFixture[str], dropped: bool
) -> None:
    """Deleted by verify, or damaged since, in a store that has to be finished anyway."""
    dump(config, show)
    before = files(config.output)
    weights = config.output / "target" / "model.safetensors"
    if not dropped:
        flip(config.output / "parts" / "000000000000" / "input_ids" / "c" / "0")
        drop_damaged(config.output, verify(config.output))
    flip(weights)
    if dropped:
        assert drop_damaged(config.output, verify(config.output)) == ["target/model.safetensors"]
    out = dump(dataclasses.replace(config, resume=True), show)
    assert (out["new_tokens"] == 0) == dropped
    assert "target: model.safetensors" in " ".join(capsys.readouterr().err.split())
    assert files(config.output) == before
    assert verify(config.output).ok


@pytest.mark.parametrize("missing", ["target/model.safetensors", "parts/000000000001"])
def test_weights_that_have_changed_since_do_not_go_on_with_a_store(
    config: DumpConfig, show: Display, tmp_path: Path, missing: str
) -> None:
    """The same folder, config and tokenizer, other weights: neither the old ones nor states are
    theirs to write.
    """
    target = save_target(tmp_path / "target")
    config = dataclasses.replace(config, model=str(target))
    dump(config, show)
    remove(config.output / missing)
    drop_damaged(config.output, verify(config.output))
    before = files(config.output)
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(target / "model.safetensors")
    save_file(
        {n: t + torch.ones_like(t) / 64 for n, t in tensors.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        MismatchError, match="this run's target is not the one that the store was started with"
    ):
        dump(dataclasses.replace(config, resume=True), show)
    assert files(config.output) == before


def test_a_changed_row_matters_where_it_was_used(config: DumpConfig, show: Display) -> None:
    """In a block that is still to be written the dump goes on; in one that is written it names the
    part.
    """
    dump(config, show)
    data, parts = Path(str(config.data)), sorted((config.output / "parts").glob("[0-9]*"))
    rows = read_manifest(config.output).dump.block_rows

    def change(row: int) -> None:
        remove(parts[-1])
        StoreWriter.resume(config.output, prepare(config).manifest).reopen()
        lines = data.read_text().splitlines()
        chat = json.loads(lines[row])
        chat["messages"][0]["content"] += " mat"
        data.write_text("\n".join([*lines[:row], json.dumps(chat), *lines[row + 1 :]]) + "\n")

    change((len(parts) - 1) * rows)
    again = dataclasses.replace(config, resume=True)
    assert dump(again, show)["complete"]
    assert verify(config.output).ok
    change(rows)
    with pytest.raises(MismatchError, match="are not the ones that part 1 was made from"):
        dump(again, show)


def test_a_whole_store_says_that_its_corpus_has_changed(
    config: DumpConfig, show: Display, capsys: pytest.CaptureFixture[str]
) -> None:
    dump(config, show)
    before = files(config.output)
    data, parts = Path(str(config.data)), sorted((config.output / "parts").glob("[0-9]*"))
    lines, rows = data.read_text().splitlines(), read_manifest(config.output).dump.block_rows
    again = dataclasses.replace(config, resume=True)

    def resumed(new: list[str]) -> None:
        data.write_text("\n".join(new) + "\n")
        dump(again, show, no_engine)

    chat = json.loads(lines[rows])
    resumed(
        [*lines[:rows], json.dumps(chat, indent=None, separators=(",", ":")), *lines[rows + 1 :]]
    )
    assert "nothing to resume" in capsys.readouterr().err.replace("\n", " ")
    chat["messages"][0]["content"] += " mat"
    with pytest.raises(MismatchError, match="are not the ones that part 1 was made from"):
        resumed([*lines[:rows], json.dumps(chat), *lines[rows + 1 :]])
    with pytest.raises(MismatchError, match="is complete, and .* are in none of its parts"):
        resumed([*lines, *(lines * (2 + rows * len(parts) // len(lines)))])
    with pytest.raises(MismatchError, match="the corpus ends before them|are not the ones"):
        resumed(lines[: -rows - 1])
    assert files(config.output) == before
    # What the message advises.
    remove(parts[1])
    drop_damaged(config.output, verify(config.output))
    data.write_text("\n".join([*lines[:rows], json.dumps(chat), *lines[rows + 1 :]]) + "\n")
    assert dump(again, show)["complete"]
    assert verify(config.output).ok


def test_an_index_that_is_gone_is_made_again(config: DumpConfig, show: Display) -> None:
    dump(config, show)
    before = files(config.output)
    remove(config.output / "index" / "sample_row")
    dump(dataclasses.replace(config, resume=True), show, no_engine)
    assert files(config.output) == before
