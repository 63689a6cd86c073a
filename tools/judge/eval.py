"""``dspark-tools eval``: real speculative decoding of real prompts, compared with the target alone.

Both engines run one prompt at a time and count as vLLM does (``dspark.tools.decode.outcome``).
``lossless`` compares with the target decoding alone in the same engine: transformers' own
``generate``, or a second vLLM without the draft (``--alone N``: on the first N prompts only, as it
takes the longest). The report is in ``dspark.tools.judge.eval_report``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dspark.cache.errors import DraftError
from dspark.cache.shared.command import Progress, bar, command, emit, json_flag, printable
from dspark.tools.decode.outcome import Outcome, summarise
from dspark.tools.decode.prompts import Prompt
from dspark.tools.decode.promptsets import NAMES
from dspark.tools.flags import COUNT, COUNT_OR_ALL, DEVICE, SEED, Temperature
from dspark.tools.judge import several
from dspark.tools.judge.coloured import accepted, coloured, steps
from dspark.tools.judge.eval_report import (
    HEADER,
    TABLES,
    how,
    in_steps,
    lines,
    markdown,
    relative_cost,
    report,
)
from dspark.tools.outputs import OUTPUT_FILE, save

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
    from dspark.tools.decode.target import Target, greedy_alone, load_model
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
        with Target(model, load_config(folder).target_layer_ids) as target:
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


@command(
    "eval",
    epilog="""\b
Examples:
  dspark-tools eval --model Qwen/Qwen3-4B --draft ./draft --data prompts.jsonl --limit 50
  dspark-tools eval --model Qwen/Qwen3-4B --draft ./draft --data gsm8k --markdown eval.md
  dspark-tools eval --model Qwen/Qwen3-4B --draft ./draft --data prompts.jsonl --engine vllm --json
  dspark-tools eval --model ./target --draft ./draft --data prompts.jsonl --temperature 0.7
  dspark-tools eval --model ./target --draft ./dspark --draft ./eagle3 --data gsm8k    one table

