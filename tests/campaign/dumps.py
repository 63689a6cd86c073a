"""``make campaign``: dumps of a tiny target are killed (kill -9) at random moments and resumed; the
store must be that of an unbroken run, byte for byte.

    python tests/campaign/dumps.py [KILLS] [SEED] [--whom process|group|worker] [--workers N]

Every try is a fork of this process, so that it costs a dump and not the import of torch. Prints one
JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dump_runs import corpus, files

from dspark.cache.parts.committed import scan_parts
from dspark.cache.stores.verify import verify
from dspark.dump.config import DumpConfig
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dump_targets import save_target


def children(pid: int) -> list[int]:
    """Worker processes of ``pid``."""
    out = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    out.append(int(child))
    except (FileNotFoundError, ProcessLookupError):  # it ends just now
        pass
    return out


def ended(pid: int) -> bool:
    """Whether ``pid``, a child, has ended; it is not waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(pid: int, whom: str) -> bool:
    """Kill ``pid``, a child and the leader of a group; its whole group; or one of its workers, as
    soon as there is one. Whether there was something to kill.
    """
    if whom == "worker":
        while not (found := children(pid)):
            if ended(pid):
                return False
            time.sleep(0.01)
        os.kill(random.choice(found), signal.SIGKILL)
        return True
    lives = not ended(pid)  # it is a zombie at worst: nobody has waited for it yet
    (os.killpg if whom == "group" else os.kill)(pid, signal.SIGKILL)
    return lives


def begin(config: DumpConfig, said: Path | None = None) -> int:
    """Dump in a process group of its own; the id of its first process. Its error is in ``said``."""
    child = os.fork()
    if not child:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        try:
            dump(config, Display())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            said.write_text(text) if said else print(text, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def attempt(
    config: DumpConfig, seconds: float | None, whom: str = "process", said: Path | None = None
) -> int:
    """As ``begin``, and ``whom`` is killed after ``seconds``; the exit code of the first process,
    -9 where that was killed.
    """
    child = begin(config, said)
    if seconds is not None:
        time.sleep(seconds)
        kill(child, whom)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_dump(folder: Path, rows: int, workers: int = 0) -> DumpConfig:
    """Make a target and a corpus of ``rows`` chats in ``folder``; the dump of them that others are
    compared with.
    """
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in corpus(rows)))
    return DumpConfig(
        model=str(save_target(folder / "target")),
        data=str(data),
        output=folder / "whole.zarr",
        part_tokens=150,
        aux_bits=4,
        last_bits=4,
        workers=workers,
    )


def campaign(
    folder: Path, kills: int, seed: int, whom: str = "process", workers: int = 0
) -> dict[str, object]:
    """Kill dumps until ``kills`` of them have been; each store that is whole is compared, then the
    next one begun.
    """
    rng = random.Random(seed)
    random.seed(seed)
    whole, said = whole_dump(folder, 60, workers), folder / "said"
    began = time.monotonic()
    assert attempt(whole, None) == 0
    unbroken = time.monotonic() - began
    want = files(whole.output)
    killed = stores = equal = 0
    findings: list[str] = []
    parts: list[int] = []  # there when a kill came; -1: no store yet
    while killed < kills and len(findings) < 20:
        config = dataclasses.replace(whole, output=folder / f"{stores}.zarr", resume=True)
        code = -9
        while code:
            left, before = killed < kills and rng.random() < 0.85, killed
            said.write_text("")
            code = attempt(config, rng.random() * 1.1 * unbroken if left else None, whom, said)
            # A dump that loses a worker ends itself, and says so.
            if code == -9 or (whom == "worker" and "ended before its work" in said.read_text()):
                killed += 1
                parts.append(len(scan_parts(config.output)) if config.output.exists() else -1)
            if code and killed == before:
                break
        stores += 1
        found = files(config.output) if config.output.exists() else {}
        differ = sorted(n for n in want | found if want.get(n) != found.get(n))
        wrong = [said.read_text()] * bool(code) + differ
        wrong = wrong or list(verify(config.output).findings)
        equal += not wrong
        findings += [f"{config.output.name}: {wrong}"] if wrong else []
    return {
        "campaign": f"dumps, {whom} killed by the clock, {workers} workers",
        "seed": seed,
        "kills": killed,
        "stores": stores,
        "parts": len(scan_parts(whole.output)),
        "seconds_unbroken": round(unbroken, 2),
        "kills_before_the_store": parts.count(-1),
        "kills_between_parts": sum(p >= 0 for p in parts),
        "byte_equal": equal,
        "findings": findings,
        "seconds": round(time.monotonic() - began),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int, nargs="?", default=40)
    parser.add_argument("seed", type=int, nargs="?", default=17)
    parser.add_argument("--whom", choices=["process", "group", "worker"], default="process")
    parser.add_argument("--workers", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(Path(folder), asked.kills, asked.seed, asked.whom, asked.workers)
    print(json.dumps(found))
    raise SystemExit(bool(found["findings"]))
