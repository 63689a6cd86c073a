"""Pieces of the page: cards, tables, large numbers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def card(title: str, body: str) -> str:
    """Frame ``body`` (HTML) under a title."""
    return f'<div class="card"><h3>{html.escape(title)}</h3>{body}</div>'


def heads(pairs: Sequence[tuple[str, str]]) -> str:
    """Format large numbers with their captions."""
    cells = "".join(
        f'<div class="head"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>'
        for k, v in pairs
    )
    return f'<div class="heads">{cells}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table of texts."""
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(cell(h, c) for h, c in zip(head, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        "<div "
        f'class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def cell(head: str, text: str) -> str:
    """A cell that knows its column's name: a phone shows a line per cell."""
    return f'<td class="num" data-head="{html.escape(head)}">{html.escape(text)}</td>'


def number(value: Any, digits: int = 3) -> str:
    """Format a number; a dash if there is none."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"
