"""Frozen weights in checkpoints as others store them: names, forms, padding, pickles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.cache.errors import TargetError
from dspark.dump.target.checkpoint import open_checkpoint
from dspark.dump.target.config import load_target
from dspark.dump.target.weights import find_frozen, read_frozen

Tensors = dict[str, torch.Tensor]
FP8_MAX = 448.0


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny Qwen3 whose tensors (and config) a function changes."""

    def make(change: Callable[[Tensors], Tensors], config: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny, folder)
        path = folder / "model.safetensors"
        save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path)
        if config:
            raw = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(raw | config))
        return folder

    return make


def read(folder: Path) -> Any:
    return read_frozen(str(folder), load_target(str(folder)).shapes)[0]


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        (new + n[len(old) :] if n.startswith(old) else n): t for n, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("embed", "norm", "head"),
    [
        ("model.language_model.embed_tokens", "model.language_model.norm", "lm_head"),
        (
            "language_model.model.embed_tokens",
            "language_model.model.norm",
            "language_model.lm_head",
        ),
        ("backbone.embeddings", "backbone.norm_f", "lm_head"),
        ("embed", "norm", "head"),
        # of nobody: by structure
        ("decoder.word_embeddings", "decoder.last_norm", "decoder.to_logits"),
    ],
)
def test_names_of_known_and_unknown_checkpoints(
    changed: Callable[..., Path], tiny: Path, embed: str, norm: str, head: str
) -> None:
    """Beside a predictor and a vision tower, whose embedding and norms have the same shapes."""
    more = {
        "mtp.norm.weight": torch.zeros(64),
        "mtp.embed_tokens.weight": torch.zeros(304, 64),
        "visual.merger.norm.weight": torch.zeros(64),
        "model.layers.6.shared_head.norm.weight": torch.zeros(64),
    }

    def change(tensors: Tensors) -> Tensors:
        names = {"model.embed_tokens": embed, "model.norm": norm, "lm_head": head}
        out = dict(tensors)
        for old, new in names.items():
            out[f"{new}.weight"] = out.pop(f"{old}.weight")
        return out | more

    folder, plain = changed(change), read(tiny)
    found = read(folder)
    for name in ("embed_tokens", "norm", "lm_head"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    whole = load_target(str(folder))
    assert (
        str(find_frozen(str(folder), whole.shapes, whole.whole)) == f"{embed}, {norm}, {head} (F32)"
    )


def test_padded_rows_are_left_out(changed: Callable[..., Path], tiny: Path) -> None:
    def pad(tensors: Tensors) -> Tensors:
        wide = {
            n: torch.cat([tensors[n], torch.ones(16, 64)])
            for n in ("model.embed_tokens.weight", "lm_head.weight")
        }
        return tensors | wide

    found, plain = read(changed(pad)), read(tiny)
    assert torch.equal(found.embed_tokens, plain.embed_tokens)
    assert torch.equal(found.lm_head, plain.lm_head)


def fp8_head(
    tensors: Tensors, scale_of: Callable[[torch.Tensor], torch.Tensor], name: str
) -> Tensors:
    head = tensors["lm_head.weight"]
    scale = scale_of(head.abs()) / FP8_MAX
    wide = scale
    if scale.ndim == 2 and scale.shape[1] > 1:
        wide = scale.repeat_interleave(32, 0)[: head.shape[0]].repeat_interleave(32, 1)[
            :, : head.shape[1]
        ]
    elif scale.ndim == 1 and scale.numel() > 1:
        wide = scale[:, None]
    return tensors | {
        "lm_head.weight": (head / wide).to(torch.float8_e4m3fn),
        f"lm_head.{name}": scale,
    }


def blocks(x: torch.Tensor) -> torch.Tensor:
    """Largest value of each block of 32 x 32."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32, 0, -x.shape[0] % 32))
    return padded.unflatten(0, (-1, 32)).unflatten(2, (-1, 32)).amax((1, 3))


@pytest.mark.parametrize(
    ("scale_of", "name"),
    [
        (lambda x: x.amax(), "weight_scale"), (lambda x: x.amax(1), "weight_scale"),
        (lambda x: x.amax(1, keepdim=True), "weight_scale"), (blocks, "weight_scale_inv"),
    ],
)  # fmt: skip
def test_an_fp8_head(
    changed: Callable[..., Path],
    tiny: Path,
    scale_of: Callable[[torch.Tensor], torch.Tensor],
    name: str,
) -> None:
    quantization = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    folder = changed(lambda t: fp8_head(t, scale_of, name), quantization)
    found, plain = read(folder), read(tiny)
    assert found.lm_head.dtype == torch.bfloat16
    error = (found.lm_head.float() - plain.lm_head).abs()
    # e4m3 has three bits behind the point: 1/16 of the value, or half of the smallest step of its
    # scale.
    assert bool(
        (
            error <= plain.lm_head.abs() * (1 / 16 + 1 / 256) + plain.lm_head.abs().amax() * 2e-5
        ).all()
    )


def test_an_fp8_head_without_its_scale_is_refused(changed: Callable[..., Path]) -> None:
    folder = changed(lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})
    target = load_target(str(folder))
    with pytest.raises(TargetError, match=r"lm_head is stored as \{'lm_head.weight': 'F8_E4M3'\}"):
        find_frozen(str(folder), target.shapes, target.whole)


def test_a_head_packed_in_four_bits(changed: Callable[..., Path]) -> None:
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    values = torch.randint(-8, 8, (304, 64), dtype=torch.int8)
    scale = torch.rand(304, 2) + 0.5

    def change(tensors: Tensors) -> Tensors:
        del tensors["lm_head.weight"]
        packed = packing.pack_to_int32(values, 4)
        return tensors | {
            "lm_head.weight_packed": packed,
            "lm_head.weight_scale": scale,
            "lm_head.weight_shape": torch.tensor([304, 64]),
        }

    expected = values.float() * scale.repeat_interleave(32, 1)
    assert torch.equal(read(changed(change)).lm_head, expected.bfloat16())


@pytest.mark.parametrize("modelopt", [False, True])
def test_a_head_in_nvfp4(changed: Callable[..., Path], modelopt: bool) -> None:
    packing = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = grid[torch.randint(0, 8, (304, 64))] * torch.where(
        torch.rand(304, 64) < 0.5, -1.0, 1.0
    )
    scale = torch.randint(1, 9, (304, 4)).to(torch.float8_e4m3fn)

    def change(tensors: Tensors) -> Tensors:
        del tensors["lm_head.weight"]
        packed, whole = packing.pack_fp4_to_uint8(values.bfloat16()), torch.tensor([0.25])
        if modelopt:
            return tensors | {
                "lm_head.weight": packed,
                "lm_head.weight_scale": scale,
                "lm_head.weight_scale_2": whole,
            }
        return tensors | {
            "lm_head.weight_packed": packed,
            "lm_head.weight_scale": scale,
            "lm_head.weight_global_scale": 1 / whole,
        }

    expected = values * scale.float().repeat_interleave(16, 1) * 0.25
    assert torch.equal(read(changed(change)).lm_head, expected.bfloat16())


def test_a_head_packed_by_gptq(changed: Callable[..., Path]) -> None:
    values, zeros = (
        torch.randint(0, 16, (64, 304), dtype=torch.int64),
        torch.randint(1, 16, (2, 304), dtype=torch.int64),
    )
    scales, group = torch.rand(2, 304) + 0.5, torch.arange(64) // 32

    def packed(x: torch.Tensor, axis: int) -> torch.Tensor:
        shifts = torch.arange(8) * 4
        out = (x.unflatten(axis, (-1, 8)) << (shifts[None, :, None] if axis == 0 else shifts)).sum(
            axis + 1
        )
        # the upper half are negative numbers of 32 bits
        return (out - ((out >> 31) << 32)).to(torch.int32)

    def change(tensors: Tensors) -> Tensors:
        del tensors["lm_head.weight"]
        return tensors | {
            "lm_head.qweight": packed(values, 0),
            "lm_head.qzeros": packed(zeros - 1, 1),
            "lm_head.scales": scales,
            "lm_head.g_idx": group.int(),
        }

    expected = ((values - zeros[group]).float() * scales[group]).T
    assert torch.equal(read(changed(change)).lm_head, expected.bfloat16())


def test_a_missing_head_is_known_from_the_headers(changed: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> Tensors:
        del tensors["lm_head.weight"]
        return tensors

    folder = changed(change)
    target = load_target(str(folder))
    with pytest.raises(
        TargetError, match=r"looked for one output head of shape \[304, 64\] .* found 0"
    ):
        find_frozen(str(folder), target.shapes, target.whole)
    assert (
        find_frozen(
            str(changed_config(folder, tie_word_embeddings=True)),
            target.shapes,
            load_target(str(folder)).whole,
        ).names.head
        is None
    )


def changed_config(folder: Path, **more: Any) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | more))
    return folder


def test_a_bin_checkpoint_is_read_without_running_it(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(read(folder).lm_head, read(tiny).lm_head)

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**tensors, "evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(TargetError, match="a pickle and may run code"):
        read(folder)
    assert not (tmp_path / "ran").exists()


def test_damaged_checkpoints_are_named(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny, folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        TargetError, match=r"model.safetensors: [\d,]+ bytes, but its header says [\d,]+"
    ):
        open_checkpoint(str(folder))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(TargetError, match="a Git LFS pointer"):
        open_checkpoint(str(folder))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}})
    )
    with pytest.raises(TargetError, match="a.safetensors: the index names it, but it is missing"):
        open_checkpoint(str(folder))
