"""The target in vLLM, by its ``extract_hidden_states`` method and our connector
(``vllm_connector.py``).

vLLM's conventions differ from the store's and are undone here: id j is the state entering layer j
(so output i is id i + 1); layers come back sorted and deduplicated; the last layer's state comes
*before* the final norm, which is applied here with the checkpoint's own weights.

States, already coded by the worker, go through spool files, one per group of requests that finish
together, read and deleted as soon as these are done. Requests go in while others come out, but
never so many that their files would exceed ``SPOOL_BYTES``; the files of up to ``pipeline.COMING``
batches that are read later come on top. vLLM runs in its own process (in-process, its connector
never flushes), over all visible GPUs; prefix caching and chunked prefill stay on.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import shutil
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dspark.cache.codec.base import EXACT_TOKEN
from dspark.cache.errors import EngineError
from dspark.cache.files.atomic import write_errors
from dspark.cache.files.layout import stored_bytes_per_token
from dspark.cache.records import Bool, Int32, TokenSample, last_rows
from dspark.cache.target.frozen import FrozenTarget
from dspark.dump.engines.answers import Answered, Ask, Sampling, repeat_last, stored_runs
from dspark.dump.engines.engine import (
    GROUPS,
    Captured,
    CodedStates,
    Engine,
    EngineRun,
    Prediction,
    States,
)
from dspark.dump.engines.options import NO_OPTIONS, EngineOptions
from dspark.dump.engines.registry import engine_version
from dspark.dump.engines.vllm.launch import (
    Split,
    architectures_of,
    capture_arguments,
    check_version,
    found_source,
    gpu_memory,
    llm_arguments,
    memory_share,
    split_of,
    start_llm,
    weight_size,
)
from dspark.dump.engines.vllm.requests import RequestLoop
from dspark.dump.engines.vllm.spool import (
    COMPARE,
    IDS,
    INDEX,
    PATH,
    RAW,
    SKIP,
    STORED,
    Coding,
    SpoolError,
    SpoolReader,
    write_coding,
)
from dspark.dump.target.layers import Shapes
from dspark.dump.target.weights import read_frozen

if TYPE_CHECKING:
    from dspark.cache.codec.base import Codec

log = logging.getLogger("dspark.dump")

SPOOL_BYTES = 2 << 30
# of raw states that a worker processes at once, on its device beside the target
BATCH_BYTES = 256 << 20
# Of one step of the engine at most, where states are so small that vLLM's own 16,384 leave a GPU
# waiting for launches.
STEP_TOKENS, VLLM_STEP_TOKENS = 1 << 16, 1 << 14
FEEDING = "engine: add requests", "engine: wait for a step"
STEP_BYTES = 512 << 20  # of raw states that vLLM keeps of a step
# of a layer's largest value: an all-reduce gives every rank the same bits, a partial sum differs by
# a tenth and more
RANK_TOLERANCE = 0.01


class Place(NamedTuple):
    """Where a finished request's states are: the file, and its index in the file."""

    batch: str
    number: int


class Member(NamedTuple):
    """Request ``number`` of a batch, its row, and the tokens int32[T] whose states it must hold."""

    number: int
    row: int
    ids: Int32


