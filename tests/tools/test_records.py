"""JSON beside a draft that a person has cut, edited or mixed up: a sentence that names file and
key, from every command that reads it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stores
from core_cases import small_draft
from dspark.cache.errors import DamagedCacheError, DraftError
from dspark.tools import records
from dspark.tools.check.symptoms import against_record
from dspark.tools.cli import main
from dspark.tools.importers.deepspec import DTYPES, DeepSpecSource
from dspark.tools.publish import card
from dspark.tools.shapes import Each, Maybe, Optional, fault
from dspark.train.config import TrainConfig
from dspark.train.draft.saved.folder import load_config, save_draft
from dspark.train.loop import train


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        (1, int, None),
        (1, float, None),
        (1.5, int, "it is 1.5, not a whole number"),
        (True, float, "it is true, not a number"),
        (True, int, "it is true, not a whole number"),
        (True, bool, None),
        (0, bool, "it is 0, not true or false"),
        ("a", str, None),
        (None, str, "it is null, not a text"),
        (None, Maybe(str), None),
        (1, Maybe(str), "it is 1, not a text"),
        ([1, 2], [int], None),
        ({"0": 1}, [int], 'it is {"0": 1}, not a list'),
        ([1, "x"], [int], '[1] is "x", not a whole number'),
        ({"a": 1, "later": 2}, {"a": int}, None),
        ([], {"a": int}, "it is [], not an object"),
        ({}, {"a": int, "b": Maybe(int), "c": Optional(int)}, "it has no a, b"),
        (
            {"a": 1, "b": None, "c": "x"},
            {"a": int, "b": Maybe(int), "c": Optional(int)},
            'c is "x", not a whole number',
        ),
        ({"a": {"b": [{}]}}, {"a": {"b": [{"c": int}]}}, "a.b[0] has no c"),
        ({}, Each(int), "it is empty"),
        ({"x": {"y": "z"}}, Each({"y": int}), 'x.y is "z", not a whole number'),
        ("long" * 20, int, 'it is "longlonglonglonglonglonglonglonglong..., not a whole number'),
    ],
)
def test_what_is_wrong_is_said(value: Any, shape: Any, wrong: str | None) -> None:
    assert fault(value, shape) == wrong


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store ``hs.zarr`` and what a run on it left in ``draft``."""
    root = tmp_path_factory.mktemp("records")
    stores.write_store(root / "hs.zarr", np.random.default_rng(3).integers(16, 40, 40).tolist())
    train(
        TrainConfig(
            cache=str(root / "hs.zarr"),
            output=str(root / "draft"),
            max_steps=1,
            num_layers=1,
            block_size=3,
            markov_rank=8,
            val_fraction=0.4,
            total_seq_len=256,
            rows_per_step=2,
            device="cpu",
            tensorboard=False,
        )
    )
    return root


@pytest.mark.parametrize("command", ["score", "calibrate"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a":', "training.json is not JSON"),
        ("[]", "training.json holds a JSON list"),
        ("{}", "it has no val_fraction"),
        ('{"val_fraction": "0.4"}', 'val_fraction is "0.4", not a number'),
        ('{"val_fraction": 4}', "val_fraction is 4, not a share"),
        ('{"val_fraction": NaN}', "val_fraction is nan, not a share"),
    ],
)
def test_a_split_needs_a_whole_training_json(
    trained: Path, command: str, content: str, said: str
) -> None:
    record = trained / "draft" / "training.json"
    whole = record.read_text()
    try:
        record.write_text(content)
        result = CliRunner().invoke(
            main,
            [command, "--cache", str(trained / "hs.zarr"), "--draft", str(trained / "draft"),
             "--split", "validation", "--device", "cpu"],
        )  # fmt: skip
    finally:
        record.write_text(whole)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.exception
    assert "training.json" in result.stderr
    assert said in result.stderr


