"""The target in vLLM, by its ``extract_hidden_states`` method and our connector (``vllm_connector.py``).

vLLM's conventions differ from the store's and are undone here: id j is the state entering layer j (so output i is id i + 1); layers come back
sorted and deduplicated; the last layer's state comes *before* the final norm, which is applied here with the checkpoint's own weights.

A request's states go through one spool file, read and deleted as soon as its request is done; requests are handed over in waves, so the spool never holds more
than ``SPOOL_BYTES``. vLLM runs in a process of its own (in-process, its connector never flushes).
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dspark.cache.disk import write_errors
from dspark.cache.errors import EngineError
from dspark.cache.frozen import FrozenTarget
from dspark.cache.records import TokenSample, last_rows
from dspark.dump.capture import Captured, Prediction, States
from dspark.dump.checkpoint import read_frozen
from dspark.dump.layers import Shapes
from dspark.dump.plan import engine_version
from dspark.dump.spool import read_spooled

if TYPE_CHECKING:
    from dspark.cache.codec import Codec

SPOOL_BYTES = 2 << 30
# stdout belongs to --json; a CPU worker refuses to start without a cache size.
ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}


class VllmEngine:
    """``llm``: a vLLM engine that extracts ``ids``; ``norm``: the final norm, on the CPU in the engine's dtype."""

    name = "vllm"

    def __init__(
        self,
        llm: Any,
        shapes: Shapes,
        layers: Sequence[int],
        frozen: FrozenTarget,
        norm: torch.nn.Module,
        spool: Path,
    ) -> None:
        self.llm = llm
        self.shapes = shapes
        self.ids = extracted_ids(layers, shapes.num_layers)
        self.columns = [self.ids.index(i + 1) for i in layers]
        self.version = engine_version("vllm")
        self._frozen, self._norm, self._spool = frozen, norm, spool

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
    ) -> VllmEngine:
        """Start vLLM on ``model``, on all visible GPUs or on the CPU."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        frozen, norm = read_frozen(model, shapes)
        shutil.rmtree(spool, ignore_errors=True)
        with write_errors(spool):
            spool.mkdir(parents=True)
        gpus = torch.cuda.device_count()
        options: dict[str, Any] = {"tensor_parallel_size": gpus} if gpus else {"enforce_eager": True}
        if batch_tokens is not None:
            options["max_num_batched_tokens"] = batch_tokens
        ids = extracted_ids(layers, shapes.num_layers)
        try:
            vllm = importlib.import_module("vllm")
            llm = vllm.LLM(
                model=model,
                dtype=dtype,
                max_model_len=seq_length + 1,
                skip_tokenizer_init=True,
                seed=0,
                max_logprobs=1,
                speculative_config={
                    "method": "extract_hidden_states",
                    "num_speculative_tokens": 1,
                    "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}},
                },
                kv_transfer_config={
                    "kv_connector": "SpoolConnector",
                    "kv_connector_module_path": "dspark.dump.vllm_connector",
                    "kv_role": "kv_producer",
                    "kv_connector_extra_config": {"shared_storage_path": str(spool.absolute())},
                },
                **options,
            )
        except Exception as error:  # vLLM raises whatever its own parts raise
            shutil.rmtree(spool, ignore_errors=True)
            raise EngineError(
                f"vllm {engine_version('vllm')} could not start {model} ({dtype}, hidden states of {ids}): {type(error).__name__}: {error}. "
                "Its own messages are above; --engine transformers does without vLLM."
            ) from error
        return cls(llm, shapes, layers, frozen, norm.to(getattr(torch, dtype)), spool)

    def frozen(self) -> FrozenTarget:
        return self._frozen

    def capture(self, samples: Sequence[TokenSample]) -> Iterator[tuple[int, States]]:
        """States of each sample, wave by wave."""
        token_bytes = len(self.ids) * self.shapes.hidden_size * 4
        for wave in waves([len(s.input_ids) for s in samples], SPOOL_BYTES // token_bytes):
            for i, out in zip(wave, self._generate([samples[i] for i in wave]), strict=True):
                yield i, self._states(samples[i], out)

    def stream(
        self, groups: Iterable[Sequence[TokenSample]], codecs: tuple[Codec, Codec]
    ) -> Iterator[Captured]:
        for group, samples in enumerate(groups):
            yield from (Captured(group, [i], states) for i, states in self.capture(samples))

    def _generate(self, samples: Sequence[TokenSample], **sampling: Any) -> list[Any]:
        vllm = importlib.import_module("vllm")
        params = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **sampling)
        prompts = [{"prompt_token_ids": s.input_ids.tolist()} for s in samples]
        try:
            out: list[Any] = self.llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:  # a worker that died arrives as one of several kinds
            raise EngineError(
                f"vllm failed while running {len(samples)} samples: {type(error).__name__}: {error}"
            ) from error
        return out

    def _states(self, sample: TokenSample, out: Any) -> States:
        path = (out.kv_transfer_params or {}).get("hidden_states_path")
        if path is None:
            raise EngineError(
                f"vllm gave no hidden states for row {sample.row}: its connector was not called."
            )
        try:
            tensors = read_spooled(path)
        except OSError as error:
            raise EngineError(
                f"vllm's hidden states of row {sample.row} are lost: {error}. {shutil.disk_usage(self._spool).free / 1e9:.2f} GB are free in {self._spool}."
            ) from error
        states = tensors["hidden_states"]
        expected = (len(sample.input_ids), len(self.ids), self.shapes.hidden_size)
        if tuple(states.shape) != expected or tensors["token_ids"].tolist() != sample.input_ids.tolist():
            raise EngineError(
                f"vllm gave states of shape {tuple(states.shape)} for row {sample.row}, expected {expected} for exactly its tokens."
            )
        with torch.inference_mode():
            stored = torch.from_numpy(last_rows(sample.loss_mask))
            last: torch.Tensor = self._norm(states[stored, self.ids.index(self.shapes.num_layers)])
            return States(states[:, self.columns], last)

    def predict(self, samples: Sequence[TokenSample]) -> list[Prediction]:
        """vLLM's own greedy tokens, from its prompt log-probabilities."""
        out = []
        for sample, result in zip(samples, self._generate(samples, prompt_logprobs=1), strict=True):
            self._states(sample, result)  # every request spools; this one's states are not needed
            best = [
                max(entry.items(), key=lambda item: item[1].logprob) for entry in result.prompt_logprobs[1:]
            ]
            out.append(
                Prediction([int(token) for token, _ in best], [float(value.logprob) for _, value in best])
            )
        return out

    def close(self) -> None:
        """Stop vLLM's processes and delete the spool."""
        engine = getattr(self.llm, "llm_engine", None)
        core = getattr(engine, "engine_core", None)
        if core is not None:
            core.shutdown()
        del self.llm
        shutil.rmtree(self._spool, ignore_errors=True)


def extracted_ids(layers: Sequence[int], num_layers: int) -> list[int]:
    """vLLM's ids of the outputs of ``layers`` and of the last layer, as it returns them: sorted, each once."""
    return sorted({i + 1 for i in layers} | {num_layers})


def waves(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive indices in groups of at most ``budget`` tokens (a longer sample goes alone)."""
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
