"""One tiny random target with its draft served by real vLLM. Used by bench/families.py."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import families
import torch

from dspark.cache.errors import DsparkError
from dspark.tools.check.parity import parity_of
from dspark.tools.decode.decode import speculative_generate
from dspark.tools.decode.outcome import Outcome
from dspark.tools.decode.target import DecodingTarget, greedy_alone, load_model
from dspark.tools.decode.vllm_serve import INTERPRETER_ENV, ServeRequest, run_vllm
from dspark.train.draft.saved.folder import load_config, load_draft

PROMPTS = [[5, 6, 7, 8, 9], list(range(20, 50)), [families.VOCAB - 9, 3, 40]]
MAX_TOKENS = 12
CPU_FOLDER = Path(__file__).parents[1] / "tests" / "vllm_cpu" / "triton_interpreter"


def serving(target: Path, draft: Path) -> dict[str, Any]:
    """How many of vLLM's answers are transformers' greedy ones, and how many of its blocks are our
    decoder's; or why it does not start.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault(INTERPRETER_ENV, str(CPU_FOLDER))
    request = ServeRequest(
        target=str(target), draft=str(draft), prompts=PROMPTS, max_tokens=MAX_TOKENS,
        num_speculative_tokens=load_config(str(draft)).block_size, dtype="float32", trace=True,
    )  # fmt: skip
    try:
        served = run_vllm(request)
    except DsparkError as error:
        return {"stopped": cause(str(error))}
    model = load_model(str(target), device="cpu", dtype="float32")
    alone = [greedy_alone(model, prompt, max_tokens=MAX_TOKENS) for prompt in PROMPTS]
    same = sum(a == outcome.tokens for a, outcome in zip(alone, served, strict=True))
    found = {"equal_answers": same, "answers": len(alone), "blocks": sum(o.drafts for o in served)}
    try:
        parity = parity_of(ours(model, draft), served)
    except DsparkError as error:
        return found | {"no_parity": str(error)[:300]}
    return found | {"compared": parity.compared, "equal_blocks": parity.equal}


def ours(model: Any, draft: Path) -> list[Outcome]:
    """Our decoder's answers to the same prompts, with its blocks."""
    config = load_config(str(draft))
    with DecodingTarget(model, config.target_layer_ids) as tapped:
        ready = load_draft(str(draft), tapped.frozen, dtype=model.dtype).eval()
        return [
            speculative_generate(tapped, ready, prompt, max_tokens=MAX_TOKENS).outcome(
                config.block_size
            )
            for prompt in PROMPTS
        ]


def cause(message: str) -> str:
    """The last line of a vLLM log that is an exception with words, and not one about a process."""
    # pydantic says what is wrong in the line behind its count of errors
    found = re.findall(r"\b(\w*(?:Error|Exception): (?:\d+ validation error.*\n)?.*)", message)
    own = [line for line in found if not re.search("EngineError|ngine core|subprocess", line)]
    return " ".join((own or found or [message])[-1].split())[:400]
