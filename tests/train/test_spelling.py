"""Drafts of other projects in the forms they document, with random weights: opened, decoded, judged, repacked, or refused by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core_cases import BLOCK, HIDDEN, VOCAB, small_batch, small_draft, small_target
from dspark.cache.errors import DraftError
from dspark.tools.check.files import Files, judge
from dspark.tools.publish.export import export
from dspark.train.data.batch import Batch
from dspark.train.draft.attention import AttentionPlan
from dspark.train.draft.decoding import BlockDecoder, chained, recomputed_states
from dspark.train.draft.folder import load_draft, save_draft
from dspark.train.draft.model import DraftModel

BACKBONE: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 512, "vocab_size": VOCAB, "sliding_window": None,
    "use_sliding_window": False, "max_window_layers": 2, "use_cache": True, "tie_word_embeddings": False,
}  # fmt: skip
FULL, SLIDING = ["full_attention"] * 2, ["sliding_attention"]
HEADS = {"markov_rank": 6, "markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True}  # fmt: skip

SPECFORGE = BACKBONE | HEADS | {
    "architectures": ["DSparkDraftModel"], "layer_types": FULL, "block_size": BLOCK, "projector_type": "dspark", "attention_mode": "gqa",
    "dflash_config": {"mask_token_id": VOCAB - 1, "target_layer_ids": [0, 2], "markov_rank": 6, "attention_mode": "gqa"},
}  # fmt: skip
Z_LAB = BACKBONE | {
    "architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "layer_types": FULL,
    "block_size": BLOCK + 1, "num_target_layers": 4, "dflash_config": {"mask_token_id": VOCAB - 1, "target_layer_ids": [0, 2]},
}  # fmt: skip
SPECULATORS = HEADS | {
    "architectures": ["DSparkDraftModel"], "speculators_model_type": "dspark", "block_size": BLOCK + 1, "mask_token_id": VOCAB - 1,
    "aux_hidden_state_layer_ids": [1, 3], "draft_vocab_size": VOCAB, "transformer_layer_config": BACKBONE | {"layer_types": FULL},
    "speculators_config": {
        "algorithm": "dspark", "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": BLOCK}],
        "verifier": {"name_or_path": "random/tiny", "architectures": ["Qwen3ForCausalLM"]},
    },
}  # fmt: skip
DEEPSPEC = BACKBONE | HEADS | {
    "architectures": ["Qwen3DSparkModel"], "layer_types": FULL, "block_size": BLOCK, "mask_token_id": VOCAB - 1, "target_layer_ids": [0, 2],
    "num_target_layers": 4, "target_hidden_size": HIDDEN, "draft_vocab_size": VOCAB, "sample_from_anchor": True, "num_anchors": 512,
}  # fmt: skip
# RedHatAI's GLM-5.2 draft: three layers, all sliding, five layers of the target by vLLM's ids, slots that no later one is shown to.
GLM = SPECULATORS | {
    "sliding_window_non_causal": False, "aux_hidden_state_layer_ids": [1, 3], "max_anchors": 1024, "target_hidden_size": None,
    "transformer_layer_config": BACKBONE | {
        "num_hidden_layers": 3, "layer_types": SLIDING * 3, "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}  # fmt: skip
BOTH_WAYS = SPECULATORS | {
    "sliding_window_non_causal": True,
    "transformer_layer_config": BACKBONE | {"layer_types": SLIDING + FULL[1:], "sliding_window": 3},
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SWA = Z_LAB | {
    "dflash_config": Z_LAB["dflash_config"] | {"use_swa": True, "swa_window_size": 5, "causal": None},
    "rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 10000.0},
}  # fmt: skip
FORMS = {"specforge": SPECFORGE, "z-lab": Z_LAB, "speculators": SPECULATORS, "deepspec": DEEPSPEC, "glm": GLM, "both-ways": BOTH_WAYS, "swa": SWA}  # fmt: skip
# What differs from two full layers whose anchor is a bonus token: sights of the layers, and what training would have made of them.
SHAPES: dict[str, dict[str, Any]] = {
    "glm": {"num_layers": 3, "layer_types": tuple(SLIDING * 3), "sliding_window": 6},
    "both-ways": {"layer_types": tuple(SLIDING + FULL[1:]), "sliding_window": 3, "is_causal": False},
    "swa": {"layer_types": tuple(SLIDING * 2), "sliding_window": 5, "is_causal": False, "rope_scaling": YARN},
}
PLAIN = {"speculator_type": "dflash", "markov_rank": 0, "enable_confidence_head": False}
ANCHOR_FIRST = ("specforge", "deepspec")
TARGET = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}


def weights(form: str) -> DraftModel:
    return small_draft(
        **(PLAIN if "dflash" in FORMS[form]["architectures"][0].lower() else {}) | SHAPES.get(form, {})
    )


def published(folder: Path, form: str, **changes: Any) -> Path:
    """A folder as another program leaves it: its config, tensors without our record."""
    save_draft(folder, weights(form), dtype=torch.float32)
    (folder / "config.json").write_text(json.dumps(FORMS[form] | changes))
    tensors = load_file(folder / "model.safetensors")
    if "dflash" in FORMS[form]["architectures"][0].lower():
        tensors = {n: t for n, t in tensors.items() if not n.startswith("markov")}
    save_file(tensors, folder / "model.safetensors")
    return folder


def by_hand(model: DraftModel, aux: torch.Tensor, anchor: int) -> torch.Tensor:
    """The block of a draft whose anchor predicts nothing: anchor and B masks through the layers, then the masks' states alone."""
    a, slots = aux.shape[0], BLOCK + 1
    row = torch.cat([aux, torch.zeros_like(aux[:1])])
    doc, one = torch.zeros(a + 1, dtype=torch.int32), torch.tensor([True])
    plan = tuple(
        AttentionPlan.build(doc, torch.tensor([a]), one, slots, sight=sight) for sight in model.sights
    )
    ids = torch.tensor([anchor] + [VOCAB - 1] * BLOCK)
    x = model.embed_tokens.weight[ids]
    position = torch.arange(a + slots)
    h = model.backbone(x, model.context(row), model.plan_of(plan, position[a:], position[: a + 1]))[1:]
    return chained(model, h, torch.tensor(anchor), lambda logits: logits.argmax(-1))


