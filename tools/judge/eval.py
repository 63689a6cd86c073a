"""``dspark-tools eval``: real speculative decoding of real prompts, and the target alone beside it.

Both engines run one prompt at a time and count as vLLM does (``dspark.tools.decode.outcome``). ``lossless`` compares
with the target decoding alone in the same engine: transformers' own ``generate``, or a second vLLM without
the draft (``--alone N``: on the first N prompts only, as it takes the longest). What is reported is in ``dspark.tools.judge.eval_report``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dspark.cache.errors import DraftError
from dspark.cache.shared.command import command, emit, json_flag
from dspark.tools.decode.outcome import Outcome, summarise
from dspark.tools.decode.prompts import Prompt
from dspark.tools.decode.promptsets import NAMES
from dspark.tools.flags import COUNT, COUNT_OR_ALL, DEVICE, SEED, Temperature
from dspark.tools.judge.coloured import accepted, coloured, steps
from dspark.tools.judge.eval_report import HEADER, TABLES, how, lines, markdown, relative_cost, report
from dspark.tools.outputs import OUTPUT_FILE, save

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """``limit`` None: every row. ``alone``: prompts that the target also decodes by itself (None: all). ``dtype`` auto: the checkpoint's on a GPU, float32 on a CPU. ``device``:
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
    """One outcome per prompt with the draft, one of the target alone for the first of them; ``dtype`` they were computed in."""

    drafted: list[Outcome]
    alone: list[Outcome]
    dtype: str


def evaluate(config: EvalConfig, note: Note = lambda line: None) -> dict[str, Any]:
    """Run it; the report as ``--json`` prints it. ``note`` gets progress, one line at a time."""
    return run(config, note)[0]


def run(config: EvalConfig, note: Note = lambda line: None) -> tuple[dict[str, Any], list[Prompt], Runs]:
    """The report, and the prompts and outcomes it was made of."""
    from dspark.dump.target.config import load_target
    from dspark.tools.decode.prompts import read_prompts
    from dspark.train.draft.folder import load_config
    from dspark.train.draft.types import drafter

    draft = load_config(config.draft)
    target = load_target(config.model)
    positions = target.shapes.max_positions
    room = (
        None
        if positions is None
        else positions - config.max_tokens - max(draft.block_size, len(draft.stage_ends)) - 1
    )
    prompts = read_prompts(
        config.data, target.tokenizer, vocab_size=target.shapes.vocab_size, room=room, limit=config.limit, per_source=config.per_source,
    )  # fmt: skip
    if config.engine == "vllm":
        if not draft.servable_by_vllm:
            why = drafter(draft.speculator_type).not_served(draft)
            raise DraftError(f"{config.draft}: {why}; use --engine transformers")
        runs = _with_vllm(config, prompts, draft.block_size, target.eos_token_ids, note)
    else:
        runs = _with_transformers(config, prompts, target.eos_token_ids, note)
    measured = report(
        prompts, runs.drafted, runs.alone, greedy=config.temperature == 0,
        relative_cost=relative_cost(config.model, config.draft),
    )  # fmt: skip
    how_measured = {
        "engine": config.engine, "dtype": runs.dtype, "temperature": config.temperature, "max_tokens": config.max_tokens,
        "block_size": draft.block_size,
    }  # fmt: skip
    return how_measured | measured, prompts, runs


