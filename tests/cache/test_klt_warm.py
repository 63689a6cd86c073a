"""What is loaded and compiled ahead: the codec that does it works, and other codecs have none."""

from __future__ import annotations

import threading

import pytest
import torch

from dspark.cache.codec.klt import warm
from dspark.cache.codec.klt.codec import FAMILY
from dspark.cache.codec.registry import make

CPU = torch.device("cpu")
CODEC = FAMILY.make("klt-1-1-2", "zstd")


def test_it_codes_with_every_class_of_cells() -> None:
    warm.warm(CODEC, 3, 64, CPU)
    tables = warm.tables(3, 64, 2.0)
    assert all(tables.aux.packing.columns)
    coder, known = CODEC.with_tables(tables), warm._tokens(64, CPU)
    aux = torch.randint(-1, 2, (warm.SIZE, 3, 64), generator=torch.Generator().manual_seed(0))
    last = aux[known.last_token, 0].bfloat16()
    got, _ = coder.decode(coder.encode(aux.bfloat16(), last, known), 64, known)
    kept = tables.aux.kept
    answers = known.last_token  # the step of the others is 2
    assert torch.equal(got.flatten(1)[answers, :kept], aux.flatten(1)[answers, :kept].float())


def test_a_thread_runs_while_states_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    began, done = threading.Event(), []

    def slow(*of: object) -> None:
        began.set()
        done.append(of)

    monkeypatch.setattr(warm, "warm", slow)
    with warm.warming(CODEC, 3, 64, "cuda"):
        assert began.wait(60)
    assert done == [(CODEC, 3, 64, torch.device("cuda"))]


def test_nothing_is_warmed_for_another_codec_or_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warm, "Thread", None)
    for codec, device in ((make("rotated-4-4"), "cuda"), (CODEC, "cpu"), (CODEC, None)):
        with warm.warming(codec, 3, 64, device):
            pass
