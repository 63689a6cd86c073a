"""How vLLM is started: which version, on which GPUs, with which arguments, and what captures the
states.

All of it is decided before weights are read, from the config and from vLLM's own source.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import EngineError, UsageError
from dspark.dump.engines.options import EngineOptions
from dspark.dump.engines.versions import release, vllm_version
from dspark.dump.engines.vllm import source

if TYPE_CHECKING:
    from dspark.dump.engines.engine import EngineRun

OLDEST, NEWEST = (0, 25), (0, 33)  # whose source was read; see docs/vllm.md for what ran
# stdout belongs to --json; a CPU worker refuses to start without a cache size.
ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}
# of a GPU's memory that weights may take when we choose the number of GPUs
WEIGHTS_SHARE = 0.6
GPU_SHARE = 0.9  # of a GPU's memory that vLLM takes if it is not told
LEAST_BESIDE = 0.15  # of a GPU's memory that vLLM needs beside the weights
CONTEXT_BYTES = 2 << 30  # of another process on the GPU, before it holds any tensor
CAPTURE_MODULE = "dspark.dump.engines.vllm.capture"


def check_version(version: str) -> str | None:
    """Refuse a vLLM older than the connector interface; warn about one newer than any tested."""
    found = release(version)
    if found < OLDEST:
        raise EngineError(
            f"vllm {version}: this release needs {OLDEST[0]}.{OLDEST[1]} or later, whose "
            "hidden-state connector it extends. Install that, or use --engine "
            "transformers."
        )
    if found > NEWEST:
        return (
            f"warning: vllm {version} is newer than {NEWEST[0]}.{NEWEST[1]}, the latest "
            "version this release was tested with. Trying it; the self-check stops the "
            "dump if its states are wrong."
        )
    return None


def architectures_of(model: str, trust_remote_code: bool = False) -> list[str]:
    """Return the class names that the target's config asks for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return list(config.architectures or ())


def found_source(architectures: Sequence[str], *, cuda: bool) -> source.ModelSource | None:
    """Return what the installed vLLM does with these architectures; None if its source does not
    tell.
    """
    root = source.vllm_root()
    try:
        return source.model_source(root, architectures, cuda=cuda) if root else None
    except (OSError, SyntaxError):
        return None


def why_not(architectures: Sequence[str], device: str) -> str | None:
    """Say why the installed vLLM cannot return the states of such a target; None if it can, or if
    its source does not tell.
    """
    found = found_source(architectures, cuda=device == "cuda")
    if found is None or found.capture != "none":
        return None
    return f"vllm {vllm_version()} returns no hidden states for {found.architecture}: {found.why}"


def capture_arguments(found: source.ModelSource | None) -> dict[str, Any]:
    """Return the arguments of ``LLM`` that make the states correct for this target."""
    if found is None or found.capture != "norms":
        return {}
    override = {found.architecture: f"{CAPTURE_MODULE}:{found.architecture}"}
    eager = {"enforce_eager": True} if found.compiled else {}
    return {"model_class_overrides": override, **eager}


@dataclass(frozen=True, slots=True)
class Split:
    """``engines`` of ``gpus`` GPUs each, ``tensor`` of them tensor-parallel. ``why``: an
    explanation to print before the start, if anything is unusual.
    """

    engines: int
    gpus: int
    tensor: int
    why: str = ""
    shared: bool = False  # all engines on the same GPU

    @property
    def sharing(self) -> int:
        """Engines on one GPU."""
        return self.engines if self.shared else 1


