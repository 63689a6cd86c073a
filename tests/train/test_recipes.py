"""Recipes set defaults; what is given on the command line wins; the store's target chooses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import stores
from dspark.cache import errors
from dspark.cache.manifest import TargetInfo
from dspark.cache.stored_manifest import read_manifest
from dspark.dump.target.presets import presets
from dspark.train.cli import main
from dspark.train.config import TrainConfig
from dspark.train.recipes import configure, parse, recipes


def store_of(folder: Path, target: str) -> str:
    """A store whose target carries the id ``target``."""
    m = stores.manifest()
    fields = {name: getattr(m.target, name) for name in TargetInfo.__dataclass_fields__}
    stores.write_store(
        folder / "hs.zarr",
        [60, 80],
        m=stores.manifest(target=TargetInfo(**{**fields, "id": target})),
    )
    return str(folder / "hs.zarr")


def test_the_published_settings() -> None:
    """The figures of the GLM-5.2, Qwen3-4B and Qwen3-8B recipes as their authors give them."""
    glm, qwen, eight = (recipes()[name].settings for name in ("GLM-5.2", "Qwen3-4B", "Qwen3-8B"))
    assert (glm["num_layers"], glm["block_size"], glm["max_anchors"], glm["lr"], glm["epochs"]) == (
        5,
        8,
        1024,
        6e-4,
        3,
    )
    assert (qwen["block_size"], qwen["max_anchors"], qwen["markov_rank"], qwen["epochs"]) == (
        7,
        512,
        256,
        10,
    )
    assert all(
        recipes()[name].settings["betas"] == (0.9, 0.999)
        for name in ("Qwen3-4B", "Qwen3-14B", "Gemma-4-12B")
    )
    assert eight["lr"] * eight["min_lr_ratio"] == pytest.approx(6e-5)
    assert {"Qwen3-14B", "SmolLM2-135M"} < set(recipes())


def test_every_target_with_a_dump_preset_has_a_recipe() -> None:
    for model in presets():
        assert sum(r.fits(model) for r in recipes().values()) == 1, model


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("zai-org/GLM-5.2-FP8", "GLM-5.2"),
        ("/models/qwen3-4b/", "Qwen3-4B"),
        ("Qwen/Qwen3-4B-Base", None),
        ("random/tiny", None),
    ],
)
def test_the_target_of_the_store_chooses(tmp_path: Path, target: str, name: str | None) -> None:
    cache = store_of(tmp_path, target)
    config = configure({"cache": cache, "lr": 1e-5})
    assert (config.recipe, config.lr) == (name, 1e-5)
    settings = recipes()[name].settings if name else {}
    plain = TrainConfig(cache=cache)
    for field in ("epochs", "block_size", "rows_per_step", "max_anchors"):
        assert getattr(config, field) == settings.get(field, getattr(plain, field))
    assert configure({"cache": cache}, "none") == plain


def test_a_name_is_taken_in_any_case_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    assert (
        configure({"cache": store_of(tmp_path, "zai-org/GLM-5.2-FP8")}, "glm-5.2").block_size == 8
    )
    with pytest.raises(errors.UsageError, match="expected auto, none or one of GLM-5.2"):
        configure({"cache": "x"}, "GLM-6")
    with pytest.raises(errors.UsageError, match="sets output, which a recipe cannot set"):
        parse(
            json.dumps(
                {"a": {"targets": [], "shapes": [], "source": "", "settings": {"output": "y"}}}
            ),
            "f",
        )
    with pytest.raises(errors.UsageError, match="block_size is -1"):
        parse(
            json.dumps(
                {"a": {"targets": [], "shapes": [], "source": "", "settings": {"block_size": -1}}}
            ),
            "f",
        )
    with pytest.raises(errors.UsageError, match="f: a has"):
        parse(json.dumps({"a": {"targets": []}}), "f")


def test_flags_win_over_the_recipe_on_the_command_line(tmp_path: Path) -> None:
    """A real run by the command: the recipe's one row a step and seven epochs, its three layers
    replaced, and the choice recorded.
    """
    cache, output = store_of(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct"), tmp_path / "draft"
    flags = (
        "--num-layers 1 --markov-rank 4 --max-steps 1 --val-fraction 0 --device cpu "
        "--no-tensorboard"
    )
    done = CliRunner().invoke(main, ["--cache", cache, "--output", str(output), *flags.split()])
    assert done.exit_code == 0, done.output
    assert "recipe SmolLM2-135M" in done.output
    saved = json.loads((output / "training.json").read_text())
    assert (saved["num_layers"], saved["markov_rank"], saved["rows_per_step"], saved["epochs"]) == (
        1,
        4,
        1,
        7,
    )
    wrong = CliRunner().invoke(main, ["--cache", cache, "--recipe", "x"])
    assert (wrong.exit_code, "expected auto" in wrong.output) == (2, True)
    assert all(name in CliRunner().invoke(main, ["--help"]).output for name in recipes())


def test_another_optimizer_than_the_recipes_does_not_take_its_rate(tmp_path: Path) -> None:
    cache = store_of(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct")
    own = configure({"cache": cache})
    assert (own.optimizer, own.lr) == ("muon", 2e-3)
    assert configure({"cache": cache, "optimizer": "muon"}).lr == 2e-3
    adamw = configure({"cache": cache, "optimizer": "adamw"})
    assert (adamw.lr, adamw.rows_per_step) == (TrainConfig(cache="").lr, own.rows_per_step)
    assert configure({"cache": cache, "optimizer": "adamw", "lr": 3e-3}).lr == 3e-3
    assert configure({"cache": cache, "strategy": "fsdp2"}).optimizer == "muon"
    qwen = store_of(tmp_path / "qwen", "Qwen/Qwen3-4B")
    assert configure({"cache": qwen, "optimizer": "adamw"}).betas == (0.9, 0.999)
    muon = configure({"cache": qwen, "optimizer": "muon"})
    assert muon.betas == TrainConfig(cache=qwen).betas


def test_a_recipe_of_another_target_is_refused(tmp_path: Path) -> None:
    """By name or by size: a fine-tuned Qwen3-4B has another name and takes Qwen3-4B's recipe."""
    qwen = store_of(tmp_path, "Qwen/Qwen3-4B")
    with pytest.raises(
        errors.MismatchError,
        match=r"--recipe GLM-5.2 is for .* is Qwen/Qwen3-4B .* Its own recipe is Qwen3-4B",
    ):
        configure({"cache": qwen}, "GLM-5.2")
    other = store_of(tmp_path / "other", "me/tuned")
    with pytest.raises(errors.MismatchError, match="No recipe is known for it"):
        configure({"cache": other}, "Qwen3-4B")
    manifest = read_manifest(other)
    recipe = recipes()["Qwen3-4B"]
    recipe.check_fits(dataclasses.replace(manifest.target, hidden_size=2560, num_layers=36), other)


