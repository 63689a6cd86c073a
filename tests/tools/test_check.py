"""``dspark-tools check``: each classic mistake made on purpose, and named; a sound draft passes.

Twice where it can be hidden: with the record of training in the weights (certain), and without it,
as in a draft of another program (a suspicion, from the target's own answers).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_models as tiny
from dspark.tools.check import parity, servers
from dspark.tools.check.command import check_command
from dspark.tools.check.servers import vllm_at_least
from dspark.tools.check.stages import CheckConfig, check
from dspark.tools.decode import vllm_serve
from dspark.tools.decode.outcome import Outcome
from dspark.tools.decode.target import greedy_alone
from dspark.train.draft.saved.folder import CHECKSUM, load_config, save_draft, write_config

Config, Tensors = dict[str, Any], dict[str, Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a draft that has learnt it (layers 0 and 2, RoPE 10,000), one with a reduced
    vocabulary, prompts.
    """
    root = tmp_path_factory.mktemp("check")
    model = tiny.target()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(root / "target")
    prompts = [[50, 60, 70], [5, 6, 7, 8, 9], [90, 3, 4]]
    rows = [{"input_ids": [*p, 1, 2], "loss_mask": [0] * len(p) + [1, 1]} for p in prompts]
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    answers = [p + greedy_alone(model, p, max_tokens=24) for p in prompts]
    for name, ids in (
        ("draft", None),
        ("reduced", torch.tensor(sorted({t for a in answers for t in a} | set(range(0, 160, 5))))),
    ):
        draft = tiny.draft(model, draft_ids=ids)
        tiny.agree(model, draft, answers, steps=40)
        save_draft(root / name, draft, dtype=torch.float32)
    return root


def broken(
    made: Path,
    tmp_path: Path,
    *,
    config: Callable[[Config], None] | None = None,
    tensors: Callable[[Tensors], None] | None = None,
    name: str = "draft",
    record: bool = True,
) -> Path:
    """A copy of a draft with its config or tensors changed; ``record`` False drops what the weights
    say of their training.
    """
    folder = tmp_path / "broken"
    shutil.copytree(made / name, folder)
    if config is not None:
        written = json.loads((folder / "config.json").read_text())
        config(written)
        (folder / "config.json").write_text(json.dumps(written))
    if tensors is not None or not record:
        weights = folder / "model.safetensors"
        with safe_open(weights, "pt") as file:
            header = dict(file.metadata())
        # by hand, as another program would: a changed file is refused where it has one
        header.pop(CHECKSUM)
        values = load_file(weights)
        if tensors is not None:
            tensors(values)
        save_file(values, weights, header if record else {"format": "pt"})
    return folder


def run(made: Path, folder: Path, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "data": str(made / "rows.jsonl"),
        "max_tokens": 24,
        "serve": False,
        "device": "cpu",
    }
    return check(CheckConfig(draft=str(folder), model=str(made / "target"), **(settings | more)))


def named(result: dict[str, Any], level: str) -> dict[str, str]:
    return {f["name"]: f["text"] for f in result["findings"] if f["level"] == level}


@pytest.mark.parametrize("name", ["draft", "reduced"])
@pytest.mark.parametrize("record", [True, False])
def test_a_sound_draft_passes(made: Path, tmp_path: Path, name: str, record: bool) -> None:
    result = run(made, broken(made, tmp_path, name=name, record=record))
    assert named(result, "error") == named(result, "suspicion") == {}
    assert result["ok"] is True
    assert "NOT compared with a real server" in named(result, "note")["served"]
    assert ("record" in named(result, "note")) is not record
    assert result["behaviour"]["as_configured"] > 3


def test_the_speculators_format_passes_too(made: Path, tmp_path: Path) -> None:
    folder = broken(made, tmp_path)
    write_config(folder, load_config(folder), torch.float32, ("target", ["Qwen3ForCausalLM"]))
    result = run(made, folder)
    assert (result["ok"], result["format"]) == (True, "speculators")

    def absent(config: Config) -> None:
        del config["sample_from_anchor"]

    (tmp_path / "again").mkdir()
    shutil.copytree(folder, tmp_path / "spec" / "draft")
    found = run(made, broken(tmp_path / "spec", tmp_path / "again", config=absent), decode=False)
    assert "vLLM then assumes false" in named(found, "error")["layout-flag"]


def _flag_false(config: Config) -> None:
    config["sample_from_anchor"] = False


def _flag_absent(config: Config) -> None:
    del config["sample_from_anchor"]


def _layers(config: Config) -> None:
    config["target_layer_ids"] = [i + 1 for i in config["target_layer_ids"]]


def _mask(config: Config) -> None:
    config["mask_token_id"] = 7


