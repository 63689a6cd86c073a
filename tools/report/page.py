"""The report page: facts and charts of every store, run and evaluation, side by side. One file of
HTML, CSS and SVG; no scripts, no network.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from dspark import __version__
from dspark.tools.judge import eval_report
from dspark.tools.report import charts
from dspark.tools.report.charts import Line
from dspark.tools.report.sources import EvalView, RunView, Sources, StoreView
from dspark.train.run.history import sentences

KINDS = ("aux", "last", "tokens", "exact")

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5b6570;--grid:#d8dde3;
--c0:#2563eb;--c1:#d97706;--c2:#059669;--c3:#db2777;--c4:#7c3aed;--c5:#0891b2;--c6:#65a30d;--c7:#b91c1c}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1d2229;--ink:#e8ebee;--soft:#a3adb8;
--grid:#39414b;
--c0:#7aa7ff;--c1:#fbbf5c;--c2:#4ade9f;--c3:#f77fb8;--c4:#b79bff;--c5:#5ad1e6;--c6:#b5dd5a;--c7:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1.2rem;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.5rem;margin:0}h2{font-size:1.2rem;margin:2rem 0 .6rem}h3{font-size:.95rem;
margin:0 0 .4rem}
p{margin:.3rem 0}.soft,.none{color:var(--soft)}.none{font-style:italic}
.grid2{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
.card{background:var(--card);border-radius:.6rem;padding:.8rem;min-width:0}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .6rem .25rem 0;border-bottom:1px solid var(--grid);
vertical-align:top}
th{font-weight:600;color:var(--soft)}td.num{white-space:nowrap}
.heads{display:flex;flex-wrap:wrap;gap:.6rem 1.6rem;margin:.6rem 0}
.head b{display:block;font-size:1.5rem;line-height:1.2}.head span{color:var(--soft);
font-size:.85rem}
svg{width:100%;height:auto;display:block}svg text{fill:var(--ink);font-size:12px;
font-family:inherit}
svg .tick{fill:var(--soft);font-size:11px}.gridline,svg .grid{stroke:var(--grid);stroke-width:1}
svg .line{fill:none;stroke-width:2}svg .dashed{stroke-dasharray:6 4}svg .error{stroke-width:1.5;
opacity:.7}
.legend{list-style:none;margin:.3rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.1rem 1rem;
font-size:.85rem}
.key{display:inline-block;width:1.1rem;height:.6rem;margin-right:.35rem;border-radius:2px;
background:currentColor}
.key.dashed{background:repeating-linear-gradient(90deg,currentColor 0 5px,transparent 5px 8px)}
@media(max-width:40rem){thead{display:none}tr,td{display:block}
tr{border-bottom:1px solid var(--grid);padding:.3rem 0}
td.num{border:0;padding:0;white-space:normal;display:flex;gap:.6rem}
td::before{content:attr(data-head);flex:0 0 8.5rem;color:var(--soft)}}
footer{margin-top:2rem;color:var(--soft);font-size:.85rem}
""" + "".join(
    f"svg .c{i}{{stroke:var(--c{i})}}svg .dot.c{i},svg "
    f".bar.c{i}{{fill:var(--c{i});stroke:none}}.key.c{i}{{color:var(--c{i})}}"
    for i in range(charts.COLOURS)
)


def page(sources: Sources, made: str) -> str:
    """Return the whole document; ``made``: when it was made, in words."""
    sections = []
    if sources.evals:
        sections.append(_evals(sources.evals))
    if sources.runs:
        sections.append(_runs(sources.runs))
    if any(run.calibration for run in sources.runs):
        sections.append(_reliability([r for r in sources.runs if r.calibration]))
    if sources.stores:
        sections.append(_stores(sources.stores))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        "'unsafe-inline'\">"
        f"<title>dspark report</title><style>{STYLE}</style></head><body>"
        f'<h1>dspark report</h1><p class="soft">{html.escape(made)}</p>'
        + "".join(sections)
        + f"<footer>dspark {__version__}. Accepted length (tau): tokens per target step, the "
        "target's own token "
        "included. Dashed lines are held-out data. Hover over a mark for its "
        "number.</footer></body></html>\n"
    )


