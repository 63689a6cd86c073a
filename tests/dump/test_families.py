"""Every family through the transformers engine: parts found by structure, states of the right
layers, self-check, frozen weights from the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch

from dspark.cache.target.logits import Logits
from dspark.cache.target.shape import shape_for
from dspark.dump.checks.states import check
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.target.config import load_target
from dspark.dump.target.weights import find_frozen, read_frozen
from dump_targets import samples

LAYERS = (0, 2, 3)


@pytest.mark.parametrize("kind", families.MAKERS)
@pytest.mark.filterwarnings("ignore")  # transformers', of configs it fills in
def test_a_family_is_dumped_right(kind: str, tmp_path: Path) -> None:
    folder = families.save(tmp_path / kind, kind)
    target = load_target(str(folder))
    engine = TransformersEngine.load(
        str(folder), target.shapes, LAYERS, device="cpu", dtype="float32", batch_tokens=512
    )
    data = samples([70, 33, 5])
    logits = Logits.of_config(target.config)
    assert (logits.cap == 8.0) == (kind == "gemma4")
    found, states = check(engine, data, engine.frozen(), "float32", LAYERS, logits)
    assert found.agree == 1.0
    for i, sample in enumerate(data):  # each alone, without padding or hooks
        with torch.inference_mode():
            ids = torch.from_numpy(sample.input_ids).long()[None]
            hidden = engine.parts.decoder(
                input_ids=ids, output_hidden_states=True, use_cache=False
            ).hidden_states
        for k, layer in enumerate(LAYERS):
            expected = hidden[layer + 1][0]
            gap = (states[i].aux[:, k] - expected).abs().max()
            assert float(gap) < 2e-5 * max(1.0, float(expected.abs().max()))
    draft = shape_for(target.config)
    assert draft.intermediate_size >= draft.hidden_size == 64
    found = find_frozen(str(folder), target.shapes, target.whole)
    assert (found.names.head is None) == engine.frozen().tied
    frozen, norm = read_frozen(str(folder), target.shapes)
    ours = engine.frozen()
    for a, b in (
        (frozen.embed_tokens, ours.embed_tokens),
        (frozen.norm, ours.norm),
        (frozen.lm_head, ours.lm_head),
    ):
        assert torch.equal(a, b)
    assert frozen.tied == ours.tied
    x = torch.randn(3, 64)
    torch.testing.assert_close(norm(x), engine.parts.norm(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_a_model_spread_over_devices_gives_the_same_states(kind: str, tmp_path: Path) -> None:
    """Layers on two devices, here memory and disk: accelerate loads the second as they run. Frozen
    weights come from the checkpoint.
    """
    folder = str(families.save(tmp_path / kind, kind))
    shapes = load_target(folder).shapes
    spread: dict[str, str] = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "disk",
        "lm_head": "cpu",
    }
    spread |= {f"model.layers.{i}": "cpu" if i < 3 else "disk" for i in range(families.LAYERS)}
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_tokens": 512}
    one = TransformersEngine.load(folder, shapes, LAYERS, **settings)
    two = TransformersEngine.load(
        folder, shapes, LAYERS, **settings, device_map=spread, offload=tmp_path / "offload"
    )
    data = samples([40, 7])
    for (_, a), (_, b) in zip(one.capture(data), two.capture(data), strict=True):
        assert torch.equal(a.aux, b.aux)
        assert torch.equal(a.last, b.last)
    for x, y in zip(
        one.frozen()._tensors().values(), two.frozen()._tensors().values(), strict=True
    ):
        assert torch.equal(x, y)
