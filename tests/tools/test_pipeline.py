"""Decoding beside a pipeline and its figures; the files that other programs read of a head."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_trainings import small_training

import dspark.cache
import tiny_models
from dspark.tools.decode.gain import gains, steps_of
from dspark.tools.decode.pipeline import pipelined_generate
from dspark.tools.decode.target import DecodingTarget, greedy_alone
from dspark.tools.judge.pipeline_score import replay, runs
from dspark.tools.judge.score import score
from dspark.tools.publish.export import export
from dspark.train.config import TrainConfig
from dspark.train.data.batch import Batch
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.saved.folder import trained_shapes
from dspark.train.draft.spd.drafter import SPD
from dspark.train.draft.spd.files import HEAD, MANIFEST, faults, file_bytes, metadata
from dspark.train.draft.spd.head import SpdHead
from dspark.train.loop import train

GLM = {
    "hidden_size": 2048,
    "vocab_size": 154_880,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "intermediate_size": 10_240,
}


@pytest.mark.parametrize(
    ("prompts", "tokens", "steps", "length"), [(12, 64, 2076, 1.10983), (11, 32, 929, 1.13671)]
)
def test_published_figures_follow_from_published_steps(
    prompts: int, tokens: int, steps: int, length: float
) -> None:
    found = gains(3, [(prompts * tokens, steps)], 1, 0)
    assert found["equivalent_accept_length"] == pytest.approx(length, abs=5e-6)
    assert found["theoretical_gain_pooled"] == pytest.approx(length - 1, abs=5e-6)
    accepted = (3 * prompts * (tokens - 1) - steps) // 2
    assert accepted == {12: 96, 11: 47}[prompts]
    each = [
        (tokens, steps_of(3, tokens, accepted // prompts + (i < accepted % prompts)))
        for i in range(prompts)
    ]
    found = gains(3, each, 1, 0)
    assert (found["steps"], found["equivalent_accept_length"]) == (
        steps,
        pytest.approx(length, abs=5e-6),
    )
    assert found["theoretical_gain"] >= found["theoretical_gain_pooled"] - 1e-12  # a mean of ratios


def simulated(stages: int, right: list[bool]) -> int:
    """Steps of the schedule itself: ages in flight, one step at a time, over an answer of
    len(right) + 1 tokens.
    """
    flight, done, steps = [0], 1, 0
    while done <= len(right):
        flight = flight or [0]
        steps += 1
        flight = [age + 1 for age in flight]
        if flight[0] == stages:
            flight.pop(0)
            done += 1
            if not right[done - 2]:
                flight = []
                continue
        flight.append(0)
    return steps


def test_the_closed_form_is_the_schedules() -> None:
    rng = np.random.default_rng(0)
    for stages in (2, 3, 5):
        for tokens in (1, 2, 3, 17):
            right = (rng.random(tokens - 1) < 0.6).tolist()
            assert steps_of(stages, tokens, sum(right[:-1])) == simulated(stages, right)


def test_a_replay_reads_the_fill_that_decoding_had() -> None:
    hits = np.array([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]], np.bool_)
    # fill 1 right, fill 2 right, fill 3 wrong, fill 1 right, fill 2 wrong
    assert replay(hits) == [True, True, False, True, False]
    assert runs(np.array([2, 3, 4, 8, 9])) == [slice(0, 3), slice(3, 5)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("spd")
    config = small_training(
        folder,
        [40, 52, 61, 44, 58, 47],
        speculator_type="spd",
        max_steps=3,
        block_size=1,
        draft_vocab_size=40,
    )
    train(config)
    return config


def test_score_replays_and_reports_both_definitions(trained: TrainConfig) -> None:
    found = score(dspark.cache.open(trained.cache), trained.output)
    n, tokens = found["stages"], found["drafts_judged"] + 6  # an answer for each of six samples
    assert n == 3
    assert found["equivalent_accept_length"] == pytest.approx(3 * tokens / found["steps"])
    assert found["acceptance_rate"] == pytest.approx(tokens / found["steps"])
    assert found["draft_acceptance"] == found["drafts_accepted"] / found["drafts_judged"]


def test_an_export_passes_the_rules_and_damage_does_not(
    trained: TrainConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = export(trained.output, str(out), target="random/tiny", dtype="fp16", pictures=False)
    assert manifest["method"] is None
    assert {HEAD, MANIFEST, "speculation_head_final.pt"} <= set(manifest["files"])
    assert faults(out) == []
    said = json.loads((out / MANIFEST).read_text())
    kept = torch.load(out / "speculation_head_final.pt")
    assert sorted(kept["state_dict"]) == sorted(
        trained_shapes(DraftConfig.from_flat(json.loads((out / "config.json").read_text())))
    )
    assert "no server supports it" in (out / "README.md").read_text()
    damage = [
        ("schema", lambda m: m.update(schema="skippy-spd-head/v2")),
        ("source is", lambda m: m["source"].update(checkpoint_version=11)),
        ("blank", lambda m: m["source"].update(base_model_path=" ")),
        ("must be relative", lambda m: m["checkpoint"].update(path="../x.pt")),
        ("64 hexadecimal", lambda m: m["checkpoint"].update(sha256="12")),
        ("a different sha256", lambda m: m["serving_checkpoint"].update(sha256="0" * 64)),
        ("the manifest says", lambda m: m["serving_checkpoint"].update(bytes=12)),
        ("tensors", lambda m: m["serving_checkpoint"].update(tensor_count=18)),
        ("expected BF16", lambda m: m["serving_checkpoint"].update(dtype="BF16")),
        ("ascending numbers", lambda m: m["topology"].update(stage_layer_boundaries=[3, 2, 6])),
        ("ascending order", lambda m: m["topology"].update(shallow_hidden_layer_indices=[[0, 2]])),
        ("ascending ids", lambda m: m["topology"]["draft_token_ids"].reverse()),
        ("g0_proj.weight is", lambda m: m["topology"].update(hidden_size=32)),
        ("has no valid", lambda m: m.pop("topology")),
    ]  # fmt: skip
    for words, change in damage:
        changed = json.loads(json.dumps(said))
        change(changed)
        (out / MANIFEST).write_text(json.dumps(changed))
        assert any(words in fault for fault in faults(out)), (words, faults(out))
    (out / MANIFEST).write_text(json.dumps(said))
    size = (out / HEAD).stat().st_size
    assert size == file_bytes(
        manifest_shapes(out),
        "F16",
        metadata(said["serving_checkpoint"]["tensor_count"], "F16", "random/tiny", "0" * 64),
    )
    (out / HEAD).write_bytes((out / HEAD).read_bytes()[:-2])
    assert any("ends" in fault or "is at bytes" in fault for fault in faults(out))


def manifest_shapes(out: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(out / HEAD, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)


def test_the_published_head_has_its_published_size() -> None:
    config = SPD.configure(
        TrainConfig(cache="", speculator_type="spd", num_layers=1), GLM, [14, 30, 46], 0, 16_000
    )
    said = metadata(19, "F16", "zai-org/GLM-4.7-Flash", "0" * 64)
    assert file_bytes(trained_shapes(config), "F16", said) == 321_399_280


def piped_head(model: torch.nn.Module, taps: tuple[int, ...]) -> SpdHead:
    config = DraftConfig.sized_for(
        model.config.to_dict(),
        target_layer_ids=taps,
        mask_token_id=0,
        speculator_type="spd",
        num_layers=1,
    )
    torch.manual_seed(3)
    head = SpdHead(config, DecodingTarget(model, taps).frozen).float()
    with torch.no_grad():
        for _, parameter in head.trained():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return head


def batch_over(model: torch.nn.Module, taps: tuple[int, ...], ids: list[int]) -> Batch:
    with DecodingTarget(model, taps) as target:
        target.start()
        aux = target.step(ids)[1].clone()
    total = len(ids)
    return Batch.build(
        input_ids=np.array(ids),
        loss_mask=np.ones(total, np.bool_),
        doc=np.zeros(total, np.int32),
        aux=aux,
        last=torch.zeros(total - 1, aux.shape[-1]),
        anchors=np.arange(total - 1),
        block_size=1,
    )


def test_decoding_is_lossless_and_drafts_are_the_training_forwards() -> None:
    model, taps, prompt = tiny_models.target(), (0, 1, 3), [5, 9, 77, 3]
    alone = greedy_alone(model, prompt, max_tokens=40)
    ids = [*prompt, *alone]
    batch, head = batch_over(model, taps, ids), piped_head(model, taps)
    optimizer = torch.optim.Adam([p for _, p in head.trained()], lr=3e-3)
    for step in range(25):  # until some drafts stand and some do not
        states = head(batch, head.plan(batch, fill=1 + step % 3))
        loss = torch.nn.functional.cross_entropy(states.z[:, 0] @ states.w2.T, batch.input_ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        hits = torch.stack(
            [
                (head(batch, head.plan(batch, fill=fill)).z[:, 0] @ head.head.weight.T).argmax(-1)
                == batch.input_ids[1:]
                for fill in (1, 2, 3)
            ]
        )
    with DecodingTarget(model, taps) as target:
        answer = pipelined_generate(target, head, prompt, max_tokens=40)
        sampled = pipelined_generate(
            target,
            head,
            prompt,
            max_tokens=30,
            temperature=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        stop = pipelined_generate(target, head, prompt, max_tokens=40, stop_ids=[alone[7]])
    assert answer.tokens == alone
    assert answer.judged == replay(hits[:, len(prompt) :].numpy())
    assert 0 < sum(answer.judged) < len(answer.judged)
    assert answer.steps == steps_of(3, 40, sum(answer.judged[:-1]))
    assert sampled.steps == steps_of(3, 30, sum(sampled.judged[:-1]))
    assert stop.tokens == alone[: alone.index(alone[7]) + 1]
