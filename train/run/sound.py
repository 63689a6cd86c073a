"""Check that a step's numbers and states are plausible: if not, the run stops before any weights
are saved, and the samples are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dspark.cache.errors import TrainError
from dspark.train.run.checkpoint import Position

if TYPE_CHECKING:
    from dspark.train.data.batch import Batch
    from dspark.train.run.setup import Run

# real targets reach 1e5 or so at a document's first token; a norm in float32 overflows silently at
# 1e19
STATE_LIMIT = 1e9
LOSS_LIMIT = 1e6  # nats, times the weights of the loss
NAMED = 4  # samples, at most, in a message


def largest(batch: Batch) -> Tensor:
    """Return the largest absolute value of the batch's states, float32 [] on its device; NaN if
    there is one. Does not wait for the device.
    """
    ends = [end for t in (batch.aux, batch.last) if t.numel() for end in torch.aminmax(t)]
    return (
        torch.stack(ends).abs().amax().float() if ends else torch.zeros((), device=batch.aux.device)
    )


def check_states(run: Run, steps: list[Position], values: Sequence[Tensor] | Tensor) -> None:
    """Raise TrainError, naming step and samples, if the largest state of one of ``steps`` is
    implausible. Waits for the device that ``values`` are on.
    """
    for position, value in zip(steps, map(float, values), strict=True):
        if not value < STATE_LIMIT:  # NaN is not
            raise TrainError(f"{_where(position)}: a state of {value:.3g}; {words(run, position)}")


def check_numbers(run: Run, position: Position, loss: float, grad_norm: float) -> None:
    """Raise TrainError, naming the samples of the step, if loss or gradient are implausible."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        wanted = "expected finite numbers"
    elif abs(loss) > LOSS_LIMIT:
        wanted = f"expected a loss below {LOSS_LIMIT:.0e}"
    else:
        return
    raise TrainError(
        f"{_where(position)}: loss {loss}, gradient norm {grad_norm}; {wanted}. "
        f"{words(run, position)}"
    )


def _where(position: Position) -> str:
    return f"step {position.step} (epoch {position.epoch})"


def words(run: Run, position: Position) -> str:
    """Say what to do, and which samples of the last step have implausible states, by index and key;
    or that none has.
    """
    samples = list(_samples(run, position))
    bad = [i for i in samples if not _sound(run, i)]
    keys = run.cache.index["sample_key"]
    shown = ", ".join(f"{i} (key {keys[i].tobytes().hex()})" for i in (bad or samples)[:NAMED])
    more = f" and {len(bad or samples) - NAMED} more" if len(bad or samples) > NAMED else ""
    if bad:
        return (
            f"samples {shown}{more} of {run.cache.path} hold invalid states (NaN, or above "
            f"{STATE_LIMIT:.0e}). Dump these rows again, or leave them out; the weights "
            "since the last checkpoint were not saved."
        )
    return (
        f"No sample of the step ({shown}{more}) has states above {STATE_LIMIT:.0e}. Lower --lr, "
        "or look at the store with dspark-tools stats."
    )


def _samples(run: Run, position: Position) -> Iterator[int]:
    """Return the samples of the step that ends at ``position``, on all ranks."""
    rows = run.stream.plan(position.epoch)
    at = (position.epoch_step - 1) * run.stream.rows_per_step
    for row in rows[at : at + run.stream.rows_per_step]:
        yield from row


def _sound(run: Run, sample: int) -> bool:
    for store in run.cache.stores:
        if sample < len(store):
            states = store.decoded(store.read(sample))
            return all(float(t.abs().amax()) < STATE_LIMIT for t in states if t.numel())
        sample -= len(store)
    raise AssertionError(sample)