def survival() -> dict[str, Any]:
    one = [{"share": 1.0, "confidence": 0.5, "accepted": 0.5}]
    return {
        "survival": {
            "ece": [0.1, 0.2],
            "brier": [0.1, 0.2],
            "auroc": [0.5, None],
            "confidence": [0.5, 0.5],
            "accepted": [0.5, 0.5],
            "diagram": [one, one],
        }
    }


CALIBRATION = {
    "temperature": [1.0, 2.0],
    "before": survival(),
    "after": survival(),
    "sweep": [{"threshold": 0.0, "verified": 2.0, "tokens": 1.5, "accepted_share": 0.3}],
}
LINE = {
    "prompts": 2,
    "drafts": 9,
    "mean_accepted_length": 2.5,
    "mean_accepted_length_se": None,
    "accept_rate": [0.9, 0.6],
    "lossless": None,
    "tokens_per_second": 10.0,
    "tokens_per_second_target": None,
    "speedup": None,
    "theoretical_gain": 1.5,
}
REPORT = LINE | {
    "engine": "vllm",
    "dtype": "bfloat16",
    "temperature": 0,
    "max_tokens": 16,
    "block_size": 2,
    "compared": 0,
    "per_source": {"all": LINE},
}
VALIDATION = {"step": 1, "validation": True, "mean_accepted_length": 1.5, "accept_rate": [0.5, 0.2]}


def damaged(whole: dict[str, Any]) -> list[Any]:
    """``whole`` with every key it has, at any depth, taken out or made a text, one at a time."""
    out: list[Any] = []

    def walk(at: tuple[Any, ...], value: Any) -> None:
        if at:
            for change in ("gone", "text", "list"):
                other = copy.deepcopy(whole)
                inner: Any = other
                for key in at[:-1]:
                    inner = inner[key]
                if change == "gone":
                    del inner[at[-1]]
                else:
                    inner[at[-1]] = "x" if change == "text" else [{}]
                out.append(other)
        for key, part in (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        ):
            walk((*at, key), part)

    walk((), whole)
    return out


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    folder = tmp_path / "draft"
    save_draft(folder, small_draft())
    return folder


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("calibration.json", CALIBRATION),
        ("metrics.jsonl", VALIDATION),
        (
            "store.json",
            {"target": "a/b", "layers": [0, 2], "aux_bits": 4, "last_bits": 4, "source": "x"},
        ),
        ("training.json", {"block_size": 4, "lr": 0.1, "loss_fn": "{}"}),
        ("report.json", REPORT),
    ],
)
def test_no_damage_is_a_trace(draft: Path, name: str, whole: dict[str, Any]) -> None:
    """Whatever one value of a file has become: either the card can still be made, or the file is
    named. Both must happen.
    """
    path = draft / name

    def make() -> None:
        reports = [records.report(path)] if name == "report.json" else []
        run = card.DraftRun.read(draft, load_config(draft))
        manifest = {
            "target": "a/b",
            "format": "flat",
            "tensors": 1,
            "parameters": 1,
            "dtype": "bfloat16",
            "bytes": 1,
        }
        card.pictures(run, draft, reports)
        card.card(run, manifest, reports, {}, "draft")
        against_record(draft, {"accept_rate": [0.5]})

    path.write_text(json.dumps(whole))
    make()
    refused = 0
    for other in damaged(whole):
        path.write_text(json.dumps(other))
        try:
            make()
        except DraftError as error:
            assert str(path) in str(error)  # noqa: PT017 (some of the damage does no harm)
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    "name", ["calibration.json", "metrics.jsonl", "store.json", "training.json", "report.json"]
)
@pytest.mark.parametrize("content", [b'{"a":', b"[1]", b"\xff\xfe{", b"null"])
def test_what_is_no_json_object_is_named(draft: Path, name: str, content: bytes) -> None:
    (draft / name).write_bytes(content)
    readers = {
        "metrics.jsonl": records.metrics,
        "calibration.json": records.calibration,
        "store.json": records.store,
        "training.json": records.training,
    }
    with pytest.raises(DraftError, match=name.replace(".", r"\.")):
        readers[name](draft) if name in readers else records.report(draft / name)