def choose_split(
    gpus: int,
    heads: Sequence[int],
    options: EngineOptions,
    *,
    weights: int | None = None,
    memory: int | None = None,
) -> Split:
    """Choose how to use ``gpus`` GPUs (0 = a CPU). ``heads``: query heads, and key heads if there
    are fewer. ``weights``: bytes on disk; ``memory``: bytes per GPU. By default an engine gets the
    fewest GPUs that hold the weights, and as many engines run as fit.
    """
    pipeline = int(dict(options.arguments).get("pipeline_parallel_size", 1))
    tp, dp = options.tensor_parallel, options.data_parallel
    fits = [n for n in range(1, max(gpus, 1) + 1) if divides(heads, n)]
    if not gpus:
        return Split(dp or 1, 0, tp or 1)
    if tp is not None and not divides(heads, tp):
        raise UsageError(
            f"--tensor-parallel-size {tp}: the target's {' and '.join(map(str, heads))} "
            f"heads do not divide evenly by it. With {gpus} GPUs, these work: "
            f"{', '.join(map(str, fits))}."
        )
    why = ""
    if tp is None:
        most = gpus // (pipeline * (dp or 1)) or 1
        possible = [n for n in fits if n <= most]
        tp = possible[-1]
        if weights is not None and memory:
            enough = (n for n in possible if weights <= WEIGHTS_SHARE * memory * n * pipeline)
            tp = next(enough, tp)
        if possible[-1] < most:
            why = (
                f"{most} GPUs do not divide the target's heads "
                f"({', '.join(map(str, heads))}) evenly: {tp} per engine"
            )
    each = tp * pipeline
    if dp is None:
        # If the size is unknown, one engine takes all GPUs.
        dp = (
            max(gpus // each, 1)
            if options.tensor_parallel is not None or weights is not None
            else 1
        )
    if each * dp > gpus and not (each == 1 and gpus == 1):
        raise UsageError(
            f"{dp} engines of {each} GPUs each (tensor parallel {tp}, pipeline parallel "
            f"{pipeline}) need {each * dp}, and {gpus} are "
            "visible. Give a smaller --tensor-parallel-size or --data-parallel-size."
        )
    left = gpus - each * dp
    if left > 0:
        why = "; ".join(filter(None, [why, f"{left} of {gpus} GPUs stay idle"]))
    return Split(dp, each, tp, why, shared=each * dp > gpus)


def split_of(run: EngineRun) -> Split:
    """Choose how this machine's GPUs are used for a run."""
    import torch
    from transformers import AutoConfig

    gpus = torch.cuda.device_count()
    if not gpus:
        return choose_split(0, (), run.options)
    config = AutoConfig.from_pretrained(run.model, trust_remote_code=run.options.trust_remote_code)
    return choose_split(
        gpus, heads_of(config), run.options, weights=weight_size(run.model), memory=gpu_memory()
    )


def divides(heads: Sequence[int], ranks: int) -> bool:
    """Tell whether vLLM can give every rank the same number of heads; key heads are repeated if
    there are fewer than ranks.
    """
    return all(h % ranks == 0 or (i > 0 and ranks % h == 0) for i, h in enumerate(heads))


def heads_of(config: Any) -> list[int]:
    """Return the numbers of query heads and key heads, as far as a config states them."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    return [int(n) for n in found if n]


def weight_size(model: str) -> int | None:
    """Return the bytes of a checkpoint's safetensors: a folder's, or what a model id's index says;
    None if unknown.
    """
    import json

    from transformers.utils import cached_file

    folder = Path(model)
    if folder.is_dir():
        return sum(f.stat().st_size for f in folder.glob("*.safetensors")) or None
    try:
        index = cached_file(
            model, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        return None
    told = (
        json.loads(Path(index).read_text()).get("metadata", {}).get("total_size") if index else None
    )
    return None if told is None else int(told)


def memory_share(
    options: EngineOptions, split: Split, *, leave: int, weights: int | None, memory: int
) -> float | None:
    """Choose vLLM's ``gpu_memory_utilization`` so that ``leave`` bytes of each GPU of ``memory``
    bytes stay free; None = its own, where the user has chosen, nothing is needed, or ``weights``
    would have too little left.
    """
    if "gpu_memory_utilization" in dict(options.arguments) or not split.gpus or not memory:
        return None
    share = GPU_SHARE - max(0.0, (leave + CONTEXT_BYTES) / memory - (1 - GPU_SHARE))
    held = (weights or memory) * split.sharing / split.gpus / memory
    if not leave or share < held + LEAST_BESIDE:
        share = GPU_SHARE
    if split.shared:
        # What is not vLLM's is for the coding beside the target: each engine does that.
        coding = (split.sharing - 1) * (1 - GPU_SHARE)
        if share - coding >= held + LEAST_BESIDE:
            share -= coding
        return round(share / split.sharing, 3)
    return round(share, 3) if share < GPU_SHARE else None


def llm_arguments(
    model: str, ids: Sequence[int], *, dtype: str, seq_length: int, spool: Path, batch_tokens: int,
    options: EngineOptions, sharing: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of ``vllm.LLM`` that extract the states ``ids``; ``batch_tokens``: a
    worker's maximum batch; ``sharing``: engines on its GPU.
    """
    return {
        "model": model,
        "dtype": dtype,
        "max_model_len": seq_length + 1,
        "skip_tokenizer_init": True,
        # Rows are text: without this, a target with a vision tower wants a tokenizer for images.
        "language_model_only": True,
        "seed": 0,
        "max_logprobs": 1,
        "trust_remote_code": options.trust_remote_code,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(ids)}},
        },
        "kv_transfer_config": {
            "kv_connector": "SpoolConnector",
            "kv_connector_module_path": "dspark.dump.engines.vllm.connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {
                "shared_storage_path": str(spool.absolute()),
                "batch_tokens": batch_tokens,
                "sharing": sharing,
            },
        },
        **dict(options.arguments),
    }


def start_llm(arguments: dict[str, Any], *, gpus: int) -> Any:
    """Start a ``vllm.LLM``; raises EngineError that says what can be done."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # torch has been asked for CUDA: a forked engine could not use it, and vLLM does not notice
    if gpus:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    try:
        return importlib.import_module("vllm").LLM(**arguments)
    except Exception as error:  # vLLM raises whatever its components raise
        raise EngineError(
            f"vllm {vllm_version()} could not start {arguments['model']} ({arguments['dtype']}, "
            f"{max(gpus, 1)} "
            f"{'GPUs' if gpus else 'CPU'}): {type(error).__name__}: {error}. Its own messages "
            f"are above. {remedies(error, arguments, gpus)}"
        ) from error


def remedies(error: BaseException, arguments: dict[str, Any], gpus: int) -> str:
    """Return what can help with this failure, and nothing that cannot."""
    text = f"{type(error).__name__}: {error}".lower()
    out = []
    if "unexpected keyword" in text or "validation error" in text:
        out.append("Check --engine-arg: this version of vLLM does not take all of them.")
    if "memory" in text or "kv cache" in text:
        out.append(
            "Use a smaller --seq-length or --batch-tokens, or more GPUs (--tensor-parallel-size)."
        )
    if "trust_remote_code" in text or "trust-remote-code" in text:
        out.append("If you trust the target's own code, give --trust-remote-code.")
    if "divisible" in text:
        out.append("Give another --tensor-parallel-size.")
    weights = weight_size(arguments["model"])
    # Transformers puts a target on one GPU, so it does not help if the target does not fit there.
    if not gpus or weights is None or weights < WEIGHTS_SHARE * gpu_memory():
        out.append("--engine transformers does without vLLM.")
    return " ".join(out)


def gpu_memory() -> int:
    """Return the memory of the smallest visible GPU, in bytes."""
    import torch

    count = torch.cuda.device_count()
    return min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=0)
