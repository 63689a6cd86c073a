"""A training that begins with an earlier draft's tensors: what it takes, what it names, what it
refuses, what it records.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_trainings import small_training

import dspark.cache
import stores
from core_cases import small_batch, small_config, small_draft, small_target
from dspark.cache.errors import DraftError, DsparkError, MismatchError, Stopped, UsageError
from dspark.tools.publish.export import export
from dspark.train.cli import config_of
from dspark.train.config import TrainConfig
from dspark.train.draft.model import DraftModel
from dspark.train.draft.saved.folder import load_draft, save_draft
from dspark.train.draft.saved.warm import Origin, settings_of
from dspark.train.loop import train
from dspark.train.run.history import sentences
from dspark.train.run.setup import prepare

IDS, OTHER = torch.tensor([2, 3, 5, 8, 13]), torch.tensor([3, 5, 6, 7, 8, 40])


def origin(folder: Path, model: DraftModel) -> Origin:
    save_draft(folder, model, dtype=torch.float32)
    ids = model.frozen_head.draft_ids
    tensors = {
        n: t for n, t in load_file(folder / "model.safetensors").items() if n not in ("d2t", "t2d")
    }
    return Origin(str(folder), model.config, tensors, ids, "0" * 64)


def fresh(draft_ids: torch.Tensor | None = None, **changes: Any) -> DraftModel:
    torch.manual_seed(5)
    if draft_ids is not None:
        changes["draft_vocab_size"] = len(draft_ids)
    return DraftModel(small_config(**changes), small_target(), draft_ids)


def states(model: DraftModel) -> torch.Tensor:
    batch = small_batch()
    with torch.no_grad():
        h: torch.Tensor = model(batch, model.plan(batch)).h
    return h


def test_the_same_shape_takes_every_tensor(tmp_path: Path) -> None:
    old, new = small_draft(), fresh()
    start = origin(tmp_path, old).give(new, small_target())
    assert (start.left, start.begun, start.changed) == ({}, {}, {})
    assert start.taken == len(list(new.trained()))
    for (name, a), (_, b) in zip(old.trained(), new.trained(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(states(old), states(new))


def test_a_deeper_draft_begins_with_the_same_states(tmp_path: Path) -> None:
    old, new = small_draft(), fresh(num_layers=4)
    start = origin(tmp_path, old).give(new, small_target())
    assert torch.equal(states(old), states(new))
    assert start.begun["layers.2.mlp.down_proj.weight"].startswith("zero")
    assert {n.split(".")[1] for n in start.begun} == {"2", "3"}
    assert start.changed == {"num_layers": "2 there, 4 now"}


def test_a_flatter_draft_names_what_it_leaves(tmp_path: Path) -> None:
    old, new = small_draft(), fresh(num_layers=1, enable_confidence_head=False, markov_rank=3)
    start = origin(tmp_path, old).give(new, small_target())
    left = {n for n, _ in old.trained()} - {n for n, _ in new.trained()}
    assert set(start.left) == left | {
        "markov_head.markov_w1.weight",
        "markov_head.markov_w2.weight",
    }
    assert set(start.begun) == {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
    for name in (*start.left, *start.begun):
        assert name in start.words()


@pytest.mark.parametrize("whole", [False, True])
def test_rows_follow_their_tokens_into_another_vocabulary(whole: bool, tmp_path: Path) -> None:
    old, new = small_draft(draft_ids=None if whole else IDS), fresh(OTHER)
    assert old.markov_head is not None
    assert new.markov_head is not None
    before = new.markov_head.markov_w2.weight.clone()
    start = origin(tmp_path, old).give(new, small_target())
    kept = {} if whole else {t: i for i, t in enumerate(IDS.tolist())}
    for row, token in enumerate(OTHER.tolist()):
        got = new.markov_head.markov_w2.weight[row]
        known = token if whole else kept.get(token)
        want = before[row] if known is None else old.markov_head.markov_w2.weight[known]
        assert torch.equal(got, want), token
    told = start.begun["markov_head.markov_w2.weight"]
    assert told.startswith("0 of 6 rows" if whole else "3 of 6 rows")
    assert ("44 of its rows" if whole else "2 of its rows") in told


def test_dspark_begins_with_dflash(tmp_path: Path) -> None:
    old = small_draft(speculator_type="dflash", markov_rank=0, enable_confidence_head=False)
    save_draft(tmp_path, old)
    store = small_store(tmp_path)
    assert settings_of(str(tmp_path))["speculator_type"] == "dflash"
    with pytest.raises(MismatchError, match="hidden_size is 32"):
        opened(tmp_path, store)
    start = origin(tmp_path, old)
    start = replace(start, tensors={n: t for n, t in start.tensors.items() if "markov" not in n})
    assert {n.split(".")[0] for n in start.give(fresh(), small_target()).begun} == {
        "markov_head",
        "confidence_head",
    }


def test_another_models_draft_is_refused(tmp_path: Path) -> None:
    old = small_draft(draft_ids=IDS)
    with pytest.raises(DraftError, match="another model"):
        origin(tmp_path, old).give(fresh(IDS), small_target(seed=9))


def test_widths_must_be_equal(tmp_path: Path) -> None:
    before = origin(tmp_path, small_draft())
    for changes, flag in (
        ({"num_heads": 2}, "--num-heads 4"),
        ({"intermediate_size": 64}, "--intermediate-size 48"),
    ):
        with pytest.raises(MismatchError, match=flag):
            before.shaped(small_config(**changes))
    kept = before.shaped(small_config(rope_theta=5e5, mask_token_id=1))
    assert (kept.rope_theta, kept.mask_token_id) == (10000.0, 49)


def small_store(folder: Path) -> Any:
    stores.write_store(folder / "hs.zarr", [30, 40])
    return dspark.cache.open(folder / "hs.zarr")


def opened(folder: Path, store: Any) -> Origin:
    settings = TrainConfig(cache="", speculator_type="dflash")
    return Origin.open(str(folder), store.manifest.target, list(store.manifest.layers), settings)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained draft and its store."""
    folder = tmp_path_factory.mktemp("earlier")
    train(small_training(folder, [60, 70, 80, 50, 40], max_steps=2, num_layers=2))
    return folder


