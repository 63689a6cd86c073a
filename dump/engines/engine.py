"""The engine protocol: an engine runs the target over given tokens and returns its states.

Legend: S tokens of a sample, L aux layers, H hidden size, M = ``last_rows(loss_mask).sum()``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dspark.cache.records import Coded, TokenSample
from dspark.dump.engines.options import NO_OPTIONS, EngineOptions

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Codec
    from dspark.cache.target.frozen import FrozenTarget
    from dspark.dump.engines.answers import Answered, Ask, Sampling
    from dspark.dump.target.layers import Shapes


log = logging.getLogger("dspark.dump")

GROUPS = 2  # groups (parts of a store) that one engine leaves unfinished at once


class States(NamedTuple):
    """States of one sample, on the engine's device: ``aux`` [S, L, H] in the order of the plan's
    layers, ``last`` [M, H] after the final norm.
    """

    aux: torch.Tensor
    last: torch.Tensor


class CodedStates(NamedTuple):
    """The same states as a codec stores them, on the host, by array name. ``seconds``: what another
    process spent on them, by stage.
    """

    arrays: Coded
    seconds: Mapping[str, float] = MappingProxyType({})


Fetch = Callable[[], CodedStates]  # waits for states that are still on their way to the host


class Captured(NamedTuple):
    """Samples ``members`` of group ``group``, their states end to end in this order. ``ready``: a
    CUDA event after them, if they are on a GPU. States that an engine would have to wait for come
    as a function, called once in another thread, so that the engine's own thread continues.
    ``engine``: number of the one that has the group, of several; the functions of one are called
    one after another, in the order of the batches.
    """

    group: int
    members: Sequence[int]
    states: States | CodedStates | Fetch
    ready: torch.cuda.Event | None = None
    engine: int = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """The engine's own greedy prediction, by its own output head: for p < S-1, token ``ids[p]``
    after x[0..p] and its log-probability ``logprobs[p]``.
    """

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRun:
    """What an engine is started with. ``layers``: output of decoder layer i. ``spool``: a folder it
    may create beside the store. ``batch_tokens``: tokens per forward pass; None = the engine's
    default. ``options``: the user's options for it. ``say``: prints a line for the user. ``leave``:
    bytes of each GPU that others need beside it, if it can do without them. ``answers``: it will be
    asked for answers.
    """

    model: str
    shapes: Shapes
    layers: Sequence[int]
    device: str
    dtype: str
    seq_length: int
    spool: Path
    batch_tokens: int | None = None
    options: EngineOptions = NO_OPTIONS
    say: Callable[[str], None] = log.info
    leave: int = 0
    answers: bool = False


class Engine(Protocol):
    """Runs the target. ``capture`` yields (index into ``samples``, states) in any order, each
    sample once.

    ``stream`` does the same for a whole dump and has to be fast: ``groups`` are pulled as room
    allows, the results may already be coded with ``codec``, and at most ``groups_at_once`` groups
    are ever unfinished.

    ``answer`` yields sampled answers in any order; ``asks`` are pulled as room allows.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def groups_at_once(self) -> int: ...
    def frozen(self) -> FrozenTarget: ...
    def capture(self, samples: Sequence[TokenSample]) -> Iterator[tuple[int, States]]: ...
    def stream(
        self, groups: Iterable[Sequence[TokenSample]], codec: Codec
    ) -> Iterator[Captured]: ...
    def predict(self, samples: Sequence[TokenSample]) -> list[Prediction]: ...
    def answer(
        self, asks: Iterable[Ask], sampling: Sampling, stops: Sequence[int], codec: Codec
    ) -> Iterator[Answered]: ...
    def close(self) -> None: ...
