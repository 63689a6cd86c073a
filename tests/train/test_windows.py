"""Drafts with windows and scaled RoPE: trained and decoded alike, saved and read again, begun from
others, refused where they contradict.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import small_training

from core_cases import HIDDEN, small_batch, small_draft, small_target
from dspark.cache.errors import DraftError, UsageError
from dspark.cache.reader import open as open_store
from dspark.tools.check.files import Files
from dspark.tools.check.rules import judge
from dspark.tools.judge.score import score
from dspark.tools.publish.export import export
from dspark.train.cli import config_of
from dspark.train.config import TrainConfig
from dspark.train.draft import scaling
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.decoding import DraftContext, recomputed_states, slot_states
from dspark.train.draft.saved.folder import load_config, load_draft, save_draft
from dspark.train.draft.sight import FULL, SLIDING, Sight
from dspark.train.loop import train
from dspark.train.ops.rope import Turning, rope_tables
from dspark.train.run.setup import prepare

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES: dict[str, dict[str, Any]] = {
    "window": {"layer_types": (SLIDING,) * 2, "sliding_window": 5},
    "mixed": {"layer_types": (SLIDING, FULL), "sliding_window": 3, "rope_scaling": YARN},
    "both-ways": {"layer_types": (SLIDING,) * 2, "sliding_window": 2, "is_causal": False},
    "causal": {"is_causal": True},
    "narrow": {"layer_types": (SLIDING,) * 2, "sliding_window": 1},
    "bonus": {"layer_types": (SLIDING,) * 2, "sliding_window": 4, "bonus_anchor": True},
    "yarn": {"rope_scaling": YARN},
}


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_is_the_training_forward(name: str, tmp_path: Path) -> None:
    """From a cache that grew in steps and was cut to the window, and from a packed row: the states
    of the plain forward. Saved, they stay.
    """
    model = small_draft(**SHAPES[name])
    batch = small_batch(lengths=(20, 16), padding=3)
    plan = model.plan(batch)
    assert len(plan.attention) == len(set(model.config.sights))
    with torch.no_grad():
        h = model(batch, plan).h
    firsts = batch.doc.tolist()
    for index, anchor in enumerate(batch.anchors.tolist()):
        if not bool(batch.anchor_valid[index]):
            continue
        begin, ids = firsts.index(firsts[anchor]), int(batch.input_ids[anchor])
        aux = batch.aux[begin:anchor]
        want = recomputed_states(model, aux, ids)
        torch.testing.assert_close(h[index], want, rtol=1e-5, atol=1e-5)
        context = DraftContext(model)
        for piece in aux.tensor_split(3):
            context.extend(piece)
        torch.testing.assert_close(slot_states(model, context, ids), want, rtol=1e-5, atol=1e-5)
        for i, sight in enumerate(model.config.sights):
            kept = context.layer(i)[0].shape[0]
            assert kept == (len(aux) if sight.window is None else min(len(aux), sight.window - 1))
    save_draft(tmp_path, model, dtype=torch.float32)
    again = load_draft(tmp_path, small_target())
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(batch, again.plan(batch)).h, h)


def test_a_window_hides_what_is_before_it() -> None:
    """Two sliding layers read the context only, never each other's: far states change nothing, the
    nearest hidden one included.
    """
    model = small_draft(**SHAPES["window"])
    aux = torch.randn(30, 2, HIDDEN)
    before = recomputed_states(model, aux, 3)
    far = aux.clone()
    far[:26] = 50.0  # at anchor 30 slot 0 sees 26..29
    assert torch.equal(recomputed_states(model, far, 3), before)
    far[26] = 50.0
    changed = recomputed_states(model, far, 3)
    assert not torch.equal(changed[0], before[0])


@pytest.mark.parametrize(
    "scaled",
    [
        YARN,
        YARN | {"attention_factor": 0.7, "truncate": False},
        LLAMA,
        {"rope_type": "linear", "factor": 2.5},
    ],
)
def test_tables_are_those_of_transformers(scaled: dict[str, Any]) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(
        head_dim=16, max_position_embeddings=256, rope_parameters=scaled | {"rope_theta": 1e4}
    )
    position = torch.tensor([0, 1, 7, 63, 64, 200])
    cos, sin = Qwen3RotaryEmbedding(config)(torch.zeros(1, 1, 16), position[None])
    turning = Turning(16, 1e4, tuple(sorted(scaled.items())))
    ours = rope_tables(position, turning, torch.float32)
    assert torch.equal(ours[0][:, 0], cos[0, :, :8])
    assert torch.equal(ours[1][:, 0], sin[0, :, :8])
    assert not torch.equal(ours[0], rope_tables(position, Turning(16, 1e4), torch.float32)[0])


def test_gradients_of_a_windowed_and_scaled_draft() -> None:
    """Every trained tensor's gradient in float64 against differences."""
    model = small_draft(**SHAPES["mixed"]).double()
    batch = small_batch(lengths=(9,), padding=1)
    batch = dataclasses.replace(batch, aux=batch.aux.double())
    probe: torch.Tensor | None = None

    def value() -> torch.Tensor:
        nonlocal probe
        h = model(batch, model.plan(batch)).h
        probe = (
            torch.randn(h.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            if probe is None
            else probe
        )
        return (h * probe).sum()

    model.zero_grad()
    value().backward()  # type: ignore[no-untyped-call]
    checked = 0
    for name, parameter in model.trained():
        if parameter.grad is None or not name.startswith(("layers.", "fc", "hidden_norm")):
            continue
        at = torch.unravel_index(parameter.grad.abs().argmax(), parameter.shape)
        kept, step = parameter.detach()[at].clone(), 1e-6
        with torch.no_grad():
            parameter[at] = kept + step
            up = value()
            parameter[at] = kept - step
            down = value()
            parameter[at] = kept
        torch.testing.assert_close(
            parameter.grad[at], (up - down) / (2 * step), rtol=1e-6, atol=1e-8
        )
        checked += 1
    assert checked >= 2 * 9


def flat_of(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(small_draft(**SHAPES["mixed"]).config.to_flat())) | changes


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sliding_window": None}, "sliding_window"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"layer_types": [SLIDING]}, "layer_types"),
        ({"layer_types": [SLIDING, "chunked_attention"]}, "layer_types"),
        ({"layer_types": [3, 4]}, "layer_types"),
        ({"is_causal": "no"}, "is_causal"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "original_max_position_embeddings",
        ),
        ({"rope_parameters": YARN | {"mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": YARN | {"factor": "4"}}, "factor"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_by_key(
    changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(DraftError, match=key):
        DraftConfig.from_flat(flat_of(**changes))


def test_older_spellings_of_scaled_rope() -> None:
    own = {k: v for k, v in YARN.items() if k != "rope_type"}
    flat = flat_of(rope_scaling=own | {"type": "yarn"}, rope_theta=1e4)
    del flat["rope_parameters"]
    assert DraftConfig.from_flat(flat).rope_scaling == YARN
    plain = flat_of(layer_types=[FULL] * 2, sliding_window=9, is_causal=False)
    assert DraftConfig.from_flat(plain).sights == (Sight(), Sight())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sliding_window": -1}, "sliding_window"),
        ({"layer_types": ("sliding",), "sliding_window": 8, "rope_scaling": "{"}, "rope-scaling"),
        ({"layer_types": ("round",)}, "layer-types"),
        ({"rope_scaling": '{"factor": 2}'}, "rope_type"),
        ({"rope_scaling": '{"rope_type": "linear", "factor": 2, "rope_theta": 5}'}, "rope_theta"),
        ({"rope_scaling": '{"rope_type": "linear", "factor": 0.5}'}, "factor"),
    ],
)
def test_settings_are_refused_before_anything_is_read(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TrainConfig(cache="nowhere", **settings)


def test_sized_for_a_target() -> None:
    target = small_draft().config.to_flat() | {"num_hidden_layers": 4}
    own = {"target_layer_ids": (0, 2), "mask_token_id": 1, "num_layers": 3, "markov_rank": 4}
    all_sliding = DraftConfig.sized_for(
        target, **own, **TrainConfig(cache="", sliding_window=8).attention
    )
    assert all_sliding.sights == (Sight(8, causal=True),) * 3
    mixed = TrainConfig(
        cache="", sliding_window=8, layer_types=("sliding", "sliding", "full")
    ).attention
    assert DraftConfig.sized_for(target, **own, **mixed).sights[2] == Sight()
    assert (
        DraftConfig.sized_for(
            target, **own, **TrainConfig(cache="", sliding_window=0).attention
        ).layer_types
        == ()
    )
    for wrong, said in (
        ({"layer_types": ("sliding",) * 3}, "sliding-window"),
        ({"layer_types": ("full",) * 3, "sliding_window": 4}, "no sliding layer"),
        ({"layer_types": ("sliding",), "sliding_window": 4}, "layer_types"),
        ({"rope_scaling": json.dumps(YARN | {"factor": 1.5})}, "positions"),
    ):
        with pytest.raises(UsageError, match=said):
            DraftConfig.sized_for(
                target | {"max_position_embeddings": 512},
                **own,
                **TrainConfig(cache="", **wrong).attention,
            )


def test_trained_scored_resumed_and_begun_from(tmp_path: Path) -> None:
    """The product's way: a windowed and scaled draft, its score, its two exports, the judge's
    verdict, and a training that goes on with it.
    """
    scaled = {"rope_type": "yarn", "factor": 1024.0, "original_max_position_embeddings": 64}
    shape = {
        "num_layers": 2,
        "sliding_window": 6,
        "layer_types": ("sliding", "full"),
        "rope_scaling": json.dumps(scaled),
    }
    config = small_training(tmp_path, [60, 70, 80, 50, 40], max_steps=3, **shape)
    train(config)
    draft = Path(config.output)
    own = load_config(draft)
    assert own.sights == (Sight(6, causal=True), Sight())
    assert own.rope_scaling == scaled
    store = open_store(config.cache)
    found = score(store, str(draft))
    row = json.loads((draft / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["blocks"] > 0
    assert row["validation"]
    target = store.manifest.target.config
    for layout in ("flat", "speculators"):
        out = tmp_path / layout
        export(str(draft), str(out), layout=layout, pictures=False)
        assert load_config(out) == own
        assert [f for f in judge(Files.read(str(out)), target) if f.level == "error"] == []
        raw = json.loads((out / "config.json").read_text())
        backbone = raw if layout == "flat" else raw["transformer_layer_config"]
        assert (backbone["sliding_window"], backbone["use_sliding_window"]) == (6, True)
        (out / "config.json").write_text(
            json.dumps(raw | {"sliding_window": 9} if layout == "flat" else raw)
        )
    wrong = judge(Files.read(str(tmp_path / "flat")), target)
    assert any(f.name == "attention" and "sliding_window = 9" in f.text for f in wrong)
    words = [
        "--recipe",
        "none",
        "--cache",
        config.cache,
        "--init-from",
        str(draft),
        "--output",
        str(tmp_path / "next"),
    ]
    again = config_of(words)
    assert (again.sliding_window, again.layer_types, json.loads(again.rope_scaling or "")) == (
        6,
        (SLIDING, FULL),
        scaled,
    )
    wider = config_of([*words, "--sliding-window", "0", "--rope-scaling", "none"])
    run = prepare(dataclasses.replace(wider, total_seq_len=256, tensorboard=False))
    assert run.model.config.sights == (Sight(), Sight())
    assert run.start is not None
    assert set(run.start.changed) == {"sliding_window", "layer_types", "rope_scaling"}
    assert config_of(
        [*words[:-4], "--layer-types", "full,sliding", "--sliding-window", "8"]
    ).layer_types == (
        "full",
        "sliding",
    )


def test_reach() -> None:
    assert scaling.reach(None, 100) == scaling.reach(LLAMA, 100) == 100
    assert scaling.reach(YARN, 100) == 256
    assert scaling.reach({"rope_type": "linear", "factor": 2}, 100) == 200


def test_other_types_refuse_windows() -> None:
    config = small_draft().config
    with pytest.raises(UsageError, match="sliding"):
        dataclasses.replace(
            config,
            speculator_type="spd",
            markov_rank=0,
            enable_confidence_head=False,
            block_size=1,
            num_target_layers=4,
            stage_ends=(1, 4),
            layer_types=(SLIDING,) * 2,
            sliding_window=4,
        )
