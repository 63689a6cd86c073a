"""Other projects' caches become stores: the same samples, states and score; what does not fit is
refused by name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dspark.cache
from dspark.cache import errors
from dspark.cache.stores.verify import drop_damaged, verify
from dspark.dump.config import DumpConfig
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dspark.tools.importers.importer import import_store
from dspark.tools.judge.score import score
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.folder import save_draft
from dump_targets import save_target

LAYERS = (1, 2, 4)


@dataclass(frozen=True)
class Row:
    """A sample with every state that a peer may keep, bfloat16: aux [S, L, H], last before and
    after the final norm [S, H].
    """

    ids: list[int]
    mask: list[int]
    aux: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def rows(target: Path) -> list[Row]:
    """Twelve random samples; the fourth is not supervised."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    rng = np.random.default_rng(0)
    out = []
    for i in range(12):
        n = int(rng.integers(20, 60))
        ids = rng.integers(4, 200, n).tolist()
        mask = [int(i != 3 and p >= n // 3) for p in range(n)]
        before: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(
            lambda _, args, to=before: to.append(args[0][0])
        )
        with torch.inference_mode():
            hidden = model.model(torch.tensor([ids]), output_hidden_states=True)
        hook.remove()
        states = torch.stack([hidden.hidden_states[j + 1][0] for j in LAYERS], dim=1)
        kept = (x.bfloat16().clone() for x in (states, before[0], hidden.last_hidden_state[0]))
        out.append(Row(ids, mask, *kept))
    return out


def write_deepspec(
    folder: Path, rows: Sequence[Row], shard_samples: int = 5, **changes: Any
) -> Path:
    """The documented layout, version 2, several shards."""
    folder.mkdir()
    shards: list[bytearray] = []
    index = b""
    for i, row in enumerate(rows):
        if i % shard_samples == 0:
            shards.append(bytearray())
        at = []
        for data in (
            np.array(row.ids, "<i4"),
            np.ones(len(row.ids), np.uint8),
            np.array(row.mask, np.uint8),
            row.aux.view(torch.int16).numpy(),
            row.after.view(torch.int16).numpy(),
        ):
            at.append(len(shards[-1]))
            shards[-1] += data.tobytes()
        index += struct.pack("<QIIQQQQQ", i, len(shards) - 1, len(row.ids), *at)
    names = [f"shard-{i:05d}.bin" for i in range(len(shards))]
    for name, data in zip(names, shards, strict=True):
        (folder / name).write_bytes(data)
    (folder / "samples.idx").write_bytes(index)
    manifest = {
        "version": 2,
        "num_samples": len(rows),
        "num_shards": len(shards),
        "target_layer_ids": list(LAYERS),
        "hidden_size": 64,
        "hidden_dtype": "bfloat16",
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "index_record_size": 56,
        "max_length": 64,
        "shards": [{"shard_id": i, "file_name": n} for i, n in enumerate(names)],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def write_speculators(folder: Path, rows: Sequence[Row]) -> Path:
    datasets = pytest.importorskip("datasets")
    columns = {
        "input_ids": [r.ids for r in rows],
        "loss_mask": [r.mask for r in rows],
        "seq_len": [len(r.ids) for r in rows],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    (folder / "hidden_states").mkdir()
    for i, row in enumerate(rows):
        states = torch.cat([row.aux, row.before[:, None]], dim=1).contiguous()
        save_file(
            {"hidden_states": states, "token_ids": torch.tensor(row.ids)},
            folder / "hidden_states" / f"hs_{i}.safetensors",
        )
    return folder


def imported(source: Path, out: Path, target: Path, **flags: Any) -> Any:
    import_store(source, out, model=str(target), part_tokens=150, **flags)
    assert verify(out).ok
    return dspark.cache.open(out)


def test_a_deepspec_cache_scores_as_the_original_states(
    target: Path, rows: list[Row], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"input_ids": r.ids, "loss_mask": r.mask}) + "\n" for r in rows)
    )
    config = DumpConfig(
        model=str(target),
        data=str(data),
        output=tmp_path / "dump.zarr",
        layers=LAYERS,
        aux_bits=16,
        last_bits=16,
        device="cpu",
    )
    dump(config, Display())
    ours = dspark.cache.open(tmp_path / "dump.zarr")
    theirs = imported(write_deepspec(tmp_path / "peer", rows), tmp_path / "in.zarr", target)
    assert theirs.manifest.layers == list(LAYERS)
    assert theirs.manifest.counts.dropped == {"no two consecutive supervised tokens": 1}
    assert theirs.parts > 1
    for name in ("sample_key", "sample_supervised", "sample_row", "sample_start"):
        np.testing.assert_array_equal(theirs.index[name], ours.index[name])
    for i in range(len(ours)):
        row = rows[theirs[i].row]
        np.testing.assert_array_equal(theirs[i].aux, row.aux.float().numpy())
        np.testing.assert_array_equal(
            theirs[i].last[theirs[i].last_mask], row.after.float().numpy()[theirs[i].last_mask]
        )
    assert torch.equal(theirs.target.norm, ours.target.norm)
    draft = DraftConfig.sized_for(
        ours.manifest.target.config,
        target_layer_ids=LAYERS,
        mask_token_id=ours.manifest.target.mask_token_id,
        num_layers=1,
        block_size=4,
        markov_rank=8,
    )
    save_draft(tmp_path / "draft", DraftModel(draft, ours.target), dtype=torch.float32)
    a, b = (score(cache, str(tmp_path / "draft"), device="cpu") for cache in (ours, theirs))
    for key in (
        "ce_loss",
        "l1_loss",
        "confidence_loss",
        "accept_rate",
        "mean_accepted_length",
        "blocks",
        "slots",
    ):
        assert b[key] == pytest.approx(a[key], rel=2e-3), key


def test_speculators_files_give_the_same_samples(
    target: Path, rows: list[Row], tmp_path: Path
) -> None:
    peer = write_speculators(tmp_path / "peer", rows)
    (peer / "hidden_states" / "hs_5.safetensors").unlink()
    wrong = load_file(peer / "hidden_states" / "hs_6.safetensors")
    wrong["token_ids"][0] += 1
    save_file(wrong, peer / "hidden_states" / "hs_6.safetensors")
    with pytest.raises(errors.UsageError, match="give the --target-layer-ids"):
        import_store(peer, tmp_path / "x", model=str(target))
    with pytest.raises(
        errors.MismatchError, match="hold 3 layers beside the last state, but the flags name 2"
    ):
        import_store(peer, tmp_path / "x", model=str(target), layers=[1, 2])
    store = imported(peer, tmp_path / "in.zarr", target, layers=LAYERS)
    assert store.manifest.counts.dropped == {
        "its token ids differ from the data set's": 1,
        "no file of hidden states": 1,
        "no two consecutive supervised tokens": 1,
    }
    assert len(store) == 9
    for i in range(9):
        sample = store[i]
        row = rows[sample.row]
        np.testing.assert_array_equal(sample.aux, row.aux.float().numpy())
        np.testing.assert_allclose(
            sample.last[sample.last_mask],
            row.after.float().numpy()[sample.last_mask],
            rtol=2**-6,
            atol=0.02,
        )


def test_compact_bits_are_calibrated_and_resumed_to_the_same_bytes(
    target: Path, rows: list[Row], tmp_path: Path
) -> None:
    peer = write_deepspec(tmp_path / "peer", rows)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise Stop

    whole = imported(peer, tmp_path / "whole.zarr", target, aux_bits=4, last_bits=4)
    assert whole.manifest.codec.calibration_sha256
    assert min(whole.manifest.quality["aux_snr_db"]) > 15
    with pytest.raises(Stop):
        import_store(
            peer,
            tmp_path / "half.zarr",
            model=str(target),
            aux_bits=4,
            last_bits=4,
            part_tokens=150,
            progress=stop,
        )
    imported(peer, tmp_path / "half.zarr", target, aux_bits=4, last_bits=4, resume=True)
    for file in sorted((tmp_path / "whole.zarr").rglob("*")):
        if file.is_file():
            assert (
                file.read_bytes()
                == (tmp_path / "half.zarr" / file.relative_to(tmp_path / "whole.zarr")).read_bytes()
            )


def test_resuming_a_whole_store_checks_that_it_is_the_same(
    target: Path, rows: list[Row], tmp_path: Path
) -> None:
    peer = write_deepspec(tmp_path / "peer", rows)
    out = tmp_path / "in.zarr"
    whole = imported(peer, out, target, aux_bits=4)
    assert (
        import_store(peer, out, model=str(target), aux_bits=4, part_tokens=150, resume=True)
        == whole.manifest
    )
    other = write_deepspec(tmp_path / "other", rows[:7])
    for source, flags, words in (
        (
            peer,
            {"aux_bits": 8},
            "codec.name: store has .rotated-4-16., this run has .rotated-8-16.",
        ),
        (
            peer,
            {"aux_bits": 4, "mask_token_id": 3},
            "target.mask_token_id: store has .*, this run has 3",
        ),
        (other, {"aux_bits": 4}, "source.id: store has 'peer', this run has 'other'"),
    ):
        with pytest.raises(errors.MismatchError, match=words):
            import_store(source, out, model=str(target), part_tokens=150, resume=True, **flags)  # type: ignore[arg-type]
    assert verify(out).ok


def test_damaged_weights_are_written_again(target: Path, rows: list[Row], tmp_path: Path) -> None:
    peer = write_deepspec(tmp_path / "peer", rows)
    imported(peer, tmp_path / "in.zarr", target)
    weights = tmp_path / "in.zarr" / "target" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + b"x")
    assert drop_damaged(tmp_path / "in.zarr", verify(tmp_path / "in.zarr")) == [
        "target/model.safetensors"
    ]
    imported(peer, tmp_path / "in.zarr", target, resume=True)
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"version": 3}, errors.FormatVersionError, "found .*'version': 3"),
        ({"hidden_dtype": "float8"}, errors.FormatVersionError, "float8"),
        (
            {"num_samples": 13},
            errors.DamagedCacheError,
            r"samples.idx: 672 bytes, expected 728 \(13 samples",
        ),
        ({"hidden_size": 32}, errors.MismatchError, "have 32 channels, .* has 64"),
        (
            {"target_layer_ids": [1, 2, 9]},
            errors.UsageError,
            "9 is out of range: the target has 6 layers",
        ),
        (
            {"shards": [{"shard_id": 0, "file_name": "gone.bin"}]},
            errors.DamagedCacheError,
            "gone.bin: cannot be read",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    target: Path,
    rows: list[Row],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    peer = write_deepspec(tmp_path / "peer", rows, **change)
    with pytest.raises(error, match=words):
        import_store(peer, tmp_path / "x", model=str(target))
    assert not (tmp_path / "x").exists()


def test_damage_inside_is_named(target: Path, rows: list[Row], tmp_path: Path) -> None:
    peer = write_deepspec(tmp_path / "peer", rows)
    shard = peer / "shard-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(
        errors.DamagedCacheError,
        match=r"sample 11: last is at bytes .* of shard 2, which does not exist",
    ):
        import_store(peer, tmp_path / "x", model=str(target))
    with pytest.raises(errors.NotACacheError, match="neither a DeepSpec target cache"):
        import_store(tmp_path, tmp_path / "x", model=str(target))
    bad = [
        *rows[:2],
        Row(rows[2].ids, rows[2].mask, rows[2].aux * float("nan"), rows[2].before, rows[2].after),
    ]
    with pytest.raises(errors.DamagedCacheError, match="sample 2: hidden state is not finite"):
        import_store(write_deepspec(tmp_path / "nan", bad), tmp_path / "y", model=str(target))


def test_a_last_state_from_before_the_norm_is_noticed(
    target: Path, rows: list[Row], tmp_path: Path
) -> None:
    """Text that the target itself wrote: read rightly the states predict it, read wrongly they do
    not.
    """
    weights = load_file(target / "model.safetensors")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()

    def own(row: Row) -> Row:
        told = (row.after.float() @ head.T).argmax(-1).tolist()
        return Row([row.ids[0], *told[:-1]], [1] * len(row.ids), row.aux, row.before, row.after)

    spoken = [own(r) for r in rows]
    peer = write_deepspec(
        tmp_path / "peer", [Row(r.ids, r.mask, r.aux, r.after, 40 * r.before) for r in spoken]
    )
    with pytest.raises(errors.MismatchError, match="Give --last-state before-norm"):
        import_store(peer, tmp_path / "x", model=str(target))
    imported(peer, tmp_path / "x", target, last_state="before-norm")