@pytest.mark.parametrize("form", FORMS)
def test_opened_decoded_judged_and_repacked(form: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "theirs", form)
    model = load_draft(folder, small_target())
    bonus = form not in ANCHOR_FIRST
    assert (model.config.bonus_anchor, model.config.block_size) == (bonus, BLOCK)
    shape = SHAPES.get(form, {})
    assert {name: getattr(model.config, name) for name in shape} == shape
    aux = torch.randn(9, 2, HIDDEN)
    decoder = BlockDecoder(model)
    decoder.extend(aux[:4], torch.zeros(4, dtype=torch.int64))
    decoder.extend(aux[4:], torch.zeros(5, dtype=torch.int64))
    with torch.no_grad():
        drafted = decoder.draft(7).tokens
        assert drafted.shape == (BLOCK,)
        want = by_hand(model, aux, 7) if bonus else chained(
            model, recomputed_states(model, aux, 7), torch.tensor(7), lambda logits: logits.argmax(-1)
        )  # fmt: skip
        assert torch.equal(drafted, want)
        batch: Batch = small_batch()
        assert model(batch, model.plan(batch)).h.shape[1] == BLOCK
    found = judge(Files.read(str(folder)), TARGET, BLOCK)
    told = {(f.level, f.name) for f in found if f.level == "error"}
    told -= {("error", "attention")} if form in ("both-ways", "swa") else set()
    assert told <= {("error", "layout-flag"), ("error", "config"), ("error", "tensors")}, found
    for layout in ("flat", "speculators"):
        out = tmp_path / layout
        export(str(folder), str(out), layout=layout, dtype="fp32", target="random/tiny", pictures=False)
        again = load_draft(out, small_target())
        assert again.config == model.config
        flat = json.loads((out / "config.json").read_text())
        assert "dflash_config" not in flat
        assert flat["sample_from_anchor"] is not bonus
        assert flat["block_size"] == BLOCK + bonus
        assert flat["architectures"] == (["Qwen3DSparkModel"] if layout == "flat" else ["DSparkSpeculator"])
        with torch.no_grad():
            assert torch.equal(again(batch, again.plan(batch)).h, model(batch, model.plan(batch)).h)
        if layout == "speculators":
            assert flat["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == BLOCK


@pytest.mark.parametrize("form", FORMS)
def test_training_forward_equals_decoding(form: str, tmp_path: Path) -> None:
    model = load_draft(published(tmp_path, form), small_target())
    batch = small_batch(lengths=(20,), padding=0)
    at = int(batch.anchors[batch.anchor_valid][-1])
    index = batch.anchors.tolist().index(at)
    with torch.no_grad():
        h = model(batch, model.plan(batch)).h[index]
        want = recomputed_states(model, batch.aux[:at], int(batch.input_ids[at]))
    torch.testing.assert_close(h, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "changes", "key"),
    [
        ("z-lab", {"dflash_config": Z_LAB["dflash_config"] | {"use_swa": True}}, "sliding_window"),
        ("z-lab", {"dflash_config": Z_LAB["dflash_config"] | {"causal": 3}}, "dflash_config.causal"),
        (
            "z-lab",
            {"dflash_config": Z_LAB["dflash_config"] | {"attention_sink_bias": True}},
            "dflash_config.attention_sink_bias",
        ),
        ("glm", {"speculators_model_type": "mtp"}, "speculators_model_type"),
        ("z-lab", {"dflash_config": Z_LAB["dflash_config"] | {"novel": 3}}, "dflash_config.novel"),
        ("specforge", {"mask_token_id": 3}, "dflash_config.mask_token_id"),
        ("specforge", {"architectures": ["Gemma4DSparkModel"]}, "architectures"),
        ("specforge", {"rope_is_neox_style": False}, "rope_is_neox_style"),
        ("specforge", {"dflash_config": {"mask_token_id": 1}}, "target_layer_ids"),
    ],
)
def test_what_cannot_be_opened_is_named_by_key(
    form: str, changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    folder = published(tmp_path, form, **changes)
    with pytest.raises(DraftError, match=key):
        load_draft(folder, small_target())


def test_our_own_weights_under_the_other_layout_are_refused(tmp_path: Path) -> None:
    save_draft(tmp_path, small_draft())
    flat = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(flat | {"sample_from_anchor": False, "block_size": BLOCK + 1})
    )
    with pytest.raises(DraftError, match="sample_from_anchor"):
        load_draft(tmp_path, small_target())
