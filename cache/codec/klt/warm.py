"""Load and compile what the transform codec runs on a GPU before it is needed.

The solvers' libraries are hundreds of megabytes that a process reads when it first uses them, and
triton compiles each variant of a kernel in a fifth of a second: seconds on a fresh machine. They
pass in threads while an engine is checked and the states to learn from are captured. Variants are
told by dtypes and constants alone (``kernels.jit``), so ``launches`` can have those that learning
and coding need; a test holds the two against each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING

from dspark.cache.codec.klt import fast
from dspark.cache.codec.klt.codec import Klt
from dspark.cache.codec.klt.symbols import CLASSES, Packing, band_count
from dspark.cache.codec.klt.tables import Tables, Transform
from dspark.cache.shared.host_cores import cores
from dspark.cache.shared.process import by_number, make_current

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Codec, Tokens

    Launch = Callable[[], object]

log = logging.getLogger("dspark.cache")
BYTES = (15, 15, 11, 7)  # of the columns of each class
SIZE = 64  # tokens, and rows of the embedding
ROWS = 4  # of a launch that is there to be compiled
THREADS = 8  # that compile, at most: most of it is outside Python's lock


@contextmanager
def warming(
    codec: Codec,
    layers: int,
    hidden: int,
    device: torch.device | str | None,
    dtype: str = "bfloat16",
) -> Iterator[Callable[[], None]]:
    """Warm ``device`` for learning and coding states of ``dtype`` with ``codec`` during the
    ``with`` block, which ends when that is done; yields what waits for that. Nothing is done for
    another codec, nor without a GPU. What does not run is left for the real work to refuse.
    """
    if not isinstance(codec, Klt) or device is None or not str(device).startswith("cuda"):
        yield lambda: None
        return
    with _beside(device, lambda here: _warm(codec, layers, hidden, here, dtype)) as wait:
        yield wait


@contextmanager
def warming_to_read(
    codecs: Iterable[Codec], hidden: int, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """Compile what ``codecs`` decode with on ``device`` during the ``with`` block, which ends when
    that is done, if ``device`` is a GPU. ``dtype``: of the target's embedding.
    """
    found = {codec.coarse == 1: codec for codec in codecs if isinstance(codec, Klt)}
    if not found or not fast.has_kernels(device):
        yield
        return
    of = list(found.values())
    with _beside(device, lambda here: _warm_to_read(of, hidden, here, dtype)):
        yield


@contextmanager
def _beside(
    device: torch.device | str, work: Callable[[torch.device], None]
) -> Iterator[Callable[[], None]]:
    """Run ``work`` with ``device`` by number in a thread during the ``with`` block, which ends when
    that has ended; yields what waits for it. Nothing is done where the device is not ready for it.
    """
    here = _ready(device)
    if here is None:
        yield lambda: None
        return
    thread = Thread(target=work, args=(here,), name="dspark-warm")
    thread.start()
    try:
        yield thread.join
    finally:
        thread.join()


def _ready(device: torch.device | str) -> torch.device | None:
    """Return ``device`` by number, as other threads need it, with triton imported if it serves it:
    here, since imports by two threads at once may see half of a module. None if that fails.
    """
    try:
        here = by_number(device)
        if fast.has_kernels(here):
            from dspark.cache.codec.klt import kernels

            kernels.read()
    except Exception as error:  # of a triton that does not fit: the real work does without it
        log.info("nothing of the transform codec is compiled ahead: %s", error)
        return None
    return here


def _warm_to_read(codecs: list[Klt], hidden: int, device: torch.device, dtype: torch.dtype) -> None:
    try:
        make_current(device)
        with _pool(device) as pool:
            for codec in codecs:
                found = launches(codec, hidden, device, dtype, encoding=False)
                for one in _compiling(pool, found):
                    one.result()
    except Exception as error:  # CUDA's and compilers': decoding meets them again
        log.info("not all of the transform codec was compiled ahead: %s", error)


def _warm(codec: Klt, layers: int, hidden: int, device: torch.device, dtype: str) -> None:
    import torch

    try:
        make_current(device)
        with torch.inference_mode():
            warm(codec, layers, hidden, device, getattr(torch, dtype))
    except Exception as error:  # CUDA's and compilers': learning and coding meet them again
        log.info("not all of the transform codec was loaded and compiled ahead: %s", error)


def warm(
    codec: Klt, layers: int, hidden: int, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Solve small equations, compile the kernels, and code a few rows of ``dtype`` (None: bfloat16)
    on ``device``.
    """
    import torch

    dtype = dtype or torch.bfloat16
    with _pool(device) as pool:
        work = [pool.submit(solve, device)]
        if fast.has_kernels(device):
            work += _compiling(pool, launches(codec, hidden, device, dtype))
        for one in work:
            one.result()
    known = _tokens(hidden, device, dtype)
    aux = torch.zeros(SIZE, layers, hidden, dtype=dtype, device=device)
    last = torch.zeros(len(known.last_token), hidden, dtype=dtype, device=device)
    coder = codec.with_tables(tables(layers, hidden, codec.coarse))
    coder.decode(coder.encode(aux, last, known), hidden, known, dtype)