def _rope(config: Config) -> None:
    config["rope_theta"] = 1e6
    config["rope_parameters"]["rope_theta"] = 1e6


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        (_flag_false, "layout-flag", "every token by one|shifts every token"),
        (_flag_absent, "layout-flag", "no sample_from_anchor"),
        (
            _layers,
            "layer-ids",
            r"\[1, 3\], but the weights were trained with \[0, 2\]: off by one, vLLM's ids",
        ),
        (_mask, "mask-token", "mask_token_id = 7, but the weights were trained with 159"),
        (_rope, "rope", "1000000.0, but the weights were trained with 10000.0"),
    ],
)
def test_a_config_that_the_weights_contradict(
    made: Path, tmp_path: Path, change: Callable[[Config], None], name: str, text: str
) -> None:
    result = run(made, broken(made, tmp_path, config=change), decode=False)
    assert result["ok"] is False
    errors = named(result, "error")
    assert set(errors) == {name}
    assert re.search(text, errors[name])


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        (_layers, "layer-ids", r"outputs of layers [0, 2]"),
        (_mask, "mask-token", "mask token 159"),
        (_rope, "rope", "rope_theta 10000,"),
    ],
)
def test_the_same_without_a_record_shows_in_behaviour(
    made: Path, tmp_path: Path, change: Callable[[Config], None], name: str, text: str
) -> None:
    result = run(made, broken(made, tmp_path, config=change, record=False))
    found = [
        f["text"] for f in result["findings"] if f["level"] == "suspicion" and f["name"] == name
    ]
    assert result["ok"] is False
    assert any(text in t and "It was probably trained that way" in t for t in found)
    assert named(result, "error") == {}


def test_store_json_tells_of_shifted_layers(made: Path, tmp_path: Path) -> None:
    folder = broken(made, tmp_path, config=_layers, record=False)
    (folder / "store.json").write_text(json.dumps({"layers": [0, 2]}))
    assert "off by one" in named(run(made, folder, decode=False), "error")["layer-ids"]


def _no_norm(tensors: Tensors) -> None:
    del tensors["norm.weight"]


def _no_hidden_norm(tensors: Tensors) -> None:
    del tensors["hidden_norm.weight"]


@pytest.mark.parametrize(
    ("change", "missing"), [(_no_norm, "norm.weight"), (_no_hidden_norm, "hidden_norm.weight")]
)
def test_a_missing_norm(
    made: Path, tmp_path: Path, change: Callable[[Tensors], None], missing: str
) -> None:
    assert (
        f"lacks {missing}"
        in named(run(made, broken(made, tmp_path, tensors=change)), "error")["norm"]
    )


def test_a_norm_of_ones(made: Path, tmp_path: Path) -> None:
    def ones(tensors: Tensors) -> None:
        tensors["norm.weight"].fill_(1)

    assert (
        "norm.weight is all ones"
        in named(run(made, broken(made, tmp_path, tensors=ones), decode=False), "suspicion")["norm"]
    )


def test_states_without_the_final_norm_show_against_the_record_of_training(
    made: Path, tmp_path: Path
) -> None:
    """A draft made on other states than the target's has its metrics and its behaviour apart."""
    folder = broken(made, tmp_path)
    rates = run(made, folder)["behaviour"]["accept_rate"]
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "validation": True, "accept_rate": rates}) + "\n"
    )
    assert f"{rates[0]:.2f} on held-out data" in named(run(made, folder), "note")["acceptance"]

    # As when the states were stored without the final norm: training's own metrics promised what
    # the target does not grant.
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "validation": True, "accept_rate": [2.5 * rates[0]]}) + "\n"
    )
    assert "less than half" in named(run(made, folder), "suspicion")["acceptance"]


def test_a_draft_that_hardly_accepts_is_not_held_against_its_record(tmp_path: Path) -> None:
    from dspark.tools.check.symptoms import against_record

    rows = {"step": 1, "validation": True, "accept_rate": [0.11]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows) + "\n")
    (found,) = against_record(tmp_path, {"accept_rate": [0.05]})
    assert (found.level, found.name) == ("note", "acceptance")
    assert "too little to tell" in found.text


def _ids(tensors: Tensors) -> None:
    tensors["d2t"] += torch.arange(tensors["d2t"].shape[0])


def _swapped(tensors: Tensors) -> None:
    # Still rising ids, of other tokens; t2d is made to agree, so only the rows of lm_head tell.
    ids = torch.arange(tensors["d2t"].shape[0]) + tensors["d2t"]
    free = next(i for i in range(int(ids[0]) + 1, 160) if i not in set(ids.tolist()))
    at = int((ids > free).nonzero()[0, 0])
    ids[at] = free
    tensors["d2t"] = ids - torch.arange(ids.shape[0])
    tensors["t2d"] = torch.zeros(160, dtype=torch.bool).index_fill(0, ids, True)


def _no_d2t(tensors: Tensors) -> None:
    del tensors["d2t"]


