"""Convert a message of any dialect to our form: text or null, one ``reasoning_content``, calls with
their arguments as objects.

Dialects: OpenAI's chats and responses, ShareGPT, Anthropic's blocks (a tool's result in a user's
message becomes a message of its own), Gemini's parts. Null padding from data frames counts as
absent. Anything ambiguous is a DataError that names the row and the key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dspark.cache.errors import DataError

Message = dict[str, Any]
SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "gpt4": "assistant",
    "gpt_4": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "claude": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_output": "tool",
    "function_response": "tool",
    "function_result": "tool",
    "ipython": "ipython",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")  # speakers whose text is a call
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_text")
TEXTS = (None, "text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text")
CUT_BY_LIMIT = {
    "length",
    "max_tokens",
    "max_length",
    "model_length",
    "max_output_tokens",
    "max_new_tokens",
}
CUT_SHORT = {
    "content_filter",
    "safety",
    "recitation",
    "error",
    "abort",
    "aborted",
    "cancelled",
    "incomplete",
}
CUT = CUT_BY_LIMIT | CUT_SHORT
REASONS = ("finish_reason", "stop_reason", "finishReason", "done_reason")
CUT_MARK, UNTAUGHT, LOST_NULL = "\0cut", "\0untaught", "\0null"  # keys that never leave parse_row
CALL_TAG = re.compile(
    r"\s*<(tool_call|functioncall|function_call)>\s*(.*?)\s*(?:</\1>)?\s*", re.DOTALL
)


def read_messages(values: list[Any], where: str) -> list[Message]:
    """Return the messages in ``values``, in order; an Anthropic message with tool results becomes
    one message per result.
    """
    out: list[Message] = []
    for number, value in enumerate(values):
        out += _read(value, f"{where}: messages[{number}]", where)
    return out


def speaker_of(name: str) -> str | None:
    """Return the role of a speaker; None if the name is unknown."""
    return SPEAKERS.get(name) or SPEAKERS.get(
        name.strip().lower().replace("-", "_").replace(" ", "_")
    )


def cut_by(reason: Any) -> bool:
    """Tell whether a finish reason says that something other than the target ended the answer."""
    return isinstance(reason, str) and reason.rpartition(".")[2].lower() in CUT


def from_text(value: Any, name: str, where: str) -> Any:
    """Return ``value``, parsed if it is JSON text; None for blank text."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: `{name}` is text that is not JSON ({error}). Write it with "
            "json.dumps, or give the object itself."
        ) from error


def text_of(value: Any) -> str | None:
    """Return text, joined if it comes in parts that are all text; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("parts") if isinstance(value.get("parts"), list) else [value]
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = [
        p
        if isinstance(p, str)
        else p.get("text")
        if isinstance(p, Mapping) and p.get("type") in TEXTS
        else None
        for p in value
    ]
    return "".join(texts) if all(isinstance(t, str) for t in texts) else None  # type: ignore[arg-type]


def _read(value: Any, here: str, where: str) -> list[Message]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{here} is {str(value)[:80]!r}, expected an object with `role` and `content`."
        )
    # Data sets give every message every key: absent ones are null, which templates would treat as
    # present.
    given = {k: v for k, v in value.items() if v is not None}
    if "role" not in given and "from" not in given:
        value = given = _item(given)
    speaker = given.pop("role", None) or given.pop("from", None)
    if not isinstance(speaker, str):
        raise DataError(
            f"{here} is {str(value)[:80]!r}, expected an object with `role` and `content`."
        )
    given.pop("from", None)
    role = speaker_of(speaker) or (speaker if "role" in value else None)
    if role is None:
        raise DataError(
            f"{where}: unknown speaker {speaker!r}, expected one of {sorted(SPEAKERS)}."
        )
    results = _tool_results(given) if role == "user" else []
    if results and not given["content"]:
        return results
    out: Message = {"role": role}
    content = _content(given, value, role, here)
    out.update(given)
    if (
        speaker.lower().replace("-", "_") in CALLS
        and isinstance(content, str)
        and "tool_calls" not in out
    ):
        out["tool_calls"], content = _calls_in_text(content, here), None
    out["content"] = content
    if role == "assistant":
        if out.get("type") == "message":  # of OpenAI's responses
            del out["type"]
        _take_thought(out, here)
        _take_calls(out, here)
        _take_marks(out)
    return [*results, out]


def _item(given: dict[str, Any]) -> dict[str, Any]:
    """Read an item of OpenAI's responses that is not a message with a role."""
    if given.get("type") == "function_call_output":
        return {
            "role": "tool",
            "tool_call_id": given.get("call_id"),
            "content": given.get("output", ""),
        }
    return given