def _with_transformers(
    config: EvalConfig, prompts: Sequence[Prompt], stop_ids: Sequence[int], note: Note
) -> Runs:
    import torch

    from dspark.tools.decode.decode import outcome_of
    from dspark.tools.decode.target import Target, greedy_alone, load_model
    from dspark.train.draft.folder import load_config, load_draft

    model = load_model(config.model, config.device, config.dtype)
    drafted, alone = [], []
    with Target(model, load_config(config.draft).target_layer_ids) as target:
        draft = load_draft(config.draft, target.frozen, dtype=model.dtype).to(model.device).eval()
        generator = torch.Generator(model.device).manual_seed(config.seed)

        def speculate(prompt: Prompt, limit: int) -> Outcome:
            return outcome_of(
                target, draft, prompt.ids, max_tokens=limit, temperature=config.temperature, stop_ids=stop_ids,
                generator=generator,
            )  # fmt: skip

        def by_itself(prompt: Prompt, limit: int) -> Outcome:
            start = time.perf_counter()
            tokens = greedy_alone(model, prompt.ids, max_tokens=limit, stop_ids=stop_ids)
            return Outcome(tokens, time.perf_counter() - start)

        for first_call in (speculate, by_itself):  # slow, and not timed
            first_call(prompts[0], 2)
        for number, prompt in enumerate(prompts, start=1):
            drafted.append(speculate(prompt, config.max_tokens))
            if config.alone is None or number <= config.alone:
                alone.append(by_itself(prompt, config.max_tokens))
            note(f"{number}/{len(prompts)} prompts, mean accepted length so far {_length(drafted)}")
    return Runs(drafted, alone, str(model.dtype).removeprefix("torch."))


def _with_vllm(
    config: EvalConfig, prompts: Sequence[Prompt], block_size: int, stop_ids: Sequence[int], note: Note
) -> Runs:
    import torch

    from dspark.tools.decode.vllm_serve import ServeRequest, run_vllm
    from dspark.train.draft.folder import load_config
    from dspark.train.draft.types import drafter

    dtype = "float32" if config.dtype == "auto" and not torch.accelerator.is_available() else config.dtype
    own = load_config(config.draft)
    speculation = drafter(own.speculator_type).serving(own)
    runs: list[list[Outcome]] = []
    for draft, asked in ((config.draft, prompts), (None, prompts[: config.alone])):
        if not asked:
            runs.append([])
            continue
        note(f"starting vLLM {'with the draft' if draft else 'with the target alone'} ({len(asked)} prompts)")
        request = ServeRequest(
            target=config.model, draft=draft, num_speculative_tokens=block_size, prompts=[p.ids for p in asked],
            max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed,
            stop_token_ids=tuple(stop_ids), dtype=dtype, speculation=speculation,
        )  # fmt: skip
        runs.append(run_vllm(request))
    return Runs(runs[0], runs[1], dtype)


def _length(outcomes: Sequence[Outcome]) -> str:
    length = summarise(outcomes)["mean_accepted_length"]
    return "-" if length is None else f"{length:.2f}"


