"""The chunked objective against plain autograd in float64: values and every gradient, on fresh
random inputs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core_cases import VOCAB, small_batch, small_draft
from dspark.cache.errors import UsageError
from dspark.cache.target.logits import Logits
from dspark.train.config import TrainConfig
from dspark.train.objective.chunks import CHUNK_LOGITS, chunk_rows_for, chunk_terms, plus_product
from dspark.train.objective.config import EXAMPLE, ObjectiveConfig
from dspark.train.objective.objective import objective
from dspark.train.objective.reference import reference_loss
from dspark.train.objective.slots import Denominators, SlotInputs, slot_weights
from dspark.train.objective.states import FrozenHead

N, H, V, VD, R = 13, 8, 23, 9, 4


def case(
    *,
    reduced: bool,
    markov: bool = True,
    shared: bool = False,
    room: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[SlotInputs, FrozenHead]:
    """Fresh at every call: an error that needs particular inputs gets its chance, run after run.
    ``shared``: target rows of several slots.
    ``room``: the head is a part of a matrix with columns for W2, full of what was there before.
    """
    full = torch.randn(V, H, dtype=dtype)
    ids = torch.randperm(V)[:VD].sort().values
    inverse = torch.full((V,), -1)
    inverse[ids] = torch.arange(VD)
    head = FrozenHead(full, full[ids], ids, inverse) if reduced else FrozenHead(full, full)
    if room:
        wide = torch.cat(
            [head.draft_head, torch.randn(head.draft_head.shape[0], R, dtype=dtype)], 1
        )
        own = wide[:, :H]
        head = replace(head, lm_head=full if reduced else own, draft_head=own, wide=wide)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    at = (torch.rand(N) < 0.6).cumsum(0)
    at -= at[0].clone()
    slots = SlotInputs(
        h=leaf(N, H),
        z=leaf(N, R) if markov else None,
        w2=leaf(VD if reduced else V, R) if markov else None,
        confidence=leaf(N) if markov else None,
        target=torch.randn(int(at[-1]) + 1 if shared else N, H, dtype=dtype),
        labels=torch.randint(0, V, (N,)),
        weight=torch.rand(N, dtype=dtype),
        target_at=at if shared else None,
    )
    return slots, head


def gradients(loss: Tensor, slots: SlotInputs) -> list[Tensor]:
    leaves = [x for x in (slots.h, slots.z, slots.w2, slots.confidence) if x is not None]
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("markov", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
def test_equals_the_reference(
    reduced: bool, markov: bool, shared: bool, room: bool, chunk: int
) -> None:
    slots, head = case(reduced=reduced, markov=markov, shared=shared, room=room)
    config = ObjectiveConfig(ce=0.3, l1=0.7, confidence=0.5)
    dens = Denominators(2.5, 4.0, 1.5)
    out = objective(slots, head, config, dens, chunk_rows=chunk)
    loss, ce, l1 = reference_loss(slots, head, config, dens)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.ce, ce.detach())
    torch.testing.assert_close(out.l1, l1.detach())
    # A factor on the loss (gradient accumulation, loss scaling) must reach every gradient.
    for ours, theirs in zip(
        gradients(3 * out.loss, slots), gradients(3 * loss, slots), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_w2_of_the_last_call_leaves_nothing_behind() -> None:
    """Columns for W2 are written anew at every call, and a backward that comes after another
    forward is its own.
    """
    slots, head = case(reduced=False, room=True)
    assert slots.w2 is not None
    other = replace(slots, w2=torch.randn_like(slots.w2).requires_grad_())
    config, dens = ObjectiveConfig(), Denominators(1, 1, 1)
    outs = [(s, objective(s, head, config, dens, chunk_rows=5).loss) for s in (slots, other)]
    for s, loss in outs:
        want = reference_loss(s, head, config, dens)[0]
        torch.testing.assert_close(loss, want)
        for a, b in zip(gradients(loss, s), gradients(want, s), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_chunks_and_the_target_rows_they_need() -> None:
    slots, _ = case(reduced=False, markov=False)
    at = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7, 7])
    found = [(c.slots, c.rows) for c in replace(slots, target_at=at).chunks(5)]
    # The row of slots 3 to 5 is needed by two chunks.
    assert found == [
        (slice(0, 5), slice(0, 3)),
        (slice(5, 10), slice(2, 6)),
        (slice(10, 13), slice(6, 8)),
    ]
    assert [(c.slots, c.rows) for c in slots.chunks(10)] == [
        (slice(0, 10), slice(0, 10)),
        (slice(10, 13), slice(10, 13)),
    ]


def test_sizes_of_chunks() -> None:
    # Half of 512 blocks of 7, on Qwen3's vocabulary; a few slots less need as much.
    assert chunk_rows_for(3584, 151_936, "cuda") == 1792 == 14 * 128
    assert chunk_rows_for(3490, 151_936, "cuda") == 1792
    assert chunk_rows_for(1792, 151_936, "cuda") == 1792
    assert chunk_rows_for(1, 151_936, "cuda") == chunk_rows_for(0, 50, "cuda") == 128
    assert chunk_rows_for(3584, 997, "cuda") == 3584
    assert chunk_rows_for(11, 1 << 22, "cpu") == 2  # six chunks
    assert chunk_rows_for(0, 50, "cpu") == 1
    for count in range(1, 9000, 97):
        rows = chunk_rows_for(count, 151_936, "cuda")
        assert rows % 128 == 0
        assert rows * 151_936 < CHUNK_LOGITS["cuda"] + 128 * 151_936
        assert -(-count // rows) <= -(-count * 151_936 // CHUNK_LOGITS["cuda"]) + 1


def test_a_target_row_is_multiplied_once_a_chunk() -> None:
    """And no row that no slot of the chunk is held to."""
    slots, head = case(reduced=False, shared=True)
    seen = []

    def terms(draft: Tensor, target: Tensor, *rest: Any) -> Any:
        seen.append(target.shape[0])
        return chunk_terms(draft, target, *rest)

    objective(slots, head, ObjectiveConfig(), Denominators(1, 1, 1), chunk_rows=5, terms=terms)
    assert slots.target_at is not None
    assert seen == [len(set(part.tolist())) for part in slots.target_at.split(5)]


def test_slots_in_another_order_give_the_same() -> None:
    """What a batch hands over, in rising target row and sharing rows, against the reference in the
    order of the blocks, a row a slot.
    """
    model, batch = small_draft().double(), small_batch().to("cpu", torch.float64)
    config, dens = ObjectiveConfig(), Denominators(3.0, 2.0, 5.0)
    trained = [p for _, p in model.trained()]
    slots = SlotInputs.gather(batch, model(batch, model.plan(batch)), config.decay)
    out = objective(slots, model.frozen_head, config, dens, chunk_rows=7)
    assert slots.target.shape[0] < slots.labels.shape[0]
    at = batch.slots.sort().values
    plain = replace(
        batch,
        slots=at,
        target_rows=batch.target_row.flatten()[at],
        target_at=torch.arange(at.numel()),
        target_at_host=torch.arange(at.numel()),
    )
    assert not torch.equal(plain.slots, batch.slots)
    in_blocks = SlotInputs.gather(plain, model(plain, model.plan(plain)), config.decay)
    loss, ce, l1 = reference_loss(in_blocks, model.frozen_head, config, dens)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(batch.in_blocks(out.ce), plain.in_blocks(ce.detach()))
    torch.testing.assert_close(batch.in_blocks(out.l1), plain.in_blocks(l1.detach()))
    mine, reference = torch.autograd.grad(out.loss, trained), torch.autograd.grad(loss, trained)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("term", ["ce", "l1", "kl"])
def test_terms_alone(term: str) -> None:
    slots, head = case(reduced=True)
    config = ObjectiveConfig(**{"ce": 0.0, "l1": 0.0, "kl": 0.0, "confidence": 0.0, term: 1.0})
    dens = Denominators(1.0, 1.0, 1.0)
    ours = gradients(objective(slots, head, config, dens, chunk_rows=4).loss, slots)
    for a, b in zip(
        ours, gradients(reference_loss(slots, head, config, dens)[0], slots), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_gradient_against_finite_differences() -> None:
    """Independent of autograd. L1 has kinks, so only away from them: one direction, small step."""
    slots, head = case(reduced=False)
    config, dens = ObjectiveConfig(confidence=0.0), Denominators(1.0, 1.0, 1.0)
    direction = torch.randn_like(slots.h)
    slope = (gradients(objective(slots, head, config, dens).loss, slots)[0] * direction).sum()

    def at(step: float) -> Tensor:
        moved = replace(slots, h=slots.h.detach() + step * direction)
        return objective(moved, head, config, dens).loss

    torch.testing.assert_close((at(1e-8) - at(-1e-8)).detach() / 2e-8, slope, rtol=1e-4, atol=1e-6)


def test_meaning_on_distributions_by_hand() -> None:
    """p_d = (1/2, 1/2), p_t = (3/4, 1/4): L1 = 1/2, accept 3/4, KL = 3/4 ln 3/2 + 1/4 ln 1/2;
    label 1: CE = ln 2.
    """
    eye = torch.eye(2)
    slots = SlotInputs(
        h=torch.zeros(1, 2),
        z=None,
        w2=None,
        confidence=torch.zeros(1),
        target=torch.tensor([[3.0, 1.0]]).log(),
        labels=torch.tensor([1]),
        weight=torch.ones(1),
    )
    out = objective(slots, FrozenHead(eye, eye), ObjectiveConfig(), Denominators(1, 1, 1))
    assert out.l1.item() == pytest.approx(0.5)
    assert out.accept.item() == pytest.approx(0.75)
    assert out.ce.item() == pytest.approx(0.693147, abs=1e-6)
    # BCE of probability 1/2 against any goal is ln 2.
    assert out.kl is not None
    assert out.kl.item() == pytest.approx(0.130812, abs=1e-6)
    loss = 0.1 * 0.693147 + 0.6 * 0.5 + 0.3 * 0.130812 + 0.693147
    assert out.loss.item() == pytest.approx(loss, abs=1e-5)


def test_soft_cap_and_factor_shape_the_target_only() -> None:
    """Target logits 2 and 0 become 3 tanh(2 * 0.5 / 3) and 0; the draft's logits stay as they
    are.
    """
    eye = torch.eye(2)
    slots = SlotInputs(
        h=torch.tensor([[2.0, 0.0]]),
        z=None,
        w2=None,
        confidence=None,
        target=torch.tensor([[2.0, 0.0]]),
        labels=torch.tensor([0]),
        weight=torch.ones(1),
    )
    out = objective(
        slots,
        FrozenHead(eye, eye, logits=Logits(0.5, 3.0)),
        ObjectiveConfig(),
        Denominators(1, 1, 1),
    )
    p_draft, p_target = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-3 * math.tanh(1 / 3)))
    assert out.l1.item() == pytest.approx(2 * abs(p_draft - p_target), abs=1e-6)
    assert out.ce.item() == pytest.approx(-math.log(p_draft), abs=1e-6)


def test_reduced_vocabulary_by_hand() -> None:
    """Draft can say token 1 only: p_d = (0, 1, 0); p_t = (1/4, 1/4, 1/2): L1 = 1/4 + 3/4 + 1/2;
    label 2 has no CE.
    """
    eye = torch.eye(3)
    head = FrozenHead(eye, eye[1:2], torch.tensor([1]), torch.tensor([-1, 0, -1]))
    slots = SlotInputs(
        h=torch.randn(1, 3),
        z=None,
        w2=None,
        confidence=None,
        target=torch.tensor([[1.0, 1.0, 2.0]]).log(),
        labels=torch.tensor([2]),
        weight=torch.ones(1),
    )
    out = objective(slots, head, ObjectiveConfig(), Denominators(1, 1, 1))
    assert out.l1.item() == pytest.approx(1.5)
    assert out.ce.item() == 0.0
    assert out.ce_known.tolist() == [False]
    assert out.hit.tolist() == [False]


def test_confidence_goal_is_detached() -> None:
    slots, head = case(reduced=False)
    config = ObjectiveConfig(ce=1.0, l1=0.0, confidence=1.0)
    dens = Denominators(1.0, 1.0, 1.0)
    with_bce = gradients(objective(slots, head, config, dens).loss, slots)
    without = gradients(objective(slots, head, replace(config, confidence=0.0), dens).loss, slots)
    assert torch.equal(with_bce[0], without[0])
    assert float(with_bce[3].abs().max()) > 0


def test_bf16_states_with_wide_sums() -> None:
    """bf16 inputs: the loss stays within their rounding of float64 on the same rounded values, and
    is fp32.
    """
    slots, head = case(reduced=False, shared=True, dtype=torch.bfloat16)
    slots = replace(slots, weight=slots.weight.float())
    config, dens = ObjectiveConfig(), Denominators(6.0, 6.0, 6.0)
    out = objective(slots, head, config, dens, chunk_rows=5)
    assert out.loss.dtype == out.l1.dtype == torch.float32

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_()

    exact = SlotInputs(
        h=slots.h.detach().double().requires_grad_(),
        z=wide(slots.z),
        w2=wide(slots.w2),
        confidence=wide(slots.confidence),
        target=slots.target.double(),
        labels=slots.labels,
        weight=slots.weight.double(),
        target_at=slots.target_at,
    )
    full = head.lm_head.double()
    loss, _, _ = reference_loss(exact, FrozenHead(full, full), config, dens)
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(gradients(out.loss, slots), gradients(loss, exact), strict=True):
        assert ours.dtype == torch.bfloat16
        cosine = torch.nn.functional.cosine_similarity(
            ours.double().flatten(), theirs.flatten(), dim=0
        )
        assert float(cosine) > 0.99


@pytest.mark.parametrize("shared", [False, True])
def test_no_slots_gives_zero_and_keeps_the_graph(shared: bool) -> None:
    slots, head = case(reduced=False)
    empty = SlotInputs(
        h=slots.h[:0],
        z=None if slots.z is None else slots.z[:0],
        w2=slots.w2,
        confidence=None if slots.confidence is None else slots.confidence[:0],
        target=slots.target[:0],
        labels=slots.labels[:0],
        weight=slots.weight[:0],
        target_at=torch.empty(0, dtype=torch.int64) if shared else None,
    )
    out = objective(empty, head, ObjectiveConfig(), Denominators(0.0, 0.0, 0.0))
    assert out.loss.item() == 0.0
    for gradient in gradients(out.loss, slots):
        assert not gradient.any()


def test_rows_add_up_to_one_mean() -> None:
    """Two rows with common denominators give the loss and gradient of their union: ragged rows must
    not weigh alike.
    """
    model = small_draft().double()
    config = ObjectiveConfig()
    rows = [small_batch(s, max_anchors=n).to("cpu", torch.float64) for s, n in ((3, 2), (4, 0))]
    dens = [Denominators.of(row, config.decay) for row in rows]
    total = dens[0] + dens[1]
    parts = [SlotInputs.gather(row, model(row, model.plan(row)), config.decay) for row in rows]
    assert parts[0].h.shape[0] != parts[1].h.shape[0]
    summed = objective(parts[0], model.frozen_head, config, total).loss
    summed = summed + objective(parts[1], model.frozen_head, config, total).loss
    parts = [
        replace(p, target=p.target[p.target_at], target_at=None, target_at_host=None) for p in parts
    ]
    both = [
        None if getattr(parts[0], name) is None else torch.cat([getattr(p, name) for p in parts])
        for name in ("h", "z", "confidence", "target", "labels", "weight")
    ]
    h, z, confidence, target, labels, weight = both
    assert h is not None
    assert target is not None
    assert labels is not None
    assert weight is not None
    union = SlotInputs(h, z, parts[0].w2, confidence, target, labels, weight)
    want, _, _ = reference_loss(union, model.frozen_head, config, total)
    torch.testing.assert_close(summed, want, rtol=1e-7, atol=1e-9)
    assert total.l1 == pytest.approx(float(weight.sum()))


def test_denominators_and_weights() -> None:
    assert slot_weights(3, 4.0).tolist() == pytest.approx([1.0, 0.7788, 0.6065], abs=1e-4)
    assert slot_weights(3, 0).tolist() == [1.0, 1.0, 1.0]
    batch = small_batch()
    to_draft = torch.full((VOCAB,), -1)
    to_draft[batch.label_ids[batch.counted][0]] = 0
    some = Denominators.of(batch, 4.0, to_draft)
    every = Denominators.of(batch, 4.0)
    assert 0 < some.ce < every.ce
    assert some.l1 == every.l1 == every.confidence == every.ce


def test_values_without_gradient() -> None:
    slots, head = case(reduced=True)
    with torch.no_grad():
        out = objective(slots, head, ObjectiveConfig(), Denominators(1, 1, 1), chunk_rows=4)
    assert not out.loss.requires_grad
    torch.testing.assert_close(
        out.loss, reference_loss(slots, head, ObjectiveConfig(), Denominators(1, 1, 1))[0].detach()
    )


def test_loss_fn_flag() -> None:
    assert ObjectiveConfig.from_json(TrainConfig(cache="").loss_fn) == ObjectiveConfig()
    assert ObjectiveConfig.from_json(EXAMPLE) == ObjectiveConfig()
    published = ObjectiveConfig(ce=0.1, l1=0.9, kl=0.0)
    assert ObjectiveConfig.from_json('{"ce":0.1,"l1":0.9}') == published
    # tv is half of l1, so the same number weighs the distance half as much.
    assert ObjectiveConfig.from_json('{"ce":0.1,"tv":1.8}') == published
    assert ObjectiveConfig.from_json('{"ce":1}', confidence=0.0) == ObjectiveConfig(
        ce=1.0, l1=0.0, kl=0.0, confidence=0.0
    )
    for bad in (
        '{"ce":0.1,"kld":1}',
        '{"l1":1,"tv":1}',
        "[1]",
        "{",
        '{"ce":"a"}',
        '{"ce":-1}',
        '{"ce":0}',
        '{"ce":NaN}',
    ):
        with pytest.raises(UsageError):
            ObjectiveConfig.from_json(bad)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_add_up_in_the_wide_type(dtype: torch.dtype, device: str) -> None:
    """Of a transposed matrix and of columns of a wider one, as the objective has them; many small
    ones do not get lost.
    """
    wide = torch.promote_types(dtype, torch.float32)
    gradient, x = (torch.randn(6, n, device=device).to(dtype) for n in (V, H + R))
    total = plus_product(None, gradient.T, x[:, H:], wide)
    want = gradient.double().T @ x[:, H:].double()
    assert total.dtype == wide
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        total.double(), want, rtol=rtol, atol=1e-2 if dtype == torch.bfloat16 else 1e-4
    )
    first, small = total.clone(), gradient / 4096
    for _ in range(8):
        assert plus_product(total, small.T, x[:, H:], wide) is total
    torch.testing.assert_close((total - first).double(), want / 512, rtol=2 * rtol, atol=1e-4)