def card(title: str, body: str) -> str:
    return f'<div class="card"><h3>{html.escape(title)}</h3>{body}</div>'


def heads(pairs: Sequence[tuple[str, str]]) -> str:
    """Format large numbers with their captions."""
    cells = "".join(
        f'<div class="head"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>'
        for k, v in pairs
    )
    return f'<div class="heads">{cells}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(_cell(h, c) for h, c in zip(head, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        "<div "
        f'class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(head: str, text: str) -> str:
    """A cell that knows its column's name: a phone shows a line per cell."""
    return f'<td class="num" data-head="{html.escape(head)}">{html.escape(text)}</td>'


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _runs(runs: Sequence[RunView]) -> str:
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
    pairs = [(f"accepted length (tau), {where}", _number(last.get("mean_accepted_length"), 2))]
    if isinstance(last.get("walk"), int | float):
        pairs.append(("walk", _number(last["walk"], 2)))
    return heads([*pairs, ("steps", f"{last['step']:,}")])


def _run_row(run: RunView) -> tuple[str, ...]:
    def final(key: str, held_out: bool) -> str:
        points = run.series(key, held_out=held_out)
        return _number(points[-1][1]) if points else "-"

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


def _evals(evals: Sequence[EvalView]) -> str:
    names = list(dict.fromkeys(s for e in evals for s in e.report["per_source"]))
    lengths, rates = [], []
    for i, e in enumerate(evals):
        found = [
            (n, e.report["per_source"][s])
            for n, s in enumerate(names)
            if s in e.report["per_source"]
        ]
        known = [(n, r) for n, r in found if r["mean_accepted_length"] is not None]
        lengths.append(Line(
            e.name, [(n + 1.0, r["mean_accepted_length"]) for n, r in known], i,
            errors=[r["mean_accepted_length_se"] for _, r in known],
        ))  # fmt: skip
        if e.report["accept_rate"]:
            rates.append(Line(e.name, list(enumerate(e.report["accept_rate"], 1)), i))
    cards = [
        card(
            "Accept rate by position",
            charts.lines(rates, x="position", y="accept rate", low=0.0, high=1.0),
        ),
    ]
    if len(names) > 1:
        key = ", ".join(f"{n} {name}" for n, name in enumerate(names, 1))
        body = charts.lines(lengths, x="source", y="accepted length ± standard error")
        cards.append(
            card("Accepted length by source", body + f'<p class="soft">{html.escape(key)}</p>')
        )
    tables = "".join(
        card(
            f"{e.name}",
            table(eval_report.HEADER, eval_report.lines(e.report))
            + f'<p class="soft">{html.escape(eval_report.how(e.report))}</p>',
        )
        for e in evals
    )
    top = ""
    if len(evals) == 1:
        r = evals[0].report
        error = r["mean_accepted_length_se"]
        length = _number(r["mean_accepted_length"], 2) + (
            "" if error is None else f" ± {error:.2f}"
        )
        pairs = [("accepted length, decoded", length), ("prompts", str(r["prompts"]))]
        if r.get("tokens") and r["drafts"] and not r.get("stages"):
            steps = r["drafts"] + r["prompts"]
            pairs.append(("speed-up in target steps", f"{r['tokens'] / steps:.2f}x"))
        if r["speedup"] is not None:
            pairs.append(("speed-up here", f"{r['speedup']:.2f}x"))
        if r["lossless"] is not None:
            pairs.append(("lossless", "yes" if r["lossless"] else "NO"))
        top = heads(pairs)
    return (
        f'<section id="evals"><h2>Decoding</h2>{top}<div '
        f'class="grid2">{"".join(cards)}</div><br>{tables}</section>'
    )


