"""Products of joined weights: values and gradients against a product each, and that a draft's
weights lie so that one product serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from core_cases import small_batch, small_draft, small_target
from dspark.train.draft.layers import Attention, Mlp
from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.folder import load_draft, save_draft
from dspark.train.evaluate import judged
from dspark.train.ops import joined
from dspark.train.ops.joined import joined_product, lay_side_by_side, side_by_side
from dspark.train.optim.adamw import MasterAdamW
from dspark.train.optim.base import AdamSettings
from dspark.train.optim.muon import MasterMuon
from dspark.train.run.setup import compile_draft

ADAM = AdamSettings(betas=(0.9, 0.95), weight_decay=0.1, clip=1.0)


def case(
    n: int, k: int, rows: list[int], adjacent: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[nn.Parameter]]:
    g = torch.Generator().manual_seed(n + k)
    x = torch.randn(n, k, generator=g, dtype=dtype).requires_grad_()
    weights = [nn.Parameter(torch.randn(m, k, generator=g, dtype=dtype)) for m in rows]
    if adjacent:
        lay_side_by_side(weights)
    assert (side_by_side(weights) is not None) == (adjacent or len(rows) == 1)
    return x, weights


def products(
    x: Tensor, weights: list[nn.Parameter], joint: Tensor | None = None
) -> tuple[Tensor, ...]:
    return joined_product(x, weights, joint).split_with_sizes([w.shape[0] for w in weights], 1)


def gradients(outs: tuple[Tensor, ...], inputs: list[Any]) -> tuple[Tensor | None, ...]:
    g = torch.Generator().manual_seed(0)
    loss = torch.stack(
        [(o * torch.randn(o.shape, generator=g).to(o.dtype)).sum() for o in outs]
    ).sum()
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    k=st.integers(1, 9),
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    adjacent=st.booleans(),
    more=st.one_of(st.none(), st.integers(0, 3)),
)
def test_values_and_gradients_are_those_of_a_product_each(
    n: int, k: int, rows: list[int], adjacent: bool, more: int | None
) -> None:
    """``more``: rows of a joint copy behind those of the weights."""
    x, weights = case(n, k, rows, adjacent)
    joint = (
        None
        if more is None
        else torch.cat([*[w.detach() for w in weights], torch.full((more, k), 9.0)])
    )
    ours, plain = products(x, weights, joint), tuple(F.linear(x, w) for w in weights)
    both = [gradients(outs, [x, *weights]) for outs in (ours, plain)]
    for a, b in zip([*ours, *both[0]], [*plain, *both[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_precisions_and_what_needs_no_gradient(dtype: torch.dtype, adjacent: bool) -> None:
    x, weights = case(6, 16, [8, 24], adjacent, dtype)
    plain = [F.linear(x, w) for w in weights]
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            for a, b in zip(products(x, weights), plain, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for inputs in ([x], [*weights], [weights[1]]):
        for p in (x, *weights):
            p.requires_grad_(any(p is i for i in inputs))
        ours = gradients(products(x, weights), inputs)
        theirs = gradients(tuple(F.linear(x, w) for w in weights), inputs)
        for a, b in zip(ours, theirs, strict=True):
            assert a is not None
            assert a.dtype == dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("adjacent", [True, False])
def test_operations_are_registered_as_torch_wants_them(adjacent: bool) -> None:
    x, weights = case(5, 8, [4, 12], adjacent, torch.float32)
    plain = [w.detach() for w in weights]
    for joint in (None, torch.cat(plain)):
        torch.library.opcheck(torch.ops.dspark.joined_linear.default, (x, weights, joint))
        torch.library.opcheck(torch.ops.dspark.joined_linear.default, (x.detach(), plain, joint))
        torch.library.opcheck(
            torch.ops.dspark.joined_linear_input.default, (torch.randn(5, 16), plain, joint)
        )


def test_a_view_only_of_what_lies_side_by_side() -> None:
    memory = torch.arange(60.0)
    a, b, c = memory[:12].view(4, 3), memory[12:18].view(2, 3), memory[18:30].view(4, 3)
    view = side_by_side([a, b, c])
    assert view is not None
    assert view.data_ptr() == memory.data_ptr()
    assert torch.equal(view, memory[:30].view(10, 3))
    assert side_by_side([b, c]) is not None
    apart: list[list[Tensor]] = [
        [b, a],
        [a, c],
        [a, b.clone()],
        [a, b.view(3, 2)],
        [a, memory[12:18].view(3, 2).T],
        [a, memory.double()[12:18].view(2, 3)],
        [a, memory.view(torch.int32)[12:18].view(2, 3)],
    ]
    for weights in apart:
        assert side_by_side(weights) is None


def sets(model: DraftModel) -> list[tuple[Tensor, ...]]:
    return [m.joined for m in model.layers.modules() if isinstance(m, Attention | Mlp)]


def is_joined(model: DraftModel) -> bool:
    return len(sets(model)) == 4 and all(
        side_by_side(weights) is not None for weights in sets(model)
    )


def test_a_draft_is_joined_however_it_was_made(tmp_path: Path) -> None:
    model = small_draft()
    assert is_joined(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    assert is_joined(model.to(torch.float64))
    assert is_joined(model.float())
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    model.load_state_dict({n: 2 * t for n, t in state.items()})
    assert is_joined(model)
    save_draft(tmp_path, model, dtype=torch.float32)
    for frozen in (None, torch.float32):
        for dtype in (torch.float32, torch.bfloat16):
            again = load_draft(tmp_path, small_target(), dtype=dtype, frozen_dtype=frozen)
            assert is_joined(again)
            assert all(torch.equal(p, 2 * state[n].to(dtype)) for n, p in again.trained())


@pytest.mark.parametrize("bucket", [1 << 26, 1 << 11, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [MasterAdamW, MasterMuon])
def test_a_draft_stays_joined_in_the_optimizers_buckets(
    kind: Any, dtype: torch.dtype, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark.train.optim.flat.BUCKET", bucket)
    model = small_draft().to(dtype)
    plain = {n: p.detach().clone() for n, p in model.trained()}
    optimizer = kind(model.trained(), ADAM)
    assert is_joined(model)
    assert all(torch.equal(plain[n], p) for n, p in model.trained())
    sizes = [sum(optimizer.parameters[n].numel() for n in b.at) for b in optimizer._buckets]
    most = max(sum(w.numel() for w in weights) for weights in sets(model))
    assert max(sizes) <= max(bucket, most, *(p.numel() for p in plain.values()))
    # a second one must not take the first one's buckets for one piece
    again = kind(model.trained(), ADAM)
    assert [set(b.at) for b in again._buckets] == [set(b.at) for b in optimizer._buckets]


def test_a_step_is_the_same_joined_or_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = small_batch()

    def trained(apart: bool) -> DraftModel:
        model = small_draft().double().float()
        if apart:
            monkeypatch.setattr(joined, "side_by_side", lambda weights: None)
        optimizer = MasterMuon(model.trained(), ADAM)
        for _ in range(2):
            states = model(batch, model.plan(batch))
            (states.h.square().sum() + states.confidence.sum()).backward()
            optimizer.step(1e-3)
        return model

    for (n, p), (_, q) in zip(trained(False).trained(), trained(True).trained(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=n)


def test_compiled_equals_eager() -> None:
    """As one graph with its backward, cut as for generated code; that code itself is slow to make
    on a CPU.
    """
    batch, found = small_batch(), []
    for compiled in (False, True):
        model = small_draft()
        run: Any = (
            torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
            if compiled
            else model
        )
        states = run(batch, model.plan(batch))
        (states.h.square().sum() + states.z.square().sum() + states.confidence.sum()).backward()
        assert is_joined(model)
        found.append([p.grad for _, p in model.trained() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_whole_draft_is_judged_by_the_code_compiled_for_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted, compiled = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, **{**k, "backend": counted}))
    batch, model = small_batch(), small_draft()
    with torch.no_grad():
        expected = judged(model, batch, 4.0, "sdpa")
    compile_draft(model, in_parts=False)
    model(batch, model.plan(batch)).h.square().sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for _, p in model.trained()]
    with torch.no_grad():
        states, _, out = judged(model, batch, 4.0, "sdpa")
    assert counted.frame_count == 1
    assert not any(x.requires_grad for x in (states.h, states.z, states.w2, states.confidence))
    torch.testing.assert_close(states.h, expected[0].h)
    torch.testing.assert_close(out.ce, expected[2].ce)
    for (_, p), before in zip(model.trained(), gradients, strict=True):
        assert p.grad is None if before is None else torch.equal(p.grad, before)
