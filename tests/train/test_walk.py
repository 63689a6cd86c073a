"""The walk: its recursion against one written backwards, and against blocks of real greedy
decoding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_trainings import small_training

import dspark.cache
import tiny_models as tiny
from dspark.tools.decode.decode import speculative_generate
from dspark.tools.decode.target import DecodingTarget, greedy_alone
from dspark.tools.judge.score import score
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.draft.model import DraftModel
from dspark.train.evaluate import batch_alphas, judged
from dspark.train.loop import train
from dspark.train.objective.walk import Walk, visits

SIZE = 4


def expected_blocks(alpha: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Of one run, from its end: blocks(a) = 1 + sum_n P(n accepted) blocks(a + n + 1)."""
    count, size = alpha.shape
    blocks = [0.0] * (count + size + 1)
    for a in reversed(range(count)):
        reached, total = 1.0, 1.0
        for n in range(size):
            total += reached * (1 - alpha[a, n]) * blocks[a + n + 1]
            reached *= alpha[a, n]
        blocks[a] = total + reached * blocks[a + size + 1]
    return blocks[0]


def test_recursion_against_the_one_from_the_end() -> None:
    rng = np.random.default_rng(0)
    runs = [1, 2, 9, 30, 5]
    anchors, alphas, expected = [], [], 0.0
    at = 3
    for length in runs:
        alpha = rng.random((length, SIZE))
        for k in range(SIZE):  # slots past the run's end do not count
            alpha[max(0, length - k) :, k] = 0
        anchors += range(at, at + length)
        alphas.append(alpha)
        expected += expected_blocks(alpha)
        at += length + rng.integers(1, 4)
    s = visits(np.concatenate(alphas), np.array(anchors))
    assert s.sum() == pytest.approx(expected, rel=1e-12)
    assert s[np.cumsum([0, *runs[:-1]])].tolist() == [1.0] * len(runs)
    assert (s <= 1 + 1e-12).all()


def test_all_or_nothing_and_nothing_at_all() -> None:
    anchors = np.arange(20)
    assert visits(np.zeros((20, SIZE)), anchors).tolist() == [1.0] * 20
    assert np.flatnonzero(visits(np.ones((20, SIZE)), anchors)).tolist() == [0, 5, 10, 15]
    assert visits(np.zeros((0, SIZE)), np.zeros(0, np.int64)).size == 0
    assert Walk().result() == {"walk": None, "walk_greedy": None, "walk_greedy_forced": None}


def row_of(model: Any, prompt: list[int], answer: list[int]) -> Batch:
    """A row of the target's own answer: supervised from its first token on, every eligible position
    an anchor.
    """
    ids = prompt + answer
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    mask, doc = np.arange(len(ids)) >= len(prompt), np.zeros(len(ids), np.int32)
    can = rules.eligible(mask, doc)
    return Batch.build(
        input_ids=np.array(ids),
        loss_mask=mask,
        doc=doc,
        aux=tiny.states(model, ids).clone(),
        last=hidden[-1][0][torch.from_numpy(can)].clone(),
        anchors=np.flatnonzero(can),
        block_size=SIZE,
    )


@pytest.mark.parametrize(
    ("markov", "reduced"), [("vanilla", False), ("rnn", False), ("vanilla", True)]
)
def test_greedy_walk_is_greedy_decoding(markov: str, reduced: bool) -> None:
    """On the target's own answers the expected number of blocks is the number of blocks, prompt by
    prompt.
    """
    model = tiny.target()
    prompts = [[5, 6, 7, 8, 9], [50, 60, 70], [3], [90, 4]]
    answers = [greedy_alone(model, p, max_tokens=30) for p in prompts]
    kept = (
        torch.tensor(sorted({t for a in answers for t in a} | set(range(0, tiny.VOCAB, 3))))
        if reduced
        else None
    )
    draft: DraftModel = tiny.draft(model, draft_ids=kept, markov_head_type=markov)
    tiny.agree(model, draft, [p + a for p, a in zip(prompts, answers, strict=True)][:3], steps=25)
    lengths = set[float]()
    with DecodingTarget(model, draft.config.target_layer_ids) as target:
        for prompt, answer in zip(prompts, answers, strict=True):
            done = speculative_generate(target, draft, prompt, max_tokens=30)
            assert done.tokens == answer
            batch = row_of(model, prompt, answer)
            walk = Walk()
            walk.add(batch_alphas(draft, batch, *judged(draft, batch, 4.0, "sdpa")), batch.anchors)
            tokens, forced, greedy, sampled = walk.sums.tolist()
            assert tokens == len(answer) - 1
            assert greedy == len(done.blocks)
            assert forced == greedy  # up to the first failure the text's tokens are the draft's own
            assert len(answer) / (SIZE + 1) - 1 <= sampled <= tokens
            lengths.add(tokens / greedy)
    assert min(lengths) < 2 < max(lengths)  # drafts that fail and drafts that do not


def test_validation_and_score_tell_the_walk(tmp_path: Path) -> None:
    """In groups of a few anchors, padded or not, as at all anchors at once; and the best draft can
    be kept.
    """
    config = small_training(
        tmp_path,
        [40, 52, 61, 44, 58, 47, 66, 49],
        max_steps=6,
        val_fraction=0.4,
        max_anchors=5,
        checkpoint_freq=0.2,
        select="walk",
    )
    train(config)
    rows = [
        json.loads(line) for line in (tmp_path / "draft" / "metrics.jsonl").read_text().splitlines()
    ]
    rows = [row for row in rows if row.get("validation")]
    assert len(rows) > 2
    found = score(dspark.cache.open(config.cache), str(tmp_path / "draft"), which="validation")
    best = max(rows, key=lambda row: float(row["walk"]))
    for key in ("walk", "walk_greedy", "walk_greedy_forced"):
        assert 1 <= found[key] <= 4
        assert found[key] == pytest.approx(best[key], rel=0.02)  # the export is in bfloat16
    few = score(dspark.cache.open(config.cache), str(tmp_path / "draft"), max_anchors=3)
    assert few["walk"] is None
