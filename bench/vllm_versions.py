"""Read the classes of every supported vLLM out of its wheel and check what this project relies on.
Nothing of vLLM runs.

    python bench/vllm_versions.py [--versions 0.32.0,0.33.0] [--keep FOLDER] [--write]

Wheels (300 to 500 MB each) are downloaded with pip one at a time; their Python files stay in FOLDER
(default .work/vllm-versions), the wheels do not. ``--write`` puts the table into docs/vllm.md. Exit
code 1 if anything is missing.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from dspark.dump.engines.vllm.source import model_source

ROOT = Path(__file__).parents[1]
VERSIONS = [
    "0.25.1",
    "0.26.0",
    "0.27.0",
    "0.27.1",
    "0.28.0",
    "0.29.0",
    "0.30.0",
    "0.31.0",
    "0.32.0",
    "0.33.0",
]
PLATFORMS = [
    "manylinux_2_28_x86_64",
    "manylinux_2_31_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
CONNECTOR = "distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py"
BASE = "distributed/kv_transfer/kv_connector/v1/base.py"
FUSED = [
    "models/common/ops/fused_allreduce_rms_norm.py",
    "model_executor/layers/fused_allreduce_gemma_rms_norm.py",
]
FAMILIES = {
    "Llama, Mistral": "LlamaForCausalLM",
    "Qwen3": "Qwen3ForCausalLM",
    "Qwen3 MoE": "Qwen3MoeForCausalLM",
    "Qwen3.5": "Qwen3_5ForConditionalGeneration",
    "gpt-oss": "GptOssForCausalLM",
    "Gemma 3": "Gemma3ForCausalLM",
    "Gemma 4": "Gemma4ForCausalLM",
    "DeepSeek V3": "DeepseekV3ForCausalLM",
    "DeepSeek V3.2": "DeepseekV32ForCausalLM",
    "GLM-5.2": "GlmMoeDsaForCausalLM",
    "GLM-4.7-Flash": "Glm4MoeLiteForCausalLM",
    "GLM-4.5, 4.6": "Glm4MoeForCausalLM",
    "MiniMax M2": "MiniMaxM2ForCausalLM",
    "MiniMax M3": "MiniMaxM3SparseForCausalLM",
}
BEGIN, END = (
    "<!-- written by bench/vllm_versions.py: begin -->",
    "<!-- written by bench/vllm_versions.py: end -->",
)


def sources(version: str, keep: Path) -> Path:
    """The Python files of a version's wheel, downloaded where they are not there."""
    folder = keep / version
    if not (folder / "vllm").is_dir():
        wheels = keep / f"{version}.wheel"
        options = [x for p in PLATFORMS for x in ("--platform", p)]
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--python-version",
                "3.11",
                *options,
                "-d",
                str(wheels),
                f"vllm=={version}",
            ],
            check=True,
        )
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith((".py", "METADATA"))]
            archive.extractall(folder, names)
        wheel.unlink()
        wheels.rmdir()
    return folder


def functions(path: Path, inside: str | None = None) -> dict[str, list[str]]:
    """Names of functions (of class ``inside``) and of their arguments."""
    tree: ast.AST = ast.parse(path.read_text())
    body = tree.body  # type: ignore[attr-defined]
    if inside is not None:
        body = next((n.body for n in body if isinstance(n, ast.ClassDef) and n.name == inside), [])
    return {n.name: [a.arg for a in n.args.args] for n in body if isinstance(n, ast.FunctionDef)}


def has(path: Path, *words: str) -> bool:
    text = path.read_text() if path.is_file() else ""
    return all(re.search(word, text) for word in words)


def connector_methods(root: Path) -> bool:
    """What ``SpoolConnector`` overrides is called by these names and arguments."""
    own = functions(root / CONNECTOR, "ExampleHiddenStatesConnector")
    base = functions(root / BASE, "KVConnectorBase_V1")
    free = functions(root / CONNECTOR)
    return (
        own.get("request_finished") == ["self", "request", "block_ids"]
        and own.get("build_connector_meta") == ["self", "scheduler_output"]
        and own.get("register_kv_caches") == ["self", "kv_caches"]
        and own.get("get_finished") == ["self", "finished_req_ids"]
        and "wait_for_save" in own
        and base.get("bind_connector_metadata") == ["self", "connector_metadata"]
        and free.get("extract_from_kv_cache") == ["kv_cache", "slot_mapping", "num_tokens"]
    )


def connector_state(root: Path) -> bool:
    """What it reads of the class that it extends."""
    names = (
        "_pending_saves", "_request_filenames", "_kv_cache", "_block_size", "_storage_path",
        "_kv_transfer_config", "_vllm_config",
    )  # fmt: skip
    text = (root / CONNECTOR).read_text() + (root / BASE).read_text()
    return all(re.search(rf"self\.{name}\b", text) for name in names)