def _tool_results(given: dict[str, Any]) -> list[Message]:
    """Take the tool results out of a user's blocks (Anthropic's form), in order."""
    content = given.get("content")
    if not isinstance(content, list):
        return []
    out = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "tool_result":
            said = part.get("content")
            text = "" if said is None else text_of(said)
            out.append({"role": "tool", "content": said if text is None else text})
            if part.get("tool_use_id") is not None:
                out[-1]["tool_call_id"] = part["tool_use_id"]
    if out:
        given["content"] = [
            p for p in content if not (isinstance(p, Mapping) and p.get("type") == "tool_result")
        ]
    return out


def _content(given: dict[str, Any], value: Mapping[str, Any], role: str, here: str) -> Any:
    """Take the content out of ``given``; None if an assistant's message has only calls."""
    named = next((n for n in ("content", "value", "parts") if n in value), None)
    content = next((given.pop(n) for n in ("content", "value", "parts") if n in given), None)
    more = ("tool_calls", "function_call", "refusal", *THOUGHTS)
    if named is None and not any(given.get(k) for k in more):
        raise DataError(
            f"{here} has no `content` (its keys: {sorted(map(str, value))}); expected an object "
            "with `role` and `content`."
        )
    if (
        role in ("tool", "ipython")
        and isinstance(content, Mapping | list)
        and text_of(content) is None
    ):
        content = json.dumps(content, ensure_ascii=False, default=str)
    if isinstance(content, Mapping):
        content = content["parts"] if isinstance(content.get("parts"), list) else [content]
    if isinstance(content, list):
        content = _joined(content, given)
    if not isinstance(content, str | list | None):
        raise DataError(f"{here}.content is a {type(content).__name__}, expected text.")
    if not content and role == "assistant" and isinstance(given.get("refusal"), str):
        content = given.pop("refusal")
    calls = given.get("tool_calls") or given.get("function_call")
    return "" if content is None and not (role == "assistant" and calls) else content


def _joined(content: list[Any], given: dict[str, Any]) -> str | list[Any] | None:
    """Join a list of text parts. A thought goes to the message's thought, a call to its calls. A
    list that contains anything else, or text after a call, stays a list: that row is dropped.
    """
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for part in content:
        text, to = part, texts
        if isinstance(part, Mapping):
            kind = part.get("type")
            if kind in ("thinking", "reasoning") or part.get("thought") is True:
                text, to = _thought_part(part), thoughts
            elif kind == "tool_use" and isinstance(part.get("name"), str):
                call = {"name": part["name"], "arguments": part.get("input") or {}}
                calls.append({"id": part.get("id"), "type": "function", "function": call})
                continue
            else:
                text = part.get("text") if kind in TEXTS else None
                text = part.get("refusal") if kind == "refusal" and text is None else text
        if not isinstance(text, str) or (calls and text.strip()):
            return content
        to.append(text)
    if thoughts:
        given.setdefault("reasoning_content", "".join(thoughts))
    if calls:
        given["tool_calls"] = [*(given.get("tool_calls") or []), *calls]
    return "".join(texts) or (None if calls else "")


def _thought_part(part: Mapping[str, Any]) -> Any:
    text = next((part[n] for n in ("thinking", "reasoning", "text") if part.get(n)), None)
    return text_of(text) if isinstance(text, list) else text


