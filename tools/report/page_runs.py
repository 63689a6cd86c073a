"""The sections of the page on trainings and their calibrations."""

from __future__ import annotations

import html
from collections.abc import Sequence

from dspark.tools.report import charts
from dspark.tools.report.charts import Line
from dspark.tools.report.markup import card, heads, number, table
from dspark.tools.report.sources import RunView
from dspark.train.run.history import sentences


def runs_section(runs: Sequence[RunView]) -> str:
    both = [(run, i, held) for i, run in enumerate(runs) for held in (False, True)]

    def over(key: str, label: str, *, low: float | None = None, held: bool = True) -> str:
        made = [
            Line(
                f"{run.name}{', held out' if out else ''}",
                run.series(key, held_out=out),
                i,
                dashed=out,
            )
            for run, i, out in both
            if held or not out
        ]
        return charts.lines(made, x="step", y=label, low=low)

    cards = [
        card("Accepted length (tau)", over("mean_accepted_length", "tokens per target step")),
        card("Loss", over("loss", "loss")),
    ]
    if any(run.series(key, held_out=True) for run in runs for key in ("walk", "walk_greedy")):
        walks = [
            Line(f"{run.name}, {name}", run.series(key, held_out=True), 2 * i + j, dashed=bool(j))
            for i, run in enumerate(runs)
            for j, (key, name) in enumerate((("walk", "temperature 1"), ("walk_greedy", "greedy")))
        ]
        cards.append(card("Walk: accepted length where decoding begins its blocks",
                          charts.lines(walks, x="step", y="tokens per target step")))  # fmt: skip
    cards += [
        card(f"Accept rate by slot{'' if len(runs) == 1 else ': ' + run.name}", _slots(run))
        for run in runs
    ]
    if len(runs) > 1:
        cards.append(card("Last accept rates by slot", _last_rates(runs)))
    cards += [
        card(title, over(key, label, low=low))
        for key, title, label, low in (
            ("ce_loss", "Cross entropy", "nats", None),
            ("l1_loss", "L1 distance of the distributions", "L1", 0.0),
            ("confidence_loss", "Confidence loss", "loss", None),
        )
        if any(run.series(key, held_out=False) for run in runs)
    ]
    cards += [
        card(title, over(key, label, low=0.0, held=False))
        for key, title, label in (
            ("tokens_per_second", "Throughput", "tokens per second"),
            ("data_wait_fraction", "Share of time waiting for data", "share"),
            ("peak_gb", "Peak memory of a device", "GB"),
            ("grad_norm", "Gradient norm", "norm"),
        )
        if any(run.series(key, held_out=False) for run in runs)
    ]
    cards += [
        card(f"History{'' if len(runs) == 1 else ': ' + run.name}", _history(run))
        for run in runs
        if run.history
    ]
    rows = [_run_row(run) for run in runs]
    top = table(("run", "tau, held out", "tau, training", "walk", "steps", "settings"), rows)
    return (
        f'<section id="runs"><h2>Training</h2>{_run_heads(runs)}<div '
        f'class="card">{top}</div><br><div class="grid2">{"".join(cards)}</div></section>'
    )


def _history(run: RunView) -> str:
    """Say in sentences what the draft started from, and which sessions trained it."""
    return "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences(run.history))


def _run_heads(runs: Sequence[RunView]) -> str:
    if len(runs) != 1:
        return ""
    run = runs[0]
    judged = run.rows(held_out=True) or run.rows(held_out=False)
    if not judged:
        return ""
    last = judged[-1]
    where = "held out" if run.rows(held_out=True) else "training rows"
    pairs = [(f"accepted length (tau), {where}", number(last.get("mean_accepted_length"), 2))]
    if isinstance(last.get("walk"), int | float):
        pairs.append(("walk", number(last["walk"], 2)))
    return heads([*pairs, ("steps", f"{last['step']:,}")])


def _run_row(run: RunView) -> tuple[str, ...]:
    def final(key: str, held_out: bool) -> str:
        points = run.series(key, held_out=held_out)
        return number(points[-1][1]) if points else "-"

    s = run.settings
    told = ", ".join(
        f"{k.replace('_', ' ')} {s[k]}"
        for k in ("speculator_type", "num_layers", "block_size", "optimizer", "lr")
        if k in s
    )
    steps = f"{run.metrics[-1]['step']:,}" if run.metrics else "-"
    return (
        run.name,
        final("mean_accepted_length", True),
        final("mean_accepted_length", False),
        final("walk", True),
        steps,
        told or "-",
    )


def _slots(run: RunView) -> str:
    held = run.rows(held_out=True)
    rows = [
        r for r in (held if len(held) > 1 else run.rows(held_out=False)) if r.get("accept_rate")
    ]
    slots = len(rows[-1]["accept_rate"]) if rows else 0
    made = [
        Line(
            f"slot {k + 1}",
            [(r["step"], r["accept_rate"][k]) for r in rows],
            k,
            dashed=len(held) > 1,
        )
        for k in range(slots)
    ]
    return charts.lines(made, x="step", y="accept rate", low=0.0)


def _last_rates(runs: Sequence[RunView]) -> str:
    made = []
    for i, run in enumerate(runs):
        rows = [
            r for r in run.rows(held_out=True) or run.rows(held_out=False) if r.get("accept_rate")
        ]
        if rows:
            made.append(Line(run.name, list(enumerate(rows[-1]["accept_rate"], 1)), i))
    return charts.lines(made, x="slot", y="accept rate", low=0.0, high=1.0)


def reliability_section(runs: Sequence[RunView]) -> str:
    cards = []
    for run in runs:
        before, after = (run.calibration[k]["survival"] for k in ("before", "after"))
        for k in range(len(before["ece"])):
            made = [
                Line(
                    f"{name}, ECE {side['ece'][k]:.3f}",
                    [(b["confidence"], b["accepted"]) for b in side["diagram"][k]],
                    j,
                )
                for j, (name, side) in enumerate(
                    (("as the head says", before), ("calibrated", after))
                )
            ]
            title = f"Position {k + 1}" if len(runs) == 1 else f"{run.name}, position {k + 1}"
            cards.append(
                card(
                    title,
                    charts.lines(
                        [Line("", [(0, 0), (1, 1)], 6, dashed=True), *made],
                        x="survival predicted",
                        y="accepted",
                        low=0.0,
                        high=1.0,
                    ),
                )
            )
    return (
        '<section id="reliability"><h2>Confidence</h2><div '
        f'class="grid2">{"".join(cards)}</div></section>'
    )
