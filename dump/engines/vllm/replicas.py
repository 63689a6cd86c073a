"""Several vLLM engines of one target, each in its own process and on its own GPUs, behind the
protocol of a single engine; or a single one in a process of its own.

An engine gets the next whole group (a part of a store) as soon as it finishes one, so that none
waits for another. States stay in a spool per engine, as with a single one; only tokens and the
places of their states go through the pipes.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, NamedTuple

from dspark.cache.codec.registry import on_host
from dspark.cache.errors import DsparkError, EngineError, UsageError
from dspark.cache.shared.stopping import end_with_parent, leave_to_parent
from dspark.dump.engines.engine import GROUPS, Captured, EngineRun, Prediction, States
from dspark.dump.engines.registry import engine_version
from dspark.dump.engines.vllm.engine import Member, VllmEngine, checked
from dspark.dump.engines.vllm.launch import Split
from dspark.dump.engines.vllm.requests import STEP_SECONDS
from dspark.dump.target.weights import read_frozen

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Codec
    from dspark.cache.records import TokenSample
    from dspark.cache.target.frozen import FrozenTarget
    from dspark.dump.engines.answers import Answered, Ask, Sampling

SILENT_SECONDS = STEP_SECONDS + 60  # an engine that hangs says so itself before
STOP_SECONDS = 60
# Median relative difference of a token's state that two engines may have; another token's state is
# 1.4 away.
REPLICA_TOLERANCE = 0.1


class Packed(NamedTuple):
    """A tensor on its way through a pipe."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class Replica:
    """One engine's process. ``reader`` reads its spool in this process; it has no engine."""

    number: int
    process: Any
    pipe: Any
    reader: VllmEngine

    @classmethod
    def start(
        cls, number: int, run: EngineRun, split: Split, frozen: FrozenTarget, norm: torch.nn.Module
    ) -> Replica:
        """Start the process; its first message says that the engine is ready."""
        context = multiprocessing.get_context("spawn")
        spool = run.spool.with_name(f"{run.spool.name}.{number}")
        own = dataclasses.replace(run, spool=spool, say=_silent)
        ours, theirs = context.Pipe()
        given = (theirs, own, split, visible_gpus(number, split))
        process = context.Process(target=serve, args=given, daemon=False)
        process.start()
        theirs.close()
        reader = VllmEngine(None, run.shapes, run.layers, frozen, norm, own.spool, split.tensor)
        return cls(number, process, ours, reader)


