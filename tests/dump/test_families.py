"""Every family through the transformers engine: parts found by structure, states of the right layers, self-check, frozen weights from the checkpoint."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

from dspark.cache.target.logits import Logits
from dspark.dump.checks.states import check
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.target.config import load_target
from dspark.dump.target.weights import read_frozen
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
