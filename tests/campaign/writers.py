"""Two to four processes write one output at once, with delays at random before and after every
rename and fsync: one wins, the others say who holds it, the output is sound.
"""

from __future__ import annotations

import collections
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults

from dspark.cache.parts import shard_writer

SAID = re.compile(
    r"LockedError: .* is being written by .* \(host \S+, pid (\d+), since .*\); wait for it to end"
)


def delayed(rng: random.Random) -> None:
    """Make every call that changes the disk take up to 6 ms longer, in this process."""
    for module, name in faults.WRITES:
        real = getattr(module, name)

        def call(*args: Any, real: Callable[..., Any] = real, **more: Any) -> Any:
            time.sleep(rng.random() * 0.003)
            out = real(*args, **more)
            time.sleep(rng.random() * 0.003)
            return out

        setattr(module, name, call)


def start(work: Callable[[], None], go: Path, said: Path, seed: int) -> int:
    """A fork that waits for the file ``go``, works, and leaves ``done`` or its error in
    ``said``.
    """
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    shard_writer._pool.cache_clear()  # its threads are the parent's
    rng = random.Random(seed)
    delayed(rng)
    while not go.exists():
        time.sleep(0.001)
    time.sleep(rng.random() * 0.05)
    try:
        work()
        said.write_text("done")
    except BaseException as error:
        said.write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


def campaign(folder: Path, tries: int, seed: int) -> dict[str, Any]:
    """Of each try: recodings or trainings, all new, all resuming what a killed one left, or one
    that replaces while others resume.
    """
    import kills
    from small_trainings import small_training

    import stores
    from dspark.cache.stores.recode import recode
    from dspark.train.loop import train

    rng = random.Random(seed)
    source = folder / "source.zarr"
    stores.write_store(source, [40, 52, 61, 44, 70, 33, 51])
    settings = small_training(
        folder, [40, 52, 61, 44], max_steps=4, checkpoint_freq=0.5, device="cpu"
    )
    import dataclasses

    def recoded(output: Path, mode: str) -> None:
        recode(
            source,
            output,
            aux_bits=4,
            last_bits=4,
            workers=1,
            resume=mode == "resume",
            overwrite=mode == "overwrite",
        )

    def trained(output: Path, mode: str) -> None:
        train(
            dataclasses.replace(settings, output=str(output)),
            resume=mode == "resume",
            overwrite=mode == "overwrite",
        )

    counts: collections.Counter[str] = collections.Counter()
    findings: list[str] = []
    began = time.monotonic()
    for kind, work, equal in (
        ("recode", recoded, kills.same_store),
        ("train", trained, kills.same_draft),
    ):
        whole = folder / f"{kind}-whole"
        said = folder / "said"
        assert faults.attempt(lambda work=work, whole=whole: work(whole, "new"), None, said) == 0, (
            said.read_text()
        )  # type: ignore[misc]
        for number in range(tries // 2):
            output, go = folder / f"{kind}-{number}", folder / f"go-{kind}-{number}"
            writers = rng.randint(2, 4)
            begun = rng.choice([False, True])
            if begun:  # what a killed writer left
                moments = 60
                while not output.exists():
                    faults.attempt(
                        lambda work=work, output=output: work(output, "new"), moments, said
                    )  # type: ignore[misc]
                    moments += 40
            modes = [
                rng.choice(["resume", "overwrite"]) if begun else "new" for _ in range(writers)
            ]
            says = [folder / f"said-{i}" for i in range(writers)]
            children = [
                start(
                    lambda mode=mode, work=work, output=output: work(output, mode),
                    go,
                    s,
                    rng.random().__hash__(),
                )  # type: ignore[misc]
                for mode, s in zip(modes, says, strict=True)
            ]
            go.touch()
            for child in children:
                os.waitpid(child, 0)
            texts = [s.read_text() for s in says]
            wrong = [] if "done" in texts else ["nobody won"]
            for text in texts:
                named = SAID.match(text)
                # begun after the winner had ended
                late = text.startswith("ExistsError") and not begun
                if not (text == "done" or named or late):
                    wrong.append("neither won nor refused")
                if named and int(named[1]) not in children:
                    wrong.append("named a process that is none of them")
                counts["done" if text == "done" else "locked" if named else "exists"] += 1
            wrong += equal(whole, output) if "done" in texts else []
            wrong += [
                f"left: {p.name}"
                for p in [*folder.iterdir(), *output.glob(".lock")]
                if p.name.endswith(".lock") or p.name.startswith(".staging")
            ]
            if wrong:
                where = faults.kept(output, output.name)
                findings.append(f"{kind}, {modes}: {wrong} {texts} (kept: {where})")
            shutil.rmtree(output, ignore_errors=True)
            counts["tries"] += 1
    return {**counts, "findings": findings, "seconds": round(time.monotonic() - began)}
