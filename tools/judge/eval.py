"""``dspark-tools eval``: real speculative decoding of real prompts, compared with the target alone.

The decoding is in ``dspark.tools.judge.evaluating``, the report in
``dspark.tools.judge.eval_report``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dspark.cache.shared.command import bar, command, emit, json_flag, printable
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
)
from dspark.tools.judge.evaluating import EvalConfig, Runs, run, run_each
from dspark.tools.outputs import OUTPUT_FILE, save


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
