"""The reference decoder: lossless with any draft, blocks as the trainer's forward, samples as the
target's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import tiny_models as tiny
from chance import chi_square
from dspark.tools.check.probe import answer_of, probe
from dspark.tools.decode.decode import Generation, speculative_generate
from dspark.tools.decode.rejection import verify_greedy, verify_sampled
from dspark.tools.decode.target import DecodingTarget, greedy_alone
from dspark.train.draft.decoding import (
    BlockDecoder,
    DraftContext,
    chain,
    recomputed_states,
    slot_states,
)
from dspark.train.draft.model import DraftModel

PROMPTS = [[5, 6, 7, 8, 9], [50, 60, 70], [3]]


def run(model: Any, draft: DraftModel, prompt: list[int], **options: Any) -> Generation:
    with DecodingTarget(model, draft.config.target_layer_ids) as target:
        return speculative_generate(target, draft, prompt, **({"max_tokens": 24} | options))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn"])
def test_greedy_is_the_targets_own(kind: str, markov: str) -> None:
    model = tiny.target(kind)
    draft = tiny.draft(model, markov_head_type=markov)
    alone = [greedy_alone(model, p, max_tokens=24) for p in PROMPTS]
    tiny.agree(model, draft, [p + a for p, a in zip(PROMPTS, alone, strict=True)][:1], steps=60)
    runs = [run(model, draft, p) for p in PROMPTS]
    assert [r.tokens for r in runs] == alone
    # Both must happen, or the rollback was not tried.
    kept = Counter(b.accepted for r in runs for b in r.blocks)
    assert kept[0] > 0
    assert kept[4] > 0


def test_drafted_blocks_are_the_trainers_forward() -> None:
    """Cached keys and values with rejections in between, against all states at once in the training
    forward.
    """
    model = tiny.target()
    draft = tiny.draft(model)
    for prompt in PROMPTS:
        out = run(model, draft, prompt)
        ids = prompt + out.tokens
        aux = tiny.states(model, ids)
        for block in out.blocks:
            if block.anchor >= len(ids):
                continue
            h = recomputed_states(draft, aux[: block.anchor], ids[block.anchor])
            assert tuple(chain(draft, h, ids[block.anchor]).tokens.tolist()) == block.drafted


def test_slot_states_equal_recomputed() -> None:
    model = tiny.target()
    draft = tiny.draft(model)
    ids = list(range(20, 40))
    aux = tiny.states(model, ids)
    context = DraftContext(draft)
    for length, step in ((7, 7), (8, 1), (13, 5)):
        context.extend(aux[length - step : length])
        torch.testing.assert_close(
            slot_states(draft, context, ids[length]),
            recomputed_states(draft, aux[:length], ids[length]),
        )


def test_stops_at_a_stop_token_inside_a_block() -> None:
    model = tiny.target()
    draft = tiny.draft(model)
    alone = greedy_alone(model, PROMPTS[1], max_tokens=24)
    tiny.agree(model, draft, [PROMPTS[1] + alone], steps=60)
    stop = next(t for i, t in enumerate(alone) if i > 4 and t not in alone[:i])
    out = run(model, draft, PROMPTS[1], stop_ids=[stop])
    assert out.tokens == greedy_alone(model, PROMPTS[1], max_tokens=24, stop_ids=[stop])
    assert out.tokens[-1] == stop
    assert len(out.tokens) < 24


def test_reduced_vocabulary_drafts_target_ids() -> None:
    model = tiny.target()
    alone = greedy_alone(model, PROMPTS[0], max_tokens=24)
    ids = torch.tensor(sorted(set(alone) | set(range(0, tiny.VOCAB, 7))))
    draft = tiny.draft(model, draft_ids=ids)
    tiny.agree(model, draft, [PROMPTS[0] + alone], steps=60)
    out = run(model, draft, PROMPTS[0])
    assert out.tokens == alone
    assert {t for b in out.blocks for t in b.drafted} <= set(ids.tolist())
    assert max(b.accepted for b in out.blocks) > 0
    decoder = BlockDecoder(draft)
    decoder.extend(tiny.states(model, PROMPTS[0]), torch.tensor(PROMPTS[0]))
    block = decoder.draft(5, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert block.probs is not None
    torch.testing.assert_close(block.probs.sum(-1), torch.ones(4))
    outside = torch.ones(tiny.VOCAB, dtype=torch.bool).index_fill(0, ids, False)
    assert not block.probs[:, outside].any()


def test_verify_greedy() -> None:
    logits = torch.eye(6)[[1, 2, 3, 4]]
    assert verify_greedy(torch.tensor([1, 2, 3]), logits) == (3, 4)
    assert verify_greedy(torch.tensor([1, 5, 3]), logits) == (1, 2)
    assert verify_greedy(torch.tensor([0, 2, 3]), logits) == (0, 1)


def test_rejection_sampling_is_exact() -> None:
    """Pairs of tokens with the first one drafted, poorly: their joint distribution is the
    target's.
    """
    generator = torch.Generator().manual_seed(7)
    vocab, trials = 5, 20000
    first = torch.softmax(torch.randn(vocab, generator=generator) * 1.5, -1)
    second = torch.softmax(torch.randn(vocab, vocab, generator=generator) * 1.5, -1)
    p_draft = torch.softmax(torch.randn(1, vocab, generator=generator) * 1.5, -1)
    counts = torch.zeros(vocab, vocab)
    accepted_total = 0
    for _ in range(trials):
        drafted = torch.multinomial(p_draft[0], 1, generator=generator)
        rows = torch.stack([first, second[drafted[0]]])
        accepted, following = verify_sampled(drafted, p_draft, rows, generator)
        accepted_total += accepted
        if accepted:
            counts[drafted[0], following] += 1
        else:
            # The next block would draw the second token; the target's own draw stands for it.
            counts[
                following, int(torch.multinomial(second[following], 1, generator=generator))
            ] += 1
    assert chi_square(counts.flatten(), (first[:, None] * second).flatten() * trials) > 1e-3
    overlap = torch.minimum(first, p_draft[0]).sum()
    assert accepted_total / trials == pytest.approx(float(overlap), abs=0.015)


def test_sampled_generation_is_distributed_as_the_target() -> None:
    """First three tokens of whole runs, 6-token vocabulary, against the target's exact joint
    distribution.
    """
    model = tiny.target(vocab_size=6, initializer_range=0.15)
    draft = tiny.draft(model, mask_token_id=5)
    prompt, temperature, trials = [1, 2], 1.5, 800
    expected = torch.zeros(6, 6, 6)
    with torch.inference_mode():
        for a in range(6):
            for b in range(6):
                logits = (
                    model(input_ids=torch.tensor([[*prompt, a, b]])).logits[0].float() / temperature
                )
                p = torch.softmax(logits, -1)
                expected[a, b] = p[1, a] * p[2, b] * p[3]
    generator = torch.Generator().manual_seed(11)
    counts = torch.zeros(6, 6, 6)
    blocks = Counter[int]()
    with DecodingTarget(model, draft.config.target_layer_ids) as target:
        for _ in range(trials):
            out = speculative_generate(
                target, draft, prompt, max_tokens=3, temperature=temperature, generator=generator
            )
            counts[tuple(out.tokens)] += 1
            blocks.update(b.accepted for b in out.blocks)
    assert chi_square(counts.flatten(), expected.flatten() * trials) > 1e-3
    assert min(blocks[0], blocks[1], blocks[2]) > 50


def test_a_probe_walks_as_decoding_does() -> None:
    """Teacher-forced over the target's answer, the anchors that decoding visits give decoding's
    accepted lengths.
    """
    model = tiny.target()
    draft = tiny.draft(model)
    alone = [greedy_alone(model, p, max_tokens=40) for p in PROMPTS]
    tiny.agree(model, draft, [p + a for p, a in zip(PROMPTS, alone, strict=True)][:2], steps=40)
    seen = set()
    with DecodingTarget(model, tiny.LAYERS) as target:
        for prompt, tokens in zip(PROMPTS, alone, strict=True):
            blocks = speculative_generate(target, draft, prompt, max_tokens=40).blocks
            probed = probe(draft, answer_of(target, prompt, tokens))
            assert probed is not None
            walk = probed.walk()
            assert walk == [b.accepted + 1 for b in blocks[: len(walk)]]
            assert len(walk) >= len(blocks) - 4
            seen |= set(walk)
            assert ((probed.accept >= 0) & (probed.accept <= 1 + 1e-5)).all()
    assert len(seen) > 1
