"""``--regenerate`` of tool chats under real templates: the call is asked for first, its recorded
result goes with it, every answer is kept, and the states are those of a second pass over the ids
that were recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from template_cells import TOOLS, tokenizer

from dspark.cache.codec import registry
from dspark.cache.settings import LOSSLESS
from dspark.dump.corpus.parts import PartRows
from dspark.dump.corpus.rows import Row, row_of
from dspark.dump.engines.answers import Sampling
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.regenerate.conversations import Prompts, Regenerator, turns
from dspark.dump.regenerate.heard import Listener
from dump_targets import build_model, shapes

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=200, thinking=None)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CHAT = [
    {"role": "user", "content": "weather in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},  # the corpus's own: not used
    {"role": "tool", "content": "3 degrees"},
    {"role": "assistant", "content": "it is warm"},
    {"role": "user", "content": "and the mat?"},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "say hello"},
]
# What the target is made to write, turn by turn: thought, call or text.
QWEN3 = [
    '<think>\nask it\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": '
    '"Oslo"}}\n</tool_call><|im_end|>',
    "<think>\nread it\n</think>\n\nit is cold<|im_end|>",
    "<think>\nthe cat\n</think>\n\nthe mat is warm<|im_end|>",
    "<think>\nbe nice\n</think>\n\nhello<|im_end|>",
]
FINAL = "<|start|>assistant<|channel|>final<|message|>"
HARMONY_CALL = (
    "<|channel|>analysis<|message|>ask it<|end|><|start|>assistant to=functions.weather"
    '<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
)
HARMONY = [
    HARMONY_CALL,
    f"<|channel|>analysis<|message|>read it<|end|>{FINAL}it is cold<|return|>",
    f"<|channel|>analysis<|message|>the cat<|end|>{FINAL}the mat is warm<|return|>",
    f"<|channel|>analysis<|message|>be nice<|end|>{FINAL}hello<|return|>",
]
THOUGHTS = ["ask it", "read it", "the cat", "be nice"]
TEXTS = [None, "it is cold", "the mat is warm", "hello"]


def scripted(tok: Any, script: Sequence[str], asked: list[str]) -> TransformersEngine:
    """A tiny random target that writes ``script``: its forward passes are real, its choice of
    tokens is not.
    """
    model = build_model("qwen3", len(tok) + 4, layers=2, max_position_embeddings=4096)
    generate, coming = model.generate, iter(script)

    def forced(input_ids: torch.Tensor, **more: Any) -> Any:
        assert len(input_ids) == 1
        asked.append(tok.decode(input_ids[0].tolist()))
        ids, width = tok(next(coming), add_special_tokens=False)["input_ids"], input_ids.shape[1]

        def force(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, ids[seen.shape[1] - width]] = 1e9
            return scores

        return generate(input_ids=input_ids, logits_processor=[force], **more)

    model.generate = forced
    return TransformersEngine(model, shapes(model), (0, 1), device="cpu", batch_tokens=64)


def regenerated(name: str, script: Sequence[str], messages: list[dict[str, Any]] = CHAT) -> Any:
    """What becomes of one row: the part, its states, the answers on disk, what was asked, and the
    target.
    """
    tok, asked, saved = tokenizer(name), [], []
    target = scripted(tok, script, asked)
    prompts = Prompts(tok, GREEDY, 4000, day="2026-01-01")
    reader = SimpleNamespace(
        dropped=Counter(),
        notes=Counter(),
        note=lambda text: None,
        drop=lambda part, row, reason: part.dropped.update([reason]),
    )
    answers = SimpleNamespace(save=lambda index, rows: saved.extend(rows))
    stops = [tok.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|return|>", "<|call|>")]
    stops = [s for s in stops if s is not None]
    codec = registry.make(LOSSLESS)
    maker = Regenerator(target, prompts, stops, codec, reader, answers, 1)  # type: ignore[arg-type]
    part = PartRows(0, 0, 0)
    states = maker._answer(part, [row_of(0, "f:1", {"messages": messages, "tools": TOOLS})])
    return SimpleNamespace(
        part=part, states=states, saved=saved, asked=asked, target=target, tok=tok, reader=reader
    )


def taught(found: Any) -> list[str]:
    out = []
    for sample in found.part.samples:
        edges = np.flatnonzero(np.diff(sample.loss_mask.astype(int), prepend=0, append=0)).reshape(
            -1, 2
        )
        out += [found.tok.decode(sample.input_ids[a:b].tolist()) for a, b in edges.tolist()]
    return out


@pytest.mark.parametrize(("name", "script"), [("qwen3", QWEN3), ("gptoss", HARMONY)])
def test_a_tool_chat_of_three_turns(name: str, script: list[str]) -> None:
    found = regenerated(name, script)
    assert not found.part.dropped
    # Every answer is taught exactly once, as it was written.
    assert taught(found) == script
    # The call was asked for before its result was shown, and the result is asked about behind the
    # target's own call.
    assert "3 degrees" not in found.asked[0]
    assert found.asked[1].index("Oslo", len(found.asked[0])) < found.asked[1].index("3 degrees")
    (line,) = found.saved
    said = line["messages"]
    assert [m["role"] for m in said] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        *["user", "assistant"] * 2,
    ]
    answers = [m for m in said if m["role"] == "assistant"]
    assert [m["reasoning_content"] for m in answers] == THOUGHTS
    assert [m["content"] for m in answers] == TEXTS
    (call,) = answers[0]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert (said[2]["tool_call_id"], said[2]["name"]) == (call["id"], "weather")
    # Samples of a row rise by turn; their states are those of a teacher-forced pass.
    assert [s.turn for s in found.part.samples] == sorted({s.turn for s in found.part.samples})
    assert line["samples"] == len(found.part.samples) == len(found.states)
    for sample, coded in zip(found.part.samples, found.states, strict=True):
        ((_, states),) = found.target.capture([sample])
        aux = torch.from_numpy(coded.arrays["aux_code"]).view(torch.bfloat16).float()
        torch.testing.assert_close(aux[:-1], states.aux[:-1], rtol=2**-7, atol=2e-3)
        last = torch.from_numpy(coded.arrays["last_code"]).view(torch.bfloat16).float()
        torch.testing.assert_close(last, states.last, rtol=2**-7, atol=2e-3)


def test_a_result_without_its_call_drops_the_row() -> None:
    found = regenerated("qwen3", ["it is cold<|im_end|>"])
    assert found.part.samples == found.states == found.saved == []
    assert dict(found.part.dropped) == {
        "the target did not make the call whose result the row records": 1
    }
    assert len(found.asked) == 1


def test_results_go_with_calls_in_order() -> None:
    two = [{"role": "tool", "content": "3 degrees"}, {"role": "tool", "content": "9 degrees"}]
    call = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
    script = [f"{call.format('Oslo')}\n{call.format('Rome')}<|im_end|>", "cold, warm<|im_end|>"]
    found = regenerated("qwen3", script, [CHAT[0], CHAT[1], *two, CHAT[3]])
    said = found.saved[0]["messages"]
    assert [c["function"]["arguments"]["city"] for c in said[1]["tool_calls"]] == ["Oslo", "Rome"]
    assert [m["tool_call_id"] for m in said[2:4]] == [c["id"] for c in said[1]["tool_calls"]]
    assert len({c["id"] for c in said[1]["tool_calls"]}) == 2


@pytest.mark.parametrize(
    "end", ["commentary to=functions.weather <|constrain|>json", "commentary to=functions.weather"]
)
def test_a_call_as_gpt_oss_writes_it_is_one(end: str) -> None:
    """The template writes the recipient in front of the channel, the target behind it."""
    call = (
        "<|channel|>analysis<|message|>ask "
        f'it<|end|><|start|>assistant<|channel|>{end}<|message|>{{"city": "Oslo"}}<|call|>'
    )
    found = regenerated("gptoss", [call, HARMONY[1]], CHAT[:3])
    assert taught(found) == [call, HARMONY[1]]
    first = found.saved[0]["messages"][1]
    assert first["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert (first["reasoning_content"], first["content"]) == ("ask it", None)


def test_an_answer_is_due_before_results_of_tools() -> None:
    row = Row(0, "x", row_of(0, "x", {"messages": CHAT}).value)
    assert [[m["content"] for m in turn] for turn in turns(row)] == [
        ["weather in Oslo?"],
        ["3 degrees"],
        ["and the mat?"],
        ["say hello"],
    ]


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3_5_think", "glm4moe", "deepseekv3", "mistral", "gemma4_v5"]
)
def test_what_a_template_writes_is_heard_as_it_was(name: str) -> None:
    """Call and text, read back from what the template itself writes of them."""
    prompts = Prompts(tokenizer(name), GREEDY, 4000, day="2026-01-01")
    template, listener = prompts.template, Listener(prompts.template)
    ask = template.form(CHAT[0])
    for message in (
        {"content": None, "tool_calls": [CALL | {"id": "call00010"}]},
        {"content": "it is cold"},
    ):
        form = template.form({"role": "assistant", **message})
        prompt = template.render([ask], TOOLS, prompt=True)
        text = template.render([ask, form], TOOLS)
        prompt = prompt if text.startswith(prompt) else prompt.removesuffix(template.rest)
        assert text.startswith(prompt)
        own = text[len(prompt) :].removesuffix(template.tail)
        heard = listener.hear(own.removesuffix(template.end), prompt, 10)
        calls = [c["function"] for c in heard.get("tool_calls", [])]
        assert calls == [c["function"] for c in message.get("tool_calls", [])], own
        if not calls:
            assert heard["content"] == "it is cold", own
