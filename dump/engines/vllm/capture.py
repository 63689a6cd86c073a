"""Take a target's states at its norms, inside vLLM, where its own class cannot return them.

vLLM adds a layer's output to the residual in the *next* layer's input norm, and where it fuses the
all-reduce into that norm, what stands between two layers is one tensor-parallel rank's part. After
the norm the residual is complete, whatever was fused. So the state entering layer j is the residual
that layer j's ``input_layernorm`` returns, and the state after the last layer is the one that the
final ``norm`` returns. No layer's output is looked at.

Named in ``model_class_overrides`` as ``dspark.dump.engines.vllm.capture:ARCHITECTURE``: vLLM then
builds its own class for that architecture, extended by ``StatesAtNorms``. Runs in vLLM's workers,
and once in a process that queries what the class can do.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dspark.cache.errors import EngineError

MODULE = __name__
TOLD = "_dspark_state"  # attribute of a norm: the object that keeps the residual after it


class Watch:
    """The states entering layers ``ids`` of ``decoder`` (its number of layers = after the last
    one), kept from one run.

    ``decoder`` has ``layers``, each with an ``input_layernorm``, and a ``norm``; ids of layers that
    another pipeline rank holds are refused.
    """

    def __init__(self, decoder: Any, ids: Sequence[int]) -> None:
        self.ids = sorted(set(ids))
        self._seen: dict[int, torch.Tensor] = {}
        for i in self.ids:
            norm = _norm_before(decoder, i)
            note = functools.partial(self._note, i)
            setattr(norm, TOLD, note)
            norm.register_forward_hook(functools.partial(_behind_norm, note), with_kwargs=True)
        for module in {type(m).__module__ for m in (decoder, *decoder.layers)}:
            _tell_of_fused(sys.modules[module])

    def _note(self, i: int, state: torch.Tensor) -> None:
        # A copy, since the next norm adds to the residual in place.
        self._seen[i] = state.clone()

    def take(self, tokens: int) -> list[torch.Tensor]:
        """Return the states [tokens, H] of the run that just ended, by ascending id, each once. If
        each rank holds a share of the tokens, they are gathered first.
        """
        missing = [i for i in self.ids if i not in self._seen]
        if missing:
            raise EngineError(
                f"the target skipped the norms before layers {missing}, so their states "
                "were not captured. Use --engine transformers."
            )
        states = [self._seen.pop(i) for i in self.ids]
        if states[0].shape[0] == tokens:
            return states
        gather = importlib.import_module("vllm.distributed").tensor_model_parallel_all_gather
        return [gather(state, 0)[:tokens] for state in states]


def _norm_before(decoder: Any, i: int) -> Any:
    layers = decoder.layers
    norm = decoder.norm if i == len(layers) else getattr(layers[i], "input_layernorm", None)
    if norm is None or type(norm).__name__ == "PPMissingLayer":
        raise EngineError(
            f"the state entering layer {i} cannot be captured: this rank has no norm "
            "before it. Omit --engine-arg pipeline_parallel_size, or use --engine "
            "transformers."
        )
    return norm


def _behind_norm(
    note: Callable[[torch.Tensor], None], norm: Any, args: Any, options: dict[str, Any], output: Any
) -> None:
    """Find the state in a norm's call: ``norm(x)`` leaves it as the input; ``norm(x, residual)``
    returns it after the normed value.
    """
    note(output[1] if isinstance(output, tuple) else args[0] if args else options["x"])


def _tell_of_fused(module: Any) -> None:
    """Report what fused all-reduce and norm return, since they do not always call the norm."""
    for name, fused in list(vars(module).items()):
        wanted = name.startswith("fused_allreduce") and name.endswith("norm") and callable(fused)
        if not wanted or hasattr(fused, TOLD):
            continue
        setattr(module, name, _telling(fused))


def _telling(fused: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fused)
    def call(
        hidden: torch.Tensor, residual: torch.Tensor, norm: Any, *args: Any, **options: Any
    ) -> Any:
        out = fused(hidden, residual, norm, *args, **options)
        note = getattr(norm, TOLD, None)
        if note is not None:
            note(out[1])
        return out

    setattr(call, TOLD, True)
    return call


class StatesAtNorms:
    """Mixed into a vLLM class for a target: its forward also returns states, as vLLM requires of a
    class that supports EAGLE3.
    """

    supports_eagle3 = True
    _watch: Watch | None = None

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        decoder = decoder_of(self)
        if not getattr(decoder, "do_not_compile", True):
            raise EngineError(
                f"{type(self).__name__} is compiled, but its states can be captured only "
                "uncompiled: run vLLM eagerly."
            )
        self._watch = Watch(decoder, layers)

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, ...]:
        return (len(decoder_of(self).layers),)

    def forward(self, *args: Any, **options: Any) -> Any:
        out = super().forward(*args, **options)  # type: ignore[misc]
        if self._watch is None:
            return out
        return out, self._watch.take(out.shape[0])


def decoder_of(model: Any) -> Any:
    """The module with the layers and the final norm."""
    if hasattr(model, "get_language_model"):
        model = model.get_language_model()
    elif hasattr(model, "language_model"):
        model = model.language_model
    return getattr(model, "model", model)


@functools.cache
def __getattr__(architecture: str) -> Any:
    """vLLM's class for ``architecture``, extended."""
    if architecture.startswith("_"):
        raise AttributeError(architecture)
    registry = importlib.import_module("vllm.model_executor.models.registry")
    if architecture not in registry._VLLM_MODELS:
        raise AttributeError(f"vLLM has no architecture {architecture}")
    relative, name = registry._VLLM_MODELS[architecture]
    own = getattr(importlib.import_module(registry._resolve_module_name(relative)), name)
    return extended(own)


def extended(own: type) -> type:
    """``own`` with ``StatesAtNorms`` before it, under its own name."""
    interface = importlib.import_module("vllm.model_executor.models.interfaces").SupportsEagle3
    behind = () if interface in own.__mro__ else (interface,)
    return type(own.__name__, (StatesAtNorms, own, *behind), {"__module__": own.__module__})
