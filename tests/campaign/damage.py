"""Every file of a store and of a training folder is damaged, one at a time: verify finds it, or
what is read and trained is as before.

Kinds: a flipped bit, a cut, a deletion, a page of zeros, the place of another file, an older copy,
the same file of a sibling store (same corpus, other bits) and of a twin (same plan, another
corpus). ``silent`` counts cases in which something else is read without an error; it must stay 0.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults

PAGE = 4096


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def zero_page(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data)) // PAGE * PAGE
    data[at : at + PAGE] = bytes(min(PAGE, len(data) - at))
    path.write_bytes(data)


def swap(path: Path, rng: random.Random, root: Path) -> None:
    """With another file of the same name or size, where there is one."""
    others = [p for p in root.rglob("*") if p.is_file() and p != path]
    alike = [p for p in others if p.name == path.name or p.stat().st_size == path.stat().st_size]
    other = rng.choice(alike or others)
    aside = path.with_name(path.name + ".swap")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def copy_of(path: Path, source: Path, root: Path) -> bool:
    """The same file of another folder in its place; whether there is one with other bytes."""
    other = source / path.relative_to(root)
    if not other.is_file() or other.read_bytes() == path.read_bytes():
        return False
    shutil.copyfile(other, path)
    return True


def hit(kind: str, path: Path, rng: random.Random, root: Path, others: dict[str, Path]) -> bool:
    """Damage ``path``; False where this kind changes nothing of it."""
    before = path.read_bytes()
    if kind in others:
        return copy_of(path, others[kind], root)
    if not before and kind != "delete":
        return False
    if kind == "swap":
        swap(path, rng, root)
    else:
        {"flip": flip, "cut": cut, "delete": delete, "zero": zero_page}[kind](path, rng)
    return not path.exists() or path.read_bytes() != before


def values(store: Path) -> str:
    """A hash of everything that can be read of a store: samples, target, index."""
    import numpy as np

    from dspark.cache import open as open_store

    cache, out = open_store(store), hashlib.sha256()
    for i in range(len(cache)):
        sample = cache[i]
        for part in (
            sample.row,
            sample.key,
            sample.input_ids,
            sample.loss_mask,
            sample.aux,
            sample.last,
        ):
            out.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    for tensor in (cache.target.embed_tokens, cache.target.norm, cache.target.lm_head):
        out.update(tensor.numpy().tobytes())
    return out.hexdigest()


def cases(
    root: Path, kinds: list[str], count: int, rng: random.Random
) -> Iterator[tuple[str, str]]:
    """(file, kind): every file by every kind, again and again with other random places, until there
    are ``count``.
    """
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    grid = [(name, kind) for name in names for kind in kinds]
    while count > 0:
        rng.shuffle(grid)
        yield from grid[:count]
        count -= len(grid)


def judged(found: Callable[[], bool], use: Callable[[], str], expected: str) -> str:
    """``found`` by verify, ``refused`` by whoever uses it, ``harmless`` (what is used is as
    before), or ``silent``.
    """
    from dspark.cache.errors import DsparkError

    try:
        seen = found()
    except DsparkError:
        seen = True
    try:
        same = use() == expected
    except DsparkError:
        return "found" if seen else "refused"
    if not same:
        return "silent"
    return "found" if seen else "harmless"


def stores_campaign(folder: Path, count: int, seed: int, pack: str = "zstd") -> dict[str, Any]:
    """``count`` cases on a store of two parts, of random states."""
    import stores
    from dspark.cache.codec import registry
    from dspark.cache.files.calibration import codec_info

    lengths = [40, 52, 61, 44, 30, 37]
    m = dataclasses.replace(stores.manifest(), codec=codec_info(registry.make("rotated-4-4", pack)))
    other = dataclasses.replace(m, codec=codec_info(registry.make("rotated-8-8", pack)))
    stores.write_store(folder / "whole.zarr", lengths, m=m)
    stores.write_store(folder / "sibling.zarr", lengths, m=other)
    stores.write_store(folder / "twin.zarr", lengths, m=m, seed=0, tokens_seed=7)
    stores.write_store(folder / "older.zarr", lengths, m=m, finish=False)
    return store_cases(folder, count, seed)


def dumped_campaign(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """``count`` cases on a store of two parts that a dump wrote in the default codec, which has a
    calibration.
    """
    from dump_runs import corpus

    from dspark.dump.config import DumpConfig
    from dspark.dump.progress import Display
    from dspark.dump.run import dump
    from dump_targets import save_target

    model = str(save_target(folder / "target"))

    def dumped(name: str, codec: str, rows: int = 80, seed: int = 0) -> None:
        data = folder / str(seed) / "rows.jsonl"
        data.parent.mkdir(exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in corpus(rows, seed)))
        output = folder / f"{name}.zarr"
        base = DumpConfig(model=model, data=str(data), output=output, codec=codec, device="cpu")
        more = {"part_tokens": 1500, "batch_tokens": 512, "layers": (0, 2)}
        dump(dataclasses.replace(base, **more), Display())

    dumped("whole", "klt-1-1")
    dumped("sibling", "klt-2-2")
    dumped("twin", "klt-1-1", seed=1)
    said = folder / "said"
    assert faults.attempt(lambda: dumped("again", "klt-1-1"), None, said) == 0, said.read_text()
    # Killed while it ends: parts are there, index or manifest are not yet.
    late = int(said.read_text()) - 12
    assert faults.attempt(lambda: dumped("older", "klt-1-1"), late, said) == -9, said.read_text()
    return store_cases(folder, count, seed)


def store_cases(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """``count`` cases on ``folder``/whole.zarr, which has a sibling, a twin and an older copy."""
    from dspark.cache.stores.verify import verify

    rng = random.Random(seed)
    whole, work = folder / "whole.zarr", folder / "work.zarr"
    others = {kind: folder / f"{kind}.zarr" for kind in ("sibling", "twin", "older")}
    expected = values(whole)

    def found() -> bool:
        return not verify(work).ok

    kinds = ["flip", "cut", "delete", "zero", "swap", *others]
    return run(
        cases(whole, kinds, count, rng),
        whole,
        work,
        rng,
        others,
        lambda: judged(found, lambda: values(work), expected),
    )


def trainings_campaign(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """``count`` cases on the folder of a training that is then resumed for a step; "used" is the
    draft it ends with.
    """
    from safetensors.torch import load_file
    from small_trainings import small_training

    from dspark.train.loop import train

    rng = random.Random(seed)
    settings = small_training(
        folder,
        [40, 52, 61, 44, 70],
        max_steps=3,
        checkpoint_freq=0.3,
        device="cpu",
        keep_checkpoints=3,
    )
    whole, work = folder / "whole", folder / "work"

    def until(output: Path, step: int, **more: Any) -> None:
        def stop(done: int, total: int, text: str) -> None:
            if done == step:
                raise Halt

        with_output = dataclasses.replace(settings, output=str(output), **more)
        with contextlib.suppress(Halt):
            train(
                with_output, progress=stop if step < 3 else lambda *_: None, resume=output.exists()
            )

    until(whole, 2)
    until(folder / "older", 1)
    until(folder / "sibling", 2, seed=5)

    def draft(output: Path) -> str:
        tensors = load_file(output / "model.safetensors")
        return hashlib.sha256(
            b"".join(n.encode() + tensors[n].float().numpy().tobytes() for n in sorted(tensors))
        ).hexdigest()

    faults.copied(whole, folder / "end")
    until(folder / "end", 3)
    expected = draft(folder / "end")

    def use() -> str:
        until(work, 3)
        return draft(work)

    others = {"sibling": folder / "sibling", "older": folder / "older"}
    kinds = ["flip", "cut", "delete", "zero", "swap", *others]
    return run(
        cases(whole, kinds, count, rng),
        whole,
        work,
        rng,
        others,
        lambda: judged(lambda: False, use, expected),
    )


class Halt(Exception):
    """Ends a training as a crash would."""


def run(
    chosen: Iterator[tuple[str, str]],
    whole: Path,
    work: Path,
    rng: random.Random,
    others: dict[str, Path],
    judge: Callable[[], str],
) -> dict[str, Any]:
    """Judge each of the cases ``chosen`` on a fresh copy; silent ones, and errors that are none of
    ours, are findings.
    """
    out: collections.Counter[str] = collections.Counter()
    told: dict[str, collections.Counter[str]] = {
        kind: collections.Counter() for kind in ("harmless", "refused")
    }
    findings, began = [], time.monotonic()
    unchanged = 0
    for name, kind in chosen:
        faults.copied(whole, work)
        if not hit(kind, work / name, rng, work, others):
            unchanged += 1
            continue
        try:
            verdict = judge()
        except Exception as error:
            verdict = "raw"
            findings.append(
                f"{kind} of {name}: {type(error).__name__}: {error} "
                f"(kept: {faults.kept(work, work.name)})"
            )
        out[verdict] += 1
        if verdict == "silent":
            findings.append(f"silent: {kind} of {name} (kept: {faults.kept(work, work.name)})")
        if verdict in told:
            told[verdict][f"{kind} of {name}"] += 1
    return {
        "cases": sum(out.values()),
        "files": len(faults.tree(whole)),
        "no change": unchanged,
        "silent": 0,
        **out,
        "findings": findings,
        "what is harmless": dict(told["harmless"]),
        "what only its user refuses": dict(told["refused"]),
        "seconds": round(time.monotonic() - began),
    }
