"""Draw the learning curve of a run: ``python bench/plot_curve.py metrics.jsonl out.svg [title]``.
Needs matplotlib (``dspark[plots]``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(metrics: Path, out: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for held_out, style, label in ((False, "-", "training rows"), (True, "o-", "held-out prompts")):
        some = [
            r
            for r in rows
            if bool(r.get("validation")) == held_out and r.get("mean_accepted_length")
        ]
        left.plot(
            [r["step"] for r in some],
            [r["mean_accepted_length"] for r in some],
            style,
            lw=1,
            label=label,
        )
    left.set(xlabel="optimizer step", ylabel="mean accepted length (tau)", title=title)
    left.grid(alpha=0.3)
    left.legend()
    final = [r for r in rows if r.get("validation")][-1]
    slots = range(1, len(final["accept_rate"]) + 1)
    right.bar(slots, final["accept_rate"])
    right.set(
        xlabel="slot",
        ylabel="accept rate",
        ylim=(0, 1),
        title=f"held out, step {final['step']}: tau {final['mean_accepted_length']:.2f}",
    )
    fig.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else "")
