"""Real templates x shapes of conversation: what is supervised, against a table made by hand from
reading the templates.
"""

# ruff: noqa: RUF001  # DeepSeek's tokens are written with these characters

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
from template_cells import SHAPES, templates, tokenizer

from dspark.dump.corpus.masks import SampleMaker
from dspark.dump.corpus.rows import row_of

COLD, NORTH, DAY = "it is cold", "it is north", "good day"
ASKED, WHY = "they ask of Oslo", "they ask why"
INLINE = f"<think>\n{ASKED}\n</think>\n\n{COLD}"
DROPPED = None


@dataclass(frozen=True)
class How:
    """How a template writes an answer. ``plain``: in front of a text without a thought.
    ``thought``: a thought in its own field, None: it is left out.
    ``inline``: the row whose thought stands in its text. Calls: None where it writes none.
    """

    end: str
    plain: str = ""
    thought: str | None = None
    inline: str = INLINE
    call: str | None = None
    with_text: str | None = None
    parallel: str | None = None
    # whose answers are supervised where the assistant begins
    first: tuple[str, ...] | None = (DAY, COLD)
    system: bool = True
    results: bool = True  # takes messages of the role tool
    first_plain: str | None = None

    def text(self, text: str, thought: str | None = None) -> str:
        lead = self.plain if thought is None else str(self.thought).format(t=thought)
        return lead + text + self.end

    def cells(self) -> dict[str, list[str] | None]:
        one, two = self.text(COLD), self.text(NORTH)
        field = [self.text(COLD, ASKED)] if self.thought is not None else DROPPED
        first_lead = self.plain if self.first_plain is None else self.first_plain
        calls = {
            "call": self.call,
            "call with text": self.with_text,
            "parallel calls": self.parallel,
        }
        answered = ([self.call] if self.call else []) + [one]
        return {
            "one turn": [one],
            "two turns": [one, two],
            "system": [one] if self.system else DROPPED,
            "thought field": field,
            "thought inline": [self.inline + self.end],
            "thoughts in two turns": [*field, self.text(NORTH, WHY)] if field else DROPPED,
            **{name: [text] if text else DROPPED for name, text in calls.items()},
            "call then answer": answered if self.results else DROPPED,
            "empty answer": [self.text(""), two],
            "assistant first": (
                DROPPED
                if self.first is None
                else [(first_lead if t == DAY else self.plain) + t + self.end for t in self.first]
            ),
            "cut answer": [self.plain + COLD],
            "developer": [one] if self.system else DROPPED,
            "parts": [one],
        }


