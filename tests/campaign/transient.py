"""Every call with which verify and a reader touch a store fails once with EIO, ESTALE, EACCES or
EMFILE: nothing is called damaged, nothing is deleted.
"""

from __future__ import annotations

import builtins
import collections
import dataclasses
import errno
import io
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import damage
import faults

CALLS = [
    (builtins, "open"),
    (io, "open"),
    (os, "open"),
    (os, "stat"),
    (os, "lstat"),
    (os, "fstat"),
    (os, "scandir"),
    (os, "listdir"),
    (os, "pread"),
]
ERRORS = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE]


@contextmanager
def failing(root: Path, at: int | None, number: int) -> Iterator[list[str]]:
    """Call ``at`` (counted from 0) of those that concern ``root``, or a file that was opened,
    raises ``number``; yields the names of the calls.
    """
    seen: list[str] = []
    busy = False

    def concerns(what: object) -> bool:
        return (
            isinstance(what, int) or os.fspath(what).startswith(str(root))
            if isinstance(what, int | str | os.PathLike)
            else False
        )  # type: ignore[arg-type]

    real = {(m, n): getattr(m, n) for m, n in CALLS}

    def wrapped(module: Any, name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal busy
            if busy or not args or not concerns(args[0]):
                return real[module, name](*args, **more)
            busy = True
            try:
                here = len(seen)
                seen.append(f"{name} {args[0]}")
                if here == at:
                    raise OSError(number, os.strerror(number), str(args[0]))
                return real[module, name](*args, **more)
            finally:
                busy = False

        return call

    for module, name in CALLS:
        setattr(module, name, wrapped(module, name))
    try:
        yield seen
    finally:
        for (module, name), was in real.items():
            setattr(module, name, was)


def campaign(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """``count`` cases over the calls of verify and of reading everything, spread evenly (0: every
    call by every error).
    """
    import stores
    from dspark.cache.codec import registry
    from dspark.cache.errors import UnreadableError
    from dspark.cache.files.calibration import codec_info
    from dspark.cache.stores.verify import drop_damaged, verify

    store = folder / "hs.zarr"
    m = dataclasses.replace(stores.manifest(), codec=codec_info(registry.make("rotated-4-4")))
    stores.write_store(store, [40, 52, 61, 44], m=m)
    before, expected = faults.tree(store), damage.values(store)
    uses = {"verify": lambda: verify(store), "read": lambda: damage.values(store)}
    calls = {}
    for name, use in uses.items():
        use()
        with failing(store, None, 0) as seen:
            use()
        calls[name] = len(seen)
    grid = [(n, i, e) for n, c in calls.items() for i in range(c) for e in ERRORS]
    if count:
        grid = random.Random(seed).sample(grid, min(count, len(grid)))
    out: collections.Counter[str] = collections.Counter()
    findings: list[str] = []
    began = time.monotonic()
    for name, at, number in grid:
        fault, seen = "", []
        try:
            with failing(store, at, number) as seen:
                result: Any = uses[name]()
        except UnreadableError:
            out["unreadable"] += 1
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        else:
            if name == "read":
                same, unreadable = result == expected, False
            else:
                same, unreadable = result.ok, result.verdict == "UNREADABLE"
                drop_damaged(store, result)
            if same or (unreadable and not result.damaged):
                out["as before" if same else "unreadable"] += 1
            else:
                fault = str(result)
        if faults.tree(store) != before:
            fault += " THE STORE CHANGED"
            shutil.rmtree(store)
            stores.write_store(store, [40, 52, 61, 44], m=m)
        if fault:
            call = seen[at] if at < len(seen) else "never met"
            findings.append(f"{name}, call {at} ({call}), {errno.errorcode[number]}: {fault}")
    return {
        "calls": calls,
        "cases": len(grid),
        **out,
        "findings": findings,
        "seconds": round(time.monotonic() - began),
    }