def _take_thought(message: Message, here: str) -> None:
    """Store the thought as `reasoning_content`, whatever it is called; the template's own name is
    handled where it is rendered.
    """
    found = {name: message.pop(name) for name in THOUGHTS if isinstance(message.get(name), str)}
    said = {name: text for name, text in found.items() if text.strip()}
    if len({text.strip() for text in said.values()}) > 1:
        raise DataError(
            f"{here} has two different thoughts ({', '.join(said)}). Keep the one that "
            "the target wrote."
        )
    details = message.get("reasoning_details")
    if isinstance(details, list) and (said or all(isinstance(d, Mapping) for d in details)):
        text = "".join(
            str(d.get("text") or d.get("summary") or "") for d in details if isinstance(d, Mapping)
        )
        if said or text.strip():
            del message["reasoning_details"]
            said = said or {"reasoning_details": text}
    if said:
        message["reasoning_content"] = next(iter(said.values()))


def _take_marks(message: Message) -> None:
    """Take what a message says about its own end, and about whether to train on it."""
    if any(cut_by(message.pop(r, None)) for r in REASONS) or message.get("truncated") is True:
        message[CUT_MARK] = True
    if message.pop("weight", 1) == 0 or any(
        message.pop(n, True) is False for n in ("train", "trainable", "loss")
    ):
        message[UNTAUGHT] = True


def _take_calls(message: Message, here: str) -> None:
    """Take `tool_calls` as a list of functions whose arguments are objects if they are JSON
    objects; absent if there are none.
    """
    calls = message.pop("tool_calls", None)
    old = message.pop("function_call", None)
    calls = from_text(calls, "tool_calls", here) if isinstance(calls, str) else calls
    old = from_text(old, "function_call", here) if isinstance(old, str) else old
    if not calls and old:
        calls = [{"type": "function", "function": old}]
    if isinstance(calls, Mapping):
        calls = [calls]
    if not calls:
        return
    if not isinstance(calls, list):
        raise DataError(f"{here}.tool_calls is a {type(calls).__name__}, expected a list.")
    read = [
        _call(c, f"{here}.tool_calls[{i}]", message) for i, c in enumerate(calls) if c is not None
    ]
    if read:
        message["tool_calls"] = read


def _call(value: Any, here: str, message: Message) -> dict[str, Any]:
    value = from_text(value, "tool_calls", here) if isinstance(value, str) else value
    call = dict(value) if isinstance(value, Mapping) else {}
    function = call.get("function")
    function = (
        from_text(function, "function", here)
        if isinstance(function, str) and function[:1] == "{"
        else function
    )
    if not isinstance(function, Mapping) and isinstance(call.get("name"), str):
        name = call.pop("name")
        function = {"name": name, "arguments": call.pop("arguments", call.pop("parameters", {}))}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{here} is {str(value)[:80]!r}, expected an object with `function` and its `name`."
        )
    function = {k: v for k, v in function.items() if v is not None}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # as the target wrote them, nulls included
        try:
            read = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            read = None
        arguments = read if isinstance(read, Mapping) else arguments
    elif isinstance(arguments, Mapping):
        whole, arguments = arguments, without_nulls(arguments)
        if arguments != whole:
            message[LOST_NULL] = True
    kept = {k: v for k, v in call.items() if v is not None and k != "function"}
    return {"type": "function"} | kept | {"function": function | {"arguments": arguments}}


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the keys that a data frame padded with null."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _calls_in_text(text: str, here: str) -> list[Any]:
    """Parse the calls in a ShareGPT speaker's text: JSON of one or several, with or without an
    enclosing tag.
    """
    tagged = CALL_TAG.fullmatch(text)
    try:
        found = json.loads(tagged[2] if tagged else text)
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    named = all(
        isinstance(c, Mapping) and isinstance(c.get("name") or c.get("function"), str | Mapping)
        for c in calls
    )
    if not calls or not named:
        raise DataError(
            f'{here} is a call whose text is not a JSON call ({text[:80]!r}), expected {{"name": '
            f'..., "arguments": {{...}}}}.'
        )
    return calls