class Replicas:
    """``replicas``: of the same target, in the same dtype and version."""

    name = "vllm"

    def __init__(
        self, replicas: Sequence[Replica], frozen: FrozenTarget, total: int | None = None
    ) -> None:
        self._replicas = list(replicas)
        self._frozen, self._total = frozen, total or len(replicas)  # once all have been started
        self.version = engine_version("vllm")

    @classmethod
    def start(cls, run: EngineRun, split: Split) -> Replicas:
        """Start all engines at once, or one after another if they share a GPU: vLLM counts what
        others take of it while it starts as its own. Raises the first error.
        """
        checked(run.model, run.options, split.gpus, run.say)  # once, not in every process
        frozen, norm = read_frozen(run.model, run.shapes, run.options.trust_remote_code)
        out = cls([], frozen, split.engines)
        waiting: list[Replica] = []
        try:
            for number in range(split.engines):
                one = Replica.start(number, run, split, frozen, norm)
                out._replicas.append(one)
                waiting.append(one)
                while waiting and (split.shared or number == split.engines - 1):
                    out._answer_of(waiting.pop(0), None)
        except BaseException:
            out.close()
            raise
        run.say(
            f"{split.engines} vLLM engines, {max(split.gpus, 1)} "
            f"{'GPU' if split.gpus else 'CPU'} each" + (", on the same one" if split.shared else "")
        )
        return out

    @property
    def groups_at_once(self) -> int:
        return GROUPS * len(self._replicas)

    def frozen(self) -> FrozenTarget:
        return self._frozen

    def capture(self, samples: Sequence[TokenSample]) -> Iterator[tuple[int, States]]:
        """Capture states; every engine takes every n-th sample."""
        shares = self._shares(samples)
        self._tell([("capture", share) for _, share in shares])
        for replica, (places, _) in zip(self._replicas, shares, strict=True):
            for i, aux, last in self._answer_of(replica, SILENT_SECONDS):
                yield places[i], States(unpack(aux), unpack(last))

    def predict(self, samples: Sequence[TokenSample]) -> list[Prediction]:
        """Predict with the engines that captured the samples; the states of the first sample must
        be the same in all.
        """
        self._tell([("capture", samples[:1])] * len(self._replicas))
        first, *others = [self._answer_of(r, SILENT_SECONDS)[0] for r in self._replicas]
        for number, other in enumerate(others, 1):
            same_on_replicas(unpack(first[1]), unpack(other[1]), number)
        shares = self._shares(samples)
        self._tell([("predict", share) for _, share in shares])
        out: dict[int, Prediction] = {}
        for replica, (places, _) in zip(self._replicas, shares, strict=True):
            out |= dict(zip(places, self._answer_of(replica, SILENT_SECONDS), strict=True))
        return [out[i] for i in range(len(samples))]

    def stream(self, groups: Iterable[Sequence[TokenSample]], codec: Codec) -> Iterator[Captured]:
        self._tell([("stream", on_host(codec))] * len(self._replicas))
        coming = enumerate(groups)
        left: dict[int, int] = {}  # samples of a group that are not out yet
        open_groups: dict[int, Sequence[TokenSample]] = {}
        held = [0] * len(self._replicas)
        owner: dict[int, int] = {}
        working, ended = set(range(len(self._replicas))), False
        while True:
            while not ended and min(held) < GROUPS:
                group, samples = next(coming, (0, ()))
                ended = not samples
                # at once: an engine that waits for another group does not process its last one
                if ended:
                    self._tell([None] * len(self._replicas))
                else:
                    number = held.index(min(held))
                    left[group], open_groups[group], owner[group] = len(samples), samples, number
                    held[number] += 1
                    self._replicas[number].pipe.send((group, samples))
            if not working:
                return
            replica, message = self._next(working)
            if message is None:
                working.remove(replica.number)
                continue
            group, batch, members = message
            samples = open_groups[group]
            wanted = [Member(n, samples[i].row, samples[i].input_ids) for n, i in members]
            left[group] -= len(members)
            if not left[group]:
                del left[group], open_groups[group]
                held[owner.pop(group)] -= 1
            states = partial(replica.reader.coded, batch, wanted, codec)
            yield Captured(group, [i for _, i in members], states, engine=replica.number)

    def answer(
        self, asks: Iterable[Ask], sampling: Sampling, stops: Sequence[int], codec: Codec
    ) -> Iterator[Answered]:
        """Answer the prompts; every engine takes every n-th one, longest first, so that they end
        together.
        """
        todo = sorted(asks, key=lambda ask: -len(ask.prompt))
        n, sent = len(self._replicas), on_host(codec)
        self._tell([("answer", todo[k::n], sampling, list(stops), sent) for k in range(n)])
        working = set(range(n))
        while working:
            replica, answered = self._next(working)
            if answered is None:
                working.remove(replica.number)
            else:
                yield answered

    def forget(self) -> None:
        """Empty all prefix caches, for measurements."""
        self._tell([("forget",)] * len(self._replicas))
        for replica in self._replicas:
            self._answer_of(replica, SILENT_SECONDS)

    def close(self) -> None:
        """End the engines and delete their spools."""
        for replica in self._replicas:
            try:
                replica.pipe.send(("close",))
            except OSError:
                continue
        for replica in self._replicas:
            replica.process.join(STOP_SECONDS)
            if replica.process.is_alive():
                replica.process.kill()  # SIGTERM is handled by us
            replica.pipe.close()
            shutil.rmtree(replica.reader._spool, ignore_errors=True)

    def _shares(self, samples: Sequence[TokenSample]) -> list[tuple[list[int], list[TokenSample]]]:
        n = len(self._replicas)
        return [(list(range(k, len(samples), n)), list(samples[k::n])) for k in range(n)]

    def _tell(self, messages: Sequence[Any]) -> None:
        for replica, message in zip(self._replicas, messages, strict=True):
            replica.pipe.send(message)

    def _next(self, among: Iterable[int] | None = None) -> tuple[Replica, Any]:
        """Return the next message of any engine (in ``among``)."""
        replicas = [r for r in self._replicas if among is None or r.number in among]
        ready = connection.wait([r.pipe for r in replicas], SILENT_SECONDS)
        if not ready:
            raise EngineError(
                f"none of {len(replicas)} vLLM engines has answered for "
                f"{SILENT_SECONDS:g} s: they hang. Committed parts are safe: continue "
                "with --resume."
            )
        replica = next(r for r in replicas if r.pipe in ready)
        return replica, self._answer_of(replica, None)

    def _answer_of(self, replica: Replica, seconds: float | None) -> Any:
        """Return one message; raises EngineError for an error in the engine, its death, or
        ``seconds`` of silence.
        """
        several = self._total > 1
        who = f"vLLM engine {replica.number} of {self._total}" if several else "vLLM engine"
        try:
            if seconds is not None and not replica.pipe.poll(seconds):
                raise EngineError(f"{who} has not answered for {seconds:g} s: it hangs.")
            message = replica.pipe.recv()
        except (EOFError, ConnectionError) as error:
            replica.process.join(5)
            raise EngineError(
                f"{who} ended with code {replica.process.exitcode}: it crashed, or was "
                "killed, as the kernel does when memory runs out. Committed parts are "
                "safe: continue with --resume."
            ) from error
        if isinstance(message, Failure):
            kind = UsageError if message.usage else EngineError
            raise kind(f"{who}: {message.reason}" if several else message.reason)
        return message


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an engine's process gives up; ``usage``: for an argument of the user's."""

    reason: str
    usage: bool = False


def visible_gpus(number: int, split: Split) -> str | None:
    """Return CUDA_VISIBLE_DEVICES for engine ``number``: its share of the visible GPUs; None on a
    CPU.
    """
    if not split.gpus:
        return None
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    first = 0 if split.shared else number * split.gpus
    mine = range(first, first + split.gpus)
    return ",".join(names[i].strip() if names != [""] else str(i) for i in mine)


def same_on_replicas(first: torch.Tensor, other: torch.Tensor, number: int) -> None:
    """Check that two engines' states [T, L, H] of one sample are the same except for rounding."""
    gap = (first.float() - other.float()).norm(dim=-1) / first.float().norm(dim=-1).clamp(min=1e-6)
    by_layer = gap.median(dim=0).values
    if float(by_layer.max()) > REPLICA_TOLERANCE:
        raise EngineError(
            f"self-check of the vllm engine failed: engines 0 and {number} return states "
            f"that differ by {float(by_layer.max()):.2g} of their size in layer "
            f"{int(by_layer.argmax())} of the requested ones. Nothing was written. Use "
            "--data-parallel-size 1."
        )


