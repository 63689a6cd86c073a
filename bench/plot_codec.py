"""Draw the README's picture from bench/results/klt_stores_corrected.json: bytes per token on disk,
and tau of drafts trained from exact states and from the default codec.

python bench/plot_codec.py docs/img/tau-and-bytes.svg
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results" / "klt_stores_corrected.json"
DEFAULT = "klt-1-1-2"
LABELS = ("exact states\n(lossless store)", f"compact codes\n({DEFAULT}, default)")
EXACT_COLOUR, CODED_COLOUR = "#7f7f7f", "#2a6f97"


def main(out: str) -> None:
    """Write the picture to ``out``; the format follows its suffix."""
    results = json.loads(RESULTS.read_text())["results"]
    rows = {row["codec"]: row for row in results["table"]}
    exact, coded = rows["exact"], rows[DEFAULT]
    sizes = [exact["raw"], exact["bytes_per_token_all"], coded["bytes_per_token_all"]]
    mpl.rcParams.update({"svg.hashsalt": "dspark", "svg.fonttype": "none", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.9), layout="constrained")

    colours = ["#bbbbbb", EXACT_COLOUR, CODED_COLOUR]
    bars = left.bar(["raw bf16\nlayout", *LABELS], sizes, color=colours)
    left.bar_label(bars, [f"{size:,.0f}" for size in sizes], padding=2)
    left.set_title("Bytes per token on disk")
    left.set_ylim(0, sizes[0] * 1.12)

    for pair in zip(exact["tau"], coded["tau"], strict=True):
        right.plot([0, 1], pair, "-", color="#cccccc", lw=1, zorder=1)
    for at, (row, colour) in enumerate(((exact, EXACT_COLOUR), (coded, CODED_COLOUR))):
        right.plot([at] * len(row["tau"]), row["tau"], "o", color=colour)
        mean = sum(row["tau"]) / len(row["tau"])
        right.plot([at - 0.15, at + 0.15], [mean] * 2, "-", color="black", lw=1)
        right.annotate(f"{mean:.2f}", (at + 0.18, mean), va="center")
    change, error = 100 * coded["change"], 100 * coded["standard_error"]
    right.set_xticks([0, 1], LABELS)
    right.set_xlim(-0.5, 1.5)
    right.set_ylim(2.7, 2.95)
    right.set_title(
        f"Held-out tau, {len(exact['tau'])} paired seeds: "
        f"{change:+.1f} ± {error:.1f} % (axis from 2.7)"
    )
    right.title.set_fontsize(8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7.5, length=0)
    figure.savefig(out, metadata={"Date": None} if out.endswith(".svg") else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