def test_what_is_not_there_is_left_out(draft: Path) -> None:
    assert (records.training(draft), records.store(draft), records.calibration(draft)) == (
        {},
        {},
        {},
    )
    assert records.metrics(draft) == []


def test_the_line_of_metrics_is_named(draft: Path) -> None:
    (draft / "metrics.jsonl").write_text(json.dumps(VALIDATION) + "\n\n" + '{"step": 2, "acc')
    with pytest.raises(DraftError, match=r"metrics\.jsonl:3 is not JSON .*remove the line"):
        records.metrics(draft)


def test_positions_of_a_calibration_that_do_not_match(draft: Path) -> None:
    (draft / "calibration.json").write_text(json.dumps(CALIBRATION | {"temperature": [1.0]}))
    with pytest.raises(
        DraftError, match=r"before\.survival\.ece has 2 positions, but temperature has 1"
    ):
        records.calibration(draft)


@pytest.mark.parametrize("name", ["store.json", "training.json", "metrics.jsonl"])
def test_check_does_not_pass_over_a_record_that_is_no_object(
    trained: Path, draft: Path, name: str
) -> None:
    """A list was taken for an empty record before, so its layers were not compared and nothing said
    so.
    """
    from dspark.tools.check.files import Files

    (draft / name).write_text("[]\n")
    with pytest.raises(DraftError, match=name.replace(".", r"\.")):
        against_record(draft, {"accept_rate": [0.5]}) if name == "metrics.jsonl" else Files.read(
            str(draft)
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, r"it is \[\], not an object"),
        ({"shards": [{}]}, r"shards\[0\] has no file_name"),
        ({"num_samples": "x"}, 'num_samples is "x", not a whole number'),
        ({"target_layer_ids": 3}, "target_layer_ids is 3, not a list"),
        ({"max_length": "x"}, 'max_length is "x"'),
    ],
)
def test_a_damaged_manifest_of_another_cache(
    tmp_path: Path, change: dict[str, Any] | None, said: str
) -> None:
    whole = {
        "version": 2,
        "num_samples": 0,
        "target_layer_ids": [1],
        "hidden_size": 8,
        "shards": [],
        **DTYPES,
    }
    (tmp_path / "manifest.json").write_text(json.dumps([] if change is None else whole | change))
    with pytest.raises(DamagedCacheError, match=said):
        DeepSpecSource(tmp_path)


def test_a_damaged_tokenizer_of_a_store(tmp_path: Path) -> None:
    from dspark.cache.errors import CacheError
    from dspark.cache.reader import open as open_store
    from dspark.tools.stores.show import load_tokenizer

    stores.write_store(tmp_path / "hs.zarr", [20])
    cache = open_store(tmp_path / "hs.zarr")
    (cache.target_files / "tokenizer.json").write_text('{"a":')
    with pytest.raises(CacheError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(cache)


@pytest.mark.parametrize("layout", ["flat", "speculators"])
@pytest.mark.parametrize(
    "key",
    [
        "target_layer_ids",
        "block_size",
        "max_position_embeddings",
        "rope_theta",
        "speculators_config",
    ],
)
@pytest.mark.parametrize("value", ["x", [None], 1.5])
def test_check_names_what_is_no_config(draft: Path, layout: str, key: str, value: Any) -> None:
    from dspark.tools.check.files import Files
    from dspark.tools.check.rules import judge
    from dspark.train.draft.saved.folder import write_config

    if layout == "speculators":
        import torch

        write_config(draft, load_config(draft), torch.bfloat16, ("a/b", []))
    path = draft / "config.json"
    target = {
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "vocab_size": 50,
        "rope_theta": 1e4,
        "max_position_embeddings": 512,
    }
    if (key, value) == ("rope_theta", 1.5):
        value = True
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DraftError, match=rf"config\.json: {key}"):
        judge(Files.read(str(draft)), target)