@pytest.mark.parametrize(
    ("change", "text"),
    [(_ids, "look like token ids"), (_swapped, "d2t is wrong"), (_no_d2t, "needs d2t")],
)
def test_a_wrong_vocabulary_map(
    made: Path, tmp_path: Path, change: Callable[[Tensors], None], text: str
) -> None:
    result = run(made, broken(made, tmp_path, name="reduced", tensors=change))
    assert text in named(result, "error")["vocabulary"]


def test_other_mistakes_by_name(made: Path, tmp_path: Path) -> None:
    def config(c: Config) -> None:
        c["max_position_embeddings"] = 64
        c["dflash_config"] = {"target_layer_ids": [5]}

    def tensors(t: Tensors) -> None:
        t["model.fc.weight"] = t.pop("fc.weight")
        t["lm_head_copy"] = torch.zeros(1)
        t["lm_head.weight"] = torch.zeros(160, 32)

    folder = broken(made, tmp_path, config=config, tensors=tensors)
    errors = [
        (f["name"], f["text"])
        for f in run(made, folder, num_speculative_tokens=3)["findings"]
        if f["level"] == "error"
    ]
    for name, text in (
        ("rope", "max_position_embeddings is 64, but the target takes 512"),
        ("override", "dflash_config"),
        ("tensors", "begin with `model.`"),
        ("tensors", "every name that contains lm_head"),
        ("head", "lm_head.weight is not the target's"),
        ("block-size", "num_speculative_tokens is 3, block_size 4: a shorter block"),
    ):
        assert any(n == name and text in t for n, t in errors), (name, errors)


def test_blocks_are_compared_with_the_server(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's side is faked by ours, once true and once with a token changed (tests/vllm_cpu runs
    the real one).
    """
    answers: dict[str, list[Outcome]] = {}

    def keep(ours: list[Outcome], served: list[Outcome]) -> parity.Parity:
        answers["ours"] = ours
        return parity_of(ours, served or ours)

    parity_of = parity.parity_of
    monkeypatch.setattr(parity, "parity_of", keep)
    monkeypatch.setattr(vllm_serve, "run_vllm", lambda request: [])
    sound = run(made, made / "draft", serve=True)
    assert (sound["ok"], sound["served"]["holds"]) == (True, True)
    assert sound["served"]["compared"] == sound["served"]["equal"] > 3

    def wrong(request: vllm_serve.ServeRequest) -> list[Outcome]:
        assert request.trace
        first, *rest = answers["ours"]
        (position, tokens), *blocks = first.drafted
        drafted = ((position, (tokens[0] ^ 1, *tokens[1:])), *blocks)
        return [Outcome(first.tokens, 1.0, first.drafts, first.accepted_at, drafted), *rest]

    monkeypatch.setattr(vllm_serve, "run_vllm", wrong)
    result = run(made, made / "draft", serve=True)
    assert result["served"]["equal"] == result["served"]["compared"] - 1
    assert "blocks" in named(result, "error")["served"]


def test_command(made: Path) -> None:
    options = [str(made / "draft"), "--model", str(made / "target"), "--no-decode"]
    sound = CliRunner().invoke(check_command, options)
    assert sound.exit_code == 0, sound.output
    assert "no problem found in the stages that ran" in sound.stdout
    assert "compared token for token on 0.32.0" in sound.stdout
    wrong = CliRunner().invoke(check_command, [*options, "--num-speculative-tokens", "9", "--json"])
    assert wrong.exit_code == 1
    assert json.loads(wrong.stdout)["ok"] is False
    assert CliRunner().invoke(check_command, ["nowhere", *options[1:]]).exit_code == 1


@pytest.mark.parametrize(
    ("layers", "form", "wanted"),
    [
        (2, "flat", "0.25.1"),
        (1, "flat", "0.27.0"),
        (3, "flat", "0.27.0"),
        (2, "speculators", "0.27.0"),
    ],
)
def test_the_first_vllm_that_reads_a_draft(made: Path, layers: int, form: str, wanted: str) -> None:
    config = dataclasses.replace(load_config(made / "draft"), num_layers=layers)
    assert len(config.target_layer_ids) == 2
    found, why = vllm_at_least(config, form)
    assert found == wanted
    assert why


@pytest.mark.parametrize(
    ("installed", "ok"),
    [
        ("0.24.0", False),
        ("0.25.1", True),
        ("0.32.0", True),
        ("0.1.dev1+g5", True),
        ("dev", True),
        (None, True),
    ],
)
def test_a_server_that_is_too_old_is_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, ok: bool
) -> None:
    monkeypatch.setattr(servers, "vllm_version", lambda: installed)
    found = run(made, made / "draft", decode=False)
    assert found["ok"] is ok
    assert [f["name"] for f in found["findings"] if f["level"] == "error"] == (
        [] if ok else ["server"]
    )
    assert found["vllm"]["at_least"] == "0.25.1"