def _reliability(runs: Sequence[RunView]) -> str:
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


def _stores(stores: Sequence[StoreView]) -> str:
    head = (
        "store",
        "target",
        "codec",
        "samples",
        "tokens",
        "supervised",
        "bytes per token",
        "smaller than raw",
        "source",
        "state",
    )
    rows = [_store_row(s) for s in stores]
    bytes_rows = [(s.name, s.stored) for s in stores]
    bytes_rows += [(f"{s.name} as raw bf16", s.raw) for s in stores]
    cards = [
        card("Bytes by array", charts.stacked(bytes_rows, KINDS)),
        card("Lengths of samples", _lengths(stores)),
        card("What the code keeps: signal to noise", _quality(stores)),
        card(
            "Massive values: largest over rms, by layer",
            _by_layer(stores, lambda r: r["absmax"] / r["rms"], "largest / rms"),
        ),
        card("Rms of the states, by layer", _by_layer(stores, lambda r: r["rms"], "rms")),
    ]
    lost = [(s.name, f"{k}: {v}") for s in stores for k, v in s.info["dropped"].items()]
    dropped = (
        card("Rows that gave no sample", table(("store", "reason: rows"), lost)) if lost else ""
    )
    return (
        '<section id="stores"><h2>Stores</h2><div '
        f'class="card">{table(head, rows)}</div><br><div '
        f'class="grid2">{"".join(cards)}{dropped}{_sources(stores)}</div></section>'
    )


def _sources(stores: Sequence[StoreView]) -> str:
    """Say what each source gave, for stores with several."""
    rows = [
        (
            s.name,
            f"{one['number']}: {one['id']}",
            f"{one['rows']:,}",
            f"{one['samples']:,}",
            f"{one['tokens']:,}",
        )
        for s in stores
        for one in s.info["per_source"]
    ]
    return (
        card("Sources", table(("store", "source", "rows", "samples", "tokens"), rows))
        if rows
        else ""
    )


def _store_row(s: StoreView) -> tuple[str, ...]:
    i = s.info
    return (
        s.name,
        str(i["target"]),
        str(i["codec"]),
        f"{i['samples']:,}",
        f"{i['tokens']:,}",
        f"{i['supervised_tokens'] / i['tokens']:.0%}" if i["tokens"] else "-",
        f"{i['bytes_per_token']:,.0f}" if i["bytes_per_token"] else "-",
        f"{i['ratio']:.2f} x" if i["ratio"] else "-",
        str(i["source"]),
        "complete" if i["complete"] else "not complete",
    )


def _lengths(stores: Sequence[StoreView]) -> str:
    found = {s.name: s.stats["length"]["histogram"] for s in stores if s.stats}
    spans = sorted({k for h in found.values() for k in h}, key=lambda k: int(k.split("-")[0]))
    series = [(name, [float(h.get(k, 0)) for k in spans]) for name, h in found.items()]
    return charts.bars(spans, series, x="tokens", y="samples")


def _quality(stores: Sequence[StoreView]) -> str:
    made = []
    for i, s in enumerate(stores):
        snr = s.info["quality"].get("aux_snr_db") or []
        points = [(n, db) for n, db in zip(s.info["layers"], snr, strict=False) if db is not None]
        last = s.info["quality"].get("last_snr_db")
        name = s.name + (f", last state {last:.1f} dB" if last is not None else "")
        if points:
            made.append(Line(name, points, i))
    if not made:
        return '<p class="none">nothing is lost (16 bits), or nothing was measured</p>'
    return charts.lines(made, x="layer", y="dB", low=0.0)


def _by_layer(stores: Sequence[StoreView], value: Any, label: str) -> str:
    made = [
        Line(s.name, [(r["layer"], value(r)) for r in s.stats["layers"] if r["rms"]], i)
        for i, s in enumerate(stores)
        if s.stats
    ]
    return charts.lines(made, x="layer", y=label, low=0.0)
