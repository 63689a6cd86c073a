"""``dspark-tools export``: both formats and dtypes load again and mean the same, the manifest is
true, the card holds the run's numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from core_cases import small_draft, small_target
from dspark.cache.errors import DraftError, StoreWriteError
from dspark.tools.publish.export import export, export_command, push
from dspark.train.draft.saved.folder import (
    load_config,
    load_draft,
    read_tensors,
    save_draft,
    trained_as,
)

IDS = torch.tensor([2, 3, 5, 8, 13, 21, 34])


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """A draft of a reduced vocabulary with the files that a run leaves."""
    folder = tmp_path / "draft"
    save_draft(folder, small_draft(draft_ids=IDS), dtype=torch.float32)
    (folder / "training.json").write_text(
        json.dumps(
            {
                "cache": "/secret/hs.zarr",
                "lr": 0.002,
                "num_layers": 2,
                "seed": 0,
                "loss_fn": '{"tv": 1}',
            }
        )
    )
    (folder / "store.json").write_text(
        json.dumps(
            {
                "target": "maker/model",
                "layers": [0, 2],
                "aux_bits": 4,
                "last_bits": 4,
                "source": "chat.jsonl",
                "tokens": 1234,
            }
        )
    )
    rows = [
        {
            "step": s,
            "epoch": e,
            "validation": True,
            "accept_rate": [r, r, r, r],
            "mean_accepted_length": 1 + r,
        }
        for s, e, r in ((10, 1, 0.25), (20, 2, 0.625))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.mark.parametrize("layout", ["flat", "speculators"])
@pytest.mark.parametrize(("short", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_both_formats_load_again(
    draft: Path, tmp_path: Path, layout: str, short: str, dtype: torch.dtype
) -> None:
    out = tmp_path / "out"
    manifest = export(str(draft), str(out), layout=layout, dtype=short)
    assert load_config(out) == load_config(draft) == trained_as(out)
    before, after = read_tensors(draft), read_tensors(out)
    assert set(before) == set(after)
    for name, value in before.items():
        assert torch.equal(after[name], value.to(dtype) if value.is_floating_point() else value), (
            name
        )
    target = small_target()
    again = load_draft(out, target)
    assert torch.equal(again.frozen_head.draft_ids, IDS)
    raw = json.loads((out / "config.json").read_text())
    if layout == "speculators":
        assert raw["aux_hidden_state_layer_ids"] == [1, 3]
        assert raw["sample_from_anchor"] is True
        assert raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
        assert raw["speculators_config"]["verifier"]["name_or_path"] == "maker/model"
        assert raw["transformer_layer_config"]["vocab_size"] == 50
        assert "target_layer_ids" not in raw
    else:
        assert raw["target_layer_ids"] == [0, 2]
    weights = (out / "model.safetensors").read_bytes()
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"] == {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert (manifest["tensors"], manifest["dtype"]) == (
        len(before),
        str(dtype).removeprefix("torch."),
    )
    assert manifest["parameters"] == sum(
        t.numel() for t in before.values() if t.is_floating_point()
    )


def test_the_card_is_made_of_the_run(draft: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(draft), str(out))
    text = (out / "README.md").read_text()
    assert '"num_speculative_tokens": 4' in text
    assert "vllm serve maker/model" in text
    assert "| 2 | 20 | 1.625 | 0.625 |" in text
    assert (
        "dspark-dump --model maker/model --data chat.jsonl --layers 0,2 --aux-bits 4 --last-bits 4"
        in text
    )
    assert re.search(
        r"dspark-train --cache ./hs.zarr --lr 0.002 --num-layers 2 --loss-fn '\{\"tv\": 1\}'", text
    )
    assert "/secret" not in text
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert "<svg" in (out / image).read_text()
    assert {"accept_rate.svg", "training.svg"} == set(re.findall(r"!\[.*?\]\((.*?)\)", text))


def test_nothing_is_overwritten_and_nothing_half_is_published(draft: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = CliRunner()
    assert run.invoke(export_command, [str(draft), str(out), "--no-pictures"]).exit_code == 0
    again = run.invoke(export_command, [str(draft), str(out), "--no-pictures"])
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert (
        run.invoke(
            export_command,
            [str(draft), str(out), "--no-pictures", "--overwrite", "--format", "speculators"],
        ).exit_code
        == 0
    )
    assert "speculators_model_type" in json.loads((out / "config.json").read_text())
    tensors = read_tensors(draft)
    from safetensors.torch import save_file

    save_file({n: t for n, t in tensors.items() if n != "d2t"}, draft / "model.safetensors")
    half = run.invoke(export_command, [str(draft), str(tmp_path / "half")])
    assert half.exit_code == 1
    assert "d2t is missing" in half.stderr
    assert not (tmp_path / "half").exists()
    save_file(tensors | {"fc.weight": tensors["fc.weight"] * 1e6}, draft / "model.safetensors")
    large = run.invoke(export_command, [str(draft), str(tmp_path / "large"), "--dtype", "fp16"])
    assert "fc.weight overflows fp16" in large.stderr


def test_push_fails_clearly(draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline; then a file that changed after the export."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    def offline(self: HfApi, *args: object, **options: object) -> None:
        raise OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    out = tmp_path / "out"
    result = CliRunner().invoke(
        export_command, [str(draft), str(out), "--no-pictures", "--push", "me/draft"]
    )
    assert result.exit_code == 1
    assert "could not be reached or refused the upload (offline mode is enabled)" in result.stderr
    assert "is complete" in result.stderr
    assert (out / "manifest.json").is_file()
    (out / "config.json").write_text("{}")
    with pytest.raises(DraftError, match="config.json is not what was exported"):
        push(str(out), "me/draft")


def test_push_uploads_the_folder(
    draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    calls = []
    monkeypatch.setattr(
        HfApi,
        "create_repo",
        lambda self, repo, **o: calls.append((repo, o["private"])) or f"https://hub/{repo}",
    )
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, **o: calls.append((o["repo_id"], o["folder_path"]))
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(
        export_command,
        [str(draft), str(out), "--no-pictures", "--push", "me/draft", "--private", "--json"],
    )
    assert json.loads(result.stdout)["pushed"] == "https://hub/me/draft"
    assert calls == [("me/draft", True), ("me/draft", str(out))]


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("a bug")]
)
@pytest.mark.parametrize("where", ["card.card", "publish.shutil.copy", "commit"])
@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_is_left_behind_and_what_was_there_stays(
    draft: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    where: str,
    earlier: bool,
) -> None:
    out = tmp_path / "out"
    if earlier:
        export(str(draft), str(out), pictures=False)
    before = left(tmp_path)
    weights = (out / "model.safetensors").read_bytes() if earlier else b""

    def fail(*args: object, **options: object) -> None:
        raise error

    names = {
        "card.card": "dspark.tools.publish.card.card",
        "publish.shutil.copy": "dspark.tools.publish.export.shutil.copy",
        "commit": "dspark.cache.files.atomic.fsync_tree",
    }
    monkeypatch.setattr(names[where], fail)
    with pytest.raises(StoreWriteError if isinstance(error, OSError) else type(error)):
        export(str(draft), str(out), pictures=False, overwrite=True, dtype="fp16")
    assert left(tmp_path) == before
    if earlier:
        assert (out / "model.safetensors").read_bytes() == weights


def test_what_a_killed_export_left_is_no_hindrance(draft: Path, tmp_path: Path) -> None:
    for name in (".staging-out", ".staging-out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    export(str(draft), str(tmp_path / "out"), pictures=False)
    export(str(draft), str(tmp_path / "out"), pictures=False, overwrite=True)
    assert left(tmp_path) == ["draft", "out"]
    assert load_config(tmp_path / "out") == load_config(draft)


def test_a_link_as_out_stays_and_what_it_leads_to_is_replaced(draft: Path, tmp_path: Path) -> None:
    export(str(draft), str(tmp_path / "out"), pictures=False)
    (tmp_path / "link").symlink_to("out")
    for _ in range(2):
        (tmp_path / "out" / "model.safetensors").unlink()
        export(str(draft), str(tmp_path / "link"), pictures=False, overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert left(tmp_path) == ["draft", "link", "out"]


@pytest.mark.parametrize("content", ["{}", '{"engine":', "[]"])
def test_a_report_is_read_before_anything_is_written(
    draft: Path, tmp_path: Path, content: str
) -> None:
    report = tmp_path / "o.json"
    report.write_text(content)
    result = CliRunner().invoke(
        export_command, [str(draft), str(tmp_path / "out"), "--report", str(report)]
    )
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "o.json" in result.stderr
    assert "dspark-tools eval --output" in result.stderr
    assert left(tmp_path) == ["draft", "o.json"]


def test_out_is_a_file_or_another_folder(draft: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for name, said in (("file", "is a file"), ("folder", "holds no export")):
        result = CliRunner().invoke(
            export_command, [str(draft), str(tmp_path / name), "--overwrite"]
        )
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "it has no files"),
        ("{", "is not JSON"),
        ('{"files": {"config.json": {}}}', "files.config.json has no sha256"),
        ('{"files": {"gone": {"sha256": ""}}}', "gone, which the manifest names, cannot be read"),
    ],
)
def test_push_of_a_damaged_export(draft: Path, tmp_path: Path, content: str, said: str) -> None:
    out = tmp_path / "out"
    export(str(draft), str(out), pictures=False)
    (out / "manifest.json").write_text(content)
    with pytest.raises(DraftError, match=said):
        push(str(out), "me/draft")
