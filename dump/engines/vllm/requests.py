"""Requests in and out of a running vLLM engine: continuous batching stays full, what is in flight
is bounded in tokens.

``LLM.generate`` returns when the last of its prompts is done, so each call ends with an emptying
batch. Here new requests go in while others come out.
"""

from __future__ import annotations

import importlib
import queue
import threading
from collections.abc import Callable
from itertools import count
from typing import Any, Generic, TypeVar, cast

from dspark.cache.errors import EngineError

Key = TypeVar("Key")
T = TypeVar("T")
STEP_SECONDS = 900.0  # a step may compile kernels; longer, and the engine hangs


class Patient:
    """Calls in a thread of its own, waited for with a limit: vLLM waits for a worker that hangs
    without one.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="vllm-step", daemon=True).start()

    def __call__(self, work: Callable[[], T], seconds: float) -> T:
        """What ``work()`` returns or raises; raises TimeoutError after ``seconds``, and the thread
        is lost then.
        """
        self._calls.put(work)
        try:
            out, error = self._done.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no answer for {seconds:g} s") from None
        if error is not None:
            raise error
        return cast("T", out)

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            try:
                self._done.put((work(), None))
            except BaseException as error:  # raised where the call was made
                self._done.put((None, error))

    def close(self) -> None:
        self._calls.put(None)


class RequestLoop(Generic[Key]):
    """``budget``: tokens that may be in flight; a longer request goes alone."""

    def __init__(self, llm: Any, budget: int) -> None:
        self._engine = llm.llm_engine
        self._patient = Patient()
        kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        self._only_final = kinds.FINAL_ONLY
        self._budget = budget
        self._names = (f"dspark-{n}" for n in count())
        self._open: dict[str, tuple[Key, int]] = {}
        self._tokens = 0

    @property
    def empty(self) -> bool:
        return not self._open

    def close(self) -> None:
        """End its thread."""
        self._patient.close()

    def fits(self, tokens: int) -> bool:
        """Whether a request of so many tokens may go in now."""
        return not self._open or self._tokens + tokens <= self._budget

    def add(self, key: Key, prompt: list[int], tokens: int, params: Any) -> None:
        """Hand over a request of ``tokens`` tokens at most, answer included. ``params``:
        SamplingParams that nobody else uses.
        """
        params.output_kind = self._only_final
        # a deep copy of them takes half of the time that adding a request does
        params.skip_clone = True
        name = next(self._names)
        self._open[name] = (key, tokens)
        self._tokens += tokens
        self._guarded(self._engine.add_request, name, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[Key, Any]]:
        """Let the engine work; the requests that finished, with their outputs.

        Raises EngineError where it failed, or gave nothing for STEP_SECONDS.
        """
        out = []
        for done in self._guarded(self._patient, self._engine.step, STEP_SECONDS):
            if done.finished:
                key, tokens = self._open.pop(done.request_id)
                self._tokens -= tokens
                out.append((key, done))
        return out

    def _guarded(self, work: Any, *args: Any) -> Any:
        try:
            return work(*args)
        except TimeoutError as error:
            raise EngineError(
                f"vllm hangs with {len(self._open)} requests in flight: {error}. What is "
                "committed is whole: --resume goes on. "
                "If it hangs again, look at the GPUs (nvidia-smi, dmesg), or try a smaller "
                "--batch-tokens."
            ) from error
        except Exception as error:  # a worker that died arrives as one of several kinds
            raise EngineError(
                f"vllm failed with {len(self._open)} requests in flight: {type(error).__name__}: "
                f"{error}"
            ) from error
