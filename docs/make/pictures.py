"""Photograph what a person sees, in headless Chromium, for docs/look.md: ``python
docs/make/pictures.py DEMO TARGET``.

DEMO is what ``make demo`` left: hs.zarr, draft, eval.json, report.html. Needs ``chromium`` and
``script`` on the path, and Pillow. Programs of the terminal run in one of 100 columns; what they
print is drawn by rich and photographed like a page.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parents[1] / "img"
COLUMNS = 100
COLOURS = 64  # of a picture: a third of the bytes, and no difference to be seen
DARK = "--blink-settings=preferredColorScheme=0"


def photograph(url: str, name: str, width: int, height: int, *more: str, crop: int = 0) -> None:
    """Save a picture of ``url`` as docs/img/NAME.png; ``crop``: pixels from the left to keep."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        subprocess.run(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--user-data-dir={folder}/profile", f"--window-size={width},{height}",
             f"--screenshot={shot}", *more, url],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        picture = Image.open(shot).convert("RGB")
    if crop:
        picture = picture.crop((0, 0, crop, picture.height))
    path = IMAGES / f"{name}.png"
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def terminal(command: str, name: str, title: str, folder: Path | None = None) -> None:
    """Run ``command`` in a terminal, in ``folder``, and save a picture of what it printed."""
    shell = f"stty cols {COLUMNS}; {command}"
    ran = subprocess.run(
        ["script", "-qec", shell, "/dev/null"],
        capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    shown = re.sub(r"\x1b\[[?\d;]*[hlAKJ]", "", ran.stdout.replace("\r\n", "\n"))
    rows = [row.rpartition("\r")[2] for row in shown.rstrip("\n").split("\n")]
    bars = [row.partition("\u2501")[0] if "\u2501" in row else None for row in rows]
    last = [a is None or a != b for a, b in zip(bars, [*bars[1:], None], strict=True)]
    rows = [row for row, keep in zip(rows, last, strict=True) if keep]  # a bar's last state
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for row in rows:
        console.print(Text.from_ansi(row), overflow="fold")
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.DOTALL)
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")  # no network
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    width, height = (round(float(x)) for x in box.groups())
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as page:
        drawn = svg.replace("<svg ", f'<svg width="{width}" ', 1)
        page.write(f'<meta charset="utf-8"><body style="margin:0">{drawn}')
        page.flush()
        photograph(f"file://{page.name}", name, width, height)


def main() -> None:
    demo, target = Path(sys.argv[1]).resolve(), sys.argv[2]
    report = f"file://{demo}/report.html"
    photograph(report, "report-light", 1280, 1250)
    photograph(report, "report-dark", 1280, 1250, DARK)
    with tempfile.NamedTemporaryFile("w", suffix=".html") as page:
        page.write(f'<body style="margin:0"><iframe src="{report}" width="390" height="1400" ')
        page.write('style="border:0">')
        page.flush()
        photograph(f"file://{page.name}", "report-phone", 500, 1400, crop=390)
    terminal("dspark-tools watch draft --once", "watch", "dspark-tools watch draft", demo)
    terminal(
        f"dspark-tools data examples/code.jsonl --model {target} --limit 1",
        "data",
        "dspark-tools data code.jsonl --model smollm2",
    )
    if len(sys.argv) > 3:  # seconds to minutes of decoding
        terminal(
            f"dspark-tools eval --model {target} --draft {demo}/draft --max-tokens 48 "
            f"--data examples/code_held_out.jsonl --alone 1 --show 1 {sys.argv[3]}",
            "eval",
            "dspark-tools eval --model smollm2 --draft draft --data code_held_out.jsonl --show 1",
        )


if __name__ == "__main__":
    main()
