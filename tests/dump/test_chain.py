"""The chain from a target to a served draft: what is refused, before weights, and with what to
do.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
from click.testing import CliRunner

from dspark.cache.errors import TargetError, UsageError
from dspark.cache.target.taps import default_layers
from dspark.dump.cli import main
from dspark.dump.target import chain
from dspark.dump.target.config import load_config, shapes_of
from dspark.dump.target.identify import did_you_mean, identify
from dspark.dump.target.presets import presets
from dspark.dump.target.support import STATES, USES, sources
from dspark.dump.target.support import families as known

# A mixture of what people have on disk: decoders, wrappers, encoders, encoder-decoders, state-space
# models.
KINDS = (
    "llama",
    "llama4",
    "llama4_text",
    "mistral",
    "mistral3",
    "mistral4",
    "ministral3",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen2_vl",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "minimax_m2",
    "kimi_k25",
    "nemotron_h",
    "longcat_flash",
    "smollm3",
    "phi3",
    "granite",
    "cohere2",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "falcon_mamba",
    "mamba2",
    "bert",
    "roberta",
    "t5",
    "bart",
    "clip",
)
REFUSED = {"bert", "roberta", "t5", "bart", "clip"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_any_config_resolves_or_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    """The default config of each class, with no weights beside it: a chain, or one of our
    errors; and one message at the command line.
    """
    from transformers import CONFIG_MAPPING

    assert kind in CONFIG_MAPPING
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    refused_in_words(dry("--model", str(tmp_path)))
    if kind in REFUSED:
        with pytest.raises(TargetError, match="expected"):
            shapes_of(load_config(str(tmp_path))[1], str(tmp_path))
        return
    whole, config = load_config(str(tmp_path))
    shapes = shapes_of(config, str(tmp_path))
    links = chain.examine(
        config=config,
        model_types=[whole.model_type, config.get("model_type")],
        shapes=shapes,
        layers=default_layers(shapes.num_layers),
        engine="transformers",
        version="5.19.0",
        frozen=None,
    )
    assert [link.name for link in links] == [
        "config",
        "layers",
        "frozen weights",
        "draft",
        "extraction",
        "serving",
    ]
    missing = [link.name for link in links if link.state == chain.MISSING]
    assert missing == (["extraction"] if kind == "deepseek_v4" else [])
    assert len(chain.table(links)) == 6


def dry(*words: str) -> Any:
    return CliRunner().invoke(main, ["--dry-run", *words])


def refused_in_words(out: Any, words: str = "") -> None:
    """Exit code 1 or 2, and a message instead of a traceback."""
    assert isinstance(out.exception, SystemExit), out.exception
    assert out.exit_code in (1, 2), out.output
    said = " ".join(out.output.split())
    assert "error" in said.lower()
    assert "Traceback" not in said
    assert words in said, said


@pytest.mark.filterwarnings("ignore")
def test_a_family_without_extraction_is_refused_with_the_chain(tmp_path: Path) -> None:
    folder = families.save(tmp_path / "v4", "deepseek_v4")
    out = dry("--model", str(folder), "--data", "x.jsonl")
    assert out.exit_code == 1, out.output
    text = out.output.replace("\n", " ")
    assert "mHC" in text
    assert "choose another target" in text


def test_a_missing_head_is_refused_with_the_chain(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bare"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    out = dry("--model", str(folder), "--data", "x.jsonl")
    assert out.exit_code == 1, out.output
    assert "looked for one output head" in out.output.replace("\n", " ")
    assert "Traceback" not in out.output


def test_what_is_no_target_is_named(tmp_path: Path, tiny: Path) -> None:
    def folder(name: str, **files: str) -> str:
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file.replace("__", ".")).write_text(text)
        return str(tmp_path / name)

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    cases = {
        str(tmp_path / "model.gguf"): "GGUF file of llama.cpp",
        folder("ggufs", q4__gguf="GGUF"): "folder of GGUF files",
        folder("empty"): "the folder is empty",
        folder(
            "lora", adapter_config__json='{"base_model_name_or_path": "a/b"}'
        ): "LoRA adapter of a/b",
        folder("store", zarr__json="{}"): "a store of hidden states",
        str(tiny.parent / (tiny.name + "x")): "no such folder. Did you mean",
    }
    for model, words in cases.items():
        with pytest.raises(UsageError, match=words):
            identify(model)
        refused_in_words(dry("--model", model), words)
    for config, words in (
        ({"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}, "pass --trust-remote-code"),
        ({"model_type": "qwen3", "architectures": ["Qwen3DSparkModel"]}, "this is a draft"),
    ):
        model = folder(str(config["model_type"]), config__json=json.dumps(config))
        with pytest.raises(TargetError, match=words):
            load_config(model)
        refused_in_words(dry("--model", model), words)


def test_near_misses() -> None:
    assert did_you_mean("zai-org/GLM-5.2-FP", presets()) == " Did you mean zai-org/GLM-5.2-FP8?"
    assert did_you_mean("qwen3-4b", presets()) == " Did you mean Qwen/Qwen3-4B?"
    assert did_you_mean("something/else", presets()) == ""


def test_every_preset_has_a_chain_and_a_source_for_each_number() -> None:
    for name, preset in presets().items():
        assert all(preset.sources.values()), name
        links = chain.examine(
            config=preset.config,
            model_types=[preset.config["model_type"]],
            shapes=preset.shapes,
            layers=preset.layers,
            engine="transformers",
            version=None,
            frozen=None,
        )
        chain.require(links)


def test_the_table_of_families() -> None:
    for family in known():
        assert family.cells, family.name
        for cell in family.cells:
            assert cell.use in USES
            assert cell.state in STATES
            assert cell.source in sources()
            assert cell.note or cell.state != "not", f"{family.name}: a cell that says not says why"


def test_a_dry_run_of_each_preset_needs_nothing_but_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No corpus, no network, no checkpoint, and neither torch nor zarr is imported for it; nor for
    a GGUF file that is refused.
    """
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    code = (
        "import sys\n"
        "from dspark.dump.cli import main\n"
        "from dspark.dump.target.presets import presets\n"
        "for name in presets():\n"
        "    main(['--dry-run', '--model', name], standalone_mode=False)\n"
        "from dspark.cache.errors import UsageError\n"
        "from dspark.dump.target.config import load_config\n"
        "try:\n"
        "    load_config(sys.argv[1])\n"
        "except UsageError as error:\n"
        "    assert 'GGUF' in str(error)\n"
        "assert not {'torch', 'zarr', 'transformers'} & set(sys.modules), sys.modules.keys()\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    call = [sys.executable, "-c", code, str(tmp_path / "m.gguf")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--target-layer-ids") == 2 * len(presets())
    assert done.stderr.count("per million tokens") == 2 * len(presets())


def test_a_dump_needs_a_corpus(tiny: Path, tmp_path: Path) -> None:
    out = CliRunner().invoke(main, ["--model", str(tiny), "--output", str(tmp_path / "hs.zarr")])
    assert out.exit_code == 2, out.output
    assert "--data is needed" in out.output
    assert dry("--model", str(tiny)).exit_code == 0
