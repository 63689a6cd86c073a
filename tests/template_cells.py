"""Real inference templates (those that the package trl ships, and one after Mistral's documented
form) and shapes of conversation.
"""

# ruff: noqa: RUF001  # DeepSeek's tokens are written with these characters

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from dump_targets import build_tokenizer

# After the form that Mistral documents for its v3 tokenizer: the system prompt stands in the last
# user turn, calls are a JSON list.
MISTRAL = """{{ bos_token }}{% set ns = namespace(system='') %}{% set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}{% elif m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}
{%- if tools and loop.index0 == last.user %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ (ns.system if loop.index0 == last.user else '') + m.content }}[/INST]
{%- elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}
{%- elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}
{%- elif m.role == 'tool' %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]{% elif m.role != 'system' %}{{ raise_exception('Only user, system, assistant and tool roles are supported') }}{% endif %}{% endfor %}"""  # noqa: E501
SPECIAL = re.compile(
    r"<[|｜][^<>{}\s]+?[|｜]>|<\|[A-Za-z_]+>|<[A-Za-z_]+\|>|<(?:start|end)_of_\w+>|</s>|\[/?INST\]|\[gMASK\]|<sop>|</?think>|</?tool_call>|\[/?TOOL_\w+\]|\[/?AVAILABLE_TOOLS\]"
)
EOS = {"phi3": "<|endoftext|>", "phi3_5": "<|endoftext|>", "mistral": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}},
            },
        },
    }
]


@cache
def templates() -> dict[str, str]:
    """Name -> text. Read where the package lies, without importing it."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    found = {
        p.stem: p.read_text()
        for p in sorted(folder.glob("*.jinja"))
        if not p.stem.endswith("_training")
    }
    return found | {"mistral": MISTRAL}


@cache
def tokenizer(name: str) -> Any:
    """A byte-level BPE tokenizer with the special tokens that the template names."""
    text = templates()[name]
    out = build_tokenizer(text)
    special = sorted(set(SPECIAL.findall(text)) | {"<|im_start|>", "<|spare|>"})
    out.add_special_tokens({"additional_special_tokens": special})
    out.bos_token, out.eos_token = "<s>", EOS.get(name, "<|im_end|>")
    return out


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def called(*cities: str, text: Any = "", **more: Any) -> dict[str, Any]:
    calls = [
        {
            "id": f"call0000{i}",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": c}},
        }
        for i, c in enumerate(cities)
    ]
    return said(text, tool_calls=calls, **more)


def result(text: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": f"call0000{number}", "content": text}


ASK, MORE = user("weather in Oslo?"), user("and why so?")
SHAPES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [ASK, said("it is cold")]},
    "two turns": {"messages": [ASK, said("it is cold"), MORE, said("it is north")]},
    "system": {"messages": [{"role": "system", "content": "be brief"}, ASK, said("it is cold")]},
    "thought field": {"messages": [ASK, said("it is cold", reasoning_content="they ask of Oslo")]},
    "thought inline": {
        "messages": [ASK, said("<think>\nthey ask of Oslo\n</think>\n\nit is cold")]
    },
    "thoughts in two turns": {
        "messages": [
            ASK,
            said("it is cold", reasoning_content="they ask of Oslo"),
            MORE,
            said("it is north", reasoning_content="they ask why"),
        ]
    },
    "call": {"messages": [ASK, called("Oslo", text=None)], "tools": TOOLS},
    "call with text": {"messages": [ASK, called("Oslo", text="let me look")], "tools": TOOLS},
    "parallel calls": {"messages": [ASK, called("Oslo", "Rome")], "tools": TOOLS},
    "call then answer": {
        "messages": [ASK, called("Oslo"), result("3 degrees"), said("it is cold")],
        "tools": TOOLS,
    },
    "empty answer": {"messages": [ASK, said(""), MORE, said("it is north")]},
    "assistant first": {"messages": [said("good day"), ASK, said("it is cold")]},
    "cut answer": {"messages": [ASK, said("it is cold", finish_reason="length")]},
    "developer": {
        "messages": [{"role": "developer", "content": "be brief"}, ASK, said("it is cold")]
    },
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "weather in "},
                    {"type": "text", "text": "Oslo?"},
                ],
            },
            said([{"type": "text", "text": "it is "}, {"type": "text", "text": "cold"}]),
        ]
    },
}