def test_the_shape_of_the_draft_from_flags_and_a_file(tmp_path: Path) -> None:
    cache, file = store_of(tmp_path, "me/tuned"), tmp_path / "shape.json"
    file.write_text(
        json.dumps(
            {"num_attention_heads": 6, "head_dim": 16, "intermediate_size": 48, "num_layers": 1}
        )
    )
    words = [
        "--cache",
        cache,
        "--draft-config",
        str(file),
        "--intermediate-size",
        "64",
        "--num-kv-heads",
        "3",
    ]
    output = tmp_path / "draft"
    flags = "--markov-rank 4 --max-steps 1 --val-fraction 0 --device cpu --no-tensorboard"
    done = CliRunner().invoke(main, [*words, "--output", str(output), *flags.split()])
    assert done.exit_code == 0, done.output
    saved = json.loads((output / "config.json").read_text())
    names = (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    )
    assert [saved[n] for n in names] == [1, 6, 3, 16, 64]
    assert json.loads((output / "training.json").read_text())["num_heads"] == 6
    for content, message in (
        ("[]", "expected a JSON object"),
        ('{"hidden_size": 4}', "hidden_size cannot be set there"),
    ):
        file.write_text(content)
        wrong = CliRunner().invoke(main, words)
        assert (wrong.exit_code, message in wrong.output) == (2, True), wrong.output
