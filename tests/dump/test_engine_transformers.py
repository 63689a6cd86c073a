"""States against transformers' own ``output_hidden_states``, and against themselves in another
batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.cache.codec import registry
from dspark.cache.errors import EngineError
from dspark.cache.records import last_rows
from dspark.cache.settings import LOSSLESS
from dspark.dump.engines.answers import Ask, Sampling
from dspark.dump.engines.hf import TransformersEngine, batches, never_packed
from dspark.dump.target.config import load_target
from dspark.dump.target.layers import Shapes
from dump_targets import ENGINE_LAYERS as LAYERS
from dump_targets import ENGINE_VOCAB as VOCAB
from dump_targets import build_model, engine, samples, save_target, shapes


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest value: fp32 sums in another order, in random networks that amplify
    it.
    """
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_states_are_the_outputs_of_the_layers_and_the_normed_last(kind: str) -> None:
    target = engine(kind)
    data = samples([17, 5, 30, 9])
    states = dict(target.capture(data))
    assert sorted(states) == [0, 1, 2, 3]
    # transformers replaces the last entry of hidden_states by the normed one; hooks on the layer
    # itself do not.
    unnormed: list[torch.Tensor] = []
    handle = target.model.model.layers[5].register_forward_hook(
        lambda m, a, out: unnormed.append(out)
    )
    for i, sample in enumerate(data):
        unnormed.clear()
        with torch.inference_mode():
            out = target.model(
                torch.from_numpy(sample.input_ids).long()[None], output_hidden_states=True
            )
        aux = torch.stack([out.hidden_states[1][0], out.hidden_states[3][0], unnormed[0][0]], dim=1)
        close(states[i].aux, aux)
        last = out.hidden_states[-1][0][torch.from_numpy(last_rows(sample.loss_mask))]
        close(states[i].last, last)
    handle.remove()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_padding_does_not_leak(kind: str) -> None:
    data = samples([3, 40, 11, 25, 40, 2])
    together = dict(engine(kind, batch_tokens=10_000).capture(data))
    alone = dict(engine(kind, batch_tokens=1).capture(data))
    for i in range(len(data)):
        close(together[i].aux, alone[i].aux)
        close(together[i].last, alone[i].last)


@pytest.mark.parametrize("regenerate", [False, True])
def test_out_of_memory_names_flags_that_the_command_takes(regenerate: bool) -> None:
    target = engine("qwen3")
    # As on a GPU that the first layer's output does not fit.
    target.parts.layers[0].register_forward_hook(refuse_memory)
    words = (
        r"a batch of 2 x \d+ tokens. Use a smaller --batch-tokens \(now 64; .*--resume.*, or a "
        r"smaller "
    )
    if regenerate:
        greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=4, thinking=None)
        asks = [Ask(key, [5, 6, 7], 4, 0, True) for key in range(2)]
        with pytest.raises(EngineError, match=words + "--max-tokens"):
            list(target.answer(asks, greedy, [3], registry.make(LOSSLESS)))
    else:
        with pytest.raises(EngineError, match=words + "--seq-length"):
            list(target.capture(samples([9, 9])))
    target.parts.layers[0]._forward_hooks.popitem()
    assert all(not layer._forward_hooks for layer in target.parts.layers)


def refuse_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("2 GiB")


def test_no_hook_stays_behind() -> None:
    target = engine("qwen3")
    list(target.capture(samples([4])))
    assert all(not layer._forward_hooks for layer in target.parts.layers)


def test_frozen_weights_share_memory_when_tied() -> None:
    tied, untied = engine("llama").frozen(), engine("qwen3").frozen()
    assert tied.tied
    assert tied.lm_head.data_ptr() == tied.embed_tokens.data_ptr()
    assert not untied.tied
    assert not torch.equal(untied.lm_head, untied.embed_tokens)


def test_batches_are_bounded_sorted_and_whole() -> None:
    lengths = [5, 90, 20, 20, 7, 5]
    groups = list(batches(lengths, 40))
    assert groups == [[0, 5, 4], [2, 3], [1]]
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= 40


def test_predictions_are_the_model_s_own() -> None:
    target = engine("qwen3")
    (sample,) = samples([12])
    (found,) = target.predict([sample])
    with torch.inference_mode():
        logits = target.model(torch.from_numpy(sample.input_ids).long()[None]).logits[0]
    assert found.ids == logits.argmax(-1).tolist()[:-1]
    assert found.logprobs == pytest.approx(logits.log_softmax(-1).amax(-1).tolist()[:-1], abs=1e-5)


def test_an_unknown_structure_says_what_was_looked_for() -> None:
    model = build_model("qwen3", VOCAB)
    wrong = Shapes(hidden_size=64, vocab_size=VOCAB, num_layers=7, max_positions=None)
    with pytest.raises(
        EngineError,
        match="looked for one stack of 7 layers with one norm of width 64 beside it, found 0",
    ):
        TransformersEngine(model, wrong, LAYERS, device="cpu", batch_tokens=8)


def test_a_model_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(EngineError, match="transformers could not load"):
        TransformersEngine.load(
            str(tmp_path),
            shapes(build_model("qwen3", VOCAB)),
            LAYERS,
            device="cpu",
            dtype="float32",
            batch_tokens=8,
        )


def test_no_kernel_that_plans_every_shape(tmp_path: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    folder = str(save_target(tmp_path / "target"))
    TransformersEngine.load(
        folder, load_target(folder).shapes, [0], device="cpu", dtype="float32", batch_tokens=64
    )
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_forward_asks_the_device_nothing(kind: str) -> None:
    """Anything that reads a value (``.item()``, ``if tensor``) cannot be answered on the meta
    device, and on CUDA would wait.
    """
    target = engine(kind)
    model = target.model.to("meta")
    ids = torch.zeros(3, 17, dtype=torch.long, device="meta")
    with torch.inference_mode(), never_packed():
        assert model.model(input_ids=ids, use_cache=False).last_hidden_state.shape[:2] == (3, 17)
