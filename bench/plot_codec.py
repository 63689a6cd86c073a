"""Draw the README's picture from bench/results/codec.json: bytes per token and tau, by codec.

python bench/plot_codec.py docs/img/tau-and-bytes.svg
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results" / "codec.json"
NAMES = {
    "16/16": "exact\n(lossless)",
    "4/4": "4 bits\n(default)",
    "3/4": "3 bits\n(small)",
    "2/4": "2 bits\n(smallest)",
}


def main(out: str) -> None:
    """Write the picture to ``out``; the format follows its suffix."""
    result = json.loads(RESULTS.read_text())
    rows = {row["name"]: row for row in result["results"]}
    raw = rows["16/16"]["bytes_per_token"] * rows["16/16"]["ratio"]
    mpl.rcParams.update({"svg.hashsalt": "dspark", "svg.fonttype": "none", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.9), layout="constrained")

    labels = ["raw bf16\nlayout", *NAMES.values()]
    sizes = [raw, *(rows[name]["bytes_per_token"] for name in NAMES)]
    bars = left.bar(labels, sizes, color=["#bbbbbb", "#7f7f7f", *["#2a6f97"] * 3])
    left.bar_label(bars, [f"{size:,.0f}" for size in sizes], padding=2)
    left.set_title("Bytes per token on disk")
    left.set_ylim(0, raw * 1.12)

    for at, name in enumerate(NAMES):
        tau = rows[name]["tau"]
        right.plot([at] * len(tau), tau, "o", color="#7f7f7f" if at == 0 else "#2a6f97")
        right.plot([at - 0.2, at + 0.2], [sum(tau) / len(tau)] * 2, "-", color="black", lw=1)
    right.set_xticks(range(len(NAMES)), list(NAMES.values()))
    right.set_xlim(-0.5, len(NAMES) - 0.5)
    right.set_ylim(2.2, 2.6)
    right.set_title("Held-out tau (dots: two seeds; line: mean; axis from 2.2)")
    right.title.set_fontsize(8.5)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7.5, length=0)
    figure.savefig(out, metadata={"Date": None} if out.endswith(".svg") else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