class VllmEngine:
    """``llm``: a vLLM engine that extracts ``ids``; ``norm``: the final norm, on the CPU in the
    engine's dtype.
    """

    name = "vllm"
    groups_at_once = GROUPS

    def __init__(
        self,
        llm: Any,
        shapes: Shapes,
        layers: Sequence[int],
        frozen: FrozenTarget,
        norm: torch.nn.Module,
        spool: Path,
        ranks: int = 1,
    ) -> None:
        self.llm = llm
        self._ranks = ranks
        self.shapes = shapes
        self.ids = extracted_ids(layers, shapes.num_layers)
        self.columns = [self.ids.index(i + 1) for i in layers]
        self.version = engine_version("vllm")
        self._frozen, self._norm, self._spool = frozen, norm, spool
        self._reader = SpoolReader(spool)
        self._loop: RequestLoop[Any] | None = None  # of the stream, and its seconds told so far
        self._told = 0.0, 0.0

    @classmethod
    def load(
        cls,
        model: str,
        shapes: Shapes,
        layers: Sequence[int],
        *,
        dtype: str,
        seq_length: int,
        spool: Path,
        batch_tokens: int | None,
        options: EngineOptions = NO_OPTIONS,
        split: Split | None = None,
        say: Callable[[str], None] = log.info,
    ) -> VllmEngine:
        """Start one vLLM on ``model``, on all visible GPUs or as ``split`` says, or on the CPU."""
        gpus = torch.cuda.device_count() if split is None else split.gpus
        own = checked(model, options, gpus, say)
        ids = extracted_ids(layers, shapes.num_layers)
        token_bytes = raw_bytes(shapes, layers, dtype)
        arguments = llm_arguments(
            model, ids, dtype=dtype, seq_length=seq_length, spool=spool,
            batch_tokens=BATCH_BYTES // token_bytes, options=options,
            sharing=split.sharing if split else 1,
        )  # fmt: skip
        frozen, norm = read_frozen(model, shapes, options.trust_remote_code)
        shutil.rmtree(spool, ignore_errors=True)
        with write_errors(spool):
            spool.mkdir(mode=0o700, parents=True)
        if batch_tokens is None and gpus:
            batch_tokens = step_tokens(token_bytes)
        if batch_tokens is not None:
            arguments.setdefault("max_num_batched_tokens", batch_tokens)
        if gpus:
            arguments["tensor_parallel_size"] = split.tensor if split else gpus
        else:
            arguments.setdefault("enforce_eager", True)
            if split is not None and split.tensor > 1:
                arguments["tensor_parallel_size"] = split.tensor
        try:
            llm = start_llm(own | arguments, gpus=gpus)
        except EngineError:
            shutil.rmtree(spool, ignore_errors=True)
            raise
        ranks = arguments.get("tensor_parallel_size", 1)
        return cls(llm, shapes, layers, frozen, norm.to(getattr(torch, dtype)), spool, ranks)

    def frozen(self) -> FrozenTarget:
        return self._frozen

    def capture(self, samples: Sequence[TokenSample]) -> Iterator[tuple[int, States]]:
        """Yield the states of each sample, wave by wave."""
        token_bytes = len(self.ids) * self.shapes.hidden_size * 4
        for wave in waves([len(s.input_ids) for s in samples], SPOOL_BYTES // token_bytes):
            for i, out in zip(wave, self._generate([samples[i] for i in wave]), strict=True):
                yield i, self._states(samples[i], out)

    def stream(self, groups: Iterable[Sequence[TokenSample]], codec: Codec) -> Iterator[Captured]:
        """Stream the groups; samples of at most two are in flight, so that the batch does not run
        empty between them.
        """
        for group, batch, members in self.finished(groups, codec):
            wanted = [Member(n, s.row, s.input_ids) for n, _, s in members]
            yield Captured(
                group, [i for _, i, _ in members], partial(self.coded, batch, wanted, codec)
            )

    def finished(
        self, groups: Iterable[Sequence[TokenSample]], codec: Codec
    ) -> Iterator[tuple[int, str, list[tuple[int, int, TokenSample]]]]:
        """As ``stream`` without the states: group, batch in the spool, and each sample's number
        there and in its group.
        """
        vllm = importlib.import_module("vllm")
        self.use_codec(codec)
        loop: RequestLoop[tuple[int, int, TokenSample]] = RequestLoop(self.llm, self.room(codec))
        self._loop, self._told = loop, (0.0, 0.0)
        plain = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        coming = enumerate(groups)
        waiting: deque[tuple[int, int, TokenSample]] = deque()
        left: dict[int, int] = {}  # samples of a group that are not out yet
        ended = False
        while True:
            while waiting or not ended:
                if not waiting:
                    if len(left) > 1:
                        break
                    group, samples = next(coming, (0, ()))
                    ended = not samples
                    if ended:
                        break
                    left[group] = len(samples)
                    waiting.extend((group, i, sample) for i, sample in enumerate(samples))
                sample = waiting[0][2]
                if not loop.fits(len(sample.input_ids)):
                    break
                params = copy(plain)  # creating one checks every field again
                params.extra_args = {
                    "kv_transfer_params": {STORED: runs(last_rows(sample.loss_mask))}
                }
                loop.add(
                    waiting.popleft(), sample.input_ids.tolist(), len(sample.input_ids), params
                )
            if loop.empty:
                loop.close()
                return
            finished = defaultdict(list)
            for (group, i, sample), out in loop.step():
                left[group] -= 1
                if not left[group]:
                    del left[group]
                place = self._place(sample.row, out)
                finished[group, place.batch].append((place.number, i, sample))
            for (group, batch), members in finished.items():
                members.sort()
                yield group, batch, members

    def answer(
        self, asks: Iterable[Ask], sampling: Sampling, stops: Sequence[int], codec: Codec
    ) -> Iterator[Answered]:
        """Yield sampled answers, with the states of the run that made them if ``keep`` is set."""
        vllm = importlib.import_module("vllm")
        self.use_codec(codec)
        loop: RequestLoop[Ask] = RequestLoop(self.llm, self.room(codec))
        waiting = deque(asks)
        while waiting or not loop.empty:
            while waiting and loop.fits(len(waiting[0].prompt) + waiting[0].max_tokens):
                ask = waiting.popleft()
                wanted = (
                    {"include_output_tokens": True, STORED: stored_runs(ask)}
                    if ask.keep
                    else {SKIP: True}
                )
                params = vllm.SamplingParams(
                    temperature=0.0 if sampling.greedy else sampling.temperature,
                    top_p=1.0 if sampling.greedy else sampling.top_p,
                    top_k=0 if sampling.greedy else sampling.top_k,
                    max_tokens=ask.max_tokens,
                    seed=ask.seed,
                    stop_token_ids=list(stops),
                    detokenize=False,
                    extra_args={"kv_transfer_params": wanted},
                )
                loop.add(ask, ask.prompt, len(ask.prompt) + ask.max_tokens, params)
            for ask, out in loop.step():
                ids = [int(i) for i in out.outputs[0].token_ids]
                finished = out.outputs[0].finish_reason == "stop"
                if not ask.keep:
                    yield Answered(ask, ids, finished, None)
                    continue
                place = self._place(ask.named_row, out)
                fed = np.array([*ask.prompt, *ids[:-1]], np.int32)
                arrays, seconds = self.coded(
                    place.batch, [Member(place.number, ask.named_row, fed)], codec
                )
                specs = codec.arrays(len(self.columns), self.shapes.hidden_size)
                # Copied, because a view would keep its whole batch in memory.
                own = {name: np.array(array) for name, array in repeat_last(arrays, specs).items()}
                yield Answered(ask, ids, finished, CodedStates(own, seconds))
        loop.close()

    def use_codec(self, codec: Codec) -> None:
        """Tell the workers how to code, before the first request that asks for codes."""
        last = self.ids.index(self.shapes.num_layers)
        with write_errors(self._spool):
            embedding = self.frozen().embed_tokens if codec.needs_tokens else None
            write_coding(self._spool, Coding(codec, self.columns, last, self._norm, embedding))

    def room(self, codec: Codec) -> int:
        """Return the number of tokens whose coded states fill the spool."""
        return int(
            SPOOL_BYTES / stored_bytes_per_token(len(self.columns), self.shapes.hidden_size, codec)
        )

    def coded(self, batch: str, members: Sequence[Member], codec: Codec) -> CodedStates:
        """Return the concatenated codes of finished requests of one batch."""
        tensors = self._spooled(batch, members)
        names = [*codec.arrays(len(self.columns), self.shapes.hidden_size), EXACT_TOKEN]
        arrays = {name: tensors[name].numpy() for name in names if name in tensors}
        return CodedStates(arrays, self._reader.spent() | self._fed())

    def _fed(self) -> dict[str, float]:
        """Return the seconds that the stream's own thread spent on requests since the last call."""
        if self._loop is None:
            return {}
        now, before = (self._loop.adding, self._loop.stepping), self._told
        self._told = now
        return {stage: a - b for stage, a, b in zip(FEEDING, now, before, strict=True)}

    def _generate(self, samples: Sequence[TokenSample], **sampling: Any) -> list[Any]:
        """Return the outputs of the samples in order, all in flight at once."""
        vllm = importlib.import_module("vllm")
        plain = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **sampling)
        loop: RequestLoop[int] = RequestLoop(self.llm, sum(len(s.input_ids) for s in samples))
        for i, sample in enumerate(samples):
            loop.add(i, sample.input_ids.tolist(), len(sample.input_ids), copy(plain))
        out: dict[int, Any] = {}
        while not loop.empty:
            out |= dict(loop.step())
        loop.close()
        return [out[i] for i in range(len(samples))]

    def _place(self, row: int, out: Any) -> Place:
        told = out.kv_transfer_params or {}
        if PATH not in told:
            raise EngineError(
                f"vllm returned no hidden states for row {row}: its connector was not called."
            )
        return Place(told[PATH], told[INDEX])

    def _spooled(
        self, batch: str, members: Sequence[Member], rank: int = 0
    ) -> dict[str, torch.Tensor]:
        """Return what a worker spooled for requests of one batch, in ascending order, concatenated:
        states of exactly their tokens.
        """
        try:
            tensors = self._reader.take(batch, [m.number for m in members], rank)
        except OSError as error:
            index = error.index if isinstance(error, SpoolError) else None
            # The request to blame may not be one of ours yet: a batch is lost as a whole.
            row = next((m.row for m in members if m.number == index), members[0].row)
            raise EngineError(
                f"vllm's hidden states of row {row} are lost: {error}. "
                f"{shutil.disk_usage(self._spool).free / 1e9:.2f} GB are free in {self._spool}."
            ) from error
        found = tensors[IDS].numpy()
        if not np.array_equal(found, np.concatenate([m.ids for m in members])):
            ends = np.cumsum([len(m.ids) for m in members])
            pieces = zip(members, np.split(found, ends), strict=False)
            wrong = next(
                (m for m, piece in pieces if not np.array_equal(m.ids, piece)), members[-1]
            )
            raise EngineError(
                f"vllm returned states of other tokens ({len(found)} tokens, together "
                f"with {len(members) - 1} more rows) for row {wrong.row}, expected "
                f"exactly its {len(wrong.ids)} tokens."
            )
        return tensors

    def _states(self, sample: TokenSample, out: Any) -> States:
        place = self._place(sample.row, out)
        states = self._spooled(place.batch, [Member(place.number, sample.row, sample.input_ids)])[
            RAW
        ]
        expected = (len(sample.input_ids), len(self.ids), self.shapes.hidden_size)
        if tuple(states.shape) != expected:
            raise EngineError(
                f"vllm returned states of shape {tuple(states.shape)} for row "
                f"{sample.row}, expected {expected}."
            )
        with torch.inference_mode():
            stored = torch.from_numpy(last_rows(sample.loss_mask))
            last: torch.Tensor = self._norm(states[stored, self.ids.index(self.shapes.num_layers)])
            return States(states[:, self.columns], last)

    def predict(self, samples: Sequence[TokenSample]) -> list[Prediction]:
        """Return vLLM's own greedy tokens, from its prompt log-probabilities."""
        out = []
        extra = {"kv_transfer_params": {COMPARE: True}} if self._ranks > 1 else None
        results = self._generate(samples, prompt_logprobs=1, extra_args=extra)
        for sample, result in zip(samples, results, strict=True):
            place = self._place(sample.row, result)
            members = [Member(place.number, sample.row, sample.input_ids)]
            states, *others = (
                self._spooled(place.batch, members, rank)[RAW] for rank in range(self._ranks)
            )
            for rank, other in enumerate(others, 1):
                same_on_ranks(states, other, rank, self.ids)
            best = [
                max(entry.items(), key=lambda item: item[1].logprob)
                for entry in result.prompt_logprobs[1:]
            ]
            out.append(
                Prediction(
                    [int(token) for token, _ in best], [float(value.logprob) for _, value in best]
                )
            )
        return out

    def forget(self) -> None:
        """Empty vLLM's prefix cache, for measurements. Raises EngineError if it cannot."""
        if not self.llm.reset_prefix_cache():
            raise EngineError("vllm did not empty its prefix cache.")

    def close(self) -> None:
        """Stop vLLM's processes and delete the spool."""
        engine = getattr(self.llm, "llm_engine", None)
        core = getattr(engine, "engine_core", None)
        if core is not None:
            core.shutdown()
        del self.llm
        shutil.rmtree(self._spool, ignore_errors=True)


