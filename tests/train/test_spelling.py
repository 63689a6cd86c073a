"""Drafts of other projects in the forms they document, with random weights: opened, decoded,
judged, repacked, or refused by key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published as forms
import pytest
import torch

from core_cases import BLOCK, HIDDEN, VOCAB, small_batch, small_draft, small_target
from dspark.cache.errors import DraftError
from dspark.tools.check.files import Files
from dspark.tools.check.rules import judge
from dspark.tools.publish.export import export
from dspark.train.data.batch import Batch
from dspark.train.draft.attention import AttentionPlan
from dspark.train.draft.decoding import BlockDecoder, chained, recomputed_states
from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.folder import load_draft, save_draft

NESTED = {"mask_token_id": VOCAB - 1, "target_layer_ids": [0, 2]}
TARGET = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}


def published(folder: Path, form: str, **changes: Any) -> Path:
    shape = forms.shape(form) | {"max_position_embeddings": 512}
    return forms.write(folder, form, small_draft(**shape), **changes)


def by_hand(model: DraftModel, aux: torch.Tensor, anchor: int) -> torch.Tensor:
    """The block of a draft whose anchor predicts nothing: anchor and B masks through the layers,
    then the masks' states alone.
    """
    a, slots = aux.shape[0], BLOCK + 1
    row = torch.cat([aux, torch.zeros_like(aux[:1])])
    doc, one = torch.zeros(a + 1, dtype=torch.int32), torch.tensor([True])
    plan = tuple(
        AttentionPlan.build(doc, torch.tensor([a]), one, slots, sight=sight)
        for sight in model.sights
    )
    ids = torch.tensor([anchor] + [VOCAB - 1] * BLOCK)
    x = model.embed_tokens.weight[ids]
    position = torch.arange(a + slots)
    h = model.backbone(x, model.context(row), model.plan_of(plan, position[a:], position[: a + 1]))[
        1:
    ]
    return chained(model, h, torch.tensor(anchor), lambda logits: logits.argmax(-1))


@pytest.mark.parametrize("form", forms.FORMS)
def test_opened_decoded_judged_and_repacked(form: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "theirs", form)
    model = load_draft(folder, small_target())
    bonus = form not in forms.ANCHOR_FIRST
    shape = forms.shape(form) | {"block_size": BLOCK}
    assert {name: getattr(model.config, name) for name in shape} == shape
    aux = torch.randn(9, 2, HIDDEN)
    decoder = BlockDecoder(model)
    decoder.extend(aux[:4], torch.zeros(4, dtype=torch.int64))
    decoder.extend(aux[4:], torch.zeros(5, dtype=torch.int64))
    with torch.no_grad():
        drafted = decoder.draft(7).tokens
        assert drafted.shape == (BLOCK,)
        want = (
            by_hand(model, aux, 7)
            if bonus
            else chained(
                model,
                recomputed_states(model, aux, 7),
                torch.tensor(7),
                lambda logits: logits.argmax(-1),
            )
        )
        assert torch.equal(drafted, want)
        batch: Batch = small_batch()
        assert model(batch, model.plan(batch)).h.shape[1] == BLOCK
    found = judge(Files.read(str(folder)), TARGET, BLOCK)
    told = {(f.level, f.name) for f in found if f.level == "error"}
    assert (("error", "attention") in told) == (
        form == "both-ways"
    )  # vLLM reads its sliding_window_non_causal for dflash only
    told.discard(("error", "attention"))
    assert told <= {("error", "layout-flag"), ("error", "config"), ("error", "tensors")}, found
    for layout in ("flat", "speculators"):
        out = tmp_path / layout
        export(
            str(folder), str(out), layout=layout, dtype="fp32", target="random/tiny", pictures=False
        )
        again = load_draft(out, small_target())
        assert again.config == model.config
        flat = json.loads((out / "config.json").read_text())
        assert "dflash_config" not in flat
        assert flat["sample_from_anchor"] is not bonus
        assert flat["block_size"] == BLOCK + bonus
        assert flat["architectures"] == (
            ["Qwen3DSparkModel"] if layout == "flat" else ["DSparkSpeculator"]
        )
        with torch.no_grad():
            assert torch.equal(again(batch, again.plan(batch)).h, model(batch, model.plan(batch)).h)
        if layout == "speculators":
            assert flat["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == BLOCK


@pytest.mark.parametrize("form", forms.FORMS)
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
        ("z-lab", {"dflash_config": NESTED | {"use_swa": True}}, "sliding_window"),
        ("z-lab", {"dflash_config": NESTED | {"causal": 3}}, "dflash_config.causal"),
        (
            "z-lab",
            {"dflash_config": NESTED | {"attention_sink_bias": True}},
            "dflash_config.attention_sink_bias",
        ),
        ("glm", {"speculators_model_type": "mtp"}, "speculators_model_type"),
        ("z-lab", {"dflash_config": NESTED | {"novel": 3}}, "dflash_config.novel"),
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
