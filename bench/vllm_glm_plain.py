"""vLLM's own states of a layer in between, and ours of the last alone: the fault that the
self-check must name.

Named in ``model_class_overrides`` by ``vllm_glm.py``. vLLM's class by itself leaves out the last
layer's state, so its engine dies before any check; with that one mended, what is left is one rank's
part.
"""

from __future__ import annotations

import functools
from typing import Any

from dspark.dump.engines.vllm import capture


class PlainButLast(capture.StatesAtNorms):
    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        decoder = capture.decoder_of(self)
        last = len(decoder.layers)
        decoder.aux_hidden_state_layers = tuple(i for i in layers if i < last)
        self._watch = capture.Watch(decoder, (last,))

    def forward(self, *args: Any, **options: Any) -> Any:
        out = super(capture.StatesAtNorms, self).forward(*args, **options)
        if self._watch is None:
            return out
        hidden, states = out
        return hidden, [*states, *self._watch.take(hidden.shape[0])]


@functools.cache
def __getattr__(architecture: str) -> Any:
    if architecture.startswith("_"):
        raise AttributeError(architecture)
    ours = getattr(capture, architecture)  # (StatesAtNorms, vLLM's own, ...)
    return type(ours.__name__, (PlainButLast, *ours.__bases__[1:]), {"__module__": ours.__module__})
