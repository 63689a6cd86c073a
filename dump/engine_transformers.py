"""The target in transformers: length-sorted batches, forward hooks on the layers that are wanted, no output head.

Padding is on the right, masked, and behind every real token of a causal model, with explicit position ids: a state does not depend on what it
was batched with (tests/dump/test_engine_transformers.py). Hooks keep only the wanted layers; the head, which costs as much as several layers at
a large vocabulary, never runs except in the self-check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from dspark.cache.errors import EngineError
from dspark.cache.frozen import FrozenTarget
from dspark.cache.records import TokenSample, last_rows
from dspark.dump.capture import Prediction, States
from dspark.dump.layers import Shapes
from dspark.dump.target import find_parts, frozen_target


class TransformersEngine:
    """``layers``: ids of decoder layers whose output is captured. ``batch_tokens``: padded tokens of a forward pass at most."""

    name = "transformers"
    version = transformers.__version__

    def __init__(
        self, model: Any, shapes: Shapes, layers: Sequence[int], *, device: str, batch_tokens: int
    ) -> None:
        self.model = model.to(device).eval()
        self.device = torch.device(device)
        self.layers = list(layers)
        self.batch_tokens = batch_tokens
        self.parts = find_parts(self.model, shapes)

    @classmethod
    def load(
        cls, model: str, shapes: Shapes, layers: Sequence[int], *, device: str, dtype: str, batch_tokens: int
    ) -> TransformersEngine:
        """Read the weights of a model id or folder."""
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
            return cls(loaded, shapes, layers, device=device, batch_tokens=batch_tokens)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise EngineError(f"transformers could not load {model} ({dtype}, {device}): {error}") from error

    def frozen(self) -> FrozenTarget:
        return frozen_target(self.parts)

    def capture(self, samples: Sequence[TokenSample]) -> Iterator[tuple[int, States]]:
        """States of each sample, batch by batch, shortest first."""
        kept: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                kept[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.parts.layers[i].register_forward_hook(keep(i)) for i in self.layers]
        try:
            for batch in batches([len(s.input_ids) for s in samples], self.batch_tokens):
                kept.clear()
                last = self._forward([samples[i] for i in batch])
                for row, i in enumerate(batch):
                    sample = samples[i]
                    n = len(sample.input_ids)
                    aux = torch.stack([kept[layer][row, :n] for layer in self.layers], dim=1)
                    stored = torch.from_numpy(last_rows(sample.loss_mask)).to(self.device)
                    yield i, States(aux, last[row, :n][stored])
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def _forward(self, batch: Sequence[TokenSample]) -> torch.Tensor:
        """The decoder over a right-padded batch -> its output after the final norm [b, S_max, H]."""
        lengths = torch.tensor([len(s.input_ids) for s in batch])
        width = int(lengths.max())
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        for row, sample in enumerate(batch):
            ids[row, : len(sample.input_ids)] = torch.from_numpy(sample.input_ids)
        positions = torch.arange(width).expand(len(batch), width)
        mask = (positions < lengths[:, None]).long()
        try:
            out = self.parts.decoder(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=positions.to(self.device),
                use_cache=False,
            )
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"out of memory at a batch of {len(batch)} x {width} tokens. Use a smaller --batch-tokens (now {self.batch_tokens}) or --seq-length."
            ) from error
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    @torch.inference_mode()
    def predict(self, samples: Sequence[TokenSample]) -> list[Prediction]:
        """Greedy tokens of the whole model, one sample at a time: no hooks, no padding, its own head."""
        out = []
        for sample in samples:
            ids = torch.from_numpy(sample.input_ids).long()[None].to(self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            best = logits.log_softmax(-1).max(-1)
            out.append(Prediction(best.indices.tolist(), best.values.tolist()))
        return out

    def close(self) -> None:
        """Nothing outlives the object."""


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in groups of near-equal length, each at most ``budget`` padded tokens (a longer sample goes alone). Ties keep their order."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and lengths[i] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
