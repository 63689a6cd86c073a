"""What is read of a target without its weights, and its frozen weights without its layers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dspark.cache.errors import TargetError, UsageError
from dspark.cache.target.frozen import FrozenTarget
from dspark.dump.target.config import choose_mask_token, load_target, tokenizer_info
from dspark.dump.target.presets import check_shapes, find
from dspark.dump.target.weights import compact, read_frozen
from dump_targets import CHATML, save_target


def test_load_target(tiny: Path) -> None:
    target = load_target(str(tiny))
    assert (target.shapes.hidden_size, target.shapes.num_layers, target.shapes.max_positions) == (
        64,
        6,
        512,
    )
    assert target.shapes.vocab_size == len(target.tokenizer) + 4
    assert target.eos_token_ids == [2]
    assert target.config["model_type"] == "qwen3"
    assert "_name_or_path" not in target.config
    assert target.files["tokenizer.json"] == (tiny / "tokenizer.json").read_bytes()
    info = tokenizer_info(target, tokenised=False)
    assert info.sha256 is not None
    assert info.chat_template_sha256 is not None
    assert tokenizer_info(target, tokenised=True).chat_template_sha256 is None


def test_mask_token_asked_preset_unused_row_spare_special(tiny: Path, tmp_path: Path) -> None:
    target = load_target(str(tiny))
    assert choose_mask_token(target, 7, 8) == 7
    assert choose_mask_token(target, None, 8) == 8
    assert choose_mask_token(target, None, None) == len(target.tokenizer)
    with pytest.raises(UsageError, match="--mask-token-id: 999 is outside the target's vocabulary"):
        choose_mask_token(target, 999, None)
    full = load_target(str(save_target(tmp_path / "full", vocab=300, layers=1)))
    assert full.shapes.vocab_size == len(full.tokenizer)
    assert full.tokenizer.convert_ids_to_tokens(choose_mask_token(full, None, None)) == "<|spare|>"
    named = CHATML + "{# <|spare|> #}"
    taken = load_target(str(save_target(tmp_path / "taken", template=named, vocab=300, layers=1)))
    with pytest.raises(UsageError, match="no spare special token"):
        choose_mask_token(taken, None, None)


def test_a_preset_s_shapes_are_checked(tiny: Path) -> None:
    preset = find("Qwen/Qwen3-4B")
    assert preset is not None
    with pytest.raises(
        UsageError,
        match=r"the preset Qwen/Qwen3-4B has .* 2560, 151936, 36; this target's config has 64",
    ):
        check_shapes(preset, load_target(str(tiny)).shapes)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_frozen_weights_straight_from_the_checkpoint(
    kind: str, tiny: Path, tiny_llama: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny if kind == "qwen3" else tiny_llama
    frozen, norm = read_frozen(str(folder), load_target(str(folder)).shapes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert frozen.tied == (kind == "llama")
    assert torch.equal(frozen.embed_tokens, model.get_input_embeddings().weight)
    assert torch.equal(frozen.lm_head, model.get_output_embeddings().weight)
    assert torch.equal(frozen.norm, model.model.norm.weight)
    x = torch.randn(3, 64)
    torch.testing.assert_close(norm(x), model.model.norm(x))


def test_a_checkpoint_without_its_weights(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny / "config.json", bare)
    shapes = load_target(str(tiny)).shapes
    with pytest.raises(
        TargetError,
        match=r"no weights found; looked for model.safetensors.index.json, .* The folder holds "
        r"config.json",
    ):
        read_frozen(str(bare), shapes)
    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, bare / "model.safetensors")
    with pytest.raises(TargetError, match=r"looked for one final norm of shape \[64\] .* found 0"):
        read_frozen(str(bare), shapes)


def test_another_prefix_in_the_checkpoint_is_found(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tiny / "config.json", other)
    tensors = load_file(tiny / "model.safetensors")
    save_file(
        {n.replace("model.", "language_model.model.", 1): t for n, t in tensors.items()},
        other / "model.safetensors",
    )
    shapes = load_target(str(tiny)).shapes
    assert torch.equal(
        read_frozen(str(other), shapes)[0].norm, read_frozen(str(tiny), shapes)[0].norm
    )


def test_compact_only_where_nothing_is_lost() -> None:
    embed = torch.randn(5, 4).bfloat16().float()
    frozen = FrozenTarget(embed, torch.ones(4), embed, True)
    small = compact(frozen)
    assert small.embed_tokens.dtype == torch.bfloat16
    assert small.lm_head is small.embed_tokens
    assert torch.equal(small.embed_tokens.float(), embed)
    fine = FrozenTarget(embed, torch.full((4,), 1 + 2**-20), embed, True)
    assert compact(fine) is fine