def fused_signature(root: Path) -> bool:
    """What is told of a fused all-reduce and norm: (hidden, residual, norm) -> (normed,
    residual).
    """
    found = [
        args
        for file in FUSED
        if (root / file).is_file()
        for name, args in functions(root / file).items()
        if name.startswith("fused_allreduce")
    ]
    return bool(found) and all(args[:3] == ["hidden_states", "residual", "norm"] for args in found)


CHECKS: dict[str, Callable[[Path], bool]] = {
    "connector's methods": connector_methods,
    "connector's state": connector_state,
    "connector by module path": lambda r: has(
        r / "config/kv_transfer.py", "kv_connector_module_path"
    ),
    "method extract_hidden_states": lambda r: has(
        r / "config/speculative.py", "extract_hidden_states"
    ),
    "model_class_overrides": lambda r: (
        has(r / "config/model.py", "model_class_overrides")
        and has(
            r / "model_executor/models/registry.py",
            r"_VLLM_MODELS = \{",
            r"def _resolve_module_name\(",
        )
    ),
    "EAGLE3 interface": lambda r: has(
        r / "model_executor/models/interfaces.py",
        r"class SupportsEagle3\(",
        r"def set_aux_hidden_state_layers\(",
        r"def get_eagle3_default_aux_hidden_state_layers\(",
    ),
    "fused norm's signature": fused_signature,
    "requests": lambda r: has(
        r / "sampling_params.py", r"FINAL_ONLY", r"skip_clone", r"extra_args"
    ),
    "text alone": lambda r: (
        has(r / "engine/arg_utils.py", r"language_model_only: bool")
        and has(r / "config/multimodal.py", r"if self.language_model_only:\s+return 0")
    ),
}


def pins(folder: Path) -> tuple[str, str]:
    """Versions of torch and transformers that a wheel asks for."""
    (about,) = folder.glob("vllm-*.dist-info/METADATA")
    found = re.findall(
        r"^Requires-Dist: (torch|transformers) ?([(=<>!][^;\n]*)", about.read_text(), re.M
    )
    told = {name: pin.strip("() ") for name, pin in found}
    return told.get("torch", "any"), told.get("transformers", "any")


def runner(root: Path) -> str:
    """The model runner that extraction takes on a GPU."""
    return (
        "V2"
        if has(root / "v1/worker/gpu/spec_decode/__init__.py", "extract_hidden_states")
        else "V1"
    )


def capture(root: Path, architecture: str) -> str:
    """Who takes a family's states on a GPU."""
    found = model_source(root, [architecture], cuda=True)
    if found is None:
        return "-"
    eager = ", eager" if found.capture == "norms" and found.compiled else ""
    return {"vllm": "vLLM", "norms": f"ours{eager}", "none": "nobody"}[found.capture]


def tables(found: dict[str, Path]) -> tuple[list[str], list[str]]:
    """Lines for the docs, and what is missing."""
    missing = [
        f"{version}: {name}"
        for version, folder in found.items()
        for name, check in CHECKS.items()
        if not check(folder / "vllm")
    ]
    lines = [
        "| vLLM | torch | transformers | model runner | what we rely on |",
        "|---|---|---|---|---|",
    ]
    for version, folder in found.items():
        torch, transformers = pins(folder)
        gone = [m.split(": ")[1] for m in missing if m.startswith(f"{version}:")]
        state = f"**missing: {', '.join(gone)}**" if gone else f"all {len(CHECKS)} there"
        lines.append(
            f"| {version} | {torch} | {transformers} | {runner(folder / 'vllm')} | {state} |"
        )
    lines += [
        "",
        f"| states taken by | {' | '.join(found)} |",
        "|---" * (len(found) + 1) + "|",
    ]
    for name, architecture in FAMILIES.items():
        by = [capture(folder / "vllm", architecture) for folder in found.values()]
        lines.append(f"| {name} | {' | '.join(by)} |")
    return lines, missing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--keep", type=Path, default=ROOT / ".work" / "vllm-versions")
    parser.add_argument("--write", action="store_true", help="put the table into docs/vllm.md")
    args = parser.parse_args()
    found = {version: sources(version, args.keep) for version in args.versions.split(",")}
    lines, missing = tables(found)
    print("\n".join(lines))
    if args.write:
        page = ROOT / "docs" / "vllm.md"
        before, rest = page.read_text().split(BEGIN)
        page.write_text(
            f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}" + rest.split(END)[1]
        )
    for line in missing:
        print(f"missing in {line}", file=sys.stderr)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