def checked(
    model: str, options: EngineOptions, gpus: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the arguments of ``LLM`` that make the installed vLLM's states of the target correct.
    Raises EngineError if there are none; says what is unusual.
    """
    warning = check_version(engine_version("vllm"))
    if warning:
        say(warning)
    found = found_source(architectures_of(model, options.trust_remote_code), cuda=gpus > 0)
    if found is not None and found.capture == "none":
        raise EngineError(
            f"vllm {engine_version('vllm')} returns no hidden states for "
            f"{found.architecture}: {found.why}. Use --engine transformers."
        )
    own = capture_arguments(found)
    if own:
        assert found is not None
        say(
            f"states are captured at the norms of vLLM's {found.name} ({found.module}): {found.why}"
        )
    return own


def start(run: EngineRun) -> Engine:
    """Start one engine, or several that share the work (the registry's entry)."""
    split = split_of(run)
    if split.why:
        run.say(split.why)
    share = memory_share(
        run.options, split, leave=run.leave, weights=weight_size(run.model), memory=gpu_memory()
    )
    if share is not None:
        options = run.options
        given = (*options.arguments, ("gpu_memory_utilization", share))
        run = dataclasses.replace(run, options=dataclasses.replace(options, arguments=given))
        run.say(f"gpu_memory_utilization {share}: other engines or the codec need the rest")
    if split.engines > 1:
        from dspark.dump.engines.vllm.replicas import Replicas

        return Replicas.start(run, split)
    return VllmEngine.load(
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


def same_on_ranks(first: torch.Tensor, other: torch.Tensor, rank: int, ids: Sequence[int]) -> None:
    """Check that every tensor-parallel rank holds the same states [T, n, H]; if one holds only its
    share of a sum, they differ.
    """
    gap = (first.float() - other.float()).abs().amax((0, 2))
    size = first.float().abs().amax((0, 2)).clamp(min=1e-6)
    wrong = [
        str(i) for i, bad in zip(ids, (gap > RANK_TOLERANCE * size).tolist(), strict=True) if bad
    ]
    if wrong:
        raise EngineError(
            "self-check of the vllm engine failed: the states entering layers "
            f"{', '.join(wrong)} are a tensor-parallel rank's partial sum: ranks 0 and {rank} "
            "differ by "
            f"up to {float((gap / size).max()):.2g} of the largest value. Nothing was written. "
            "Try another version of vLLM, or one GPU."
        )


def raw_bytes(shapes: Shapes, layers: Sequence[int], dtype: str) -> int:
    """Return the bytes of a token's extracted states, as vLLM holds them."""
    states = len(extracted_ids(layers, shapes.num_layers))
    return states * shapes.hidden_size * int(getattr(torch, dtype).itemsize)


def step_tokens(token_bytes: int) -> int | None:
    """Return the tokens per engine step on a GPU, for states of ``token_bytes`` per token; None =
    vLLM's default. A step of 16,384 tokens of a 135M target takes 10 ms on an H100, and Python
    needs 18 ms to launch it. vLLM keeps the raw states of a step, so a large target gets fewer
    tokens.
    """
    fit = min(STEP_TOKENS, STEP_BYTES // token_bytes)
    return fit if fit >= 2 * VLLM_STEP_TOKENS else None


def runs(mask: Bool) -> list[list[int]]:
    """``[start, stop)`` of every run of true values."""
    framed = np.zeros(len(mask) + 2, bool)
    framed[1:-1] = mask
    out: list[list[int]] = np.flatnonzero(framed[1:] != framed[:-1]).reshape(-1, 2).tolist()
    return out


def extracted_ids(layers: Sequence[int], num_layers: int) -> list[int]:
    """Return vLLM's ids of the outputs of ``layers`` and of the last layer, in the order it returns
    them: sorted, each once.
    """
    return sorted({i + 1 for i in layers} | {num_layers})


def waves(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group consecutive indices into at most ``budget`` tokens (a longer sample goes alone)."""
    group: list[int] = []
    tokens = 0
    for i, length in enumerate(lengths):
        if group and tokens + length > budget:
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += length
    if group:
        yield group
