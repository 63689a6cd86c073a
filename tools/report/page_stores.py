"""The section of the page on stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dspark.tools.report import charts
from dspark.tools.report.charts import Line
from dspark.tools.report.markup import card, table
from dspark.tools.report.sources import StoreView

KINDS = ("aux", "last", "tokens", "exact")


def stores_section(stores: Sequence[StoreView]) -> str:
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