def _pool(device: torch.device) -> ThreadPoolExecutor:
    """Make threads that launch on ``device``: triton does so on a thread's current GPU, wherever
    the tensors are, and another GPU's memory is an error that ends the process's use of it.
    """
    threads = min(THREADS, cores())
    return ThreadPoolExecutor(threads, "dspark-warm", make_current, (device,))


def _compiling(pool: ThreadPoolExecutor, found: list[list[Launch]]) -> list[Future[object]]:
    """Begin to compile what was ``found`` for each kernel. Its first launch comes before the
    others, for which it makes what they share: older tritons compile a launcher in C.
    """
    from dspark.cache.codec.klt import kernels

    kernels.read()
    (alone,), *others = found
    alone()  # makes triton's driver, which threads would make several times
    first = [pool.submit(of[0]) for of in others]
    rest = []
    for one, of in zip(first, others, strict=True):
        one.result()
        rest += [pool.submit(launch) for launch in of[1:]]
    return rest


def solve(device: torch.device) -> object:
    """Use what a calibration solves its equations with."""
    import torch

    small = torch.eye(SIZE, dtype=torch.float64, device=device)
    torch.linalg.eigh(small)
    torch.linalg.solve(small, small) @ small
    return small.float() @ small.float()


def launches(
    codec: Klt, hidden: int, device: torch.device, dtype: torch.dtype, *, encoding: bool = True
) -> list[list[Launch]]:
    """Return, for each kernel, what launches each variant that ``codec`` needs once, for states and
    an embedding of ``dtype``; without ``encoding``, those that it decodes with.
    """
    import torch

    from dspark.cache.codec.klt import kernels

    kinds = 1 if codec.coarse == 1 else 2
    zeros = partial(torch.zeros, dtype=torch.bfloat16, device=device)  # as ``half_on`` has them
    ones = torch.ones(hidden, device=device)
    table = torch.zeros(1, hidden, dtype=dtype, device=device)
    wide = zeros(ROWS, 2 * hidden)
    which = torch.zeros(ROWS, dtype=torch.int64, device=device)
    scale, coarse = which.float(), which.bool()
    packs: list[Launch] = []
    unpacks: list[Launch] = []
    for i, (_, n) in reversed(list(enumerate(CLASSES))):  # the longest to compile come first
        packing = Packing(tuple(n if j == i else 0 for j in range(len(CLASSES))))
        y, out = torch.zeros(ROWS, n, device=device), zeros(ROWS, n)
        code = torch.zeros(ROWS, 1, dtype=torch.uint8, device=device)
        pack = partial(kernels.pack, y, 1.0, packing)
        unpack = partial(kernels.unpack, out, code, packing, [zeros(kinds * 256, n)])
        packs.append(pack)
        unpacks += [unpack, partial(unpack, which)]
        if kinds == 2:
            packs.append(partial(pack, scale))
            unpacks.append(partial(unpack, coarse=coarse))
    embed: list[Launch] = [partial(kernels.embeddings, wide, table, which[None], 0)]
    standard: list[Launch] = [
        partial(kernels.standardised, wide, table.expand(ROWS, -1), ones, ones)
    ]
    return [embed, standard, packs, unpacks] if encoding else [embed, unpacks]


def tables(layers: int, hidden: int, coarse: float) -> Tables:
    """Return tables that predict nothing and code some channels as they are."""
    aux = _identity(layers * hidden, 2 * hidden, coarse)
    return Tables(aux, _identity(hidden, aux.kept + 3 * hidden, 1.0), layers, hidden, aux.kept)


def _identity(channels: int, features: int, coarse: float) -> Transform:
    import torch

    columns = tuple(n * count for n, (_, count) in zip(BYTES, CLASSES, strict=True))
    packing = Packing(columns)
    kinds = 1 if coarse == 1 else 2
    return Transform(
        mean=torch.zeros(channels),
        deviation=torch.ones(channels),
        back=torch.eye(packing.total, channels, dtype=torch.bfloat16),
        forward=None,
        predict=torch.zeros(features, channels, dtype=torch.bfloat16),
        offsets=torch.zeros(2 * kinds, band_count(packing)),
        step=1.0,
        packing=packing,
        limit=1e9,
        noise=0.0,
        bits=0.0,
        coarse=coarse,
    )


def _tokens(hidden: int, device: torch.device, dtype: torch.dtype) -> Tokens:
    import torch

    from dspark.cache.codec.base import Tokens

    at = torch.arange(SIZE, device=device)
    start = torch.tensor([0, SIZE], device=device)
    embedding = torch.zeros(SIZE, hidden, dtype=dtype, device=device)
    return Tokens(at, start, at[SIZE // 2 : -1], embedding)