def qwen_json(city: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


def qwen_xml(city: str) -> str:
    parameter = f"<parameter=city>\n{city}\n</parameter>"
    return f"<tool_call>\n<function=weather>\n{parameter}\n</function>\n</tool_call>"


def gemma_call(city: str) -> str:
    return f'<|tool_call>call:weather{{city:<|"|>{city}<|"|>}}<tool_call|>'


def glm_call(city: str) -> str:
    return (
        f"<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>\n</tool_call>"
    )


def deepseek_call(city: str) -> str:
    return (
        f'<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{{"city": '
        f'"{city}"}}\n```<｜tool▁call▁end｜>'
    )


def muse_call(city: str) -> str:
    return (
        '<atem:function_calls>\n<atem:invoke name="weather">\n<atem:parameter '
        f'name="city">{city}</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
    )


def mistral_call(city: str, number: int = 0) -> str:
    return f'{{"name": "weather", "arguments": {{"city": "{city}"}}, "id": "call0000{number}"}}'


def calls(
    write: Any, end: str, *, lead: str = "", text: str = "let me look\n", join: str = "\n"
) -> dict[str, str]:
    return {
        "call": lead + write("Oslo") + end,
        "with_text": lead + text + write("Oslo") + end,
        "parallel": lead + write("Oslo") + join + write("Rome") + end,
    }


CHATML = How("<|im_end|>")
QWEN = How("<|im_end|>", **calls(qwen_json, "<|im_end|>"))
EMPTY = "<think>\n\n</think>\n\n"
QWEN3 = How(
    "<|im_end|>",
    EMPTY,
    "<think>\n{t}\n</think>\n\n",
    first_plain="",
    **calls(qwen_json, "<|im_end|>", lead=EMPTY),
)
# The prompt opens the thought; a row that begins with the assistant has no user to answer, which
# the template refuses.
QWEN35 = How(
    "<|im_end|>",
    "\n</think>\n\n",
    "{t}\n</think>\n\n",
    f"{ASKED}\n</think>\n\n{COLD}",
    first=(COLD,),
    **calls(qwen_xml, "<|im_end|>", lead="\n</think>\n\n", text="let me look\n\n"),
)
NOTHINK = replace(QWEN35, plain="", **calls(qwen_xml, "<|im_end|>", text="let me look\n\n"))
NEMOTRON = How(
    "<|im_end|>", "", "{t}\n</think>\n", f"{ASKED}\n</think>\n\n{COLD}",
    call="\n" + qwen_xml("Oslo") + "\n<|im_end|>",
    with_text="let me look\n" + qwen_xml("Oslo") + "\n<|im_end|>",
    parallel="\n" + qwen_xml("Oslo") + "\n" + qwen_xml("Rome") + "\n<|im_end|>",
)  # fmt: skip
NEMOTRON35 = replace(NEMOTRON, thought="{t}</think>")
RESPONSE = "<|tool_response>"
GEMMA4 = How(
    "<turn|>",
    call=gemma_call("Oslo") + RESPONSE,
    with_text=gemma_call("Oslo") + "let me look" + RESPONSE,
    parallel=gemma_call("Oslo") + gemma_call("Rome") + RESPONSE,
)
GEMMA4_V2 = replace(
    GEMMA4,
    **{
        k: str(getattr(GEMMA4, k)).removesuffix(RESPONSE) + "<turn|>"
        for k in ("call", "with_text", "parallel")
    },
)
GEMMA4_V5 = replace(GEMMA4, thought="<|channel>thought\n{t}\n<channel|>")
DEEPSEEK_END = "<｜end▁of▁sentence｜>"
DEEPSEEK = How(
    DEEPSEEK_END,
    "",
    "{t}\n</think>\n\n",
    f"{ASKED}\n</think>\n\n{COLD}",
    **{
        k: v.replace("<｜tool▁call▁begin｜>", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", 1)
        for k, v in calls(
            deepseek_call, f"<｜tool▁calls▁end｜>{DEEPSEEK_END}", text="let me look"
        ).items()
    },
)
GLM = How(
    "", "\n<think></think>\n", "\n<think>{t}</think>\n", f"\n<think>{ASKED}</think>\n{COLD}",
    **calls(glm_call, "", lead="\n<think></think>\n"),
)  # fmt: skip
HARMONY_CALL = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
FINAL = "<|channel|>final<|message|>"
HARMONY = How(
    "<|return|>",
    FINAL,
    f"<|channel|>analysis<|message|>{{t}}<|end|><|start|>assistant{FINAL}",
    FINAL + INLINE,
    call=HARMONY_CALL,
    with_text=f"<|channel|>analysis<|message|>let me look<|end|><|start|>assistant{HARMONY_CALL}",
)
TO_USER = " to=user<|message|>"
MUSE = How(
    "<|eot|>",
    TO_USER,
    f" to=self<|message|>{{t}}<|eom|><|start|>assistant{TO_USER}",
    TO_USER + INLINE,
    call=" to=weather<|message|>" + muse_call("Oslo") + "<|eot|>",
    parallel=f" to=weather<|message|>{muse_call('Oslo')}<|eom|><|start|>assistant "
    f"to=weather<|message|>{muse_call('Rome')}<|eot|>",
)
LFM_CALL = "<|tool_call_start|>[weather(city='Oslo')]<|tool_call_end|><|im_end|>"
LFM_CALLS = How(
    "<|im_end|>",
    call=LFM_CALL,
    with_text="let me look" + LFM_CALL,
    parallel=LFM_CALL.replace("')]", "'), weather(city='Rome')]"),
)
LFM25 = replace(LFM_CALLS, thought="<think>{t}</think>")
LLAMA31 = How("<|eot_id|>", call='{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>')
UTTERANCE = How("<end_of_utterance>", " ", inline=" " + INLINE)
ALTERNATING = {"first": None, "results": False}
HOW: dict[str, How] = {
    "cohere": How("<|END_OF_TURN_TOKEN|>", **ALTERNATING),
    "cohere2": How("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", **ALTERNATING),
    # One call has no end token in this template; a text beside it, no call.
    "deepseek_r1_distill": replace(
        DEEPSEEK, call=f"<｜tool▁calls▁begin｜>{deepseek_call('Oslo')}", with_text=None
    ),
    "deepseekv3": DEEPSEEK,
    "diffusion_gemma": GEMMA4_V5,
    "gemma": How("<end_of_turn>", system=False, **ALTERNATING),
    "gemma3": How("<end_of_turn>", **ALTERNATING),
    "gemma4": GEMMA4,
    "gemma4_v2": GEMMA4_V2,
    "gemma4_v3": GEMMA4,
    "gemma4_v4": GEMMA4,
    "gemma4_v5": GEMMA4_V5,
    "glm4moe": GLM,
    "gptoss": HARMONY,
    "idefics3": UTTERANCE,
    "lfm2": CHATML,
    "lfm2_2_5": LFM25,
    "lfm2_2_5_v2": LFM25,
    "lfm2_2_5_vl": LFM25,
    "lfm2_v2": LFM_CALLS,
    "llama3": How("<|eot_id|>"),
    "llama3_1": LLAMA31,
    "llama3_2": LLAMA31,
    "llava_next": How("</s>", " ", inline=" " + INLINE, results=False, first_plain=""),
    "mistral": How(
        "</s>", " ", inline=" " + INLINE, first_plain="",
        call=f"[TOOL_CALLS] [{mistral_call('Oslo')}]</s>",
        parallel=f"[TOOL_CALLS] [{mistral_call('Oslo')}, {mistral_call('Rome', 1)}]</s>",
    ),
    "muse_glimmer": MUSE,
    "nemotron_3_5_lightning": NEMOTRON35,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON35,
    "phi3": How("<|end|>"),
    "phi3_5": How("<|end|>"),
    "qwen2_5": QWEN,
    "qwen2_5_vl": CHATML,
    "qwen3": QWEN3,
    "qwen3_5_nothink": NOTHINK,
    "qwen3_5_think": QWEN35,
    "qwen3_6": QWEN35,
    "qwen3_8": QWEN35,
    "qwen3_instruct_2507": QWEN,
    "qwen3_vl": QWEN,
    "smolvlm": UTTERANCE,
}  # fmt: skip


def supervised(name: str, row: dict[str, Any], **options: Any) -> list[str] | None:
    """The supervised texts of a row in order, over its samples; None: no sample."""
    settings: dict[str, Any] = {
        "vocab_size": 9999,
        "seq_length": 8000,
        "min_supervised": 1,
        "day": "2026-01-01",
    }
    maker = SampleMaker(tokenizer(name), tokenised=False, **(settings | options))
    made = maker.make(row_of(0, "f:1", json.loads(json.dumps(row))))
    assert (made.dropped is None) == bool(made.samples)
    out: list[str] = []
    for sample in made.samples:
        run: list[int] = []
        for token, on in [
            *zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True),
            (0, False),
        ]:
            if on:
                run.append(token)
            elif run:
                out.append(tokenizer(name).decode(run))
                run = []
    return out or None


def test_every_template_is_in_the_table() -> None:
    assert set(HOW) == set(templates())
    assert len(SHAPES) >= 14


@pytest.mark.parametrize("name", sorted(HOW))
def test_what_is_supervised(name: str) -> None:
    expected = HOW[name].cells()
    assert set(expected) == set(SHAPES)
    found = {shape: supervised(name, row) for shape, row in SHAPES.items()}
    if name == "qwen3_5_nothink":  # an end token alone, in a sample of its own, is no anchor
        expected["empty answer"] = [HOW[name].text(NORTH)]
    if name == "glm4moe":  # the line break in front of a text comes with the text
        expected["empty answer"] = ["\n<think></think>", HOW[name].text(NORTH)]
    assert found == expected