def tuned(earlier: Path, folder: Path, **changes: Any) -> TrainConfig:
    given = {
        "init_from": str(earlier / "draft"),
        "num_layers": 2,
        "max_steps": 2,
        "lr": 1e-3,
    } | changes
    return small_training(folder, [64, 72, 33, 81], **given)


def test_a_second_training_goes_on_with_the_first(earlier: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = tuned(earlier, tmp_path, num_layers=3, block_size=4)
    run = prepare(config)
    target = dspark.cache.open(earlier / "hs.zarr").target
    old = load_draft(earlier / "draft", target)
    mine = dict(run.model.trained())
    assert torch.equal(
        mine["layers.1.mlp.up_proj.weight"], dict(old.trained())["layers.1.mlp.up_proj.weight"]
    )
    train(config, say=said.append)
    log = (tmp_path / "draft" / "train.log").read_text()
    for text in ("".join(said), log):
        assert "layers.2.self_attn.q_proj.weight" in text
    record = json.loads((tmp_path / "draft" / "history.json").read_text())
    assert record["start"]["folder"] == str(earlier / "draft")
    assert record["start"]["changed"] == {
        "num_layers": "2 there, 3 now",
        "block_size": "3 there, 4 now",
    }
    assert record["sessions"] == [{"from_step": 0, "to_step": 2, "ended": "finished"}]
    out = tmp_path / "out"
    export(str(tmp_path / "draft"), str(out), pictures=False)
    card = (out / "README.md").read_text()
    assert "Warm start" in card
    assert "Begun anew: layers.2.self_attn.q_proj.weight" in card
    first = json.loads((earlier / "draft" / "history.json").read_text())
    assert sentences(first) == [
        "Started from random weights.",
        "Trained from step 0 to step 2: finished.",
    ]


def test_interrupted_and_resumed_runs_are_told_apart(earlier: Path, tmp_path: Path) -> None:
    config = tuned(earlier, tmp_path, max_steps=4)

    def stop(step: int, total: int, text: str) -> None:
        if step == 2:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        train(config, progress=stop)
    path = tmp_path / "draft" / "history.json"
    assert [s["ended"] for s in json.loads(path.read_text())["sessions"]] == ["interrupted"]
    train(config, resume=True)
    record = json.loads(path.read_text())
    assert [(s["from_step"], s["to_step"], s["ended"]) for s in record["sessions"]] == [
        (0, 2, "interrupted"),
        (2, 4, "finished"),
    ]
    assert record["start"]["taken"] > 20
    out = tmp_path / "out"
    export(str(tmp_path / "draft"), str(out), pictures=False)
    card = (out / "README.md").read_text()
    for line in (
        f"- Warm start: {record['start']['taken']} tensors of {earlier / 'draft'}",
        "- Trained from step 0 to step 2: interrupted.",
        "- Resumed from step 2 to step 4: finished.",
    ):
        assert line in card
    changed = json.loads(path.read_text())
    changed["start"]["weights_sha256"] = "1" * 64
    path.write_text(json.dumps(changed))
    with pytest.raises(MismatchError, match="started from weights"):
        train(config, resume=True)
    for odd in (changed | {"sessions": 3}, {"start": ["folder"]}):
        path.write_text(json.dumps(odd))
        with pytest.raises(DraftError, match=r"history.json: .*restore the file, or delete it"):
            train(config, resume=True)


def test_the_earlier_shape_is_the_default(earlier: Path) -> None:
    words = [
        "--cache",
        str(earlier / "hs.zarr"),
        "--init-from",
        str(earlier / "draft"),
        "--recipe",
        "none",
    ]
    config = config_of(words)
    assert (config.num_layers, config.block_size, config.markov_rank, config.num_heads) == (
        2,
        3,
        4,
        4,
    )
    assert config_of([*words, "--num-layers", "1"]).num_layers == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_kv_heads": 4}, MismatchError, "--num-kv-heads 2"),
        ({"init_from": "nowhere"}, DraftError, "config.json"),
        ({"output": "EARLIER"}, UsageError, "another --output"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    changes: dict[str, Any], error: type[DsparkError], message: str, earlier: Path, tmp_path: Path
) -> None:
    config = replace(tuned(earlier, tmp_path), **changes)
    if config.output == "EARLIER":
        config = replace(config, output=str(earlier))
    with pytest.raises(error, match=message):
        train(config)
    assert not (tmp_path / "draft").exists()


def test_another_programs_spelling(earlier: Path, tmp_path: Path) -> None:
    """A flat draft without our record, and the speculators format, are taken as our own."""
    draft = earlier / "draft"
    for layout in ("flat", "speculators"):
        out = tmp_path / layout
        export(str(draft), str(out), layout=layout, pictures=False)
        save_file(load_file(out / "model.safetensors"), out / "model.safetensors")
        for extra in ("history.json", "training.json", "store.json", "manifest.json"):
            (out / extra).unlink()
        (tmp_path / f"{layout}_tuned").mkdir()
        run = prepare(tuned(earlier, tmp_path / f"{layout}_tuned", init_from=str(out)))
        assert run.start is not None
        assert (run.start.left, run.start.begun) == ({}, {})


def test_layers_that_the_store_lacks(earlier: Path, tmp_path: Path) -> None:
    config = tuned(earlier, tmp_path)
    path = tmp_path / "moved"
    export(str(earlier / "draft"), str(path), pictures=False)
    flat = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(flat | {"target_layer_ids": [1, 2, 3]}))
    with pytest.raises(MismatchError, match="--layers 1,2,3"):
        prepare(replace(config, init_from=str(path)))
