"""Feed requests to a running vLLM engine so that continuous batching stays full; the number of
tokens in flight is bounded. ``LLM.generate`` returns when the last of its prompts is done, so each
call ends with a shrinking batch. Here new requests go in while others come out.
"""

from __future__ import annotations

import importlib
import queue
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any, Generic, TypeVar, cast

from dspark.cache.errors import EngineError

Key = TypeVar("Key")
T = TypeVar("T")
STEP_SECONDS = 900.0  # a step may compile kernels; if it takes longer, the engine hangs


class Patient:
    """Makes calls in its own thread and waits for them with a time limit, since vLLM waits forever
    for a worker that hangs.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="vllm-step", daemon=True).start()

    def __call__(self, work: Callable[[], T], seconds: float) -> T:
        """Return or raise what ``work()`` does; raises TimeoutError after ``seconds``, and then
        abandons the thread.
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
    """``budget``: maximum tokens in flight; a longer request goes alone. ``adding`` and
    ``stepping``: seconds spent so far on adding requests, and in steps of the engine, which mostly
    are waiting for it.
    """

    def __init__(self, llm: Any, budget: int) -> None:
        self._engine = llm.llm_engine
        self._patient = Patient()
        kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        self._only_final = kinds.FINAL_ONLY
        self._budget = budget
        self._names = (f"dspark-{n}" for n in count())
        self._open: dict[str, tuple[Key, int]] = {}
        self._tokens = 0
        self.adding = self.stepping = 0.0

    @property
    def empty(self) -> bool:
        return not self._open

    def close(self) -> None:
        """End its thread."""
        self._patient.close()

    def fits(self, tokens: int) -> bool:
        """Tell whether a request of so many tokens may be added now."""
        return not self._open or self._tokens + tokens <= self._budget

    def add(self, key: Key, prompt: list[int], tokens: int, params: Any) -> None:
        """Add a request of at most ``tokens`` tokens, including the answer. ``params``:
        SamplingParams that no other request uses.
        """
        params.output_kind = self._only_final
        # a deep copy of them would take half the time of adding a request
        params.skip_clone = True
        name = next(self._names)
        self._open[name] = (key, tokens)
        self._tokens += tokens
        began = time.perf_counter()
        # As vLLM's renderer returns token ids: it need not run, which took half of the time.
        rendered = {"type": "token", "prompt_token_ids": prompt}
        self._guarded(self._engine.add_request, name, rendered, params)
        self.adding += time.perf_counter() - began

    def step(self) -> list[tuple[Key, Any]]:
        """Run an engine step; returns the finished requests with their outputs. Raises EngineError
        if the engine failed or returned nothing for STEP_SECONDS.
        """
        out, began = [], time.perf_counter()
        finished = self._guarded(self._patient, self._engine.step, STEP_SECONDS)
        self.stepping += time.perf_counter() - began
        for done in finished:
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
                f"vllm hangs with {len(self._open)} requests in flight: {error}. "
                "Committed parts are safe: continue with --resume. If it hangs again, "
                "check the GPUs (nvidia-smi, dmesg), or try a smaller --batch-tokens."
            ) from error
        except Exception as error:  # a dead worker shows up as one of several errors
            raise EngineError(
                f"vllm failed with {len(self._open)} requests in flight: {type(error).__name__}: "
                f"{error}"
            ) from error
