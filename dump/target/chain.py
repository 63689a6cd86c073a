"""The chain from a target to a served draft, checked link by link before the first weight is read.

config -> layers -> frozen weights -> draft -> extraction -> serving. A link is found, unknown
(nothing here can tell) or missing; what is missing stops a dump before it starts, with what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.cache.errors import DsparkError, TargetError
from dspark.cache.target.shape import shape_for
from dspark.dump.target.layers import Shapes
from dspark.dump.target.support import Family, family_of

FOUND, UNKNOWN, MISSING = "found", "unknown", "missing"


@dataclass(frozen=True, slots=True)
class Link:
    """``state``: found, unknown or missing. ``text``: what was found, or why not, and what to
    do.
    """

    name: str
    state: str
    text: str


class BrokenChain(TargetError):
    """A link is missing. ``links``: all that were examined."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = tuple(links)
        first = next(link for link in links if link.state == MISSING)
        super().__init__(f"{first.name}: {first.text}")


def table(links: Sequence[Link]) -> list[str]:
    """One line per link, for a person."""
    width = max(len(link.name) for link in links)
    return [f"{link.name:{width}}  {link.state:7}  {link.text}" for link in links]


def require(links: Sequence[Link]) -> None:
    """Raise BrokenChain unless no link is missing."""
    if any(link.state == MISSING for link in links):
        raise BrokenChain(links)


def examine(
    *,
    config: Mapping[str, Any],
    model_types: Sequence[str | None],
    shapes: Shapes,
    layers: Sequence[int],
    engine: str,
    version: str | None,
    frozen: Callable[[], str] | None,
) -> tuple[Link, ...]:
    """Examine every link of a target whose text config is ``config``. ``layers``: outputs of
    decoder layers, already checked. ``frozen`` finds the frozen weights and says where they are, or
    raises TargetError; None = the checkpoint is not local. ``version``: of the engine that would
    run the target.
    """
    kind = next((t for t in model_types if t), "not known")
    family = family_of(model_types)
    ids = " ".join(str(i + 1) for i in layers)
    return (
        Link(
            "config",
            FOUND,
            f"{kind}: {shapes.num_layers} layers, hidden {shapes.hidden_size}, vocabulary "
            f"{shapes.vocab_size}",
        ),
        Link(
            "layers", FOUND, f'--layers {",".join(map(str, layers))} = --target-layer-ids "{ids}"'
        ),
        _frozen(frozen),
        _draft(config, partial=frozen is None),
        _extraction(config, family, str(kind), engine, version),
        serving(model_types),
    )


def _frozen(look: Callable[[], str] | None) -> Link:
    name = "frozen weights"
    if look is None:
        return Link(
            name,
            UNKNOWN,
            "the checkpoint is not on this machine; a dump looks for it before reading anything",
        )
    try:
        return Link(name, FOUND, look())
    except DsparkError as error:
        return Link(name, MISSING, str(error))


def _draft(config: Mapping[str, Any], partial: bool) -> Link:
    # from a preset, without the target's own config
    if partial and "num_attention_heads" not in config:
        return Link(
            "draft", UNKNOWN, "sized by the target's config.json, which is not on this machine"
        )
    try:
        shape = shape_for(config)
    except DsparkError as error:
        return Link("draft", MISSING, str(error))
    notes = f" ({'; '.join(shape.notes)})" if shape.notes else ""
    return Link("draft", FOUND, f"{shape}{notes}")


def _extraction(
    config: Mapping[str, Any], family: Family | None, kind: str, engine: str, version: str | None
) -> Link:
    name, what = "extraction", f"{engine} {version or ''}".strip()
    cell = family.cell("dump", engine, version) if family else None
    if cell is not None and cell.state == "not":
        others = [
            f"{c.engine} {c.versions}".strip() for c in (family.working("dump") if family else [])
        ]
        do = (
            f"Use --engine {', or '.join(others)}."
            if others
            else "No engine returns its states; choose another target."
        )
        return Link(name, MISSING, f"{what} returns no usable states for {kind}: {cell.note}. {do}")
    streams = config.get("hc_mult")
    if isinstance(streams, int) and streams > 1:
        return Link(
            name,
            MISSING,
            f"its layers pass on {streams} parallel streams (mHC), not one hidden state; "
            "no draft can be trained on it.",
        )
    if cell is None:
        return Link(
            name,
            UNKNOWN,
            f"{what}: {kind} is not in the table of families; the self-check tests it "
            "before anything is written",
        )
    return Link(name, FOUND, f"{what}: {cell.state}{f' ({cell.note})' if cell.note else ''}")


def serving(model_types: Sequence[str | None]) -> Link:
    """Say what can serve a draft for a target with these ``model_type``s (a wrapper's, its text
    model's).
    """
    family = family_of(model_types)
    cells = [c for c in (family.cells if family else ()) if c.use == "serve"]
    if not cells:
        kind = next((t for t in model_types if t), "this target")
        return Link(
            "serving",
            UNKNOWN,
            f"nothing is known about {kind} with a draft; try dspark-tools check --serve",
        )
    words = [
        f"{c.engine} {c.versions}".strip() + f": {c.state}" + (f" ({c.note})" if c.note else "")
        for c in cells
    ]
    return Link(
        "serving", FOUND if family and family.working("serve") else UNKNOWN, "; ".join(words)
    )
