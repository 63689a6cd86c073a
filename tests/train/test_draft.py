"""The draft model: names, frozen tensors, and properties of a forward that a wrong mask, position
or norm would break.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from core_cases import BLOCK, HIDDEN, VOCAB, small_batch, small_config, small_draft, small_target
from dspark.cache.errors import MismatchError
from dspark.train.data.batch import Batch
from dspark.train.draft.layers import RMSNorm
from dspark.train.draft.model import DraftModel
from dspark.train.ops.rope import Turning, rope_tables, rotate


def test_names_are_the_served_checkpoints() -> None:
    layer = [
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    want = {f"layers.{i}.{name}.weight" for i in range(2) for name in layer}
    want |= {
        "fc.weight",
        "hidden_norm.weight",
        "norm.weight",
        "confidence_head.proj.weight",
        "confidence_head.proj.bias",
    }
    want |= {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
    model = small_draft()
    assert {name for name, _ in model.trained()} == want
    assert set(model.state_dict()) == want | {"embed_tokens.weight", "lm_head.weight"}
    shapes = {name: tuple(p.shape) for name, p in model.trained()}
    assert shapes["fc.weight"] == (HIDDEN, 2 * HIDDEN)
    assert shapes["markov_head.markov_w1.weight"] == (VOCAB, 6)
    assert shapes["confidence_head.proj.weight"] == (1, HIDDEN + 6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_target_weights_are_shared_and_frozen(tied: bool, reduced: bool) -> None:
    target = small_target(tied=tied)
    ids = torch.tensor([3, 7, 20]) if reduced else None
    model = DraftModel(small_config(draft_vocab_size=3 if reduced else VOCAB), target, ids)
    head = model.frozen_head
    assert model.embed_tokens.weight.data_ptr() == target.embed_tokens.data_ptr()
    assert head.lm_head.data_ptr() == target.lm_head.data_ptr()
    moved = model.to(torch.float64)
    same = moved.frozen_head.lm_head.data_ptr() == moved.embed_tokens.weight.data_ptr()
    assert same == tied
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if n not in dict(model.trained())
    )
    assert bool((model.norm.weight == 1).all()), (
        "the draft's norm is its own, whatever the target's is"
    )
    if reduced:
        assert torch.equal(head.draft_head.float(), target.lm_head[[3, 7, 20]])
        assert head.to_draft is not None
        assert head.to_draft[7] == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_a_copied_output_matrix_has_room_for_w2(tied: bool, reduced: bool) -> None:
    ids = torch.tensor([3, 7, 20]) if reduced else None
    target = small_target(tied=tied)
    model = DraftModel(small_config(draft_vocab_size=3 if reduced else VOCAB), target, ids)
    assert (model.frozen_head.wide is None) == (not reduced), (
        "the target's own memory is left as it is"
    )
    names, rows = set(model.state_dict()), target.lm_head if ids is None else target.lm_head[ids]
    for _ in range(2):  # the second time nothing moves
        model.to(torch.float64)
        head = model.frozen_head
        assert head.wide is not None
        assert head.wide.shape == (rows.shape[0], HIDDEN + 6)
        assert head.wide.data_ptr() == head.draft_head.data_ptr() == model.lm_head.weight.data_ptr()
        assert torch.equal(head.draft_head, rows.double())
        assert torch.equal(model.embed_tokens.weight, target.embed_tokens.double())
        shared = model.embed_tokens.weight.data_ptr() == head.lm_head.data_ptr()
        assert shared == tied
    assert set(model.state_dict()) == names
    w2 = torch.randn(rows.shape[0], 6, dtype=torch.float64)
    assert head.with_markov(w2).data_ptr() == head.wide.data_ptr()
    assert torch.equal(head.with_markov(w2), torch.cat([rows.double(), w2], 1))
    assert torch.equal(replace(head, wide=None).with_markov(w2), head.wide)
    # Weights that are loaded go into the same memory; a copy of the module has none, and says so.
    model.load_state_dict({n: 2 * t for n, t in model.state_dict().items()})
    assert torch.equal(head.wide, torch.cat([2 * rows.double(), w2], 1))
    other = copy.deepcopy(model)
    assert other.frozen_head.wide is None
    assert torch.equal(other.frozen_head.draft_head, head.draft_head)
    other.make_room()
    assert other.frozen_head.wide is not None
    assert other.frozen_head.wide.data_ptr() != head.wide.data_ptr()


def test_no_room_without_a_markov_head() -> None:
    model = small_draft(
        speculator_type="dflash", markov_rank=0, enable_confidence_head=False
    ).double()
    model.make_room()
    assert model.frozen_head.wide is None
    assert model.lm_head.weight.is_contiguous()


def test_wrong_targets_are_refused() -> None:
    with pytest.raises(MismatchError, match="embed_tokens"):
        DraftModel(small_config(vocab_size=60, draft_vocab_size=60), small_target())
    with pytest.raises(MismatchError, match="are needed"):
        DraftModel(small_config(draft_vocab_size=3), small_target())
    with pytest.raises(MismatchError, match="ascending"):
        DraftModel(small_config(draft_vocab_size=3), small_target(), torch.tensor([7, 3, 20]))


def test_packing_changes_nothing() -> None:
    """A document's slots are the same alone and behind another document: mask and positions
    restart.
    """
    model = small_draft()
    packed = small_batch(lengths=(13, 11), padding=2)
    cut = slice(13, 24)
    keep = (packed.anchors >= 13) & packed.anchor_valid
    first_row = int((packed.last_index[:13] >= 0).sum())
    alone = Batch.build(
        input_ids=packed.input_ids[cut].numpy(),
        loss_mask=packed.loss_mask[cut].numpy(),
        doc=np.zeros(11, dtype=np.int32),
        aux=packed.aux[cut],
        last=packed.last[first_row:],
        anchors=(packed.anchors[keep] - 13).numpy(),
        block_size=BLOCK,
    )
    assert alone.anchors.shape[0] > 3
    with torch.no_grad():
        a = model(packed, model.plan(packed))
        b = model(alone, model.plan(alone))
    counted = packed.counted[keep]
    torch.testing.assert_close(a.h[keep][counted], b.h[counted], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        a.confidence[keep][counted], b.confidence[counted], rtol=1e-5, atol=1e-5
    )


def test_what_a_block_may_depend_on() -> None:
    """States before the anchor matter; the anchor's own, later ones and other tokens of the block
    do not.
    """
    model = small_draft()
    batch = small_batch(lengths=(20,), padding=0, max_anchors=1)
    a = int(batch.anchors[0])
    assert a >= 2

    def states(changed: Batch) -> torch.Tensor:
        with torch.no_grad():
            h: torch.Tensor = model(changed, model.plan(changed)).h[0]
        return h

    base = states(batch)
    before, after = batch.aux.clone(), batch.aux.clone()
    before[a - 1] += 1
    after[a:] += 1
    assert not torch.allclose(states(replace(batch, aux=before)), base)
    assert torch.equal(states(replace(batch, aux=after)), base)
    ids = batch.input_ids.clone()
    ids[a + 1] = (ids[a + 1] + 1) % VOCAB
    assert torch.equal(states(replace(batch, input_ids=ids)), base)
    ids[a] = (ids[a] + 1) % VOCAB
    assert not torch.allclose(states(replace(batch, input_ids=ids)), base)


def test_context_keys_skip_the_layer_norm() -> None:
    """Served drafts project ctx without input_layernorm: scaling that norm away leaves the
    context's keys as they were.
    """
    model = small_draft(num_layers=1)
    batch = small_batch()
    layer = model.layers[0]
    with torch.no_grad():
        # block: q = k = v = 0, so scores are 0 and only v_ctx is averaged
        layer.input_layernorm.weight.zero_()
        h = model.block_input(batch.input_ids[batch.anchors], batch.anchor_valid)[0, :1]
        a, start = int(batch.anchors[0]), 0
        if a == 0:
            a = int(batch.anchors[1])
            h = model.block_input(batch.input_ids[batch.anchors], batch.anchor_valid)[1, :1]
        v = layer.self_attn.v_proj(model.context(batch.aux))[start:a].view(-1, 2, 16)
        mean = v.sum(0) / (a + BLOCK)
        x = h + layer.self_attn.o_proj(mean.repeat_interleave(2, 0).flatten())
        want = model.norm(x + layer.mlp(layer.post_attention_layernorm(x)))
        index = batch.anchors.tolist().index(a)
        got = model(batch, model.plan(batch)).h[index, :1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_norm_and_rope_by_formula() -> None:
    x = torch.randn(5, 3, 8)
    norm = RMSNorm(8, 1e-6)
    torch.testing.assert_close(norm(x), x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt())
    position = torch.tensor([0, 1, 7, 100, 30000])
    out = rotate(x, rope_tables(position, Turning(8, 1e4), x.dtype))
    for t, p in enumerate(position.tolist()):
        for i in range(4):
            # Pairs (i, i + D/2) as complex numbers, turned by p * theta^(-2i/D).
            turn = np.exp(1j * np.float32(p) * np.float32(1e4 ** (-2 * i / 8)))
            for head in range(3):
                z = complex(x[t, head, i], x[t, head, i + 4]) * turn
                assert out[t, head, i].item() == pytest.approx(z.real, abs=5e-3)
                assert out[t, head, i + 4].item() == pytest.approx(z.imag, abs=5e-3)


def test_rope_survives_a_bf16_model() -> None:
    """Far positions: rounding the frequencies to bf16 would turn by whole radians."""
    position = torch.tensor([20000])
    fine, _ = rope_tables(position, Turning(64, 1e6), torch.float32)
    model = small_draft().to(torch.bfloat16)
    assert not [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    coarse, _ = rope_tables(position, Turning(64, 1e6), torch.bfloat16)
    assert float((fine - coarse.float()).abs().max()) < 0.01


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_every_parameter_learns(kind: str) -> None:
    model = small_draft(markov_head_type=kind)
    batch = small_batch()
    states = model(batch, model.plan(batch))
    (states.h.sum() + states.z.sum() + states.w2.sum() + states.confidence.sum()).backward()
    for name, parameter in model.trained():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_forward_by_formula() -> None:
    """One block written out slot by slot in float64: both layers, own norms, GQA, positions,
    SwiGLU, heads.
    """
    model = small_draft(markov_head_type="gated").double()
    batch = small_batch(lengths=(7, 12), padding=0).to("cpu", torch.float64)
    index = int((batch.anchors[batch.anchor_valid] >= 10).nonzero()[0])
    a, p = int(batch.anchors[index]), dict(model.named_parameters())

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return p[name + ".weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        angle = position * 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float32) / 16)
        z = torch.complex(x[:8], x[8:]) * torch.polar(
            torch.ones(8, dtype=torch.float64), angle.double()
        )
        return torch.cat([z.real, z.imag])

    ctx = rms(batch.aux[7:a].flatten(1) @ p["fc.weight"].T, "hidden_norm")
    ids = [int(batch.input_ids[a])] + [VOCAB - 1] * (BLOCK - 1)
    x = p["embed_tokens.weight"][ids]
    positions = [*range(a - 7), *range(a - 7, a - 7 + BLOCK)]  # the document begins at 7
    for i in range(2):
        at = f"layers.{i}.self_attn."
        n = rms(x, f"layers.{i}.input_layernorm")
        rows = torch.cat([ctx, n])
        seen = torch.zeros(BLOCK, 4, 16, dtype=torch.float64)
        for head in range(4):
            q = rms((n @ p[at + "q_proj.weight"].T)[:, 16 * head : 16 * head + 16], at + "q_norm")
            own = slice(16 * (head // 2), 16 * (head // 2) + 16)
            k = rms((rows @ p[at + "k_proj.weight"].T)[:, own], at + "k_norm")
            v = (rows @ p[at + "v_proj.weight"].T)[:, own]
            k = torch.stack([turn(row, where) for row, where in zip(k, positions, strict=True)])
            for s in range(BLOCK):
                seen[s, head] = (k @ turn(q[s], positions[a - 7 + s]) / 4).softmax(0) @ v
        x = x + seen.flatten(1) @ p[at + "o_proj.weight"].T
        n = rms(x, f"layers.{i}.post_attention_layernorm")
        gate = n @ p[f"layers.{i}.mlp.gate_proj.weight"].T
        up = n @ p[f"layers.{i}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ p[f"layers.{i}.mlp.down_proj.weight"].T
    h = rms(x, "norm")
    e = p["markov_head.markov_w1.weight"][batch.prev_ids[index]]
    both = torch.cat([h, e], 1)
    z = (
        torch.sigmoid(both @ p["markov_head.gate_proj.weight"].T + p["markov_head.gate_proj.bias"])
        * e
    )
    confidence = both @ p["confidence_head.proj.weight"][0] + p["confidence_head.proj.bias"]
    got = model(batch, model.plan(batch))
    # 1e-6: angles are made in fp32, here and there.
    torch.testing.assert_close(got.h[index], h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.z[index], z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.confidence[index], confidence, rtol=1e-5, atol=1e-6)