def serve(pipe: Any, run: EngineRun, split: Split, gpus: str | None) -> None:
    """Run an engine's process: start it, then process messages from ``pipe``."""
    leave_to_parent()
    end_with_parent()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    try:
        engine = VllmEngine.load(
            run.model,
            run.shapes,
            run.layers,
            dtype=run.dtype,
            seq_length=run.seq_length,
            spool=run.spool,
            batch_tokens=run.batch_tokens,
            options=run.options,
            split=split,
            say=run.say,
        )
    except (DsparkError, OSError) as error:
        pipe.send(Failure(str(error), isinstance(error, UsageError)))
        return
    pipe.send("ready")
    try:
        work(engine, pipe)
    except EOFError:
        pass  # the parent is gone
    except Exception as error:
        pipe.send(
            Failure(
                str(error) if isinstance(error, DsparkError) else f"{type(error).__name__}: {error}"
            )
        )
    finally:
        engine.close()


def work(engine: VllmEngine, pipe: Any) -> None:
    """Process messages of ``Replicas`` until ``close``."""
    while True:
        task, *given = pipe.recv()
        if task == "close":
            return
        if task == "capture":
            found = [(i, pack(s.aux), pack(s.last)) for i, s in engine.capture(given[0])]
            pipe.send(found)
        elif task == "predict":
            pipe.send(engine.predict(given[0]) if given[0] else [])
        elif task == "stream":
            numbers: list[int] = []
            for group, batch, members in engine.finished(_groups(pipe, numbers), given[0]):
                pipe.send((numbers[group], batch, [(n, i) for n, i, _ in members]))
            pipe.send(None)
        elif task == "forget":
            engine.forget()
            pipe.send(None)
        elif task == "answer":
            for answered in engine.answer(*given):
                pipe.send(answered)
            pipe.send(None)


def _groups(pipe: Any, numbers: list[int]) -> Iterator[Sequence[TokenSample]]:
    """Yield groups as they arrive; ``numbers`` receives the parent's numbers for them."""
    ahead: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:  # at once, so that the parent never waits for this engine to accept one
        message = object()
        while message is not None:
            try:
                message = pipe.recv()
            except EOFError:
                message = None
            ahead.put(message)

    threading.Thread(target=read, daemon=True).start()
    while (message := ahead.get()) is not None:
        number, samples = message
        numbers.append(number)
        yield samples


def _silent(line: str) -> None:
    """Suppress what an engine says, since the first process says it once."""


def pack(tensor: torch.Tensor) -> Packed:
    import torch

    flat = tensor.cpu().contiguous().view(-1)
    return Packed(
        flat.view(torch.uint8).numpy().tobytes(), str(flat.dtype)[6:], tuple(tensor.shape)
    )


def unpack(packed: Packed) -> torch.Tensor:
    import torch

    kind = getattr(torch, packed.dtype)
    if not packed.data:
        return torch.empty(packed.shape, dtype=kind)
    return torch.frombuffer(bytearray(packed.data), dtype=kind).view(packed.shape)
