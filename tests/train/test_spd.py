"""SPD heads: the network against an oracle written from its description, the published sizes,
training, and decoding beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_trainings import small_training
from torch import Tensor

import dspark.cache
import stores
from dspark.cache.errors import DraftError, MismatchError
from dspark.cache.target.frozen import FrozenTarget
from dspark.train.data.batch import Batch
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.saved.folder import load_draft, trained_shapes
from dspark.train.draft.spd.decoding import SpdDecoder
from dspark.train.draft.spd.drafter import SPD, tap_rows
from dspark.train.draft.spd.head import SpdHead
from dspark.train.draft.types import drafter
from dspark.train.loop import train
from dspark.train.objective.chunks import chunk_terms
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators, SlotInputs

GLM = {
    "hidden_size": 2048,
    "vocab_size": 154_880,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "intermediate_size": 10_240,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def tiny(
    layers: int = 1, taps: tuple[int, ...] = (1, 3, 5), vocab: int = 50, kept: int = 50
) -> SpdHead:
    """A head of random weights, none of them at a value that hides a mistake."""
    torch.manual_seed(7)
    config = DraftConfig.sized_for(
        {
            "hidden_size": 16,
            "vocab_size": vocab,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 24,
            "rope_theta": 100.0,
        },
        target_layer_ids=taps,
        mask_token_id=0,
        speculator_type="spd",
        num_layers=layers,
        draft_vocab_size=kept,
    )
    ids = None if kept == vocab else torch.arange(0, vocab, vocab // kept)[:kept]
    target = FrozenTarget(
        torch.randn(vocab, 16), torch.rand(16) + 0.5, torch.randn(vocab, 16), False
    )
    head = SpdHead(config, target, ids)
    for _, parameter in head.trained():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.double()


def batch_of(head: SpdHead, lengths: tuple[int, ...] = (9, 6)) -> Batch:
    """Two documents in a row, every position an anchor that can be one."""
    total = sum(lengths)
    g = torch.Generator().manual_seed(1)
    mask = np.ones(total, np.bool_)
    doc = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    ends = np.cumsum(lengths) - 1
    return Batch.build(
        input_ids=torch.randint(0, head.config.vocab_size, (total,), generator=g).numpy(),
        loss_mask=mask,
        doc=doc,
        aux=torch.randn(total, len(head.config.target_layer_ids), 16, generator=g).double(),
        last=torch.randn(total - len(lengths), 16, generator=g).double(),
        anchors=np.setdiff1d(np.arange(total), ends),
        block_size=1,
    )


def oracle(head: SpdHead, ids: Tensor, aux: Tensor, fill: int) -> Tensor:
    """Logits [S, Vd] of the token after each of one document, position by position, from SPD's
    description and the weights by name.
    """
    w = SPD.served(dict(head.trained()), head.config, torch.float64)
    c, n = head.config, len(head.config.stage_ends)
    states = torch.cat([head.embed_tokens.weight[ids][:, None], aux], 1)  # hs[0], then the taps
    hf = [0, *(i + 1 for i in c.target_layer_ids)]
    g: list[Tensor] = [states[:, 0] @ w["g0_proj.weight"].T]
    for k in range(1, n + 1):
        used = [j for j, i in enumerate(hf) if i <= c.stage_ends[k - 1]]
        g.append(states[:, used].flatten(1) @ w[f"stage_projs.{n - k}.weight"].T)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def turned(x: Tensor, position: int) -> Tensor:
        half = c.head_dim // 2
        angle = position * c.rope_theta ** -(torch.arange(half, dtype=torch.float32) / half)
        angle = angle.double()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    out = []
    for t in range(len(ids)):
        x = g[0][t]
        # Distance -> the memory row there.
        memory = {t - p: g[n if t - p >= min(fill, n) else t - p][p] for p in range(t)}
        for layer in range(c.num_layers):
            at = f"spec_layers.{layer}."
            memory = {
                d: row @ w[f"fixed_stage_per_layer_projs.{layer}.{n - min(d, n)}.weight"].T
                for d, row in memory.items()
            }
            q = (
                rms(x, w[at + "input_layernorm.weight"]) @ w[at + "self_attn.q_proj.weight"].T
            ).view(-1, c.head_dim)
            q = turned(rms(q, w[at + "self_attn.q_norm.weight"]), t)
            rows = {0: x, **memory}
            heads = []
            for h in range(c.num_heads):
                kv = h * c.num_kv_heads // c.num_heads
                scores, values = [], []
                for d, row in rows.items():
                    normed = rms(row, w[at + "input_layernorm.weight"])
                    k = (w[at + "self_attn.k_proj.weight"] @ normed).view(-1, c.head_dim)[kv]
                    scores.append(
                        q[h]
                        @ turned(rms(k, w[at + "self_attn.k_norm.weight"]), t - d)
                        * c.head_dim**-0.5
                    )
                    values.append(
                        (w[at + "self_attn.v_proj.weight"] @ normed).view(-1, c.head_dim)[kv]
                    )
                heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
            x = x + w[at + "self_attn.o_proj.weight"] @ torch.cat(heads)
            y = rms(x, w[at + "post_attention_layernorm.weight"])
            inner = torch.nn.functional.silu(w[at + "mlp.gate_proj.weight"] @ y) * (
                w[at + "mlp.up_proj.weight"] @ y
            )
            x = x + w[at + "mlp.down_proj.weight"] @ inner
        out.append(w["lm_head.weight"] @ rms(x, head.norm.weight))
    return torch.stack(out)


def logits_of(head: SpdHead, batch: Batch, fill: int) -> Tensor:
    states = head(batch, head.plan(batch, fill=fill))
    return states.z[:, 0] @ states.w2.T


@pytest.mark.parametrize(("layers", "taps"), [(1, (1, 3, 5)), (2, (1, 3, 5)), (1, (0, 1, 2, 3))])
def test_the_forward_is_the_oracles_at_every_fill(layers: int, taps: tuple[int, ...]) -> None:
    head = tiny(layers, taps)
    batch = batch_of(head)
    with torch.no_grad():
        for fill in range(1, len(taps) + 1):
            ours = logits_of(head, batch, fill)
            theirs = torch.cat(
                [
                    oracle(head, batch.input_ids[a:b], batch.aux[a:b], fill)[:-1]
                    for a, b in ((0, 9), (9, 15))
                ]
            )
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # angles are float32


def test_decoding_is_the_training_forward_at_every_position_and_fill() -> None:
    head = tiny(2)
    batch = batch_of(head, (12,))
    with torch.no_grad():
        want = {fill: logits_of(head, batch, fill) for fill in (1, 2, 3)}
        decoder = SpdDecoder(head)
        decoder.extend(batch.aux[:2], batch.input_ids[:2])
        # one token completes at a time; a rejection begins again at fill 1
        for complete in range(2, 9):
            for fill in (1, 2, 3):
                at = slice(complete, complete + fill)
                # What a token has not reached yet is not there: NaN shows it if it is read.
                aux = batch.aux[at].clone()
                for i in range(fill):
                    aux[i, fill - 1 - i :] = torch.nan
                got = decoder.logits(batch.input_ids[at].tolist(), aux)
                torch.testing.assert_close(
                    got.double(), want[fill][complete + fill - 1], rtol=0, atol=1e-5
                )
            decoder.extend(
                batch.aux[complete : complete + 1], batch.input_ids[complete : complete + 1]
            )


def test_published_sizes_from_shapes_alone() -> None:
    settings = dspark_settings(num_layers=1)
    config = SPD.configure(settings, GLM, [14, 30, 46], 0, 16_000)
    shapes = trained_shapes(config)
    values = sum(int(np.prod(s)) for s in shapes.values())
    assert (len(shapes), values) == (19, 160_698_496)
    assert shapes["stage_projs.0.weight"] == (2048, 8192)
    assert shapes["lm_head.weight"] == (16_000, 2048)
    assert shapes["spec_layers.0.self_attn.q_proj.weight"] == (1280, 2048)
    assert tap_rows(config) == [[0, 15, 31, 47], [0, 15, 31], [0, 15]]


def dspark_settings(**changes: Any) -> Any:
    from dspark.train.config import TrainConfig

    return TrainConfig(cache="", speculator_type="spd", **changes)


@pytest.mark.parametrize("kept", [50, 25])
def test_kl_and_its_gradients_are_the_formulas(kept: int) -> None:
    head = tiny(kept=kept)
    batch = batch_of(head)
    config = ObjectiveConfig(ce=0.0, l1=0.0, confidence=0.0, decay=0.0, kl=1.0)
    plan = head.plan(batch, fill=2)
    slots = SlotInputs.gather(batch, head(batch, plan), 0.0)
    frozen, weights = head.frozen_head, Denominators.of(batch, 0.0)
    wanted = [p for _, p in head.trained()]
    out = objective(slots, frozen, config, weights, chunk_rows=4)
    ours = torch.autograd.grad(out.loss, wanted, retain_graph=True)
    draft = slots.z @ slots.w2.T
    teacher = frozen.target_logits(slots.target[slots.target_at]).softmax(-1)
    teacher = teacher if frozen.draft_ids is None else teacher[:, frozen.draft_ids]
    loss = (teacher * (teacher.log() - draft.log_softmax(-1))).sum(-1).mean()
    theirs = torch.autograd.grad(loss, wanted)
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_kl_survives_a_target_that_is_certain() -> None:
    draft, target = torch.randn(2, 5), torch.tensor([[0.0, -2e3, -2e3, -2e3, -2e3]])
    at, none, one = torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.ones(2)
    *_, gradient, kl = chunk_terms(draft, target, at, None, at, none, none, one, True)
    assert kl is not None
    torch.testing.assert_close(kl, -draft.log_softmax(-1)[:, 0])
    assert gradient is not None
    assert bool(gradient.isfinite().all())


def test_a_head_trains_is_saved_and_loads(tmp_path: Path) -> None:
    config = small_training(
        tmp_path,
        [40, 52, 61, 44, 58, 47],
        speculator_type="spd",
        max_steps=30,
        lr=3e-3,
        block_size=1,
        draft_vocab_size=40,
    )
    result = train(config)
    rows = [
        json.loads(line) for line in (tmp_path / "draft" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["kl_loss"] for row in rows if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(rows[0]["kl_loss"], rel=1e-5)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert result["kl_loss"] > 0
    flat = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (flat["speculator_type"], flat["stage_ends"], flat["vllm_servable"]) == (
        "spd",
        [2, 3, 6],
        False,
    )
    cache = dspark.cache.open(config.cache)
    draft = load_draft(tmp_path / "draft", cache.target)
    assert isinstance(draft, SpdHead)
    assert draft.head.weight.shape == (40, stores.HIDDEN)
    assert not torch.equal(draft.head.weight, draft.lm_head.weight)  # its own rows have moved
    assert drafter("spd").stages(draft.config) == 3


def test_the_fill_is_drawn_by_row_and_constant_in_validation() -> None:
    head = tiny()
    batch = batch_of(head)

    def fill(draw: int) -> int:
        from dataclasses import replace

        plan = head.plan(replace(batch, draw=torch.tensor([draw])))
        return 3 - int(plan.complete.sum())

    found = np.bincount([fill(d) for d in range(400)], minlength=4)
    assert fill(0) == 3
    assert found.tolist() == [0, 100, 100, 200]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(DraftError, match="one token at a time"):
        DraftConfig.from_flat({**tiny().config.to_flat(), "block_size": 2})
    with pytest.raises(
        MismatchError, match=r"at least two stages; the store has \[-1, 4\] and lacks \[2, 5, 8\]"
    ):
        SPD.layers([-1, 4], {"num_hidden_layers": 9})
