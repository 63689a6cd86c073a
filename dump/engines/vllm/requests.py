"""Requests in and out of a running vLLM engine: continuous batching stays full, what is in flight is bounded in tokens.

``LLM.generate`` returns when the last of its prompts is done, so each call ends with an emptying batch. Here new requests go in while others come out.
"""

from __future__ import annotations

import importlib
from itertools import count
from typing import Any, Generic, TypeVar

from dspark.cache.errors import EngineError

Key = TypeVar("Key")


class RequestLoop(Generic[Key]):
    """``budget``: tokens that may be in flight; a longer request goes alone."""

    def __init__(self, llm: Any, budget: int) -> None:
        self._engine = llm.llm_engine
        self._budget = budget
        self._names = (f"dspark-{n}" for n in count())
        self._open: dict[str, tuple[Key, int]] = {}
        self._tokens = 0

    @property
    def empty(self) -> bool:
        return not self._open

    def fits(self, tokens: int) -> bool:
        """Whether a request of so many tokens may go in now."""
        return not self._open or self._tokens + tokens <= self._budget

    def add(self, key: Key, prompt: list[int], tokens: int, params: Any) -> None:
        """Hand over a request of ``tokens`` tokens at most, answer included. ``params``: SamplingParams that nobody else uses."""
        kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        params.output_kind = kinds.FINAL_ONLY
        params.skip_clone = True  # a deep copy of them takes half of the time that adding a request does
        name = next(self._names)
        self._open[name] = (key, tokens)
        self._tokens += tokens
        self._guarded(self._engine.add_request, name, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[Key, Any]]:
        """Let the engine work; the requests that finished, with their outputs."""
        out = []
        for done in self._guarded(self._engine.step):
            if done.finished:
                key, tokens = self._open.pop(done.request_id)
                self._tokens -= tokens
                out.append((key, done))
        return out

    def _guarded(self, work: Any, *args: Any) -> Any:
        try:
            return work(*args)
        except Exception as error:  # a worker that died arrives as one of several kinds
            raise EngineError(
                f"vllm failed with {len(self._open)} requests in flight: {type(error).__name__}: {error}"
            ) from error
