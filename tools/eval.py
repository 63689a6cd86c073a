"""``dspark-tools eval``: real speculative decoding of real prompts, and the target alone beside it.

Both engines run one prompt at a time and count as vLLM does (``dspark.tools.outcome``). ``lossless`` compares
with the target decoding alone in the same engine: transformers' own ``generate``, or a second vLLM without
the draft. It is null with a temperature, where only distributions could be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from dspark.cache.command import emit, guarded
from dspark.cache.errors import DraftError, EngineError
from dspark.tools.outcome import Outcome, rate, summarise
from dspark.tools.prompts import Prompt

Note = Callable[[str], None]
UNNAMED = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """``limit`` None: every row. ``dtype`` auto: the checkpoint's on a GPU, float32 on a CPU. ``device``:
    transformers only.
    """

    model: str
    draft: str
    data: str
    engine: str = "transformers"
    max_tokens: int = 256
    temperature: float = 0.0
    limit: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Runs:
    """One outcome a prompt, with the draft and of the target alone; ``dtype`` they were computed in."""

    drafted: list[Outcome]
    alone: list[Outcome]
    dtype: str


def evaluate(config: EvalConfig, note: Note = lambda line: None) -> dict[str, Any]:
    """Run it; the report as ``--json`` prints it. ``note`` is told what is going on, a line at a time."""
    from dspark.dump.target import load_target
    from dspark.tools.prompts import read_prompts
    from dspark.train.export import load_config

    draft = load_config(config.draft)
    target = load_target(config.model)
    positions = target.shapes.max_positions
    room = None if positions is None else positions - config.max_tokens - draft.block_size - 1
    prompts = read_prompts(
        config.data, target.tokenizer, vocab_size=target.shapes.vocab_size, room=room, limit=config.limit
    )
    if config.engine == "vllm":
        if not draft.servable_by_vllm:
            raise DraftError(
                f"{config.draft}: its Markov head is {draft.markov_head_type}, and vLLM has only the vanilla one; "
                "use --engine transformers"
            )
        runs = _with_vllm(config, prompts, draft.block_size, target.eos_token_ids, note)
    else:
        runs = _with_transformers(config, prompts, target.eos_token_ids, note)
    return report(config, prompts, runs, draft.block_size)


def report(config: EvalConfig, prompts: Sequence[Prompt], runs: Runs, block_size: int) -> dict[str, Any]:
    """Totals, the comparison with the target alone, and totals of each source."""
    pairs = list(zip(prompts, runs.drafted, runs.alone, strict=True))
    diverged = [p.where for p, a, b in pairs if a.tokens != b.tokens] if config.temperature == 0 else []
    sources: dict[str, list[Outcome]] = {}
    for prompt, outcome, _ in pairs:
        sources.setdefault(prompt.source or UNNAMED, []).append(outcome)
    alone = rate(runs.alone)
    totals = summarise(runs.drafted)
    return {
        "engine": config.engine,
        "dtype": runs.dtype,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "block_size": block_size,
        **totals,
        "lossless": not diverged if config.temperature == 0 else None,
        "diverged": diverged,
        "tokens_per_second_target": alone,
        "speedup": totals["tokens_per_second"] / alone,
        "per_source": {name: summarise(found) for name, found in sorted(sources.items())},
    }


def _with_transformers(
    config: EvalConfig, prompts: Sequence[Prompt], stop_ids: Sequence[int], note: Note
) -> Runs:
    import torch
    import transformers

    from dspark.tools.decode import speculative_generate
    from dspark.tools.target import Target, greedy_alone
    from dspark.train.export import load_config, load_draft

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = "float32" if config.dtype == "auto" and device == "cpu" else config.dtype
    try:
        model = (
            transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=wanted).to(device).eval()
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise EngineError(
            f"transformers could not load {config.model} ({wanted}, {device}): {error}"
        ) from error
    drafted, alone = [], []
    with Target(model, load_config(config.draft).target_layer_ids) as target:
        draft = load_draft(config.draft, target.frozen, dtype=model.dtype).to(device).eval()
        generator = torch.Generator(device).manual_seed(config.seed)

        def speculate(prompt: Prompt, limit: int) -> Outcome:
            return speculative_generate(
                target, draft, prompt.ids, max_tokens=limit, temperature=config.temperature, stop_ids=stop_ids,
                generator=generator,
            ).outcome(draft.config.block_size)  # fmt: skip

        def by_itself(prompt: Prompt, limit: int) -> Outcome:
            start = time.perf_counter()
            tokens = greedy_alone(model, prompt.ids, max_tokens=limit, stop_ids=stop_ids)
            return Outcome(tokens, time.perf_counter() - start)

        for run in (speculate, by_itself):  # first calls are slow; they are not timed
            run(prompts[0], 2)
        for number, prompt in enumerate(prompts, start=1):
            drafted.append(speculate(prompt, config.max_tokens))
            alone.append(by_itself(prompt, config.max_tokens))
            note(f"{number}/{len(prompts)} prompts, mean accepted length so far {_length(drafted)}")
    return Runs(drafted, alone, str(model.dtype).removeprefix("torch."))


def _with_vllm(
    config: EvalConfig, prompts: Sequence[Prompt], block_size: int, stop_ids: Sequence[int], note: Note
) -> Runs:
    import torch

    from dspark.tools.vllm_serve import ServeRequest, run_vllm

    dtype = "float32" if config.dtype == "auto" and not torch.accelerator.is_available() else config.dtype
    runs = []
    for draft in (config.draft, None):
        note(
            f"starting vLLM {'with the draft' if draft else 'with the target alone'} ({len(prompts)} prompts)"
        )
        request = ServeRequest(
            target=config.model, draft=draft, num_speculative_tokens=block_size, prompts=[p.ids for p in prompts],
            max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed,
            stop_token_ids=tuple(stop_ids), dtype=dtype,
        )  # fmt: skip
        runs.append(run_vllm(request))
    return Runs(runs[0], runs[1], dtype)


def _length(outcomes: Sequence[Outcome]) -> str:
    length = summarise(outcomes)["mean_accepted_length"]
    return "-" if length is None else f"{length:.2f}"


@click.command(
    "eval",
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120},
    epilog="""\b
