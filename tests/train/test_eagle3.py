"""EAGLE-3 and P-EAGLE: decoding is the training's forward, both against a layer written out;
training, files, vLLM's names.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_trainings import small_training
from torch import Tensor
from torch.nn.attention import flex_attention

import dspark.cache
import stores
import tiny_models
from dspark.cache.errors import MismatchError
from dspark.tools.decode.decode import speculative_generate
from dspark.tools.decode.target import DecodingTarget, greedy_alone
from dspark.train.data.batch import Batch
from dspark.train.draft import attention
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.eagle3 import model as eagle3_model
from dspark.train.draft.eagle3.decoding import Eagle3Decoder
from dspark.train.draft.eagle3.drafter import EAGLE3
from dspark.train.draft.eagle3.model import Eagle3Model
from dspark.train.draft.saved.folder import load_draft, read_tensors, trained_shapes
from dspark.train.draft.spd.head import attended
from dspark.train.draft.types import drafter
from dspark.train.loop import train

TAPS, MODEL = (0, 1, 3), tiny_models.target()


def model_of(kind: str, ids: Tensor | None = None) -> Eagle3Model:
    config = DraftConfig.sized_for(
        MODEL.config.to_dict(),
        target_layer_ids=TAPS,
        mask_token_id=159,
        speculator_type=kind,
        num_layers=1,
        block_size=4,
        draft_vocab_size=None if ids is None else len(ids),
    )
    torch.manual_seed(2)
    model = drafter(kind).network(config, DecodingTarget(MODEL, TAPS).frozen, ids)
    assert isinstance(model, Eagle3Model)
    for _, parameter in model.trained():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def row_of(lengths: tuple[int, ...], size: int) -> Batch:
    total = sum(lengths)
    g = torch.Generator().manual_seed(1)
    doc = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    anchors = np.setdiff1d(np.arange(total), np.concatenate([starts, np.cumsum(lengths) - 1]))
    return Batch.build(
        input_ids=torch.randint(0, 150, (total,), generator=g).numpy(),
        loss_mask=np.ones(total, np.bool_),
        doc=doc,
        aux=torch.randn(total, 3, 32, generator=g).double(),
        last=torch.zeros(total - len(lengths), 32),
        anchors=anchors,
        block_size=size,
    )


def oracle(model: Eagle3Model, ids: Tensor, aux: Tensor, anchor: int, parallel: bool) -> Tensor:
    """h [B, H] of one anchor of one document, a whole causal sequence at a time: rows 0..a-1 of the
    target's states, then the steps'.
    """
    w, c = {n: p.detach() for n, p in model.named_parameters()}, model.config

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name + ".weight"]

    def turned(x: Tensor, at: Tensor) -> Tensor:
        half = c.head_dim // 2
        angle = at[:, None, None].float() * (
            1.0 / c.rope_theta ** (torch.arange(half).float() / half)
        )
        cos, sin = angle.cos().double(), angle.sin().double()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    hidden, tokens = aux[:anchor].flatten(1) @ w["fc.weight"].T, ids[1 : anchor + 1]
    out = []
    for step in range(c.block_size):
        m = "midlayer."
        embedded = w["embed_tokens.weight"][tokens]
        x = torch.cat([rms(embedded, m + "input_layernorm"), rms(hidden, m + "hidden_norm")], -1)
        at = torch.arange(len(x))
        q, k, v = (
            (x @ w[f"{m}self_attn.{n}_proj.weight"].T).view(len(x), -1, c.head_dim) for n in "qkv"
        )
        q, k = turned(q, at), turned(k, at)
        k, v = (y.repeat_interleave(c.num_heads // c.num_kv_heads, 1) for y in (k, v))
        weights = torch.einsum("hd,shd->hs", q[-1], k).div(c.head_dim**0.5).softmax(-1)
        y = (
            hidden[-1]
            + w[m + "self_attn.o_proj.weight"] @ torch.einsum("hs,shd->hd", weights, v).flatten()
        )
        z = rms(y, m + "post_attention_layernorm")
        gate, up = (w[f"{m}mlp.{n}_proj.weight"] @ z for n in ("gate", "up"))
        y = y + w[m + "mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        out.append(rms(y, "norm"))
        following = w["mask_hidden"][0] @ w["fc.weight"].T if parallel else y
        mask = torch.tensor([c.mask_token_id])
        tokens = torch.cat([tokens, mask if parallel else ids[anchor + step + 1][None]])
        hidden = torch.cat([hidden, following[None]])
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_the_unrolled_forward_is_the_oracles(kind: str) -> None:
    model, batch = model_of(kind), row_of((11, 9), 4)
    with torch.no_grad():
        h = model(batch, model.plan(batch)).h
        for i, a in enumerate(batch.anchors.tolist()):
            start, end = (0, 11) if a < 11 else (11, 20)
            if a + 4 >= end:
                continue
            theirs = oracle(
                model, batch.input_ids[start:end], batch.aux[start:end], a - start, kind == "peagle"
            )
            torch.testing.assert_close(h[i], theirs, rtol=0, atol=1e-6)  # angles are float32


def slow_forward(model: Eagle3Model, batch: Batch) -> Tensor:
    """h [A, B, H] of all steps one after the other, each a dense product of all anchors with the
    whole row: what the fast ways of attending must give.
    """
    layer, fused = model.midlayer, model.fused(batch.aux)
    a, at = batch.anchors, torch.arange(batch.doc.shape[0])
    far = (batch.doc[None] == batch.doc[a][:, None]) & (at[None] < a[:, None] - 1)
    where, following = batch.position[a], batch.input_ids.roll(-1)
    rows = layer.rows(model.embedded(following), fused)
    context = layer.self_attn.keys_values(rows, model.ropes(batch.position))
    hidden, masked = torch.where((where > 0)[:, None], fused[(a - 1).clamp(min=0)], 0), None
    out, own = list[Tensor](), list[tuple[Tensor, Tensor]]()
    if model.mask_hidden is not None:
        masked = model.fc(model.mask_hidden).expand(len(a), -1)
    for step in range(model.config.block_size):
        ids = batch.prev_ids[:, step]
        if step and masked is not None:
            ids, hidden = torch.full_like(ids, model.config.mask_token_id), masked
        rope = model.ropes((where - 1 + step).clamp(min=0))
        rows = layer.rows(model.embedded(ids), hidden)
        own.append(layer.self_attn.keys_values(rows, rope))
        k, v = (
            torch.cat([c, torch.stack(s[:-1], 1).flatten(0, 1) if step else c[:0], s[-1]])
            for c, s in zip(context, zip(*own, strict=True), strict=True)
        )
        exists = far.new_ones(len(a), step)
        seen = attended(layer.self_attn.queries(rows, rope), k, v, far, exists)
        hidden = layer.after(hidden, seen)
        out.append(model.norm(hidden))
    return torch.stack(out, 1)


# Uncompiled flex warns that it is slow. torch refuses its gradient on a CPU, and has one all the
# same: the formulas that its kernel for a GPU is held against.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_fast_attention_and_its_gradients_are_the_slow_ones(
    kind: str, backend: attention.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "flex":
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *unused: None)
    monkeypatch.setattr(eagle3_model, "ANCHORS_AT_ONCE", 5)  # several groups
    model, batch = model_of(kind).float(), row_of((11, 9, 30), 4).to("cpu", torch.float32)
    weights = torch.randn(*batch.counted.shape, 32, generator=torch.Generator().manual_seed(3))

    def of(h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        (h * weights).sum().backward()
        found = {n: p.grad.clone() for n, p in model.trained() if p.grad is not None}
        assert len(found) == len(list(model.trained()))
        return h.detach(), found

    fast, gradients = of(model(batch, model.plan(batch, backend)).h)
    slow, expected = of(slow_forward(model, batch))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        most = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() < 1e-4 * most, name


# Seen: steps whose attention kept the earlier ones' keys in an attribute lost them in the compiler,
# without a word.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_compiler_sees_every_step() -> None:
    model, batch = model_of("eagle3").float(), row_of((11, 9), 4).to("cpu", torch.float32)
    plan = model.plan(batch, "flex")
    traced = torch.compile(model, backend="eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        h = model(batch, plan).h
        torch.testing.assert_close(traced(batch, plan).h, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_drafts_are_the_training_forwards_on_the_drafts_own_tokens(kind: str) -> None:
    model, batch = model_of(kind, torch.arange(0, 160, 2)), row_of((14,), 4)
    decoder = Eagle3Decoder(model)
    decoder.extend(batch.aux[:3], batch.input_ids[:3])
    decoder.extend(batch.aux[3:4], batch.input_ids[3:4])
    decoder.extend(batch.aux[4:6], batch.input_ids[4:6])
    drafted = decoder.draft(int(batch.input_ids[6])).tokens
    ids = batch.input_ids.clone()
    ids[7:11] = drafted
    with torch.no_grad():
        h = oracle(model, ids, batch.aux, 6, kind == "peagle")
    assert drafted.tolist() == (model.slot_logits(h).argmax(-1) * 2).tolist()


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_decoding_is_lossless(kind: str) -> None:
    model, prompt = model_of(kind).float(), [5, 9, 77]
    with DecodingTarget(MODEL, TAPS) as target:
        out = speculative_generate(target, model, prompt, max_tokens=16)
        of_one_token = speculative_generate(target, model, [5], max_tokens=8)
        drawn = speculative_generate(
            target,
            model,
            prompt,
            max_tokens=8,
            temperature=1.0,
            generator=torch.Generator().manual_seed(0),
        )
    assert out.tokens == greedy_alone(MODEL, prompt, max_tokens=16)
    assert of_one_token.tokens == greedy_alone(MODEL, [5], max_tokens=8)
    assert len(drawn.tokens) == 8


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_it_trains_is_saved_under_vllms_names_and_loads(kind: str, tmp_path: Path) -> None:
    config = small_training(
        tmp_path,
        [40, 52, 61, 44, 58, 47],
        speculator_type=kind,
        max_steps=16,
        rows_per_step=4,
        max_anchors=0,
        lr=3e-3,
        draft_vocab_size=40,
    )
    train(config)
    rows = [
        json.loads(line) for line in (tmp_path / "draft" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3])
    flat = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert flat["architectures"] == ["LlamaForCausalLMEagle3"]
    assert flat["eagle_aux_hidden_state_layer_ids"] == [i + 1 for i in stores.LAYERS]
    # SGLang adds one to its own.
    assert flat["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == list(stores.LAYERS)
    assert (flat["draft_vocab_size"], flat["sglang_servable"]) == (40, kind == "eagle3")
    assert (flat["vllm_servable"], flat.get("parallel_drafting", False)) == (True, kind == "peagle")
    stored = read_tensors(tmp_path / "draft")
    own = {
        f"midlayer.{n}.weight"
        for n in (
            "input_layernorm",
            "hidden_norm",
            "post_attention_layernorm",
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    own |= {"fc.weight", "norm.weight", "d2t", "t2d", "lm_head.weight"} | (
        {"mask_hidden"} if kind == "peagle" else set()
    )
    assert set(stored) == own
    draft = load_draft(tmp_path / "draft", dspark.cache.open(config.cache).target)
    assert trained_shapes(draft.config)["midlayer.self_attn.q_proj.weight"] == (
        64,
        2 * stores.HIDDEN,
    )


def test_layers_of_a_larger_store_serve_and_of_a_smaller_do_not() -> None:
    target = {"num_hidden_layers": 36}
    assert EAGLE3.layers([1, 9, 17, 25, 33], target) == (1, 17, 33)
    assert EAGLE3.layers([1, 9, 17, 25, 33], target, [9, 17, 25]) == (9, 17, 25)
    with pytest.raises(MismatchError, match=r"reads 3 layers.*lacks \[1, 17, 32\].*--for eagle3"):
        EAGLE3.layers([-1, 4, 5], target)
    with pytest.raises(MismatchError, match=r"--layers 9,17,18: the store has .* but not \[18\]"):
        EAGLE3.layers([1, 9, 17, 25, 33], target, [9, 17, 18])
