"""How vLLM is started: GPUs, arguments, versions; and several engines behind one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspark.cache.errors import EngineError, UsageError
from dspark.dump.config import DumpConfig
from dspark.dump.engines.options import EngineOptions, parse_arguments
from dspark.dump.engines.vllm.launch import (
    Split,
    choose_split,
    divides,
    llm_arguments,
    memory_share,
    remedies,
)
from dspark.dump.engines.vllm.replicas import visible_gpus
from dspark.dump.engines.vllm.requests import Patient, RequestLoop

GB = 1 << 30


def split(gpus: int, heads: tuple[int, ...] = (32, 8), size: int | None = 8, **asked: Any) -> Split:
    weights = None if size is None else size * GB
    return choose_split(gpus, heads, EngineOptions(**asked), weights=weights, memory=80 * GB)


def test_a_small_target_takes_a_gpu_each_and_a_large_one_all() -> None:
    assert split(8) == Split(8, 1, 1)
    assert split(8, size=90) == Split(4, 2, 2)
    assert split(8, size=750) == Split(1, 8, 8)
    assert split(1) == Split(1, 1, 1)
    assert split(0) == Split(1, 0, 1)
    assert split(8, size=None) == Split(1, 8, 8), "of unknown size"


def test_what_is_asked_for_is_taken() -> None:
    assert split(8, tensor_parallel=4) == Split(2, 4, 4)
    assert split(8, data_parallel=2, size=90) == Split(2, 2, 2, "4 of 8 GPUs stay idle")
    assert split(1, data_parallel=2) == Split(2, 1, 1, shared=True)
    pipeline = (("pipeline_parallel_size", 2),)
    assert split(8, arguments=pipeline, size=750) == Split(1, 8, 4)
    with pytest.raises(UsageError, match="need 16, and 8 are visible"):
        split(8, tensor_parallel=4, data_parallel=4)


def test_heads_that_do_not_divide_give_another_split_that_is_told() -> None:
    found = split(8, (12, 12), size=500)
    assert (found.engines, found.gpus, found.tensor) == (1, 6, 6)
    assert "8 GPUs do not divide the target's heads (12, 12) evenly: 6 per engine" in found.why
    assert "2 of 8 GPUs stay idle" in found.why
    with pytest.raises(
        UsageError,
        match="heads do not divide evenly by it. With 8 GPUs, these work: 1, 2, 3, 4, 6",
    ):
        split(8, (12, 12), tensor_parallel=8)
    assert divides((64, 4), 8), "heads of keys are repeated"
    assert not divides((64, 6), 4)


@pytest.mark.parametrize(
    ("gpus", "leave", "weights", "memory", "share"),
    [
        (1, 5, 8, 80, None),  # a tenth of the GPU is more than that
        (1, 11, 16, 80, 0.838),
        (8, 21, 750, 141, 0.837),  # GLM-5.2 on H200s
        (8, 21, 750, 120, None),  # weights first: the codec is learnt on the host
        (1, 11, None, 80, None),
        (0, 11, 1, 0, None),
    ],
)
def test_an_engine_leaves_room_for_learning_the_codec(
    gpus: int, leave: int, weights: int | None, memory: int, share: float | None
) -> None:
    def chosen(split: Split, *given: tuple[str, Any]) -> float | None:
        return memory_share(
            EngineOptions(arguments=given), split, leave=leave * GB,
            weights=None if weights is None else weights * GB, memory=memory * GB,
        )  # fmt: skip

    assert chosen(Split(1, gpus, max(gpus, 1))) == share
    assert chosen(Split(1, gpus, max(gpus, 1)), ("gpu_memory_utilization", 0.5)) is None


def test_engines_on_one_gpu_share_it() -> None:
    """With room for each one's coding, as long as the weights leave it."""
    for engines, leave, weights, share in (
        (2, 0, 8, 0.4),
        (2, 12, 8, 0.362),
        (3, 0, 1, 0.233),
        (2, 0, 30, 0.45),
        (5, 0, 1, 0.1),
    ):
        found = memory_share(
            EngineOptions(), Split(engines, 1, 1, shared=True),
            leave=leave * GB, weights=weights * GB, memory=80 * GB,
        )  # fmt: skip
        assert found == share


