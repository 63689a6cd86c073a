"""``dspark-tools data``: show which parts of a file of conversations would be supervised, before
anything runs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click

from dspark.cache.shared.command import command, emit, json_flag, printable
from dspark.dump.config import DEFAULT_SEQ_LENGTH, TURNS
from dspark.tools.flags import COUNT, COUNT_OR_ALL

SHOWN = 5


def judged(corpus: Any, maker: Any, limit: int) -> Iterator[dict[str, Any]]:
    """Yield, per row, ``{"row", "where", "samples": [{"turn", "tokens", "text", "spans"}],
    "reason", "detail", "notes", "count"}``; ``spans``: characters ``[start, stop)`` of ``text``
    that are supervised. The first ``limit`` rows (0 = all) include texts.
    """
    from dspark.dump.corpus.rows import BadRow

    for n, row in enumerate(corpus.rows()):
        out: dict[str, Any] = {"row": row.number, "where": row.where, "samples": [], "reason": None}
        if maker is None:
            bad = isinstance(row.value, BadRow)
            yield out | {
                "reason": "malformed row" if bad else None,
                "detail": row.value.detail if isinstance(row.value, BadRow) else "",
                "notes": {},
                "count": 0,
            }
            continue
        made = maker.make(row)
        if not limit or n < limit:
            out["samples"] = [_shown(maker.tokenizer, s) for s in made.samples]
        yield out | {
            "reason": made.dropped,
            "detail": made.detail,
            "notes": dict(made.notes),
            "count": len(made.samples),
        }


def _shown(tokenizer: Any, sample: Any) -> dict[str, Any]:
    from dspark.tools.stores.show import mask_runs

    text, spans = "", []
    for run in mask_runs(tokenizer, sample):
        if run["supervised"]:
            spans.append([len(text), len(text) + len(run["text"])])
        text += run["text"]
    return {"turn": sample.turn, "tokens": len(sample.input_ids), "text": text, "spans": spans}


def data(
    file: str,
    model: str | None,
    limit: int,
    *,
    seq_length: int,
    min_supervised: int,
    turns: str,
    pattern: str | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the report that ``--json`` prints: counts over all rows, texts of the first ``limit``
    (0 = all).
    """
    from dspark.dump.corpus.masks import SampleMaker
    from dspark.dump.corpus.rows import BadRow
    from dspark.dump.corpus.shapes import TokenRow
    from dspark.dump.corpus.sources import open_corpus
    from dspark.dump.corpus.template import today

    corpus = open_corpus(file)
    first = next((row for row in corpus.rows() if not isinstance(row.value, BadRow)), None)
    maker, day = None, today()
    if model is not None:
        from dspark.dump.target.config import load_target

        target = load_target(model)
        maker = SampleMaker(
            target.tokenizer,
            tokenised=first is not None and isinstance(first.value, TokenRow),
            vocab_size=target.shapes.vocab_size,
            seq_length=seq_length,
            min_supervised=min_supervised,
            assistant_pattern=pattern,
            turns=turns,
            template_kwargs=kwargs,
            day=day,
        )
    rows = samples = 0
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    shown = []
    for one in judged(corpus, maker, limit):
        rows += 1
        samples += one.pop("count")
        notes.update(one["notes"])
        if one["reason"]:
            dropped[one["reason"]] += 1
        if not limit or rows <= limit:
            shown.append(one)
    return {
        "file": file,
        "model": model,
        "rows": rows,
        "samples": samples,
        "dropped": dict(dropped),
        "notes": dict(notes),
        "per_row": shown,
    }


@command(
    "data",
    epilog="""\b
Examples:
  dspark-tools data chats.jsonl --model Qwen/Qwen3-8B
  dspark-tools data chats.parquet --model ./model --turns each --limit 0 --json
""",
)
@click.argument("file")
@click.option(
    "--model",
    help=(
        "Target whose tokenizer and template to use: id or folder. Without it, rows are only "
        "parsed."
    ),
)
@click.option(
    "--limit", type=COUNT_OR_ALL, default=SHOWN, help="Rows to show; 0 = all. All rows are counted."
)
@click.option("--turns", type=click.Choice(TURNS), default="auto", help="As for dspark-dump.")
@click.option("--template-kwargs", metavar="JSON", help="As for dspark-dump.")
@click.option("--assistant-pattern", metavar="REGEX", help="As for dspark-dump.")
@click.option("--seq-length", type=COUNT, default=DEFAULT_SEQ_LENGTH, help="As for dspark-dump.")
@click.option("--min-supervised", type=COUNT, default=2, help="As for dspark-dump.")
@json_flag
def data_command(
    file: str,
    model: str | None,
    limit: int,
    turns: str,
    template_kwargs: str | None,
    assistant_pattern: str | None,
    seq_length: int,
    min_supervised: int,
    as_json: bool,
) -> None:
    """Show what would be supervised in each conversation of FILE, and why a row gives no sample."""
    from dspark.dump.config import template_keywords

    report = data(
        file, model, limit, seq_length=seq_length, min_supervised=min_supervised, turns=turns,
        pattern=assistant_pattern, kwargs=template_keywords(template_kwargs),
    )  # fmt: skip
    if as_json:
        emit(report)
        return
    _print(report)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for row in report["per_row"]:
        for sample in row["samples"]:
            where = printable(row["where"])
            console.rule(
                f"{where}, answer {sample['turn']}, {sample['tokens']} tokens", align="left"
            )
            out, at = Text(), 0
            for start, stop in sample["spans"]:
                out.append(printable(sample["text"][at:start]), style="dim")
                marked = printable(sample["text"][start:stop])
                out.append(marked if console.is_terminal else f"[[{marked}]]", style="bold green")
                at = stop
            console.print(out.append(printable(sample["text"][at:]), style="dim"))
        if row["reason"]:
            more = f" ({row['detail']})" if row["detail"] else ""
            console.print(
                Text(printable(f"{row['where']}: no sample: {row['reason']}{more}"), style="red")
            )
    print(f"{report['rows']:,} rows, {report['samples']:,} samples", file=sys.stderr)
    for reason, n in report["dropped"].items():
        print(f"  dropped: {printable(reason)}: {n:,}", file=sys.stderr)
    for note, n in report["notes"].items():
        print(f"  {note}: {n:,}", file=sys.stderr)
