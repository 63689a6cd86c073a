"""The self-check passes on right states and stops, with the cause, on each known fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from dspark.cache.errors import EngineError
from dspark.cache.records import TokenSample, last_rows
from dspark.dump.checks.states import PROBE_SAMPLES, check, probe_samples
from dspark.dump.engines.engine import States
from dspark.dump.engines.hf import TransformersEngine
from dump_targets import ENGINE_VOCAB as VOCAB
from dump_targets import engine, samples

Fault = Callable[[TransformersEngine, TokenSample], torch.Tensor]


class Faulty:
    """An engine whose last state is ``fault``'s."""

    def __init__(self, inner: TransformersEngine, fault: Fault) -> None:
        self.inner, self.fault = inner, fault
        self.name, self.version = "faulty", "0"
        self.frozen, self.predict, self.close = inner.frozen, inner.predict, inner.close

    def capture(self, data: Sequence[TokenSample]) -> Iterator[tuple[int, States]]:
        for i, states in self.inner.capture(data):
            yield i, States(states.aux, self.fault(self.inner, data[i]))


def hidden(target: TransformersEngine, sample: TokenSample, layer: int) -> torch.Tensor:
    """Output of decoder layer ``layer`` at every position, before any norm."""
    kept: list[torch.Tensor] = []
    handle = target.parts.layers[layer].register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.inference_mode():
        target.model(torch.from_numpy(sample.input_ids).long()[None])
    handle.remove()
    return kept[0][0]


def stored(sample: TokenSample) -> torch.Tensor:
    return torch.from_numpy(last_rows(sample.loss_mask))


def norm_forgotten(target: TransformersEngine, sample: TokenSample) -> torch.Tensor:
    return hidden(target, sample, 5)[stored(sample)]


def layer_shifted(target: TransformersEngine, sample: TokenSample) -> torch.Tensor:
    out: torch.Tensor = target.parts.norm(hidden(target, sample, 4))[stored(sample)]
    return out


def position_shifted(target: TransformersEngine, sample: TokenSample) -> torch.Tensor:
    out: torch.Tensor = target.parts.norm(hidden(target, sample, 5)).roll(-1, 0)[stored(sample)]
    return out


def half_sum(target: TransformersEngine, sample: TokenSample) -> torch.Tensor:
    """As one of two tensor-parallel ranks: only a part of the last layer's output is added."""
    before, after = hidden(target, sample, 4), hidden(target, sample, 5)
    out: torch.Tensor = target.parts.norm(before + 0.5 * (after - before))[stored(sample)]
    return out


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_right_states_pass(kind: str) -> None:
    target = engine(kind)
    found, states = check(target, samples([20, 40]), target.frozen(), "float32")
    assert (found.agree, found.top1, found.positions) == (
        1.0,
        1.0,
        sum(int(stored(s).sum()) for s in samples([20, 40])),
    )
    assert found.worst < 1e-4
    assert sorted(states) == [0, 1]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (norm_forgotten, "the final norm was not applied"),
        (layer_shifted, "a layer other than the last was captured"),
        (
            position_shifted,
            "the positions are shifted by one: the states belong one position later",
        ),
        (half_sum, "partial sum"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_faults_stop_the_dump(kind: str, fault: Fault, cause: str) -> None:
    target = engine(kind)
    with pytest.raises(EngineError, match=cause) as error:
        check(Faulty(target, fault), samples([20, 40]), target.frozen(), "float32")
    text = str(error.value)
    assert "self-check of the faulty engine failed" in text
    assert "expected at least 99%" in text
    assert "sample 0 position" in text


def test_a_norm_without_weights_is_missed_by_no_value() -> None:
    """With unit norm weights a forgotten norm keeps every argmax; the probabilities give it
    away.
    """
    target = engine("qwen3")
    with torch.no_grad():
        target.parts.norm.weight.fill_(1.0)
    with pytest.raises(EngineError, match="the final norm was not applied"):
        check(Faulty(target, norm_forgotten), samples([20, 40]), target.frozen(), "float32")


def test_near_ties_agree() -> None:
    target = engine("qwen3")
    with torch.no_grad():  # two tokens with the same logits: which one wins is rounding
        target.parts.head.weight[:] = target.parts.head.weight[torch.arange(VOCAB) // 2]
    noisy = Faulty(target, lambda t, s: t.parts.norm(hidden(t, s, 5))[stored(s)] * (1 + 1e-6))
    found, _ = check(noisy, samples([20, 40]), target.frozen(), "float32")
    assert found.top1 == 1.0


def test_probe_is_bounded() -> None:
    assert len(probe_samples(samples([10] * 9))) == PROBE_SAMPLES
    assert len(probe_samples(samples([5000, 10]))) == 1
    assert len(probe_samples(samples([3000, 1000, 1000]))) == 2


def test_nothing_to_check_is_an_error() -> None:
    target = engine("qwen3")
    with pytest.raises(EngineError, match="no stored position"):
        check(target, samples([1]), target.frozen(), "float32")
