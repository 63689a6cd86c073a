"""The target in transformers: length-sorted batches, forward hooks on the requested layers, no
output head.

Padding is on the right, behind every real token of a causal model, so no real token ever attends to
it and no mask is needed: attention takes the kernel for plain causal attention, which is several
times faster than one with a mask. A state does not depend on what it was batched with
(tests/dump/test_engine_transformers.py). Hooks keep only the wanted rows of the wanted layers; the
head, which costs as much as several layers at a large vocabulary, never runs except in the
self-check. Nothing here waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import masking_utils

from dspark.cache.codec.base import Tokens, to_numpy
from dspark.cache.codec.state_errors import StateError
from dspark.cache.errors import EngineError
from dspark.cache.records import Int64, TokenSample, joined_last_rows, last_rows
from dspark.cache.shared.process import no_plan_a_shape, quiet_transformers, send
from dspark.cache.target.frozen import FrozenTarget
from dspark.dump.engines.answers import Answered, Ask, Sampling, repeat_last, stored_runs
from dspark.dump.engines.engine import (
    GROUPS,
    Captured,
    CodedStates,
    EngineRun,
    Prediction,
    States,
)
from dspark.dump.target.layers import Shapes
from dspark.dump.target.loading import load_model
from dspark.dump.target.weights import are_plain, find_parts, frozen_target, read_frozen

if TYPE_CHECKING:
    from dspark.cache.codec.base import Codec

# Tokens x hidden size of a batch that fills a GPU: 65,536 tokens of a model with 576 channels.
BATCH_VALUES = 1 << 25
BATCH_TOKENS = (16384, 65536)
CPU_BATCH_TOKENS = 2048


class TransformersEngine:
    """``layers``: ids of decoder layers whose output is captured. ``batch_tokens``: maximum padded
    tokens per forward pass. A model spread over devices (``hf_device_map``) stays where it is; its
    states are gathered on the embedding's device. ``source``: the checkpoint, from which frozen
    weights are read if the loaded ones are quantised.
    """

    name = "transformers"
    groups_at_once = GROUPS
    version = transformers.__version__

    def __init__(
        self,
        model: Any,
        shapes: Shapes,
        layers: Sequence[int],
        *,
        device: str,
        batch_tokens: int,
        source: str | None = None,
    ) -> None:
        placed = getattr(model, "hf_device_map", None)
        self.model = (model if placed else model.to(device)).eval()
        self.device = torch.device(device)
        self.layers = list(layers)
        self.batch_tokens = batch_tokens
        self.shapes, self.source = shapes, source
        self.parts = find_parts(self.model, shapes)

    @classmethod
    def load(
        cls,
        model: str,
        shapes: Shapes,
        layers: Sequence[int],
        *,
        device: str,
        dtype: str,
        batch_tokens: int,
        trust_remote_code: bool = False,
        device_map: Any = None,
        offload: Path | None = None,
    ) -> TransformersEngine:
        """Read the weights of a model id or folder. ``device_map``, ``offload``: as ``load_model``
        takes them.
        """
        no_plan_a_shape()
        quiet_transformers()
        loaded = load_model(
            model,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            offload=offload,
        )
        return cls(loaded, shapes, layers, device=device, batch_tokens=batch_tokens, source=model)

    def frozen(self) -> FrozenTarget:
        if are_plain(self.parts) or self.source is None:
            return frozen_target(self.parts).to(self.device)
        return read_frozen(self.source, self.shapes)[0].to(self.device)

    def capture(self, samples: Sequence[TokenSample]) -> Iterator[tuple[int, States]]:
        """States of each sample, batch by batch, shortest first."""
        for batch in self._run(0, samples):
            assert isinstance(batch.states, States)
            rows = [samples[i] for i in batch.members]
            aux = torch.split(batch.states.aux, [len(s.input_ids) for s in rows])
            last = torch.split(batch.states.last, [int(last_rows(s.loss_mask).sum()) for s in rows])
            yield from ((i, States(a, b)) for i, a, b in zip(batch.members, aux, last, strict=True))

    def stream(self, groups: Iterable[Sequence[TokenSample]], codec: Codec) -> Iterator[Captured]:
        """Stream batches that stay within a group, so that a group's states do not depend on the
        groups before it.
        """
        for group, samples in enumerate(groups):
            yield from self._run(group, samples)

    def _run(self, group: int, samples: Sequence[TokenSample]) -> Iterator[Captured]:
        for members in batches([len(s.input_ids) for s in samples], self.batch_tokens):
            states = self._states([samples[i] for i in members])
            ready = None
            if self.device.type == "cuda":
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
            yield Captured(group, members, states, ready)

    @torch.inference_mode()
    def _states(self, batch: Sequence[TokenSample]) -> States:
        """Compute the states of a batch without padding: aux [T, L, H] of all its tokens, last [M,
        H].
        """
        places, width, start = padded(batch)
        stored = joined_last_rows(np.concatenate([s.loss_mask for s in batch]), start)
        whole = len(places) == len(batch) * width
        rows = None if whole else send(places, self.device)
        wanted = send(places[stored], self.device)
        aux: list[torch.Tensor] = [torch.empty(0)] * len(self.layers)

        def keep(at: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                x = (
                    (output[0] if isinstance(output, tuple) else output)
                    .flatten(0, 1)
                    .to(self.device)
                )
                aux[at] = x if rows is None else x.index_select(0, rows)

            return hook

        handles = [
            self.parts.layers[i].register_forward_hook(keep(k)) for k, i in enumerate(self.layers)
        ]
        try:
            with self._enough_memory(len(batch), width, "--seq-length"):
                last = self.forward(batch).flatten(0, 1).index_select(0, wanted)
                return States(torch.stack(aux, dim=1), last)
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def forward(self, batch: Sequence[TokenSample]) -> torch.Tensor:
        """Run the decoder over a right-padded batch; returns its output after the final norm [b,
        S_max, H].
        """
        places, width, _ = padded(batch)
        ids = np.zeros(len(batch) * width, dtype=np.int64)
        ids[places] = np.concatenate([s.input_ids for s in batch])
        with never_packed():
            sent = send(ids, self.device).view(len(batch), width)
            out = self.parts.decoder(input_ids=sent, use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden.to(self.device)

    @contextmanager
    def _enough_memory(self, rows: int, width: int, length: str) -> Iterator[None]:
        """Turn running out of memory into an EngineError; ``length`` is the flag that bounds
        ``width``.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"out of memory at a batch of {rows} x {width} tokens. Use a smaller "
                f"--batch-tokens (now {self.batch_tokens}; it may change with --resume), "
                f"or a smaller {length}, which needs a new store."
            ) from error

    @torch.inference_mode()
    def answer(
        self, asks: Iterable[Ask], sampling: Sampling, stops: Sequence[int], codec: Codec
    ) -> Iterator[Answered]:
        """Yield sampled answers batch by batch, with the states of the run that made them if
        ``keep`` is set.
        """
        todo = list(asks)
        for members in batches([len(a.prompt) + a.max_tokens for a in todo], self.batch_tokens):
            yield from self._answer([todo[i] for i in members], sampling, stops, codec)

    def _answer(
        self, asks: Sequence[Ask], sampling: Sampling, stops: Sequence[int], codec: Codec
    ) -> Iterator[Answered]:
        """One batch, padded on the left. Hooks see the prompts once and then one token per step:
        every token but an answer's last.
        """
        width = max(len(a.prompt) for a in asks)
        ids = np.zeros((len(asks), width), dtype=np.int64)
        real = np.zeros_like(ids)
        for row, ask in enumerate(asks):
            ids[row, width - len(ask.prompt) :] = ask.prompt
            real[row, width - len(ask.prompt) :] = 1
        seen: list[list[torch.Tensor]] = [[] for _ in range(len(self.layers) + 1)]

        def keep(at: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                seen[at].append(
                    (output[0] if isinstance(output, tuple) else output).to(self.device)
                )

            return hook

        watched = [*(self.parts.layers[i] for i in self.layers), self.parts.norm]
        handles = [module.register_forward_hook(keep(k)) for k, module in enumerate(watched)]
        chances = (
            {}
            if sampling.greedy
            else {"temperature": sampling.temperature, "top_p": sampling.top_p}
        )
        longest = max(a.max_tokens for a in asks)
        settings = transformers.GenerationConfig(
            do_sample=not sampling.greedy,
            top_k=None if sampling.greedy else sampling.top_k,
            max_new_tokens=longest,
            eos_token_id=list(stops) or None,
            pad_token_id=0,
            **chances,
        )
        torch.manual_seed(asks[0].seed)
        try:
            with self._enough_memory(len(asks), width + longest, "--max-tokens"):
                whole = self.model.generate(
                    input_ids=send(ids, self.device),
                    attention_mask=send(real, self.device),
                    generation_config=settings,
                )
                aux = torch.stack([torch.cat(x, dim=1) for x in seen[:-1]], dim=2)
                last = torch.cat(seen[-1], dim=1)
        finally:
            for handle in handles:
                handle.remove()
        for row, (ask, new) in enumerate(zip(asks, whole[:, width:].tolist(), strict=True)):
            ends = [i for i, token in enumerate(new[: ask.max_tokens]) if token in stops]
            answer = new[: ends[0] + 1] if ends else new[: ask.max_tokens]
            states = None
            if ask.keep:
                here = slice(width - len(ask.prompt), width + len(answer) - 1)
                try:
                    states = self._coded(aux[row, here], last[row, here], ask, answer, codec)
                except StateError as error:
                    error.conversation = ask.key
                    raise
            yield Answered(ask, answer, bool(ends), states)

    def _coded(
        self, aux: torch.Tensor, last: torch.Tensor, ask: Ask, answer: list[int], codec: Codec
    ) -> CodedStates:
        """``aux[S - 1, L, H]`` and ``last[S - 1, H]`` of one answer, as the codec stores them, on
        the host.
        """
        runs = stored_runs(ask)
        rows = torch.cat([last[a:b] for a, b in runs])
        tokens = None
        if codec.needs_tokens:
            at = torch.arange(len(last), device=last.device)
            tokens = Tokens(
                torch.tensor([*ask.prompt, *answer[:-1]], device=last.device),
                torch.tensor([0, len(aux)], device=last.device),
                torch.cat([at[a:b] for a, b in runs]),
                self.frozen().embed_tokens.to(last.device),
            )
        specs = codec.arrays(*aux.shape[1:])
        return CodedStates(repeat_last(to_numpy(codec.encode(aux, rows, tokens)), specs))

    @torch.inference_mode()
    def predict(self, samples: Sequence[TokenSample]) -> list[Prediction]:
        """Predict greedy tokens with the whole model, one sample at a time: no hooks, no padding,
        its own head.
        """
        out = []
        for sample in samples:
            ids = torch.from_numpy(sample.input_ids).long()[None].to(self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            best = logits.log_softmax(-1).max(-1)
            out.append(Prediction(best.indices.tolist(), best.values.tolist()))
        return out

    def close(self) -> None:
        """Do nothing: nothing outlives the object."""


def start(run: EngineRun) -> TransformersEngine:
    """The registry's entry."""
    return TransformersEngine.load(
        run.model,
        run.shapes,
        run.layers,
        device=run.device,
        dtype=run.dtype,
        batch_tokens=run.batch_tokens or default_batch_tokens(run.device, run.shapes.hidden_size),
        trust_remote_code=run.options.trust_remote_code,
    )


def default_batch_tokens(device: str, hidden_size: int) -> int:
    """Return the padded tokens per forward pass: on a GPU a power of two that depends on hidden
    size.
    """
    if device != "cuda":
        return CPU_BATCH_TOKENS
    least, most = BATCH_TOKENS
    return int(min(max(2 ** round(math.log2(BATCH_VALUES / hidden_size)), least), most))


@contextmanager
def never_packed() -> Iterator[None]:
    """Tell transformers that no row holds several sequences. It would otherwise query the device,
    and wait for it, in every forward pass.
    """
    ask = getattr(masking_utils, "find_packed_sequence_indices", None)
    if ask is None:  # a release that does not ask
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask


def padded(batch: Sequence[TokenSample]) -> tuple[Int64, int, Int64]:
    """Return where the tokens of a batch are among its places when every sample is padded to the
    longest, in order: int64[T]; that width; and the first token of each sample, then T: int64[b +
    1]. Without a step per sample, which would delay the launching of kernels.
    """
    start = np.cumsum([0, *(len(s.input_ids) for s in batch)], dtype=np.int64)
    lengths = np.diff(start)
    width = int(lengths.max())
    before = np.arange(len(batch), dtype=np.int64) * width - start[:-1]
    return np.arange(start[-1]) + np.repeat(before, lengths), width, start


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group indices by near-equal length, each at most ``budget`` padded tokens (a longer sample
    goes alone). Ties keep their order.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and lengths[i] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
