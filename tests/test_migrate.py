"""The command lines of docs/migrate.md for speculators' recipes, run on tiny targets: only names
and sizes are replaced.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import families
import numpy as np
from click.testing import CliRunner
from safetensors.torch import load_file
from test_docs import DOCS, blocks

from commands import commands
from dump_targets import chat, save_target

# Sizes that a tiny target or a test of seconds cannot have; every other argument stays as the page
# has it.
SMALLER = {
    "--total-seq-len": "128",
    "--markov-rank": "8",
    "--draft-vocab-size": "64",
    "--max-anchors": "32",
    "--num-layers": "1",
}


def lines(heading: str) -> list[list[str]]:
    """The two command lines of a section of the page, split into words; without torchrun."""
    text = (DOCS / "migrate.md").read_text()
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = [
        shlex.split(line)
        for line in blocks(section)
        if line.startswith(("dspark-dump", "torchrun", "dspark-train"))
    ]
    return [
        ["dspark-train", *w[w.index("dspark.train") + 1 :]] if w[0] == "torchrun" else w
        for w in found
    ]


def run(words: list[str], **changes: str) -> None:
    words = list(words)
    for flag, value in changes.items():
        words[words.index("--" + flag.replace("_", "-")) + 1] = value
    for flag, value in SMALLER.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    result = CliRunner().invoke(commands()[words[0]], words[1:], prog_name=words[0])
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"


def check(store: str, draft: Path, layers: list[int]) -> None:
    import dspark.cache

    cache = dspark.cache.open(store)
    assert cache.manifest.target_layer_ids == layers
    config = json.loads((draft / "config.json").read_text())
    assert config["block_size"] == 8
    weights = load_file(draft / "model.safetensors")
    assert weights
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_glm_recipe(tmp_path: Path) -> None:
    target = families.save(tmp_path / "glm", "glm_moe_dsa")
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": rng.integers(4, 90, 60).tolist(), "loss_mask": [0] * 20 + [1] * 40}
        for _ in range(20)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dump, train = lines("speculators, GLM-5.2")
    store, draft = str(tmp_path / "glm.zarr"), tmp_path / "draft"
    dump += ["--mask-token-id", "250"]  # the real target has a tokenizer to choose it from
    run(
        dump,
        model=str(target),
        data=str(data),
        seq_length="128",
        target_layer_ids="1 2 3",
        output=store,
    )
    run([*train, "--max-steps", "2", "--no-tensorboard"], cache=store, output=str(draft))
    check(store, draft, [1, 2, 3])


def test_qwen3_recipe(tmp_path: Path) -> None:
    target = save_target(tmp_path / "qwen3")
    data = tmp_path / "sharegpt.jsonl"
    rows = [chat(f"u: say hello {n}", "a: Yes, it is. No! one two three") for n in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dump, train = lines("speculators, Qwen3")
    store, draft = str(tmp_path / "hs.zarr"), tmp_path / "draft"
    run(
        dump,
        model=str(target),
        data=str(data),
        seq_length="128",
        target_layer_ids="2 4 5",
        output=store,
    )
    run([*train, "--max-steps", "2", "--no-tensorboard"], cache=store, output=str(draft))
    check(store, draft, [2, 4, 5])
