"""The main job on the real small target, through the commands as a user types them: dump, train,
inspect, score, decode.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(tool: str, *args: object, code: int = 0) -> Any:
    """``dspark-TOOL args --json`` -> its object; the exit code must be ``code``."""
    call = [sys.executable, "-c", f"from dspark.{tool}.cli import main; main()", *map(str, args)]
    done = subprocess.run([*call, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return json.loads(done.stdout) if done.stdout else done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main_job")


@pytest.fixture(scope="module")
def store(work: Path, smollm2: Path) -> Path:
    run(
        "dump",
        "--model",
        smollm2,
        "--data",
        EXAMPLES / "chat.jsonl",
        "--limit",
        8,
        "--output",
        work / "hs.zarr",
    )
    return work / "hs.zarr"


@pytest.fixture(scope="module")
def draft(work: Path, store: Path) -> Path:
    run(
        "train",
        "--cache",
        store,
        "--output",
        work / "draft",
        "--num-layers",
        1,
        "--block-size",
        3,
        "--max-anchors",
        24,
        "--markov-rank",
        16,
        "--rows-per-step",
        1,
        "--total-seq-len",
        4096,
        "--max-steps",
        6,
        "--lr",
        "2e-3",
        "--val-fraction",
        0,
        "--log-every",
        1,
    )
    return work / "draft"


@pytest.mark.smollm2
def test_info_verify_show(store: Path) -> None:
    info = run("tools", "info", store)
    assert info["complete"]
    assert info["layers"] == [1, 8, 14, 20, 27]
    assert info["target_layer_ids"] == [2, 9, 15, 21, 28]
    assert info["raw_bytes_per_token"] == 6 + 2 * 576 * 6
    assert info["samples"] == 8
    report = run("tools", "verify", store)
    assert report["ok"]
    assert report["findings"] == []
    shown = run("tools", "show", store, 0)
    answer = json.loads((EXAMPLES / "chat.jsonl").read_text().splitlines()[shown["row"]])[
        "messages"
    ][-1]["content"]
    assert (
        "".join(r["text"] for r in shown["runs"] if r["supervised"]).removesuffix("<|im_end|>")
        == answer
    )


@pytest.mark.smollm2
def test_training_lowers_the_loss_and_the_folder_is_servable(draft: Path, store: Path) -> None:
    rows = [json.loads(line) for line in (draft / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    # Each step sees another row, so only what falls far is compared: the first thing a draft learns
    # is how often ids occur.
    assert rows[-1]["ce_loss"] < 0.9 * rows[0]["ce_loss"]
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "data_wait_fraction", "step_ms"} <= set(
        rows[0]
    )
    config = json.loads((draft / "config.json").read_text())
    assert config["sample_from_anchor"] is True
    assert config["target_layer_ids"] == [1, 8, 14, 20, 27]
    assert "fc.weight" in load_file(draft / "model.safetensors")
    a, b = (
        run("tools", "score", "--cache", store, "--draft", draft, "--total-seq-len", n)
        for n in (4096, 700)
    )
    assert a["blocks"] == run("tools", "info", store)["last_rows"]
    assert a["accept_rate"] == pytest.approx(
        b["accept_rate"], abs=1e-5
    )  # how samples are packed changes nothing


@pytest.mark.smollm2
def test_decoding_with_the_draft_is_lossless(draft: Path, smollm2: Path) -> None:
    data = EXAMPLES / "chat.jsonl"
    result = run(
        "tools",
        "eval",
        "--model",
        smollm2,
        "--draft",
        draft,
        "--data",
        data,
        "--limit",
        1,
        "--max-tokens",
        16,
    )
    assert result["lossless"] is True
    assert result["mean_accepted_length"] >= 1.0


@pytest.mark.parametrize("tool", ["dump", "train", "tools"])
def test_help_is_quick(tool: str) -> None:
    """Under a second on an idle machine; what makes it so is that nothing heavy is imported, which
    is what is asserted.
    """
    code = (
        f"import sys; from dspark.{tool}.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted(m for m in ('torch','numpy','zarr','transformers','vllm') if m in "
        "sys.modules), file=sys.stderr)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Examples" in done.stdout or tool == "tools"
    assert time.perf_counter() - started < 20


def test_bad_usage_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    for call in (("train", "--cache"), ("tools", "info"), ("tools", "verify")):
        said = run(*call, tmp_path / "none.zarr", code=2)
        assert "no such folder" in said["error"]
        assert said["exit_code"] == 2
