"""Several engines behind the protocol of one: who gets what, in which order it comes out, and how
failures are told.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dspark.cache.codec import registry
from dspark.cache.errors import EngineError, UsageError
from dspark.cache.records import TokenSample
from dspark.dump.engines.answers import Answered, Ask, Sampling
from dspark.dump.engines.engine import Prediction, States
from dspark.dump.engines.vllm.launch import Split
from dspark.dump.engines.vllm.replicas import Failure, Replica, Replicas, pack, unpack, work
from dump_targets import samples

CODEC, SENT = registry.make("lossless"), registry.make("rotated-4-4")  # here, and to engines


class Fake:
    """An engine whose states are its tokens. ``seconds``: to a sample; ``off``: added to them."""

    def __init__(self, number: int, seconds: float = 0.0, off: float = 0.0) -> None:
        self.number, self.seconds, self.off = number, seconds, off
        self.most, self.forgot = 0, False

    def capture(self, data: Sequence[TokenSample]) -> Iterator[tuple[int, States]]:
        for i, sample in reversed(list(enumerate(data))):
            aux = (
                torch.from_numpy(sample.input_ids).float()[:, None, None].repeat(1, 2, 3) + self.off
            )
            yield i, States(aux.bfloat16(), aux[:1, 0])

    def predict(self, data: Sequence[TokenSample]) -> list[Prediction]:
        return [Prediction(s.input_ids.tolist(), [float(self.number)]) for s in data]

    def finished(self, groups: Iterable[Sequence[TokenSample]], codec: Any) -> Iterator[Any]:
        assert codec == SENT
        coming, held = enumerate(groups), list[tuple[int, list[tuple[int, int, TokenSample]]]]()
        ended = False
        while held or not ended:
            while len(held) < 2 and not ended:
                group, data = next(coming, (0, ()))
                ended = not data
                if data:
                    held.append((group, [(n, i, s) for n, (i, s) in enumerate(enumerate(data))]))
                    self.most = max(self.most, len(held))
            if held:
                group, members = held.pop(0)
                half = len(members) // 2
                for part in (members[:half], members[half:]):
                    if part:
                        time.sleep(self.seconds * len(part))
                        yield group, f"engine{self.number}", part

    def forget(self) -> None:
        self.forgot = True

    def answer(self, asks: Iterable[Ask], *_: Any) -> Iterator[Answered]:
        for ask in asks:
            if ask.key == 99:
                raise EngineError("the engine says no")
            yield Answered(ask, [ask.key], True, None)


def started(*engines: Fake) -> Replicas:
    """As many threads as there would be processes."""
    made = []
    for engine in engines:
        ours, theirs = multiprocessing.Pipe()

        def serve(engine: Fake = engine, theirs: Any = theirs) -> None:
            try:
                work(engine, theirs)  # type: ignore[arg-type]
            except EngineError as error:
                theirs.send(Failure(str(error)))
            theirs.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        process = SimpleNamespace(
            join=thread.join,
            is_alive=thread.is_alive,
            exitcode=-9,
            terminate=lambda: None,
            kill=lambda: None,
        )
        reader: Any = SimpleNamespace(coded=lambda *a: a, _spool=Path("/nowhere"))
        made.append(Replica(engine.number, process, ours, reader))
    return Replicas(made, None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark.dump.engines.vllm.replicas.on_host", {CODEC: SENT}.get)
    monkeypatch.setattr("dspark.dump.engines.vllm.replicas.engine_version", lambda name: "0")


def test_every_sample_comes_once_and_the_faster_engine_gets_more() -> None:
    engines = Fake(0, seconds=0.02), Fake(1, seconds=0.001)
    fleet = started(*engines)
    assert fleet.groups_at_once == 4
    groups = [samples([5, 9, 3, 7], seed=i) for i in range(12)]
    unfinished, most = dict[int, int](), 0

    def coming() -> Iterator[Sequence[TokenSample]]:
        nonlocal most
        for i, group in enumerate(groups):
            unfinished[i] = len(group)
            most = max(most, len(unfinished))
            yield group

    found: dict[tuple[int, int], str] = {}
    for captured in fleet.stream(coming(), CODEC):
        assert callable(captured.states)
        batch, wanted, codec = captured.states()  # type: ignore[misc]
        assert codec == CODEC
        assert batch == f"engine{captured.engine}"
        for i, member in zip(captured.members, wanted, strict=True):
            assert np.array_equal(member.ids, groups[captured.group][i].input_ids)
            assert (captured.group, i) not in found
            found[captured.group, i] = batch
        unfinished[captured.group] -= len(captured.members)
        if not unfinished[captured.group]:
            del unfinished[captured.group]
    assert len(found) == 48
    assert most <= fleet.groups_at_once
    by_engine = [sum(b == f"engine{n}" for b in found.values()) for n in range(2)]
    assert by_engine[1] > by_engine[0] > 0
    assert max(e.most for e in engines) == 2
    # And once more with the same engines.
    assert sum(len(c.members) for c in fleet.stream(iter(groups[:1]), CODEC)) == 4
    fleet.forget()
    assert all(e.forgot for e in engines)
    fleet.close()


def test_self_check_sees_every_engine() -> None:
    data = samples([5, 9, 3])
    fleet = started(Fake(0), Fake(1))
    states = dict(fleet.capture(data))
    for i, sample in enumerate(data):
        assert states[i].aux[:, 1, 2].tolist() == sample.input_ids.tolist()
        assert states[i].aux.dtype == torch.bfloat16
    found = fleet.predict(data)
    assert [p.ids for p in found] == [s.input_ids.tolist() for s in data]
    assert [p.logprobs[0] for p in found] == [0.0, 1.0, 0.0]
    fleet.close()
    fleet = started(Fake(0), Fake(1, off=200.0))
    with pytest.raises(
        EngineError,
        match="engines 0 and 1 return states that differ by .* Use --data-parallel-size 1",
    ):
        fleet.predict(data)
    fleet.close()


def test_answers_of_all_and_an_engine_s_own_error() -> None:
    asks = [Ask(i, [1] * (i + 1), 5, i, False) for i in range(7)]
    sampling: Any = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=5, thinking=None)
    fleet = started(Fake(0), Fake(1))
    assert sorted(a.ask.key for a in fleet.answer(asks, sampling, [2], CODEC)) == list(range(7))
    with pytest.raises(EngineError, match="vLLM engine . of 2: the engine says no"):
        list(fleet.answer([*asks, Ask(99, [1], 5, 0, False)], sampling, [2], CODEC))
    fleet.close()


def test_an_engine_that_dies_or_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = started(Fake(0))
    monkeypatch.setattr("dspark.dump.engines.vllm.replicas.SILENT_SECONDS", 0.2)
    with pytest.raises(EngineError, match="vLLM engine has not answered for 0.2 s: it hangs"):
        fleet._answer_of(fleet._replicas[0], 0.2)
    with pytest.raises(
        EngineError, match="none of 1 vLLM engines has answered for 0.2 s: they hang"
    ):
        fleet._next()
    fleet._replicas[0].pipe.send(("close",))
    with pytest.raises(
        EngineError, match="vLLM engine ended with code -9: it crashed, or was killed"
    ):
        fleet._next()
    fleet.close()


@pytest.mark.parametrize("shared", [False, True])
def test_engines_that_share_a_gpu_start_one_after_another(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """vLLM would count the memory that another one takes meanwhile as its own."""
    place, told = "dspark.dump.engines.vllm.replicas", list[str]()
    monkeypatch.setattr(f"{place}.checked", lambda *a: {})
    monkeypatch.setattr(f"{place}.read_frozen", lambda *a: (None, None))

    class Ready:
        def __init__(self, number: int) -> None:
            self.number = number

        def recv(self) -> str:
            told.append(f"{self.number} is ready")
            return "ready"

    def start(number: int, *_: Any) -> Replica:
        told.append(f"{number} starts")
        return Replica(number, None, Ready(number), None)  # type: ignore[arg-type]

    monkeypatch.setattr(Replica, "start", start)
    options = SimpleNamespace(trust_remote_code=False)
    run: Any = SimpleNamespace(model="", shapes=None, options=options, say=lambda line: None)
    fleet = Replicas.start(run, Split(2, 1, 1, shared=shared))
    assert fleet.groups_at_once == 4
    starts, ready = ["0 starts", "1 starts"], ["0 is ready", "1 is ready"]
    assert told == ([starts[0], ready[0], starts[1], ready[1]] if shared else starts + ready)


def test_an_argument_of_the_user_s_is_told_as_such() -> None:
    """From a single engine as if it ran in this process."""
    told = Failure("--engine-arg x: no", usage=True)
    pipe = SimpleNamespace(poll=lambda seconds: True, recv=lambda: told)
    replica = Replica(0, None, pipe, None)  # type: ignore[arg-type]
    for engines, who in ((1, ""), (2, "vLLM engine 0 of 2: ")):
        fleet = Replicas([replica] * engines, None)  # type: ignore[arg-type]
        with pytest.raises(UsageError) as error:
            fleet._answer_of(replica, None)
        assert str(error.value) == who + "--engine-arg x: no"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_through_a_pipe(dtype: torch.dtype) -> None:
    for shape in ((3, 2, 4), (0, 4)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(unpack(pack(x)), x)
