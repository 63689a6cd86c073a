"""Find what only behaviour shows: run the draft on its target's own answers, as configured and
under each classic mistake.

If reading the config another way (every layer id one lower, another mask token, another RoPE base,
no window, the other layout, the target's norm)
would have had clearly more tokens accepted, that other way is probably how it was trained. It is
evidence, not proof, and says so. Paired over the same anchors of the same answers, and by answer: a
difference counts from three standard errors and a tenth of the length.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dspark.tools import records
from dspark.tools.check.files import Finding
from dspark.tools.check.probe import Answer, Probed, probe
from dspark.tools.decode.outcome import ratio_error
from dspark.train.draft.model import DraftModel

ROPE_BASES = (1e4, 1e5, 5e5, 1e6, 5e6)
WEAK = 0.15  # held-out accept rate of a draft that has hardly begun to learn
MANY_MASKS = 12  # candidates tried; every one costs a pass over the answers


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read the draft: the mistake it would reveal, in words, and the draft read that
    way.
    """

    name: str
    text: str
    draft: DraftModel
    bonus_anchor: bool = False


def readings(
    draft: DraftModel,
    num_layers: int,
    target_theta: float | None,
    masks: Sequence[int],
    norm: torch.Tensor,
) -> Iterator[Reading]:
    """Yield other readings of ``draft``; the weights are shared. ``masks``: ids that may have been
    the mask token.
    """
    config = draft.config
    for by, what in (
        (-1, "as if config.json held vLLM's ids, the state entering layer j"),
        (1, "one layer later"),
    ):
        ids = tuple(i + by for i in config.target_layer_ids)
        if ids[0] >= -1 and ids[-1] < num_layers:
            yield Reading(
                "layer-ids",
                f"outputs of layers {list(ids)} ({what})",
                _read_as(draft, target_layer_ids=ids),
            )
    for theta in sorted({*ROPE_BASES, target_theta or config.rope_theta} - {config.rope_theta}):
        yield Reading("rope", f"rope_theta {theta:g}", _read_as(draft, rope_theta=theta))
    if config.rope_scaling:
        yield Reading("rope", "RoPE without its scaling", _read_as(draft, rope_scaling=None))
    if config.layer_types:
        causal = config.is_causal is not False
        both = "see" if causal else "do not see"
        yield Reading(
            "attention",
            f"slots of sliding layers {both} later ones",
            _read_as(draft, is_causal=not causal),
        )
        full = _read_as(draft, layer_types=(), sliding_window=None, is_causal=None)
        yield Reading("attention", "every layer sees the whole context", full)
    for mask in [m for m in dict.fromkeys(masks) if m != config.mask_token_id][:MANY_MASKS]:
        yield Reading("mask-token", f"mask token {mask}", _read_as(draft, mask_token_id=mask))
    if config.block_size > 1:
        yield Reading(
            "layout-flag",
            "sample_from_anchor false: slot k predicts its own position",
            draft,
            bonus_anchor=True,
        )
    swapped = copy.copy(draft)
    swapped.__dict__["_modules"] = {**draft._modules, "norm": copy.deepcopy(draft.norm)}
    with torch.no_grad():
        swapped.norm.weight.copy_(norm)
    yield Reading("norm", "the target's final norm in place of the draft's norm.weight", swapped)


def _read_as(draft: DraftModel, **changes: Any) -> DraftModel:
    """Return the same parameters under another config."""
    other = copy.copy(draft)
    other.config = dataclasses.replace(draft.config, **changes)
    other.look()
    return other


def symptoms(
    draft: DraftModel,
    answers: Sequence[Answer],
    others: Iterator[Reading],
    note: Callable[[str], None] = lambda line: None,
) -> tuple[list[Finding], dict[str, Any]]:
    """Return the findings, and the measured lengths: as configured and under each reading (greedy,
    mean over anchors).
    """
    base = [probe(draft, a) for a in answers]
    own = _lengths(base, draft.config.block_size)
    if own is None:
        return [
            Finding(
                "note",
                "behaviour",
                (
                    "every answer of the target is shorter than a block: the draft's "
                    "behaviour was not judged"
                ),
            )
        ], {}
    measured: dict[str, Any] = {
        "as_configured": _mean(own),
        "anchors": sum(n for _, n in own),
        "accept_rate": _accept(base),
    }
    found, tried = list[tuple[float, Finding]](), list[dict[str, Any]]()
    for other in others:
        note(f"reading it as {other.text}")
        probed = [probe(other.draft, a, bonus_anchor=other.bonus_anchor) for a in answers]
        theirs = _lengths(probed, draft.config.block_size)
        assert theirs is not None
        gain = _mean(theirs) - _mean(own)
        error = (
            ratio_error(
                [t - o for (t, _), (o, _) in zip(theirs, own, strict=True)], [n for _, n in own]
            )
            or math.inf
        )
        tried.append(
            {"name": other.name, "reading": other.text, "mean_accepted_length": _mean(theirs)}
        )
        if gain > 3 * error and gain > 0.1 * _mean(own):
            found.append(
                (
                    gain,
                    Finding(
                        "suspicion",
                        other.name,
                        f"read with {other.text}, the draft would have {_mean(theirs):.2f} "
                        f"tokens accepted per block; as configured, {_mean(own):.2f} "
                        f"(greedy, {sum(n for _, n in own)} anchors). It was probably "
                        "trained that way",
                    ),
                )
            )
    measured["readings"] = tried
    # A wrong config makes several other readings look a little better; the best one is the finding,
    # the rest are in the table.
    best = max(found, key=lambda f: f[0], default=None)
    return ([] if best is None else [best[1]]), measured


def _lengths(probed: Sequence[Probed | None], size: int) -> list[tuple[float, int]] | None:
    """Return (sum of accepted lengths, anchors) of every answer that has an anchor."""
    out = [(float(p.lengths().sum()), p.hit.shape[0]) for p in probed if p is not None]
    return out or None


def _mean(pairs: list[tuple[float, int]]) -> float:
    return sum(s for s, _ in pairs) / sum(n for _, n in pairs)


def _accept(probed: Sequence[Probed | None]) -> list[float]:
    rows = torch.cat([p.accept for p in probed if p is not None])
    return [float(v) for v in rows.mean(0)]


def against_record(folder: Path, measured: dict[str, Any]) -> list[Finding]:
    """Compare acceptance at slot 0 on the target's answers with that on held-out data in training:
    far less means that something between training and here differs (a norm left out when states
    were stored, another target, other layers).
    """
    rows = _validations(folder)
    if not rows or "accept_rate" not in measured:
        return [
            Finding(
                "note",
                "acceptance",
                "metrics.jsonl has no held-out accept rate to compare with",
            )
        ]
    then, now = rows[-1]["accept_rate"][0], measured["accept_rate"][0]
    text = (
        f"accept rate at slot 0 is {now:.2f} on the target's own answers, {then:.2f} on held-out "
        "data when it was trained"
    )
    if then < WEAK:
        text += ": too little to tell a mistake from a short training"
    elif now < 0.5 * then:
        return [
            Finding(
                "suspicion",
                "acceptance",
                (
                    f"{text}: less than half. The states, norm, layers or target differ from "
                    "those of training"
                ),
            )
        ]
    return [Finding("note", "acceptance", text)]


def _validations(folder: Path) -> list[dict[str, Any]]:
    return [r for r in records.metrics(folder) if r.get("validation") and r.get("accept_rate")]
