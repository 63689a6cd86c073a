"""Parse an answer's text into a message: its thought, its text and its calls, told apart by how the
template renders them.

What the template puts around a thought and a call is found by rendering some (as in
``corpus/template.py``). An answer in another form (the template has no thoughts, or the target
deviates) is parsed by commonly used marks.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from dspark.dump.corpus.messages import Message
from dspark.dump.corpus.template import ASKED, CALLED, MOCK_TOOLS, SAID, THOUGHT, Template, common

KEYS, VALUES = ("kestrun", "mabrole"), ("vintosa", "zurempi")
HARMONY = re.compile(
    r"(?:<\|channel\|>analysis<\|message\|>(.*?)<\|end\|>)?.*<\|channel\|>final<\|message\|>(.*)",
    re.DOTALL,
)
ANALYSIS = re.compile(r"<\|channel\|>analysis<\|message\|>(.*?)<\|end\|>", re.DOTALL)
# Harmony's template writes a call's recipient before the channel, gpt-oss after it.
RECIPIENT = re.compile(
    r"<\|channel\|>commentary "
    r"to=(?:functions\.)?([\w.-]+)\s*(?:<\|constrain\|>)?(?:json)?\s*<\|message\|>(.*)",
    re.DOTALL,
)
THINK = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CallForm:
    """The text around the parts of a call. ``as_json``: its arguments are one JSON object.
    ``again``: between a call's ``after`` and the name of the next; None if a turn has at most one
    call.
    """

    before: str
    named: str  # between name and arguments
    after: str
    as_json: bool
    again: str | None = None
    closing: str = ""  # after the last call of a turn
    to_value: str = ""
    to_key: str = ""


class Listener:
    """Reads answers of one target."""

    def __init__(self, template: Template) -> None:
        self.template = template
        ask = template.form({"role": "user", "content": ASKED})
        said = self._written(ask, {"content": SAID, "reasoning_content": THOUGHT})
        self.thought: tuple[str, str] | None = None
        if THOUGHT in said and SAID in said[said.index(THOUGHT) :]:
            at = said.index(THOUGHT)
            self.thought = said[:at], said[at + len(THOUGHT) : said.index(SAID, at)]
        self.plain = self._written(ask, {"content": SAID}).partition(SAID)[0]
        self.call = self._call_form(ask)

    def _written(self, ask: Message, message: Message, tools: Any = None) -> str:
        form = self.template.form({"role": "assistant", **message})
        text = self.template.try_render([ask, form], tools)
        prompt = self.template.try_render([ask], tools, prompt=True)
        base = prompt.removesuffix(self.template.rest)
        return (
            text.removeprefix(base) if base and text.startswith(base) else text.partition(ASKED)[2]
        )

    def _call_form(self, ask: Message) -> CallForm | None:
        arguments = dict(zip(KEYS, VALUES, strict=True))
        call = {
            "type": "function",
            "id": "call00000",
            "function": {"name": CALLED, "arguments": arguments},
        }
        text = self._written(ask, {"content": None, "tool_calls": [call]}, MOCK_TOOLS)
        places = [text.find(w) for w in (CALLED, KEYS[0], VALUES[0], KEYS[1], VALUES[1])]
        if -1 in places or places != sorted(places):
            return None
        name, key, value, key2, value2 = places
        opening = self.template.opening
        before = text[:name].rpartition(opening)[2] if opening else text[:name]
        before = before.removeprefix(self.template.rest).removeprefix(self.plain)
        written = next(
            (
                w
                for w in (json.dumps(arguments), json.dumps(arguments, separators=(",", ":")))
                if w in text
            ),
            None,
        )
        own = text.removesuffix(self.template.tail)
        if written is not None:
            start = text.index(written)
            after, again, closing = self._end_of_call(
                ask, call, written, own[start + len(written) :]
            )
            return CallForm(before, text[name + len(CALLED) : start], after, True, again, closing)
        after, again, closing = self._end_of_call(
            ask, call, VALUES[1], own[value2 + len(VALUES[1]) :]
        )
        return CallForm(
            before, text[name + len(CALLED) : key], after, False, again, closing,
            text[key + len(KEYS[0]) : value], text[value + len(VALUES[0]) : key2],
        )  # fmt: skip

    def _end_of_call(
        self, ask: Message, call: Any, last: str, tail: str
    ) -> tuple[str, str | None, str]:
        """Find what closes a call, and what separates it from the next one's name. ``last``: what a
        call's text ends with; ``tail``: what follows it in a turn of one call.
        """
        two = self._written(ask, {"content": None, "tool_calls": [call, call]}, MOCK_TOOLS)
        start = two.find(last) + len(last)
        stop = two.find(CALLED, start)
        if last not in two or stop < 0:
            return tail, None, ""
        shared = self.template.whole_specials(tail, common(two[start:stop], tail))
        return tail[:shared], two[start + shared : stop], tail[shared:]

    def hear(self, text: str, opened: str, number: int) -> Message:
        """Parse ``text``, with special tokens as text but without its end, into a message.
        ``opened``: the end of the prompt before it. Calls are numbered from ``number``.
        """
        out: Message = {"role": "assistant"}
        rest = text
        if self.thought is not None:
            lead, close = self.thought
            begun = next((n for n in range(len(lead), 0, -1) if opened.endswith(lead[:n])), 0)
            thought, found, behind = rest.partition(close)
            if found and (begun or thought.startswith(lead)):
                out["reasoning_content"] = thought.removeprefix(lead[begun:])
                rest = behind
        if "reasoning_content" not in out and (marked := THINK.match(rest)) is not None:
            out["reasoning_content"], rest = marked[1].strip("\n"), marked[2].lstrip("\n")
        if (harmony := HARMONY.fullmatch(rest)) is not None:
            rest = harmony[2]
            if harmony[1]:
                out["reasoning_content"] = harmony[1]
        calls, rest = self._calls(rest, number)
        if calls and (analysis := ANALYSIS.search(rest)) is not None:
            out["reasoning_content"], rest = analysis[1], ""
        if calls:
            out["tool_calls"] = calls
        else:
            rest = rest.removeprefix(self.plain) if self.plain else rest
        # marks of an unknown form are not text
        rest = "".join(self.template.split_specials(rest))
        if not out.get("reasoning_content", "x").strip():
            del out["reasoning_content"]
        out["content"] = None if calls and not rest.strip() else rest
        return out

    def _calls(self, text: str, number: int) -> tuple[list[dict[str, Any]], str]:
        """Return the calls in ``text``, and the text without them."""
        if (harmony := RECIPIENT.search(text)) is not None and (
            call := _object(harmony[2])
        ) is not None:
            function = {"name": harmony[1], "arguments": call}
            return [_numbered(function, number)], text[: harmony.start()]
        form = self.call
        if form is None or not form.before.strip():
            return [], text
        calls: list[dict[str, Any]] = []
        start = text.find(form.before.strip())
        at = start + len(form.before.strip())
        while start >= 0 and (read := self._one(form, text, at)) is not None:
            name, arguments, at = read
            function = {"name": name, "arguments": arguments}
            calls.append(_numbered(function, number + len(calls)))
            if form.again is None or not text[at:].lstrip().startswith(form.again.strip() or "\0"):
                break
            at = text.index(form.again.strip(), at) + len(form.again.strip())
        behind = text[at:].removeprefix(form.closing.rstrip())
        return (calls, (text[:start] + behind).rstrip("\n")) if calls else ([], text)

    def _one(self, form: CallForm, text: str, at: int) -> tuple[str, Any, int] | None:
        """Parse name, arguments and end of the call whose name begins near ``at``."""
        head = text[at:].lstrip()
        name, found, _ = head.partition(form.named.strip() or form.named)
        if not found or not name.strip() or len(name) > 200:
            return None
        start = at + (len(text[at:]) - len(head)) + len(name) + len(found)
        if form.as_json:
            body = text[start:].lstrip()
            try:
                arguments, used = json.JSONDecoder().raw_decode(body)
            except ValueError:
                return None
            stop = start + len(text[start:]) - len(body) + used
        else:
            after = form.after.rstrip() or form.after
            body, closed, _ = text[start:].partition(after)
            if not closed:
                return None
            pairs = [p.partition(form.to_value) for p in body.split(form.to_key)]
            if not all(found for _, found, _ in pairs):
                return None
            return name.strip(), {k: v for k, _, v in pairs}, start + len(body) + len(after)
        after = form.after.strip()
        behind = text[stop:].lstrip()
        stop += len(text[stop:]) - len(behind)
        return name.strip(), arguments, stop + (len(after) if behind.startswith(after) else 0)


def _numbered(function: dict[str, Any], number: int) -> dict[str, Any]:
    return {"id": f"call{number:05}", "type": "function", "function": function}


def _object(text: str) -> dict[str, Any] | None:
    """Parse ``text`` as a JSON object; None if it is not one."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
