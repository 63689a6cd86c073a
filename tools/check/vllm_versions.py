"""What is known of vLLM's versions, and which of them reads a draft correctly."""

from __future__ import annotations

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
