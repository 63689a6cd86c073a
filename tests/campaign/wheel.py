"""``make wheel``: builds the wheel, installs it with what it depends on and nothing else, and goes
from a tiny target to an exported draft outside the checkout.

    python tests/campaign/wheel.py [FOLDER] [REQUIREMENT ...]

``REQUIREMENT``: installed with the wheel, such as torch==2.13.0. Needs a package index. Prints a
line per command and what was installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from words import WORDS

CHECKOUT = Path(__file__).resolve().parents[2]
ROWS = 40
TARGET = """
import sys
sys.path.insert(0, sys.argv[1])
import dspark
assert not dspark.__file__.startswith(sys.argv[2]), dspark.__file__
from dump_targets import save_target
from pathlib import Path
save_target(Path("target"))
"""


def chats() -> str:
    """Rows that are long enough for a draft's blocks."""
    out = []
    for i in range(ROWS):
        said = " ".join(WORDS[(i * 3 + j * (i % 4 + 1)) % len(WORDS)] for j in range(24))
        out.append(
            {
                "messages": [
                    {"role": "user", "content": f"say {WORDS[i % len(WORDS)]}"},
                    {"role": "assistant", "content": said},
                ]
            }
        )
    return "".join(json.dumps(row) + "\n" for row in out)


def steps(bin_: Path) -> list[list[str]]:
    """The commands of a first day."""
    dump, train, tools = (str(bin_ / f"dspark-{name}") for name in ("dump", "train", "tools"))
    out = [[c, flag] for c in (dump, train, tools) for flag in ("--version", "--help", "-h")]
    out += [
        [str(bin_ / "python"), "-m", f"dspark.{name}", "--version"]
        for name in ("dump", "train", "tools")
    ]
    return [
        *out,
        [
            dump,
            "--model",
            "target",
            "--data",
            "rows.jsonl",
            "--output",
            "hs.zarr",
            "--codec",
            "rotated-4-4",
        ],
        [tools, "info", "hs.zarr"],
        [tools, "verify", "hs.zarr"],
        [
            train,
            "--cache",
            "hs.zarr",
            "--output",
            "draft",
            "--num-layers",
            "1",
            "--block-size",
            "3",
            "--markov-rank",
            "4",
            "--total-seq-len",
            "256",
            "--max-anchors",
            "32",
            "--rows-per-step",
            "1",
            "--max-steps",
            "6",
            "--device",
            "cpu",
        ],
        [tools, "score", "--draft", "draft", "--cache", "hs.zarr"],
        [
            tools,
            "eval",
            "--model",
            "target",
            "--draft",
            "draft",
            "--data",
            "rows.jsonl",
            "--limit",
            "2",
            "--max-tokens",
            "8",
        ],
        [tools, "export", "draft", "published", "--target", "org/target"],
        [tools, "report", ".", "-o", "report.html"],
    ]


def main(folder: Path, requirements: list[str]) -> None:
    """Raises CalledProcessError where a command fails, with what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    bin_ = folder / "venv" / "bin"
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    def run(*words: str) -> str:
        began = time.monotonic()
        done = subprocess.run(words, cwd=work, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
            done.check_returncode()
        ours = "dspark" in words[0]
        said = [line for line in done.stderr.splitlines() if ours and "warning" in line.lower()]
        print(
            f"{time.monotonic() - began:6.1f} s  {' '.join(words).replace(str(folder), '')[:110]}",
            *said,
            sep="\n         ",
            flush=True,
        )
        return done.stdout

    if not bin_.exists():
        run(sys.executable, "-m", "venv", str(folder / "venv"))
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    source = folder / "source"  # a build leaves its folders beside what it builds
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    run(str(bin_ / "pip"), "wheel", "-q", "--no-deps", "-w", str(wheels), str(source))
    (wheel,) = wheels.glob("dspark-*.whl")
    run(str(bin_ / "pip"), "install", "-q", *requirements)
    run(str(bin_ / "pip"), "install", "-q", "--force-reinstall", "--no-deps", str(wheel))
    run(str(bin_ / "pip"), "install", "-q", str(wheel), *requirements)
    run(str(bin_ / "pip"), "check")
    (work / "rows.jsonl").write_text(chats())
    run(str(bin_ / "python"), "-c", TARGET, str(CHECKOUT / "tests"), str(CHECKOUT))
    for step in steps(bin_):
        run(*step)
    for name in (
        "published/model.safetensors",
        "published/README.md",
        "report.html",
        "draft/metrics.jsonl",
    ):
        assert (work / name).stat().st_size > 0, name
    print(run(str(bin_ / "pip"), "list", "--format=freeze"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve(), sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary), [])
