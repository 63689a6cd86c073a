"""``dspark-tools report``: one self-contained page on stores, runs and evaluations."""

from __future__ import annotations

import datetime
from pathlib import Path

import click

from dspark.cache.files.urls import GIVEN, Where
from dspark.cache.shared.command import command, emit, json_flag
from dspark.tools.outputs import OUTPUT_FILE, save


@command(
    "report",
    epilog="""\b
Examples:
  dspark-tools report ./hs.zarr ./draft eval.json -o report.html
  dspark-tools report ./draft-adamw ./draft-muon -o compare.html    several of a kind together
  dspark-tools report ./runs                                        a folder: what lies in it
""",
)
@click.argument("paths", nargs=-1, required=True, type=GIVEN)
@click.option("--output", "-o", type=OUTPUT_FILE, default="report.html", help="The page.")
@json_flag
def report_command(paths: tuple[Where, ...], output: Path, as_json: bool) -> None:
    """Plot stores, training runs and evaluations on one page that needs no network: open it in a
    browser.

    A PATH is a store, also at a URL, a draft folder, a file of `eval --output`, or a folder with
    any of these.
    """
    from dspark.tools.report.page import page
    from dspark.tools.report.sources import read

    sources = read(paths)
    made = datetime.datetime.now().strftime("made on %d %B %Y at %H:%M")
    data = page(sources, made).encode()
    save(output, data)
    counts = {
        "stores": len(sources.stores),
        "runs": len(sources.runs),
        "evaluations": len(sources.evals),
    }
    if as_json:
        emit({"output": str(output), "bytes": len(data), **counts})
        return
    told = [f"{n} {name if n > 1 else name[:-1]}" for name, n in counts.items() if n]
    print(f"{output}: {', '.join(told)}, {len(data):,} bytes")
