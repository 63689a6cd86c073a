"""Run by test_klt_warm.py with TRITON_INTERPRET=1: a JSON line per launch of the warm-up, with the
accesses of its kernel that leave the storage of the tensors that it was given.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from dspark.cache.codec.klt import kernels, warm
from dspark.cache.codec.klt.codec import FAMILY

CPU = torch.device("cpu")


class Watched:
    """Stands for the interpreter's memory: counts accesses, and those beyond ``given``."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.given: list[tuple[int, int]] = []  # begin and end of each tensor's storage
        self.made = self.beyond = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, at: Any, mask: Any, *rest: Any) -> Any:
        self.look(at, mask, np.dtype(rest[-1]).itemsize)
        return self._memory.load(at, mask, *rest)

    def store(self, at: Any, value: Any, mask: Any) -> Any:
        self.look(at, mask, value.dtype.itemsize)
        return self._memory.store(at, value, mask)

    def look(self, at: Any, mask: Any, size: int) -> None:
        at, mask = np.broadcast_arrays(at, mask)
        found = at[mask.astype(bool)].astype(np.int64)
        inside = np.zeros(found.shape, bool)
        for begin, end in self.given:
            inside |= (found >= begin) & (found + size <= end)
        self.made += found.size
        self.beyond += int((~inside).sum())


watched = Watched(interpreter._interpreter)
interpreter._interpreter = watched
convert = interpreter._implicit_cvt


def noted(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        storage = arg.untyped_storage()
        watched.given.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return convert(arg)


interpreter._implicit_cvt = noted


def case(what: str, launch: Any) -> None:
    watched.given, watched.made, watched.beyond = [], 0, 0
    launch()
    print(json.dumps({"what": what, "made": watched.made, "beyond": watched.beyond}))


for name in ("klt-1-1", "klt-1-1-2"):
    for hidden in (20, 36, 1500):
        for dtype in (torch.bfloat16, torch.float32):
            found = warm.launches(FAMILY.make(name, "zstd"), hidden, CPU, dtype)
            for i, of in enumerate(found):
                for j, launch in enumerate(of):
                    case(f"{name} {hidden} {dtype} {i}.{j}", launch)
# One access too far, to see that it is noticed.
short = torch.zeros(1, 20, dtype=torch.bfloat16)
ids = torch.ones(1, 4, dtype=torch.int64)
case("beyond", lambda: kernels.embeddings(torch.zeros(4, 20).bfloat16(), short, ids, 0))
