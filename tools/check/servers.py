"""Servers of a draft: which vLLM reads it correctly, what is installed, who serves the target."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dspark.dump.engines.registry import ENGINES
from dspark.dump.engines.versions import vllm_version

if TYPE_CHECKING:
    from dspark.train.draft.config import DraftConfig

# What is known about servers, and from where. "Checked here" means: the served-parity test and
# bench/serve_parity.py ran on it.
VLLM = {
    "compared_token_for_token": ["0.32.0"],
    # 100 prompts each, on an H100 and on a CPU (docs/log/2026-11-22-served-h100.md)
    "served_losslessly": ["0.26.0", "0.32.0"],
    "sources": [
        "vllm #46995 (method dspark)",
        "vllm #47093 (speculators format)",
        "vllm #48524 (fc's width)",
        "the source of 0.25.1, 0.26.0, 0.27.0",
    ],
    "needs": "the V2 model runner; vLLM has the vanilla Markov head only",
}


def vllm_at_least(config: DraftConfig, form: str) -> tuple[str, str]:
    """Return the first vLLM that reads this draft correctly, and why not an earlier one."""
    if config.layer_types or config.is_causal is not None:
        return (
            "0.32.0",
            (
                "its windows were compared block by block in that version; earlier ones were "
                "not tested"
            ),
        )
    if form == "speculators":
        return "0.27.0", (
            "0.25.1 and 0.26.0 treat the anchor of every speculators checkpoint as a bonus "
            "token, whatever sample_from_anchor says, and draft from the wrong slots "
            "without an error. They read the flat format correctly"
        )
    if len(config.target_layer_ids) != config.num_layers:
        return "0.27.0", (
            f"0.25.1 and 0.26.0 size fc by the draft's own {config.num_layers} layers, not by "
            f"the {len(config.target_layer_ids)} of the target "
            "that it reads, and fail to load it"
        )
    return "0.25.1", "it introduced method dspark"


def who_serves(target: Any) -> str:
    """Return what the table of families (docs/targets.md) says about servers for this target."""
    from dspark.dump.target.chain import serving

    return serving(
        [getattr(target.whole, "model_type", None), target.config.get("model_type")]
    ).text


def served_states(architectures: Sequence[str]) -> str | None:
    """Say how to start the installed vLLM if it gives a draft one tensor-parallel rank's part of
    the target's states; None if it does not, or is not installed.
    """
    from dspark.dump.engines.vllm.launch import CAPTURE_MODULE, found_source

    found = found_source(architectures, cuda=True)
    if found is None or found.capture != "norms":
        return None
    name = found.architecture
    what = (
        f"vLLM {vllm_version()} cannot serve a draft of {name}: {found.why}"
        if not found.gives_states
        else f"with tensor parallelism vLLM {vllm_version()} feeds a draft of {name} one rank's "
        "part of the target's states: the output stays lossless, but fewer tokens are "
        "accepted"
    )
    return (
        f'{what}. Not tested on a GPU yet: vllm serve --model-class-overrides \'{{"{name}": '
        f'"{CAPTURE_MODULE}:{name}"}}\''
        f"{' --enforce-eager' if found.compiled else ''} uses whole states (docs/vllm.md)"
    )


def servers_for(described: Any, form: str, findings: list[Any]) -> dict[str, Any]:
    """Return what is known about vLLM versions for this draft; adds a finding if the installed one
    would read it wrongly.
    """
    from dspark.tools.check.files import Finding
    from dspark.tools.check.servers import VLLM, vllm_at_least

    installed = vllm_version()
    out: dict[str, Any] = {**VLLM, "installed": installed}
    if described is None or not described.servable_by_vllm:
        return out
    first, why = vllm_at_least(described, form)
    # A build from source calls itself 0.1.dev1 or dev, whatever its version.
    release = re.match(r"(\d+)\.(\d+)\.(\d+)(?!.*dev)", installed or "")
    if release and [int(n) for n in release.groups()] < [int(n) for n in first.split(".")]:
        text = f"vLLM {installed} is installed, but this draft needs {first}: {why}"
        findings.append(Finding("error", "server", text))
    return out | {"at_least": first, "because": why}


def can_serve() -> bool:
    import torch

    from dspark.tools.decode.vllm_serve import INTERPRETER_ENV

    installed = ENGINES["vllm"].available
    return installed and (torch.accelerator.is_available() or bool(os.environ.get(INTERPRETER_ENV)))