Exit code 1 if a greedy answer in float32 is not the target's own.
""",
)
@click.option("--model", required=True, help="Target: a model id or a folder.")
@click.option(
    "--draft",
    required=True,
    multiple=True,
    help="Draft folder that dspark-train wrote. Repeatable: one table, on the same prompts.",
)
@click.option(
    "--data",
    required=True,
    help="JSONL of chats ({'messages': ...}; the last answer is dropped) or of token rows; or "
    f"one of {NAMES} (speed-bench:coding: one category).",
)
@click.option("--engine", default="transformers", type=click.Choice(["transformers", "vllm"]))
@click.option("--max-tokens", default=256, type=COUNT, help="Maximum new tokens per answer.")
@click.option(
    "--temperature",
    default=0.0,
    type=Temperature(min=0),
    help="0 = greedy; above 0: rejection sampling.",
)
@click.option("--limit", type=COUNT, help="Only the first N rows.  [default: all]")
@click.option(
    "--per-source",
    type=COUNT,
    help="Only the first N rows of each source or category, such as 1 per SPEED-Bench category. "
    " [default: all]",
)
@click.option(
    "--alone",
    type=click.IntRange(min=0),
    help="Also decode the first N prompts without the draft, to measure the speed-up and check "
    "losslessness.  [default: all]",
)
@click.option("--seed", default=0, type=SEED, help="Of sampling.")
@click.option(
    "--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="auto: the checkpoint's on a GPU, float32 on a CPU.",
)  # fmt: skip
@click.option(
    "--device",
    default="auto",
    type=DEVICE,
    help="auto, cpu, cuda or cuda:N; --engine transformers only.",
)
@click.option("--output", type=OUTPUT_FILE, help="Also write the report as JSON to this file.")
@click.option(
    "--markdown", "table_file", type=OUTPUT_FILE, help="Also write the table as Markdown."
)
@click.option(
    "--answers",
    type=OUTPUT_FILE,
    help="Also write every answer and its counts, one JSON object per line.",
)
@click.option(
    "--show",
    "show_answers",
    default=0,
    type=COUNT_OR_ALL,
    help="Print the first N answers with accepted draft tokens in colour.",
)
@json_flag
def eval_command(
    draft: tuple[str, ...],
    as_json: bool,
    output: Path | None,
    table_file: Path | None,
    answers: Path | None,
    show_answers: int,
    **flags: Any,
) -> None:
    """Decode prompts with a draft: accepted lengths, speed, and whether the output is the target's
    own.
    """
    from rich.console import Console

    console = Console(stderr=True)
    config = EvalConfig(draft=draft[0], **flags)
    with bar("eval: prompts") as progress:
        if len(draft) == 1:
            result, prompts, runs = run(config, progress)
            found = [(result, runs)]
        else:
            found, prompts = run_each(config, draft, progress)
    told: dict[str, Any] = found[0][0]
    if len(draft) > 1:
        told = {
            "drafts": [
                {"draft": folder} | result for folder, (result, _) in zip(draft, found, strict=True)
            ]
        }
        side_by_side = (
            several.cells(draft, [result for result, _ in found], several.EVAL),
            how(found[0][0]),
        )
    if as_json:  # first, so that a disk that became full meanwhile does not lose this
        emit(told)
    elif len(draft) > 1:
        several.show(*side_by_side)
    else:
        show(told)
    for folder, (_, runs) in zip(draft, found, strict=True):
        if show_answers:
            show_coloured(
                flags["model"],
                prompts,
                runs,
                show_answers,
                console,
                folder if len(draft) > 1 else "",
            )
    lines_of = [
        {"draft": d} | a
        for d, (_, r) in zip(draft, found, strict=True)
        for a in _answers(prompts, r)
    ]
    for path, text in (
        (output, json.dumps(told, indent=1) + "\n"),
        (table_file, several.markdown(*side_by_side) if len(draft) > 1 else markdown(told)),
        (answers, "".join(json.dumps(line) + "\n" for line in lines_of)),
    ):
        if path is not None:
            save(path, text.encode())
    wrong = [
        (folder, result)
        for folder, (result, _) in zip(draft, found, strict=True)
        if result["diverged"]
    ]
    for folder, result in wrong:
        _explain(console, result, f"{folder}: " if len(draft) > 1 else "")
    if any(result["dtype"] == "float32" for _, result in wrong):
        click.get_current_context().exit(1)


def _answers(prompts: Sequence[Prompt], runs: Runs) -> Iterator[dict[str, Any]]:
    for prompt, outcome in zip(prompts, runs.drafted, strict=True):
        yield {
            "where": prompt.where,
            "source": prompt.source,
            "input_ids": prompt.ids,
            "tokens": outcome.tokens,
            "seconds": outcome.seconds,
            "drafts": outcome.drafts,
            "accepted_at": list(outcome.accepted_at),
            "accepted": accepted(len(prompt.ids), outcome) if outcome.drafted else None,
        }


def show_coloured(
    model: str, prompts: Sequence[Prompt], runs: Runs, count: int, console: Any, whose: str = ""
) -> None:
    """Print the first ``count`` answers on stderr, with correctly drafted tokens in colour."""
    from rich.panel import Panel

    from dspark.dump.target.config import load_tokenizer

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        console.print("--show: the target has no tokenizer, so its answers have no text")
        return
    for prompt, outcome in list(zip(prompts, runs.drafted, strict=True))[:count]:
        marks = accepted(len(prompt.ids), outcome)
        text = coloured(tokenizer, outcome.tokens, marks)
        note = (
            steps(outcome)
            if outcome.drafted
            else "this engine does not tell which tokens were accepted"
        )
        console.print(
            Panel(
                text,
                title=printable(f"{whose} {prompt.where}".strip()),
                subtitle=note,
                title_align="left",
            )
        )
    console.print("Green: drafted and accepted. The rest are the target's own.", style="dim")


def show(result: dict[str, Any]) -> None:
    """Print the report on stdout, in tables that fit a terminal."""
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
    if result["drafts"] and not result.get("stages"):
        console.print(in_steps(result), highlight=False)
    if result["lossless"]:
        console.print("lossless: every answer is the target's own greedy answer")


def _explain(console: Any, result: dict[str, Any], whose: str = "") -> None:
    where = ", ".join(result["diverged"][:5])
    console.print(
        f"{whose}{len(result['diverged'])} of {result['compared']} answers differ from the "
        f"target's own ({where}). "
        + (
            "In float32 this should not happen."
            if result["dtype"] == "float32"
            else "Below float32, a near-tie can fall either way, as with any change of batch; "
            "rerun with --dtype float32 to be sure."
        ),
        highlight=False,
    )
