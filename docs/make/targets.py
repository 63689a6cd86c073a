"""Write the tables of docs/targets.md from dump/target/support.json and
bench/results/families.json: ``python docs/make/targets.py``.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from dspark.dump.target.support import Cell, Family, families, sources

PAGE = Path(__file__).parents[1] / "targets.md"
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "families.json"
BEGIN, END = "<!-- begin: docs/make/targets.py -->", "<!-- end: docs/make/targets.py -->"
COLUMNS = (("dump", "transformers"), ("dump", "vllm"), ("serve", "vllm"), ("serve", "sglang"))


def known() -> list[str]:
    """Families by what is known of engines and servers, then notes and sources."""
    notes: list[str] = []
    out = [
        "| family | `model_type` | "
        + " | ".join(f"{use}, {engine}" for use, engine in COLUMNS)
        + " |"
    ]
    out.append("|---|---|" + "---|" * len(COLUMNS))
    for family in families():
        cells = [_cell(family, use, engine, notes) for use, engine in COLUMNS]
        types = ", ".join(f"`{t}`" for t in family.model_types)
        out.append(f"| {family.name} | {types} | {' | '.join(cells)} |")
    out += [
        "",
        *(wrapped(f"{i}. {note}") for i, note in enumerate(notes, 1)),
        "",
        "Where it is known from:",
        "",
    ]
    return [*out, *(wrapped(f"- {name}: {what}") for name, what in sources().items())]


def _cell(family: Family, use: str, engine: str, notes: list[str]) -> str:
    found = [c for c in family.cells if (c.use, c.engine) == (use, engine)]
    return "; ".join(_words(c, notes) for c in found) or "not known"


def _words(cell: Cell, notes: list[str]) -> str:
    words = f"**{cell.state}** ({cell.source}{f', {cell.versions}' if cell.versions else ''})"
    if not cell.note:
        return words
    if cell.note not in notes:
        notes.append(cell.note)
    return f"{words} [{notes.index(cell.note) + 1}]"


def shown() -> list[str]:
    """What bench/families.py saw, a row per tiny checkpoint."""
    results = json.loads(RESULTS.read_text())["results"]
    out = ["| checkpoint | frozen weights | draft | dump | 2 steps, export | check | vLLM states |"]
    out.append("|---|---|---|---|---|---|---|")
    return out + [f"| {kind} | {' | '.join(_seen(r))} |" for kind, r in results.items()]


def _seen(result: dict[str, Any]) -> list[str]:
    journey = result.get("journey", {})
    stopped = journey.get("stopped")
    if not journey:
        cells = ["not run"] * 5
    elif stopped:
        cells = [f"refused: {stopped.split(': ', 1)[1]}", "-", "-", "-", "-"]
    else:
        d = journey["draft"]
        heads = f"{d['num_attention_heads']}/{d['num_key_value_heads']} heads of {d['head_dim']}"
        errors = journey["check_errors"]
        cells = [
            journey["frozen"],
            f"{heads}, MLP {d['intermediate_size']}",
            f"{journey['tokens']:,} tokens",
            f"{journey['exported_tensors']} tensors",
            "no error" if not errors else f"{len(errors)} errors: {errors[0]}",
        ]
    if "difference" in result:
        worst = max(d["max_rel"] for d in result["difference"].values())
        top1 = result["top1_vllm_states_against_transformers"]
        return [*cells, f"largest relative difference {worst:.1e}, top-1 {100 * top1:.0f} %"]
    vllm = result.get("vllm")
    return [*cells, vllm if isinstance(vllm, str) else "not run"]


def wrapped(item: str) -> str:
    """An item of a list in lines of at most 98 characters."""
    indent = " " * (item.index(" ") + 1)
    return textwrap.fill(
        item, 98, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def page(text: str) -> str:
    """Return ``text`` with what stands between the marks replaced by the tables of today."""
    before, rest = text.split(BEGIN)
    tables = "\n".join(
        [
            "## Engines and servers",
            "",
            *known(),
            "",
            "## Tiny checkpoints, end to end",
            "",
            *shown(),
        ]
    )
    return f"{before}{BEGIN}\n{tables}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