@command(
    "eval",
    epilog="""\b
Examples:
  dspark-tools eval --model Qwen/Qwen3-4B --draft ./draft --data prompts.jsonl --limit 50
  dspark-tools eval --model Qwen/Qwen3-4B --draft ./draft --data gsm8k --limit 100 --markdown eval.md
  dspark-tools eval --model Qwen/Qwen3-4B --draft ./draft --data prompts.jsonl --engine vllm --json
  dspark-tools eval --model ./target --draft ./draft --data prompts.jsonl --temperature 0.7

Exit code 1 if a greedy answer in float32 is not the target's own.
""",
)
@click.option("--model", required=True, help="Target: a model id or a folder.")
@click.option("--draft", required=True, help="Folder that dspark-train wrote.")
@click.option(
    "--data",
    required=True,
    help=f"JSONL of chats ({{'messages': ...}}, the last answer is dropped) or token rows; or {NAMES} (speed-bench:coding: one category).",
)
@click.option("--engine", default="transformers", type=click.Choice(["transformers", "vllm"]))
@click.option("--max-tokens", default=256, type=COUNT, help="Most new tokens per answer.")
@click.option(
    "--temperature", default=0.0, type=Temperature(min=0), help="0 = greedy; above: rejection sampling."
)
@click.option("--limit", type=COUNT, help="Only the first N rows.  [default: all]")
@click.option(
    "--per-source", type=COUNT,
    help="Only the first N rows of each source (or category), such as 1 of each of SPEED-Bench's.  [default: all]",
)  # fmt: skip
@click.option(
    "--alone", type=click.IntRange(min=0),
    help="Also decode the first N prompts without the draft, for the speed-up and the lossless check.  [default: all]",
)  # fmt: skip
@click.option("--seed", default=0, type=SEED, help="Of sampling.")
@click.option(
    "--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="auto: the checkpoint's on a GPU, float32 on a CPU.",
)  # fmt: skip
@click.option(
    "--device", default="auto", type=DEVICE, help="auto, cpu, cuda or cuda:N; --engine transformers only."
)
@click.option("--output", type=OUTPUT_FILE, help="Also write the report as JSON to this file.")
@click.option("--markdown", "table_file", type=OUTPUT_FILE, help="Also write the table as Markdown.")
@click.option(
    "--answers", type=OUTPUT_FILE, help="Also write every answer and its counts, one JSON object per line."
)
@click.option(
    "--show",
    "show_answers",
    default=0,
    type=COUNT_OR_ALL,
    help="Print the first N answers, accepted draft tokens in colour.",
)
@json_flag
def eval_command(
    as_json: bool,
    output: Path | None,
    table_file: Path | None,
    answers: Path | None,
    show_answers: int,
    **flags: Any,
) -> None:
    """Decode prompts with a draft: accepted lengths, speed, and whether the output is the target's own."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading") as status:
        result, prompts, runs = run(EvalConfig(**flags), note=status.update)
    if as_json:  # first: a disk that has become full meanwhile does not take this with it
        emit(result)
    else:
        show(result)
    if show_answers:
        show_coloured(flags["model"], prompts, runs, show_answers, console)
    for path, text in (
        (output, json.dumps(result, indent=1) + "\n"),
        (table_file, markdown(result)),
        (answers, "".join(json.dumps(a) + "\n" for a in _answers(prompts, runs))),
    ):
        if path is not None:
            save(path, text.encode())
    if result["diverged"]:
        _explain(console, result)
        if result["dtype"] == "float32":
            click.get_current_context().exit(1)


def _answers(prompts: Sequence[Prompt], runs: Runs) -> Iterator[dict[str, Any]]:
    for prompt, outcome in zip(prompts, runs.drafted, strict=True):
        yield {
            "where": prompt.where, "source": prompt.source, "input_ids": prompt.ids, "tokens": outcome.tokens,
            "seconds": outcome.seconds, "drafts": outcome.drafts, "accepted_at": list(outcome.accepted_at),
            "accepted": accepted(len(prompt.ids), outcome) if outcome.drafted else None,
        }  # fmt: skip


def show_coloured(model: str, prompts: Sequence[Prompt], runs: Runs, count: int, console: Any) -> None:
    """The first ``count`` answers on stderr, what the draft guessed right in colour."""
    from rich.panel import Panel

    from dspark.dump.target.config import load_tokenizer

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        console.print("--show: the target has no tokenizer, so its answers have no text")
        return
    for prompt, outcome in list(zip(prompts, runs.drafted, strict=True))[:count]:
        marks = accepted(len(prompt.ids), outcome)
        text = coloured(tokenizer, outcome.tokens, marks)
        note = steps(outcome) if outcome.drafted else "which tokens were accepted is not known of this engine"
        console.print(Panel(text, title=prompt.where, subtitle=note, title_align="left"))
    console.print("Green: drafted and accepted. The rest are the target's own.", style="dim")


def show(result: dict[str, Any]) -> None:
    """The report on stdout, in tables that fit a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for columns in TABLES:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            table.add_column(name, no_wrap=True)
        for cells in lines(result):
            table.add_row(*(cells[HEADER.index(name)] for name in columns))
        console.print(table)
    console.print(how(result), highlight=False)
    if result["lossless"]:
        console.print("lossless: every answer is the target's own greedy answer")


def _explain(console: Any, result: dict[str, Any]) -> None:
    where = ", ".join(result["diverged"][:5])
    console.print(
        f"{len(result['diverged'])} of {result['compared']} answers are not the target's own ({where}). "
        + (
            "In float32 that should not happen."
            if result["dtype"] == "float32"
            else "Below float32 a near-tie can fall either way, as with any change of batch; rerun with --dtype float32 to be sure."
        ),
        highlight=False,
    )
