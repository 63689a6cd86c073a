"""Every drafter type through the tools: several drafts in one table, check, export and card."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import tiny_models as tiny
from dspark.cache.errors import UsageError
from dspark.tools.check.files import Files
from dspark.tools.check.rules import judge
from dspark.tools.judge import several
from dspark.tools.judge.eval import eval_command
from dspark.tools.judge.score import same_samples
from dspark.tools.publish.export import export
from dspark.train.draft.saved.folder import save_draft
from dspark.train.draft.types import TYPES, drafter

OWN: dict[str, dict[str, Any]] = {
    "dspark": {},
    "dflash": {"markov_rank": 0, "enable_confidence_head": False},
    **{
        kind: {"num_layers": 1, "target_layer_ids": (0, 1, 3)}
        for kind in ("eagle3", "peagle", "spd")
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a draft of each type, two prompts."""
    path = tmp_path_factory.mktemp("types")
    model = tiny.target()
    model.save_pretrained(path / "target")
    for kind in TYPES:
        draft = tiny.draft(model, speculator_type=kind, **OWN[kind])
        with torch.no_grad():
            for _, parameter in draft.trained():
                if parameter.ndim == 1:
                    parameter.mul_(1.1)
        save_draft(path / kind, draft, dtype=torch.float32)
    rows = [{"input_ids": [5, 6, 7, i, 1, 2], "loss_mask": [0, 0, 0, 0, 1, 1]} for i in range(2)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_several_drafts_are_one_table(folder: Path, tmp_path: Path) -> None:
    drafts = [word for kind in TYPES for word in ("--draft", str(folder / kind))]
    table, answers = tmp_path / "table.md", tmp_path / "answers.jsonl"
    result = CliRunner().invoke(
        eval_command,
        [
            "--model",
            str(folder / "target"),
            *drafts,
            "--data",
            str(folder / "rows.jsonl"),
            "--max-tokens",
            "8",
            "--device",
            "cpu",
            "--json",
            "--markdown",
            str(table),
            "--answers",
            str(answers),
        ],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["drafts"]
    assert [(row["speculator_type"], Path(row["draft"]).name) for row in found] == [
        (k, k) for k in TYPES
    ]
    assert all(row["lossless"] is True and row["compared"] == 2 for row in found)
    # the target decodes by itself once
    assert len({row["tokens_per_second_target"] for row in found}) == 1
    lines = table.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:7]] == [f"| {kind}" for kind in TYPES]
    told = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(told) == 2 * len(TYPES)
    assert {row["draft"] for row in told} == {str(folder / kind) for kind in TYPES}


def test_a_table_leaves_out_what_no_draft_has_and_tells_twins_apart() -> None:
    rows = [
        {
            "speculator_type": "spd",
            "walk_greedy": None,
            "walk": 2.0,
            "mean_accepted_length": 1.5,
            "accept_rate": [0.5],
        }
    ] * 2
    cells = several.cells(["a/draft", "b/draft"], rows, several.SCORE)
    assert cells[0] == ("draft", "type", "walk, T = 1", "tau", "accept rate by slot")
    assert [row[0] for row in cells[1:]] == ["a/draft", "b/draft"]


def test_drafts_of_different_splits_are_not_compared(tmp_path: Path) -> None:
    keys = torch.randint(0, 256, (200, 16), generator=torch.Generator().manual_seed(0)).numpy()
    store: Any = SimpleNamespace(index={"sample_key": keys.astype("uint8")})
    for name, share in (("a", 0.1), ("b", 0.4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(json.dumps({"val_fraction": share}))
    with pytest.raises(UsageError, match="different splits"):
        same_samples(store, [str(tmp_path / "a"), str(tmp_path / "b")], "validation")


@pytest.mark.parametrize("kind", TYPES)
def test_a_whole_draft_has_no_error(folder: Path, kind: str) -> None:
    config = json.loads((folder / "target" / "config.json").read_text())
    found = judge(Files.read(str(folder / kind)), config)
    assert [f for f in found if f.level != "note"] == []
    assert any("no server supports it" in f.text for f in found) == (kind == "spd")


@pytest.mark.parametrize("kind", ["eagle3", "peagle", "spd"])
def test_a_key_that_its_server_needs_is_missed(folder: Path, kind: str, tmp_path: Path) -> None:
    key = "stage_ends" if kind == "spd" else "eagle_aux_hidden_state_layer_ids"
    flat = json.loads((folder / kind / "config.json").read_text())
    del flat[key]
    (tmp_path / "config.json").write_text(json.dumps(flat))
    (tmp_path / "model.safetensors").write_bytes((folder / kind / "model.safetensors").read_bytes())
    config = json.loads((folder / "target" / "config.json").read_text())
    found = [f.text for f in judge(Files.read(str(tmp_path)), config) if f.level == "error"]
    assert any(f"no {key}" in text for text in found)


def test_each_type_says_who_serves_it() -> None:
    assert {kind: drafter(kind).method for kind in TYPES} == {
        "dspark": "dspark", "dflash": "dspark", "spd": None, "eagle3": "eagle3", "peagle": "eagle3"
    }  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_exported_whole_with_a_card(folder: Path, kind: str, tmp_path: Path) -> None:
    manifest = export(
        str(folder / kind),
        str(tmp_path / "out"),
        target=str(folder / "target"),
        dtype="fp32",
        pictures=False,
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert manifest["method"] == drafter(kind).method
    assert written["vllm_servable"] is (kind != "spd")
    # None: SGLang then takes the target's output matrix for EAGLE-3.
    assert written["draft_vocab_size"] == (None if kind in ("eagle3", "peagle") else tiny.VOCAB)
    assert written["sglang_servable"] is (kind in ("dspark", "dflash", "eagle3"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("vllm serve" in text) == (kind != "spd")
    assert ('"method": "eagle3"' in text) == (kind in ("eagle3", "peagle"))
    extra = {"spd-head.safetensors", "skippy-spd-head.json"} & set(manifest["files"])
    assert bool(extra) == (kind == "spd")
