"""The dump's own way against the self-check's states: every fault is named, and the engine as it is
passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspark.cache.codec import registry
from dspark.cache.codec.base import Codec, to_numpy
from dspark.cache.errors import EngineError
from dspark.cache.records import TokenSample
from dspark.cache.settings import rotated_name
from dspark.dump.checks.coded import check_coded
from dspark.dump.engines.engine import Captured, CodedStates, States

LAYERS = [1, 4, 7]
ROWS = ((9, 4), (5, 0), (30, 12))  # tokens and stored last states of each sample


@pytest.fixture
def states() -> list[States]:
    return [States(torch.randn(t, 3, 64), 5 * torch.randn(m, 64)) for t, m in ROWS]


def codec_of(bits: int, states: list[States]) -> Codec:
    aux, last = torch.cat([s.aux for s in states]), torch.cat([s.last for s in states])
    return registry.make(rotated_name(bits, bits)).calibrated(aux, last)


def engine(
    states: list[States],
    spoil: Callable[[States], States],
    way: str,
    given: Sequence[int] = (0, 1, 2),
) -> Any:
    """Hands out ``states`` in two batches; ``way``: raw, coded, or coded and fetched later."""

    def stream(groups: Iterable[Sequence[TokenSample]], codec: Codec) -> Iterator[Captured]:
        assert [len(g) for g in groups] == [3]
        for members in (given[:1], given[1:]):
            own = [spoil(states[i]) for i in members]
            joint = States(torch.cat([s.aux for s in own]), torch.cat([s.last for s in own]))
            coded = CodedStates(to_numpy(codec.encode(*joint)))
            out = {"raw": joint, "coded": coded, "fetched": lambda coded=coded: coded}
            yield Captured(0, members, out[way])

    return SimpleNamespace(stream=stream, name="test")


@pytest.mark.parametrize("way", ["raw", "coded", "fetched"])
@pytest.mark.parametrize("bits", [16, 4])
def test_states_as_they_are_pass(states: list[States], bits: int, way: str) -> None:
    check_coded(
        engine(states, lambda s: s, way), [None] * 3, states, codec_of(bits, states), LAYERS
    )  # type: ignore[list-item]


@pytest.mark.parametrize("way", ["raw", "coded"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: States(s.aux[:, [0, 2, 1]], s.last), "sample 0, layer 4, differ"),
        (lambda s: States(s.aux.roll(1, 0), s.last), "sample 0, layer 1, differ"),
        (lambda s: States(s.aux, s.last.flip(0)), "sample 0, layer last, differ"),
        (lambda s: States(s.aux, s.aux[: len(s.last), 2]), "sample 0, layer last, differ"),
        (
            lambda s: States(s.aux, 2 * s.last),
            r"sample 0, layer last, differ from its states by (1\.0|0\.9)",
        ),
        (lambda s: States(s.aux[1:], s.last), r"returned .*: 8, .* rows .* expected .*: 9, "),
    ],
)
def test_each_fault_is_named(
    states: list[States], spoil: Callable[[States], States], says: str, way: str
) -> None:
    with pytest.raises(EngineError, match=says):
        check_coded(engine(states, spoil, way), [None] * 3, states, codec_of(4, states), LAYERS)  # type: ignore[list-item]


def test_a_sample_that_does_not_come_is_named(states: list[States]) -> None:
    with pytest.raises(EngineError, match=r"returned no states for samples \[1\]"):
        check_coded(
            engine(states, lambda s: s, "coded", (0, 2)),
            [None] * 3,
            states,
            codec_of(4, states),
            LAYERS,  # type: ignore[list-item]
        )


@pytest.mark.parametrize("sink", [3e3, 2e4])
@pytest.mark.parametrize(
    "spoil", [lambda x: x[:, [0, 2, 1]], lambda x: torch.cat([x[:1], x[1:].roll(1, 0)])]
)
def test_a_massive_first_token_hides_nothing(
    sink: float, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """The same in all layers, as in real targets: a norm over the sample would be its."""
    states = []
    for t, m in ROWS:
        aux = 3 * torch.randn(t, 3, 64)
        aux[0, :, 7] = sink
        states.append(States(aux, torch.randn(m, 64)))
    with pytest.raises(EngineError, match="differ from its states"):
        check_coded(
            engine(states, lambda s: States(spoil(s.aux), s.last), "coded"),
            [None] * 3,
            states,
            codec_of(4, states),
            LAYERS,  # type: ignore[list-item]
        )


def test_a_sample_that_comes_twice_is_named(states: list[States]) -> None:
    with pytest.raises(EngineError, match="returned the states of sample 1 twice"):
        check_coded(
            engine(states, lambda s: s, "raw", (1, 0, 1)),
            [None] * 3,
            states,
            codec_of(4, states),
            LAYERS,  # type: ignore[list-item]
        )


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_two_percent_of_rounding_pass(states: list[States], bits: int) -> None:
    def rounded(s: States) -> States:
        return States(s.aux * (1 + 0.02 * torch.randn_like(s.aux)), s.last)

    check_coded(
        engine(states, rounded, "coded"), [None] * 3, states, codec_of(bits, states), LAYERS
    )  # type: ignore[list-item]