def test_arguments_are_read_and_those_of_the_dump_refused(tmp_path: Path) -> None:
    found = parse_arguments(
        ("max-num-seqs=64", "enable_expert_parallel=true", "quantization=fp8", "a=b=c", "x=None")
    )
    assert dict(found) == {
        "max_num_seqs": 64,
        "enable_expert_parallel": True,
        "quantization": "fp8",
        "a": "b=c",
        "x": None,
    }
    for wrong in ("64", "=3", "a b=3"):
        with pytest.raises(UsageError, match="expected KEY=VALUE"):
            parse_arguments((wrong,))
    with pytest.raises(UsageError, match="given twice"):
        parse_arguments(("a=1", "a=2"))

    def made(*given: str) -> dict[str, Any]:
        options = EngineOptions(arguments=parse_arguments(given))
        return llm_arguments(
            "m",
            [1, 3],
            dtype="float32",
            seq_length=8,
            spool=tmp_path,
            batch_tokens=9,
            options=options,
        )

    assert made("max_num_seqs=64")["max_num_seqs"] == 64
    assert made()["max_model_len"] == 9
    # vLLM makes a processor of images otherwise, which wants the tokenizer that is left out.
    assert {"skip_tokenizer_init", "language_model_only"} <= set(made())
    # Known before any engine starts.
    with pytest.raises(UsageError, match="--engine-arg max_model_len: the dump sets this itself"):
        DumpConfig(model="m", engine_arg=("max_model_len=5",))


def test_flags_of_vllm_are_refused_with_another_engine() -> None:
    with pytest.raises(
        UsageError, match="--tensor-parallel-size: the transformers engine has no such option"
    ):
        DumpConfig(model="m", engine="transformers", tensor_parallel_size=2)
    with pytest.raises(UsageError, match="--data-parallel-size: found 0"):
        DumpConfig(model="m", data_parallel_size=0)
    assert DumpConfig(model="m", engine="vllm", engine_arg=("a=1",)).engine_options.arguments == (
        ("a", 1),
    )


def test_a_failed_start_offers_only_what_can_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"model": str(tmp_path)}
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(100 * GB)  # a hole
    monkeypatch.setattr("dspark.dump.engines.vllm.launch.gpu_memory", lambda: 80 * GB)
    assert "--engine transformers" not in remedies(RuntimeError("CUDA out of memory"), told, 8)
    assert "more GPUs" in remedies(RuntimeError("CUDA out of memory"), told, 8)
    monkeypatch.setattr("dspark.dump.engines.vllm.launch.gpu_memory", lambda: 180 * GB)
    assert remedies(RuntimeError("what"), told, 1) == "--engine transformers does without vLLM."
    assert "--trust-remote-code" in remedies(ValueError("set trust_remote_code=True"), told, 8)


def test_gpus_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible_gpus(i, Split(4, 2, 2)) for i in range(4)] == ["0,1", "2,3", "4,5", "6,7"]
    assert [visible_gpus(i, Split(2, 1, 1, shared=True)) for i in range(2)] == ["0", "0"]
    assert visible_gpus(0, Split(2, 0, 1)) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b,GPU-c")
    assert [visible_gpus(i, Split(3, 1, 1)) for i in range(3)] == ["GPU-a", "GPU-b", "GPU-c"]


def test_an_engine_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark.dump.engines.vllm.requests.STEP_SECONDS", 0.2)
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=1))
    monkeypatch.setattr(
        "dspark.dump.engines.vllm.requests.importlib.import_module", lambda name: kinds
    )
    gate = threading.Event()
    core = SimpleNamespace(add_request=lambda *a: None, step=lambda: gate.wait(10) and [])
    loop: RequestLoop[int] = RequestLoop(SimpleNamespace(llm_engine=core), 100)
    loop.add(0, [1, 2], 2, SimpleNamespace())
    began = time.monotonic()
    with pytest.raises(
        EngineError, match="vllm hangs with 1 requests in flight: no answer for 0.2 s"
    ):
        loop.step()
    assert time.monotonic() - began < 5
    gate.set()


def test_an_error_in_the_thread_is_raised_where_it_was_called() -> None:
    patient = Patient()
    assert patient(lambda: 3, 5) == 3
    with pytest.raises(ZeroDivisionError):
        patient(lambda: 1 // 0, 5)
    patient.close()
