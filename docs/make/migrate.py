"""Write the flag tables of docs/migrate.md from cache/shared/peer_flags.json: ``python
docs/make/migrate.py``.
"""

from __future__ import annotations

from pathlib import Path

from dspark.cache.shared.peers import table

PAGE = Path(__file__).parents[1] / "migrate.md"
BEGIN, END = "<!-- begin: docs/make/migrate.py -->", "<!-- end: docs/make/migrate.py -->"


def tables() -> str:
    """One section with a table for each program, in the order of the file."""
    out = []
    for program, entry in table().items():
        out.append(f"### {program}\n\n| theirs | ours | note |\n|---|---|---|")
        for theirs, (ours, note) in entry["flags"].items():
            same = ours == f"{entry['command']} {theirs}"
            out.append(
                f"| `{theirs}` | {'same' if same else f'`{ours}`' if ours else '-'} | {note} |"
            )
        out.append("")
    return "\n".join(out)


def page(text: str) -> str:
    """Return ``text`` with what stands between the marks replaced by the tables of today."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
