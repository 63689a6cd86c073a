"""The target while decoding: steps that return logits and aux states, and rollback of rejected
tokens.

Legend: n new tokens, V vocabulary, L aux layers, H hidden size. Layer id ``i`` is the output of
decoder layer i (0-based), -1 what enters layer 0. States are taken by hooks, not from
``output_hidden_states``: that tuple keeps every layer, and its last entry is normed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from dspark.cache.errors import EngineError
from dspark.cache.shared.process import (
    choose_device,
    make_current,
    no_plan_a_shape,
    quiet_transformers,
)
from dspark.cache.target.frozen import FrozenTarget
from dspark.dump.target import loading
from dspark.dump.target.config import shapes_of, text_json
from dspark.dump.target.weights import find_parts, frozen_target


class DecodingTarget:
    """A transformers causal LM with its KV cache, for one sequence at a time. A context manager
    that removes its hooks at the end.
    """

    def __init__(self, model: Any, layer_ids: Sequence[int], *, decodes: bool = True) -> None:
        """``decodes`` False: only ``whole`` is called, which any decoder supports. Raises
        EngineError for layers whose cache cannot be cropped.
        """
        if decodes:
            refuse_uncroppable(model.config.get_text_config())
        self.model = model
        self.layer_ids = tuple(layer_ids)
        self._parts = find_parts(model, shapes_of(text_json(model.config), type(model).__name__))
        self._cache: Any = None
        self._cache_name = cache_name(model)
        self._seen: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        layers = self._parts.layers
        for i in self.layer_ids:
            if i < 0:
                self._hooks.append(
                    layers[0].register_forward_pre_hook(self._entering, with_kwargs=True)
                )
            else:
                self._hooks.append(layers[i].register_forward_hook(self._leaving(i)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _entering(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen[-1] = args[0] if args else kwargs["hidden_states"]

    def _leaving(self, i: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            self._seen[i] = output if isinstance(output, Tensor) else output[0]

        return keep

    @property
    def frozen(self) -> FrozenTarget:
        """Return what a draft borrows, sharing the model's memory."""
        return frozen_target(self._parts)

    def start(self) -> None:
        """Forget the sequence."""
        from transformers import DynamicCache

        # Without a config every layer keeps all keys, also a sliding one (the mask still slides):
        # only such a layer can be cropped.
        self._cache = DynamicCache()

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return int(self._cache.get_seq_length())

    @torch.inference_mode()
    def step(self, ids: Sequence[int], *, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """Run ``ids`` after the cached ones: logits fp32 [n, V] ([1, V] if ``last_only``), aux [n,
        L, H].
        """
        more = {"use_cache": True, self._cache_name: self._cache}
        return self._run(ids, logits_to_keep=1 if last_only else 0, **more)

    @torch.inference_mode()
    def whole(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run the sequence ``ids`` at once, without a cache: logits fp32 [n, V], aux [n, L, H]."""
        return self._run(ids, use_cache=False)

    def _run(self, ids: Sequence[int], **settings: Any) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([list(ids)], device=self.model.get_input_embeddings().weight.device)
        output = self.model(input_ids=tokens, **settings)
        aux = [self._seen.pop(i)[0] for i in self.layer_ids]
        return output.logits[0].float(), torch.stack([a.to(aux[0].device) for a in aux], dim=1)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        # Negative: how many to drop. Transformers deprecates the positive form, and 0 would drop
        # everything.
        if length < self.length:
            self._cache.crop(length - self.length)


# Layers that keep keys and values by position, or nothing; any other carries a state that cannot be
# taken back.
CROPPABLE = {"full_attention", "sliding_attention", "attention", "mlp", "moe"}


def refuse_uncroppable(config: Any) -> None:
    """Raise EngineError for a text config with layers that cannot forget their last tokens."""
    kinds = {
        str(kind)
        for name in ("layer_types", "layers_block_type")
        for kind in getattr(config, name, None) or []
    }
    if kinds - CROPPABLE:
        raise EngineError(
            f"the target has layers of type {sorted(kinds)}, but rejected tokens can be rolled "
            "back only in attention layers: use --engine vllm"
        )


def cache_name(model: Any) -> str:
    """Return what ``model`` calls the argument for its KV cache: ``cache``, or ``past_key_values``
    before transformers 5.24.
    """
    named = inspect.signature(model.forward).parameters
    return "cache" if "cache" in named else "past_key_values"


def load_model(model: str, device: str = "auto", dtype: str = "auto") -> Any:
    """Load the target in transformers; ``auto``: a GPU if there is one, and float32 on a CPU, else
    the checkpoint's dtype.
    """
    chosen = choose_device(device)
    no_plan_a_shape()
    quiet_transformers()
    wanted = "float32" if dtype == "auto" and chosen.type == "cpu" else dtype
    make_current(chosen)
    return loading.load_model(model, device=str(chosen), dtype=wanted)


def greedy_alone(
    model: Any, prompt: Sequence[int], *, max_tokens: int, stop_ids: Sequence[int] = ()
) -> list[int]:
    """Generate without a draft: transformers' own greedy search, only new tokens, including the
    stop token. Every setting in a model's generation_config that is not plain greedy (sampling,
    penalties) is overridden.
    """
    from transformers import GenerationConfig

    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([list(prompt)], device=device)
    pad = stop_ids[0] if stop_ids else 0
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    saved, model.generation_config = model.generation_config, config
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        model.generation_config = saved
    return [int(t) for t in out[0, ids.shape[1] :]]
