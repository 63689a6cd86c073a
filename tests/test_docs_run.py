"""The commands of README and docs, run in the order of their page on a tiny target: only names and
sizes are replaced. What a test cannot run (``ONLY_PARSED``) says why; ``test_docs`` parses it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_docs import DOCS, ROOT, blocks

from commands import commands
from dump_targets import chat, save_target

TARGETS = ("Qwen/Qwen3-4B", "MODEL", "TARGET", "./smollm2")
# Part of a command line -> why it is only parsed.
ONLY_PARSED = {
    "s3://": "needs a bucket; tests/cache/test_remote.py runs stores by URL",
    "--data gsm8k": "needs a network",
    "--push": "needs a network and a login",
    "--nnodes": "needs two nodes; tests/train/test_ranks.py runs two processes",
    "--ray": "needs a Ray cluster",
    "zai-org/GLM-5.2-FP8 --limit": "needs the real target",
    "/data/glm.zarr": "needs the real target",
    "zai-org/GLM-5.2-FP8 --no-decode": "needs the real target",
    "./try.zarr": "needs the real target",
    ".work/smollm2": "needs SmolLM2",
    "--max-steps 160": "trains for minutes, on a store of SmolLM2",
}
# What makes a dump or training of seconds; the rest of a line is the page's.
SMALLER = {
    "dspark-dump": "--part-tokens 512",
    "dspark-train": "--max-steps 2 --num-layers 1 --max-anchors 8 --total-seq-len 512 "
    "--rows-per-step 1 --markov-rank 8 --val-fraction 0.4 --no-tensorboard",
    "dspark-tools eval": "--max-tokens 4 --limit 2",
    "dspark-tools check": "--no-serve --limit 2 --max-tokens 12",
}
# Stores and drafts that a page takes as given.
GIVEN = {
    "serving.md": ("hs.zarr", "draft"),
    "finetune.md": ("draft", "general.zarr"),
    "glm-5.2.md": (),
    "sizing.md": (),
    "cluster.md": (),
    "quickstart.md": (),
    "README.md": (),
}


def written(folder: Path) -> None:
    """The corpora and prompts that the pages name."""
    names = dict.fromkeys(("chats.jsonl", "chat.jsonl", "own.jsonl", "prompts.jsonl"), "hello")
    for name, word in (names | {"more.jsonl": "more"}).items():
        rows = [chat(f"u: say {word} {n}", "a: Yes, it is. No! one two three") for n in range(40)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(words: list[str]) -> None:
    first = " ".join(words[:2])
    name = first if first in commands() else words[0]
    rest = words[len(name.split()) :]
    for flag in re.findall(r"--[a-z-]+", more := SMALLER.get(name, "")):
        if flag in rest and flag not in ("--no-tensorboard", "--no-serve"):
            more = re.sub(rf"{flag} \S+", "", more)
    result = CliRunner().invoke(commands()[name], [*rest, *more.split()], prog_name=name)
    # Two steps train nothing, which ``check`` rightly says.
    untrained = name == "dspark-tools check" and "DO NOT SERVE" in result.output
    assert result.exit_code == (1 if untrained else 0), (
        f"{shlex.join([name, *rest])}\n{result.output[-2000:]}"
    )


def lines(page: Path) -> list[str]:
    """The page's commands of ours that can run here."""
    found = []
    for line in blocks(page.read_text()):
        if not re.match(r"dspark-|torchrun ", line):
            continue
        if not any(part in re.sub(r"\s+", " ", line) for part in ONLY_PARSED):
            found.append(line)
    return found


def words_of(line: str, target: Path) -> list[str]:
    words = [str(target) if w in TARGETS else w for w in shlex.split(line, comments=True)]
    if words[0] == "torchrun":
        words = ["dspark-train", *words[words.index("dspark.train") + 1 :], "--overwrite"]
    return words


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # As many layers as Qwen3-4B, whose ids the pages name.
    return save_target(tmp_path_factory.mktemp("docs") / "target", layers=36)


@pytest.fixture(scope="module")
def given(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store and the draft of the README's first commands."""
    folder = tmp_path_factory.mktemp("given")
    written(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in lines(ROOT / "README.md"):
            run(words_of(line, target))
    return folder


def test_readme(given: Path) -> None:
    assert (given / "draft" / "model.safetensors").exists()
    assert len(lines(ROOT / "README.md")) == 4


@pytest.mark.parametrize("name", [name for name in GIVEN if name != "README.md"])
def test_page(
    name: str, given: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    for what in GIVEN[name]:
        source = "hs.zarr" if what.endswith(".zarr") else what
        shutil.copytree(given / source, tmp_path / what)
    monkeypatch.chdir(tmp_path)
    found = lines(DOCS / name)
    assert found, f"{name} has no command that runs"
    for line in found:
        words = words_of(line, target)
        if words[:2] == ["dspark-tools", "append"]:
            second = "dspark-dump --model MODEL --data own.jsonl --output second.zarr"
            given_by = " --calibration s0.zarr/calibration.safetensors"
            run(words_of(second + given_by, target))
        run(words)