Examples:
  dspark-tools eval --model Qwen/Qwen3-4B --draft ./draft --data prompts.jsonl --limit 50
  dspark-tools eval --model Qwen/Qwen3-4B --draft ./draft --data prompts.jsonl --engine vllm --json
  dspark-tools eval --model ./target --draft ./draft --data prompts.jsonl --temperature 0.7

Exit code 1 if a greedy answer in float32 is not the target's own.
""",
)
@click.option("--model", required=True, help="Target: id or folder.")
@click.option("--draft", required=True, help="Folder that dspark-train wrote.")
@click.option(
    "--data",
    required=True,
    help="JSONL of chats ({'messages': ...}, the last answer is dropped) or token rows.",
)
@click.option("--engine", default="transformers", type=click.Choice(["transformers", "vllm"]))
@click.option("--max-tokens", default=256, type=click.IntRange(min=1), help="New tokens an answer, at most.")
@click.option(
    "--temperature", default=0.0, type=click.FloatRange(min=0), help="0 = greedy; above: rejection sampling."
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N rows.  [default: all]")
@click.option("--seed", default=0, help="Of sampling.")
@click.option(
    "--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="auto: the checkpoint's on a GPU, float32 on a CPU.",
)  # fmt: skip
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N; --engine transformers only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
@guarded
def eval_command(context: click.Context, as_json: bool, **flags: Any) -> None:
    """Decode prompts with a draft: accepted lengths, speed, and whether the output is the target's own."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading") as status:
        result = evaluate(EvalConfig(**flags), note=status.update)
    if as_json:
        emit(result)
    else:
        show(result)
    if result["diverged"]:
        _explain(console, result)
        if result["dtype"] == "float32":
            context.exit(1)


def show(result: dict[str, Any]) -> None:
    """The report as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("source", "prompts", "tokens", "drafts", "accepted length", "accepted at slot 1, 2, ...")
    rows = list(result["per_source"].items())
    if len(rows) > 1 or rows[0][0] != UNNAMED:
        rows.append((UNNAMED, result))
    for name, row in rows:
        length = "-" if row["mean_accepted_length"] is None else f"{row['mean_accepted_length']:.3f}"
        rates = " ".join(f"{x:.2f}" for x in row["accept_rate"] or [])
        table.add_row(name, str(row["prompts"]), str(row["tokens"]), str(row["drafts"]), length, rates)
    console = Console()
    console.print(table)
    console.print(
        f"{result['tokens_per_second']:.1f} tokens/s, the target alone {result['tokens_per_second_target']:.1f} "
        f"({result['speedup']:.2f}x), {result['engine']}, one prompt at a time, {result['dtype']}"
    )
    if result["lossless"]:
        console.print("lossless: every answer is the target's own greedy answer")


def _explain(console: Any, result: dict[str, Any]) -> None:
    where = ", ".join(result["diverged"][:5])
    console.print(
        f"{len(result['diverged'])} of {result['prompts']} answers are not the target's own ({where}). "
        + (
            "In float32 that should not happen."
            if result["dtype"] == "float32"
            else "Below float32 a near-tie can fall either way, as with any change of batch; --dtype float32 tells."
        ),
        highlight=False,
    )
