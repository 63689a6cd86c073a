"""Layers in another order and at other positions are found in the states, and stop the dump; right
ones pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from dspark.cache.errors import EngineError
from dspark.cache.records import TokenSample
from dspark.dump.checks.states import check
from dspark.dump.engines.engine import States
from dspark.dump.engines.hf import TransformersEngine
from dump_targets import ENGINE_VOCAB, build_model, samples, shapes

LAYERS = (0, 1, 3, 4)


class Aux:
    """An engine whose aux states went through ``fault``."""

    def __init__(
        self, inner: TransformersEngine, fault: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.inner, self.fault = inner, fault
        self.name, self.version = "faulty", "0"
        self.frozen, self.predict, self.close, self.stream = (
            inner.frozen, inner.predict, inner.close, inner.stream,
        )  # fmt: skip

    def capture(self, data: Sequence[TokenSample]) -> Iterator[tuple[int, States]]:
        for i, states in self.inner.capture(data):
            yield i, States(self.fault(states.aux), states.last)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def target(request: pytest.FixtureRequest) -> TransformersEngine:
    model = build_model(request.param, ENGINE_VOCAB)
    return TransformersEngine(model, shapes(model), LAYERS, device="cpu", batch_tokens=64)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x: x.flip(1), "the states are those of layers 4,3,1,0"),
        (
            lambda x: x[:, [0, 3, 2, 1]],
            "not in the order of --layers 0,1,3,4: judging by their similarity.* of layers 0,4,3,1",
        ),
        (
            lambda x: x.roll(-1, 0),
            "the positions of layer 4 are shifted by one: its states belong one position later",
        ),
        (
            lambda x: x.roll(1, 0),
            "the positions of layer 4 are shifted by one: its states belong one position earlier",
        ),
    ],
)
def test_faults_in_the_layers_stop_the_dump(
    target: TransformersEngine, fault: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        check(Aux(target, fault), samples([60, 80]), target.frozen(), "float32", LAYERS)


def test_right_layers_pass_whichever_they_are(target: TransformersEngine) -> None:
    check(target, samples([60, 80]), target.frozen(), "float32", LAYERS)
    for layers in ((0, 1, 2, 3, 4, 5), (2,), (1, 5)):
        engine = TransformersEngine(
            target.model, shapes(target.model), layers, device="cpu", batch_tokens=200
        )
        check(engine, samples([60, 80]), engine.frozen(), "float32", layers)
