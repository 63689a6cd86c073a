"""python bench/conversation_table.py: writes the table of docs/conversations.md, real templates x
shapes of conversation.

A cell is the number of samples that a row of this shape gives under the template; "-": none, with
the reason below the table.
What is supervised in each cell is held against a table made by hand in
tests/dump/test_template_matrix.py.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "conversations.md"
BEGIN, END = "<!-- table: python bench/conversation_table.py -->", "<!-- end of table -->"


def table() -> str:
    """Markdown."""
    from template_cells import SHAPES, templates, tokenizer

    from dspark.dump.corpus.masks import SampleMaker
    from dspark.dump.corpus.rows import row_of

    lines = ["| template | " + " | ".join(SHAPES) + " |", "|---" * (len(SHAPES) + 1) + "|"]
    reasons: dict[str, int] = {}
    for name in templates():
        maker = SampleMaker(
            tokenizer(name),
            tokenised=False,
            vocab_size=9999,
            seq_length=8000,
            min_supervised=1,
            day="2026-01-01",
        )
        cells = []
        for row in SHAPES.values():
            made = maker.make(row_of(0, "row", json.loads(json.dumps(row))))
            if made.dropped:
                number = reasons.setdefault(made.dropped, len(reasons) + 1)
                cells.append(f"- ({number})")
            else:
                left_out = sum(
                    n for note, n in made.notes.items() if note.startswith("answer left out")
                )
                cells.append(f"{len(made.samples)}" + ("\\*" if left_out else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [
        textwrap.fill(
            f"{number}. {reason}",
            98,
            subsequent_indent="   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for reason, number in reasons.items()
    ]
    return "\n".join(
        [*lines, "", "\\* an answer is left out; the row's other answers are kept.", "", *notes]
    )


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
