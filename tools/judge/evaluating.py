"""Decode prompts with drafts, and with the target alone, on either engine.

Both engines run one prompt at a time and count as vLLM does (``dspark.tools.decode.outcome``).
``lossless`` compares with the target decoding alone in the same engine: transformers' own
``generate``, or a second vLLM without the draft (``alone``: on the first prompts only, as it takes
the longest).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dspark.cache.errors import DraftError
from dspark.cache.shared.command import Progress
from dspark.tools.decode.outcome import Outcome, summarise
from dspark.tools.decode.prompts import Prompt
from dspark.tools.judge.eval_report import relative_cost, report

TOLD = 10  # times that the accepted length so far is told


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """``limit`` None: every row. ``alone``: prompts that the target also decodes by itself (None:
    all). ``dtype`` auto: the checkpoint's on a GPU, float32 on a CPU. ``device``:
    transformers only.
    """

    model: str
    draft: str
    data: str
    engine: str = "transformers"
    max_tokens: int = 256
    temperature: float = 0.0
    limit: int | None = None
    per_source: int | None = None
    alone: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Runs:
    """One outcome per prompt with the draft, one of the target alone for the first of them;
    ``dtype`` they were computed in.
    """

    drafted: list[Outcome]
    alone: list[Outcome]
    dtype: str


def silent(done: int, total: int, text: str = "") -> None:
    """Show nobody the progress."""


def evaluate(config: EvalConfig, progress: Progress = silent) -> dict[str, Any]:
    """Run it and return the report that ``--json`` prints. ``progress`` counts prompts."""
    return run(config, progress)[0]


def run(
    config: EvalConfig, progress: Progress = silent
) -> tuple[dict[str, Any], list[Prompt], Runs]:
    """Return the report, and the prompts and outcomes it is based on."""
    ((result, runs),), prompts = run_each(config, [config.draft], progress)
    return result, prompts, runs


def run_each(
    config: EvalConfig, drafts: Sequence[str], progress: Progress = silent
) -> tuple[list[tuple[dict[str, Any], Runs]], list[Prompt]]:
    """Return, for each of the ``drafts`` in place of ``config.draft``, its report and outcomes on
    the same prompts. The target is loaded, and decodes alone, only once.
    """
    from dspark.dump.target.config import load_target
    from dspark.tools.decode.prompts import read_prompts
    from dspark.train.draft.saved.folder import load_config
    from dspark.train.draft.types import drafter

    shapes = [load_config(draft) for draft in drafts]
    if config.engine == "vllm":
        for draft, shape in zip(drafts, shapes, strict=True):
            if not shape.servable_by_vllm:
                why = drafter(shape.speculator_type).not_served(shape)
                raise DraftError(f"{draft}: {why}; use --engine transformers")
    target = load_target(config.model)
    longest, room = (
        max(max(s.block_size, len(s.stage_ends)) for s in shapes),
        target.shapes.max_positions,
    )
    room = None if room is None else room - config.max_tokens - longest - 1
    prompts = read_prompts(
        config.data,
        target.tokenizer,
        vocab_size=target.shapes.vocab_size,
        room=room,
        limit=config.limit,
        per_source=config.per_source,
    )
    decode = _with_vllm if config.engine == "vllm" else _with_transformers
    drafted, alone, dtype = decode(config, drafts, prompts, target.eos_token_ids, progress)
    out = []
    for draft, shape, outcomes in zip(drafts, shapes, drafted, strict=True):
        measured = report(
            prompts,
            outcomes,
            alone,
            greedy=config.temperature == 0,
            relative_cost=relative_cost(config.model, draft),
        )
        how_measured = {
            "engine": config.engine,
            "dtype": dtype,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "speculator_type": shape.speculator_type,
            "block_size": shape.block_size,
        }
        out.append((how_measured | measured, Runs(outcomes, alone, dtype)))
    return out, prompts


# of each draft, of the target alone, the dtype
Decoded = tuple[list[list[Outcome]], list[Outcome], str]


def _with_transformers(
    config: EvalConfig,
    drafts: Sequence[str],
    prompts: Sequence[Prompt],
    stop_ids: Sequence[int],
    progress: Progress,
) -> Decoded:
    import torch

    from dspark.tools.decode.decode import outcome_of
    from dspark.tools.decode.target import DecodingTarget, greedy_alone, load_model
    from dspark.train.draft.saved.folder import load_config, load_draft

    model = load_model(config.model, config.device, config.dtype)
    drafted, alone = [list[Outcome]() for _ in drafts], list[Outcome]()

    def by_itself(prompt: Prompt, limit: int) -> Outcome:
        start = time.perf_counter()
        tokens = greedy_alone(model, prompt.ids, max_tokens=limit, stop_ids=stop_ids)
        return Outcome(tokens, time.perf_counter() - start)

    total, text = len(prompts) * len(drafts), ""
    progress(0, total)
    by_itself(prompts[0], 2)  # the first call is slow, and not timed
    for place, (folder, outcomes) in enumerate(zip(drafts, drafted, strict=True)):
        last = folder == drafts[-1] and outcomes is drafted[-1]
        with DecodingTarget(model, load_config(folder).target_layer_ids) as target:
            draft = load_draft(folder, target.frozen, dtype=model.dtype).to(model.device).eval()
            generator = torch.Generator(model.device).manual_seed(config.seed)

            def speculate(
                prompt: Prompt,
                limit: int,
                target: Any = target,
                draft: Any = draft,
                generator: Any = generator,
            ) -> Outcome:
                return outcome_of(
                    target,
                    draft,
                    prompt.ids,
                    max_tokens=limit,
                    temperature=config.temperature,
                    stop_ids=stop_ids,
                    generator=generator,
                )

            speculate(prompts[0], 2)
            for number, prompt in enumerate(prompts, start=1):
                outcomes.append(speculate(prompt, config.max_tokens))
                if last and (config.alone is None or number <= config.alone):
                    alone.append(by_itself(prompt, config.max_tokens))
                named = f"{folder}: " if len(drafts) > 1 else ""
                if number % max(len(prompts) // TOLD, 1) == 0:  # a log gets a line at each new text
                    text = f"{named}accepted length so far {_length(outcomes)}"
                progress(place * len(prompts) + number, total, text)
    return drafted, alone, str(model.dtype).removeprefix("torch.")


def _with_vllm(
    config: EvalConfig,
    drafts: Sequence[str],
    prompts: Sequence[Prompt],
    stop_ids: Sequence[int],
    progress: Progress,
) -> Decoded:
    import torch

    from dspark.tools.decode.vllm_serve import ServeRequest, run_vllm
    from dspark.train.draft.saved.folder import load_config
    from dspark.train.draft.types import drafter

    dtype = (
        "float32"
        if config.dtype == "auto" and not torch.accelerator.is_available()
        else config.dtype
    )

    decoded: list[list[Outcome]] = []

    def asked(draft: str | None) -> list[Outcome]:
        chosen = prompts if draft is not None else prompts[: config.alone]
        name = "vLLM alone" if draft is None else f"vLLM with {draft}"
        progress(len(decoded), len(drafts) + 1, f"{name}, {len(chosen)} prompts")
        if not chosen:
            return []
        shape = None if draft is None else load_config(draft)
        own: dict[str, Any] = (
            {} if shape is None else {"speculation": drafter(shape.speculator_type).serving(shape)}
        )
        return run_vllm(
            ServeRequest(
                target=config.model,
                draft=draft,
                num_speculative_tokens=1 if shape is None else shape.block_size,
                prompts=[p.ids for p in chosen],
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                seed=config.seed,
                stop_token_ids=tuple(stop_ids),
                dtype=dtype,
                **own,
            )
        )

    for draft in (*drafts, None):
        decoded.append(asked(draft))
    return decoded[:-1], decoded[-1], dtype


def _length(outcomes: Sequence[Outcome]) -> str:
    length = summarise(outcomes)["mean_accepted_length"]
    return "-" if length is None else f"{length:.2f}"
