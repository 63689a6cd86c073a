"""The report page: facts and charts of every store, run and evaluation, side by side. One file of
HTML, CSS and SVG; no scripts, no network.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from dspark import __version__
from dspark.tools.judge import eval_report
from dspark.tools.report import charts
from dspark.tools.report.charts import Line
from dspark.tools.report.markup import card, heads, number, table
from dspark.tools.report.page_runs import reliability_section, runs_section
from dspark.tools.report.page_stores import stores_section
from dspark.tools.report.sources import EvalView, Sources

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
        sections.append(evals_section(sources.evals))
    if sources.runs:
        sections.append(runs_section(sources.runs))
    if any(run.calibration for run in sources.runs):
        sections.append(reliability_section([r for r in sources.runs if r.calibration]))
    if sources.stores:
        sections.append(stores_section(sources.stores))
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


def evals_section(evals: Sequence[EvalView]) -> str:
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
        length = number(r["mean_accepted_length"], 2) + ("" if error is None else f" ± {error:.2f}")
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
