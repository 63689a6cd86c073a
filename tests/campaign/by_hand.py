"""What a person meets who uses the commands, each as a process of its own: an odd row late in a
corpus, few file handles, a store that changed under a training, ``--overwrite`` killed, SIGHUP,
input of absurd size, a pickled target. Prints what each command said.

    python tests/campaign/by_hand.py [NAME ...]

Names: odd_row, handles, changed_store, overwrite, hangup, long_line, many_turns, pickled.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dump_runs import files

from dump_targets import chat
from words import WORDS

KILLS = 20  # of --overwrite
SMALL = ["--num-layers", "1", "--block-size", "3", "--markov-rank", "4", "--max-anchors", "16"]
SMALL += ["--rows-per-step", "1", "--total-seq-len", "256", "--recipe", "none", "--device", "cpu"]
PARTS = ["--codec", "rotated-4-4", "--part-tokens", "4000", "--device", "cpu"]


def command(folder: Path, name: str, *given: str, handles: int = 0) -> subprocess.Popen[str]:
    """``dspark-NAME`` in ``folder``, with at most ``handles`` open files."""
    limit = ["sh", "-c", f'ulimit -n {handles}; exec "$@"', "sh"] if handles else []
    return subprocess.Popen(
        [*limit, sys.executable, "-m", f"dspark.{name}", *given],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ran(folder: Path, name: str, *given: str, handles: int = 0, lines: int = 3) -> int:
    """Run it to its end, and print its exit code, time, peak memory and last lines."""
    began = time.monotonic()
    process = command(folder, name, *given, handles=handles)
    assert process.stdout
    said = process.stdout.read().strip().splitlines()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    print(f"$ dspark-{name} {' '.join(given)}", flush=True)
    print(f"  exit {process.returncode}, {seconds:.1f} s, {used.ru_maxrss / 2**20:.2f} GB")
    for line in said[-lines:]:
        print(f"  | {line[:400]}", flush=True)
    return process.returncode


def target(folder: Path) -> str:
    from dump_targets import save_target

    save_target(folder / "target")
    return "target"  # as the store records it


def chats(path: Path, rows: int, seed: int = 0, odd: dict[int, str] | None = None) -> Path:
    """``rows`` chats as lines of ``path``, those of ``odd`` replaced."""
    rng = random.Random(seed)

    def words(least: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, 25)))

    lines = [json.dumps(chat(f"u: {words(3)}", f"a: {words(3)}")) for _ in range(rows)]
    for row, line in (odd or {}).items():
        lines[row] = line
    path.write_text("\n".join(lines) + "\n")
    return path


def dumped(folder: Path, rows: int, *more: str, lines: int = 2) -> int:
    chats(folder / "rows.jsonl", rows)
    flags = ["--model", target(folder), "--data", "rows.jsonl", *PARTS, *more]
    return ran(folder, "dump", *flags, lines=lines)


def odd_row(folder: Path) -> None:
    """Row 1,052 of 1,100: no JSON, wrong types, no text; then repaired, and resumed."""
    flags = ["--model", target(folder), "--data", "rows.jsonl", *PARTS]
    for odd in ('{"messages": [{"role": "user", "cont', '{"messages": 7}', '{"messages": []}'):
        chats(folder / "rows.jsonl", 1100, odd={1052: odd})
        ran(folder, "dump", *flags, "--overwrite", lines=5)
        log = (folder / "hs.zarr.log").read_text().splitlines()
        print("  log:", *[line[:300] for line in log if "1052" in line or "1053" in line][-2:])
        ran(folder, "tools", "verify", "hs.zarr", lines=2)
    chats(folder / "rows.jsonl", 1100)
    ran(folder, "dump", *flags, "--resume", lines=3)


def handles(folder: Path) -> None:
    """Verify and a training with 160 handles on a store of more than 22 parts, and with 24."""
    dumped(folder, 2600, "--part-tokens", "2000")
    print("  parts:", len(list((folder / "hs.zarr/parts").iterdir())) - 1)
    before = files(folder / "hs.zarr")
    for count in (160, 24):
        ran(folder, "tools", "verify", "hs.zarr", handles=count)
        ran(folder, "tools", "verify", "hs.zarr", "--drop-damaged", handles=count)
    flags = ["--cache", "hs.zarr", "--output", "draft", "--max-steps", "20", *SMALL]
    ran(folder, "train", *flags, handles=160)
    print("  store unchanged:", files(folder / "hs.zarr") == before)


def changed_store(folder: Path) -> None:
    """A training resumed after its store was made again: another seed's chats, another codec."""
    dumped(folder, 200)
    shutil.copytree(folder / "hs.zarr", folder / "first.zarr")
    steps = ["--max-steps", "12", "--checkpoint-freq", "0.05", *SMALL]
    flags = ["--cache", "hs.zarr", "--output", "draft", *steps]
    process = command(folder, "train", *flags)
    while not list(folder.glob("draft/checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    shutil.rmtree(folder / "hs.zarr")
    dumped(folder, 200, "--codec", "rotated-8-8")
    ran(folder, "train", *flags, "--resume")
    chats(folder / "rows.jsonl", 200, seed=1)
    more = ["--model", "target", "--data", "rows.jsonl", *PARTS, "--overwrite"]
    ran(folder, "dump", *more, lines=1)
    ran(folder, "train", *flags, "--resume")
    shutil.rmtree(folder / "hs.zarr")
    shutil.copytree(folder / "first.zarr", folder / "hs.zarr")
    ran(folder, "train", *flags, "--resume", lines=1)


def overwrite(folder: Path) -> None:
    """``--overwrite`` killed 20 times at a random moment; after every fifth kill one that is left
    alone must end with the bytes of a fresh dump.
    """
    dumped(folder, 300)
    want = files(folder / "hs.zarr")
    flags = ["--model", "target", "--data", "rows.jsonl", *PARTS]
    began = time.monotonic()
    assert ran(folder, "dump", *flags, "--overwrite", lines=1) == 0
    whole, rng = time.monotonic() - began, random.Random(20)
    killed = tries = equal = 0
    while killed < KILLS and tries < 4 * KILLS:
        began = time.monotonic()
        process = command(folder, "dump", *flags, "--overwrite")
        time.sleep(rng.uniform(0.4, 1.0) * whole)
        process.kill()
        said = process.communicate()[0].strip().splitlines()
        tries += 1
        print(f"  try {tries}: {process.returncode}, {said[-1:]}"[:200], flush=True)
        if process.returncode != -signal.SIGKILL:
            whole = min(whole, time.monotonic() - began)  # it has ended before
            continue
        killed += 1
        if killed % 5 == 0:
            code = ran(folder, "dump", *flags, "--overwrite", lines=1)
            equal += code == 0 and files(folder / "hs.zarr") == want
    left = sorted(p.name for p in folder.iterdir())
    print(f"  killed {killed} of {tries}, equal {equal} of {killed // 5}; in the folder: {left}")


def hangup(folder: Path) -> None:
    """SIGHUP to a dump and to a training, then ``--resume``."""
    dumped(folder, 1500)
    want = files(folder / "hs.zarr")
    flags = ["--model", "target", "--data", "rows.jsonl", *PARTS, "--output", "second.zarr"]
    signalled(folder, folder / "second.zarr/parts/000000000001", "dump", *flags)
    ran(folder, "dump", *flags, "--resume", lines=1)
    print("  equal:", files(folder / "second.zarr") == want)
    flags = ["--cache", "hs.zarr", "--output", "draft", "--max-steps", "400", *SMALL]
    signalled(folder, folder / "draft/metrics.jsonl", "train", *flags)
    ran(folder, "train", *flags, "--resume", lines=1)


def signalled(folder: Path, there: Path, name: str, *flags: str) -> None:
    """Start it, send SIGHUP as soon as ``there`` exists, and print what it says."""
    process = command(folder, name, *flags)
    while not there.exists() and process.poll() is None:
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGHUP)
    said = process.communicate()[0].strip().splitlines()
    print(f"$ dspark-{name} {' '.join(flags)}   (SIGHUP)")
    print(f"  exit {process.returncode}, {time.monotonic() - began:.1f} s after the signal")
    for line in said[-3:]:
        print(f"  | {line[:300]}", flush=True)


def long_line(folder: Path) -> None:
    """A corpus that is one line of 200 MB, alone and before a hundred chats."""
    model = target(folder)
    chats(folder / "rows.jsonl", 100)
    (folder / "line.jsonl").write_bytes(bytes(200 << 20))
    text = b'{"messages": [{"role": "user", "content": "' + b"a" * (200 << 20) + b'"}]}\n'
    (folder / "long.jsonl").write_bytes(text + (folder / "rows.jsonl").read_bytes())
    for name in ("line.jsonl", "long.jsonl"):
        flags = ["--model", model, "--data", name, *PARTS, "--overwrite"]
        ran(folder, "dump", *flags, lines=5)
        ran(folder, "tools", "data", name, "--model", model, lines=3)


def many_turns(folder: Path) -> None:
    """A chat of 20,000 turns among ten others."""
    turns = [
        {"role": role, "content": "one two three"}
        for _ in range(10_000)
        for role in ("user", "assistant")
    ]
    chats(folder / "rows.jsonl", 10, odd={5: json.dumps({"messages": turns})})
    model = target(folder)
    for how in ("auto", "each", "whole"):
        flags = ["--model", model, "--data", "rows.jsonl", *PARTS, "--overwrite", "--turns", how]
        ran(folder, "dump", *flags, "--seq-length", "512", lines=3)


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def pickled(folder: Path) -> None:
    """A target whose weights are a pickle that runs a command."""
    model = folder / target(folder)
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    chats(folder / "rows.jsonl", 10)
    flags = ["--model", str(model), "--data", "rows.jsonl", *PARTS, "--overwrite"]
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    ran(folder, "dump", *flags)
    import torch

    torch.save({"model.embed_tokens.weight": Harm()}, model / "pytorch_model.bin")
    ran(folder, "dump", *flags)
    print("  executed:", (folder / "ran").exists())


NAMES = {
    made.__name__: made
    for made in (
        odd_row,
        handles,
        changed_store,
        overwrite,
        hangup,
        long_line,
        many_turns,
        pickled,
    )
}

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        print(f"== {name}: {(NAMES[name].__doc__ or '').splitlines()[0]}", flush=True)
        with tempfile.TemporaryDirectory() as made:
            NAMES[name](Path(made))
