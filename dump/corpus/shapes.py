"""The shapes that rows come in, made into one: a chat of OpenAI-like messages, or tokens with their loss mask.

Taken: ``messages`` or ``conversations`` (OpenAI's or ShareGPT's form, also as JSON text), ``prompt`` with ``completion``, logs of a
gateway (``request``, ``response``), bodies of OpenAI's batches, and ``input_ids`` with ``loss_mask``. What a data frame pads with
null is taken for absent. A row that is none of these is a DataError that names row and key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark.cache.errors import DataError

Message = dict[str, Any]
SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "ipython",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")  # speakers whose text is a call
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
ANSWERS = ("completion", "response", "answer", "output")
CUT = {"length", "max_tokens", "max_length", "model_length", "max_output_tokens"}
REASONS = ("finish_reason", "stop_reason", "finishReason", "done_reason")
CONVERSATION_IDS = ("primary_id", "conversation_id", "conv_id", "dialog_id", "session_id", "id", "uuid")


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation. ``finished`` False: its last answer was cut short, so its end must not be taught.

    ``cut``: messages, by index, of which the same is said. ``kwargs``: what the row itself hands to the template.
    ``untaken``: answers of a log beside the first.
    """

    messages: list[Message]
    tools: list[Any] | None
    finished: bool
    cut: frozenset[int] = frozenset()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    untaken: int = 0


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens with their loss mask, as given. ``conversation``: the id of the one they are of, None where no key says it."""

    input_ids: list[int]
    loss_mask: list[bool]
    conversation: str | None = None


def parse_row(value: Any, where: str) -> ChatRow | TokenRow:
    """Check one row's form and bring it into ours. Raises DataError that names ``where`` and the key."""
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: found a JSON {type(value).__name__}, expected an object with `messages` or `input_ids`."
        )
    if value.get("input_ids") is not None:
        return _token_row(value, where)
    row, untaken = _unwrapped(value, where)
    messages = _conversation(row, where)
    out = [_message(m, i, where) for i, m in enumerate(messages)]
    if not out:
        raise DataError(f"{where}: `messages` is empty.")
    out = _with_system(row, out, where)
    cut = frozenset(i for i, m in enumerate(out) if m.pop("\0cut", False))
    tools = _from_text(row.get("tools"), "tools", where) or None
    if tools is not None and not isinstance(tools, list):
        raise DataError(
            f"{where}: `tools` is a {type(tools).__name__}, expected a list, or JSON text of one."
        )
    kwargs = _from_text(row.get("chat_template_kwargs"), "chat_template_kwargs", where) or {}
    if not isinstance(kwargs, Mapping):
        raise DataError(f"{where}: `chat_template_kwargs` is a {type(kwargs).__name__}, expected an object.")
    finished = row.get("finished") is not False and not was_cut(row)
    return ChatRow(out, _pruned_tools(tools), finished, cut, dict(kwargs), untaken)


def was_cut(value: Any, depth: int = 4) -> bool:
    """Whether a finish reason of a row says that the limit on tokens ended the answer, wherever in the row's objects it stands (not in its messages, which
    have their own)."""
    if isinstance(value, str) and value[:1] == "{" and any(r in value for r in REASONS):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    if isinstance(value, list) and depth:
        return any(was_cut(v, depth - 1) for v in value[:1])
    if not isinstance(value, Mapping):
        return False
    if any(str(value.get(r)).lower() in CUT for r in REASONS):
        return True
    skip = ("messages", "conversations", "content", "tools", "input", "prompt", "text", "value")
    return depth > 0 and any(was_cut(v, depth - 1) for k, v in value.items() if k not in skip)


def _from_text(value: Any, name: str, where: str) -> Any:
    """``value``, read where it is JSON text."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: `{name}` is text that is not JSON ({error}).") from error


def _unwrapped(value: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], int]:
    """A log of a gateway or a batch as one row (request, and response as its last message), and how many further answers it has."""
    request = value.get("request") if value.get("request") is not None else value.get("body")
    request = _from_text(request, "request", where) if isinstance(request, str) else request
    if not isinstance(request, Mapping):
        return value, 0
    if isinstance(request.get("body"), Mapping):
        request = request["body"]
    row = {**{k: v for k, v in value.items() if k not in ("request", "body", "response")}, **request}
    response = value.get("response")
    if response is None:
        return row, 0
    answer, further = _response(response, where)
    row["messages"] = [*_list(_text_or_list(row, "messages", where), "messages", where), answer]
    return row | {"response": None}, further


def _text_or_list(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise DataError(
            f"{where}: a request without `{name}` (its keys: {sorted(map(str, row))[:12]}); expected a chat."
        )
    return _from_text(row[name], name, where)


def _response(response: Any, where: str) -> tuple[Any, int]:
    """The answer's message in a response, with its finish reason, and how many others there are."""
    if isinstance(response, str):
        read = None
        if response.lstrip()[:1] == "{":
            try:
                read = json.loads(response)
            except ValueError:
                read = None
        if not isinstance(read, Mapping):
            return {"role": "assistant", "content": response}, 0
        response = read
    if isinstance(response, Mapping) and isinstance(response.get("body"), Mapping):
        response = response["body"]
    if not isinstance(response, Mapping):
        raise DataError(f"{where}: `response` is a {type(response).__name__}, expected an object or text.")
    choices = response.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        message = choices[0].get("message")
        if message is None and isinstance(choices[0].get("text"), str):
            message = {"content": choices[0]["text"]}
        outer = choices[0]
    else:
        message = response.get("message") or (response if "content" in response else None)
        outer, choices = response, [response]
    if not isinstance(message, Mapping):
        raise DataError(
            f"{where}: `response` has keys {sorted(map(str, response))[:12]}, expected `choices` with a `message`."
        )
    reasons = {r: outer[r] for r in REASONS if outer.get(r) is not None}
    return {"role": "assistant", **message, **reasons}, len(choices) - 1


def _conversation(row: Mapping[str, Any], where: str) -> list[Any]:
    for name in ("messages", "conversations", "conversation"):
        if row.get(name) is not None:
            value = _from_text(row[name], name, where)
            return _list([] if value is None else value, name, where)
    prompt = row.get("prompt") if row.get("prompt") is not None else row.get("instruction")
    if prompt is not None:
        if isinstance(prompt, str) and isinstance(row.get("input"), str) and row["input"]:
            prompt = f"{prompt}\n\n{row['input']}"
        given = [row[n] for n in ANSWERS if row.get(n) is not None]
        return _said(prompt, "user") + (_said(given[0], "assistant") if given else [])
    raise DataError(
        f"{where}: found keys {sorted(map(str, row))}, expected `messages` (a chat) or `input_ids` and `loss_mask` (tokens)."
    )


def _said(value: Any, role: str) -> list[Any]:
    if isinstance(value, list):
        return value
    return [value if isinstance(value, Mapping) else {"role": role, "content": value}]


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: `{name}` is a {type(value).__name__}, expected a list.")
    return value


def _with_system(row: Mapping[str, Any], messages: list[Message], where: str) -> list[Message]:
    """A system prompt beside the chat goes in front of it, unless the chat has one."""
    for name in ("system", "system_prompt"):
        text = row.get(name)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise DataError(f"{where}: `{name}` is a {type(text).__name__}, expected text.")
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
    return messages


def _message(value: Any, number: int, where: str) -> Message:
    """One message in OpenAI's form: content text, list or None; one `reasoning_content`; calls with arguments as an object."""
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: messages[{number}] is {str(value)[:80]!r}, expected an object with `role` and `content`."
        )
    # Data sets give every message every key: absent ones as null, which templates would take for present.
    given = {k: v for k, v in value.items() if v is not None}
    speaker = given.pop("role", None) or given.pop("from", None)
    if not isinstance(speaker, str):
        raise DataError(
            f"{where}: messages[{number}] is {str(value)[:80]!r}, expected an object with `role` and `content`."
        )
    given.pop("from", None)
    role = SPEAKERS.get(speaker, speaker if "role" in value else None)
    if role is None:
        raise DataError(f"{where}: unknown speaker {speaker!r}, expected one of {sorted(SPEAKERS)}.")
    out: Message = {"role": role}
    content = _content(given, value, role, f"{where}: messages[{number}]")
    out.update(given)
    if speaker in CALLS and isinstance(content, str) and "tool_calls" not in out:
        calls = _calls_in_text(content)
        if calls:
            content, out["tool_calls"] = None, calls
    out["content"] = content
    if role == "assistant":
        _take_thought(out)
        _take_calls(out, f"{where}: messages[{number}]")
        if any(str(out.pop(r, "")).lower() in CUT for r in REASONS):
            out["\0cut"] = True
    return out


def _content(given: dict[str, Any], value: Mapping[str, Any], role: str, where: str) -> Any:
    """Takes the content out of ``given``; None where an assistant's message is its calls alone."""
    named = "content" in value
    content = given.pop("content", None)
    if content is None:
        content = given.pop("value", None)
        named = named or "value" in value
    if not isinstance(content, str | list | None):
        raise DataError(f"{where}.content is a {type(content).__name__}, expected text.")
    more = ("tool_calls", "function_call", *THOUGHTS)
    if not named and not any(given.get(k) for k in more):
        raise DataError(
            f"{where} has no `content` (its keys: {sorted(map(str, value))}); expected an object with `role` and `content`."
        )
    if isinstance(content, list):
        content = _joined(content, given)
    calls = given.get("tool_calls") or given.get("function_call")
    return "" if content is None and not (role == "assistant" and calls) else content


def _joined(content: list[Any], given: dict[str, Any]) -> str | list[Any]:
    """A list of text parts as the text that they make. A part that is a thought goes to the message's thought. A list with
    something else in it stays: that row is dropped."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        text, to = part, texts
        if isinstance(part, Mapping):
            kind = part.get("type") or "text"
            if kind in ("thinking", "reasoning"):
                text, to = _thought_part(part), thoughts
            else:
                text = part.get("text") if kind in ("text", "input_text", "output_text", "refusal") else None
        if not isinstance(text, str):
            return content
        to.append(text)
    if thoughts:
        given.setdefault("reasoning_content", "".join(thoughts))
    return "".join(texts)


def _thought_part(part: Mapping[str, Any]) -> Any:
    text = part.get("thinking") or part.get("reasoning") or part.get("text")
    if isinstance(text, list):
        return "".join(str(p.get("text", "")) for p in text if isinstance(p, Mapping))
    return text


def _take_thought(message: Message) -> None:
    """Whatever name the thought goes by, it is `reasoning_content`; the template's own name is its matter."""
    found = [message.pop(name) for name in THOUGHTS if isinstance(message.get(name), str)]
    said = [text for text in found if text.strip()]
    if said:
        message["reasoning_content"] = said[0]


def _take_calls(message: Message, where: str) -> None:
    """`tool_calls` as a list of functions whose arguments are objects where they are JSON objects; absent where there are none."""
    calls = message.pop("tool_calls", None)
    old = message.pop("function_call", None)
    calls = _from_text(calls, "tool_calls", where) if isinstance(calls, str) else calls
    if not calls and old:
        calls = [{"type": "function", "function": old}]
    if not calls:
        return
    if not isinstance(calls, list):
        raise DataError(f"{where}.tool_calls is a {type(calls).__name__}, expected a list.")
    message["tool_calls"] = [_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]


def _call(value: Any, where: str) -> dict[str, Any]:
    call = dict(value) if isinstance(value, Mapping) else {}
    function = call.get("function") if isinstance(call.get("function"), Mapping) else None
    if function is None and isinstance(call.get("name"), str):
        function = {"name": call.pop("name"), "arguments": call.pop("arguments", {})}
    if function is None or not isinstance(function.get("name"), str):
        raise DataError(f"{where} is {str(value)[:80]!r}, expected an object with `function` and its `name`.")
    function = {k: v for k, v in function.items() if v is not None}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            read = None
        arguments = read if isinstance(read, Mapping) else arguments
    if isinstance(arguments, Mapping):
        arguments = {k: v for k, v in arguments.items() if v is not None}
    kept = {k: v for k, v in call.items() if v is not None and k != "function"}
    return {"type": "function"} | kept | {"function": function | {"arguments": arguments}}


def _calls_in_text(text: str) -> list[Any] | None:
    """The calls that a ShareGPT speaker's text is, or None where it is something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    calls = found if isinstance(found, list) else [found]
    named = all(isinstance(c, Mapping) and isinstance(c.get("name"), str) for c in calls)
    return calls if calls and named else None


def _pruned_tools(tools: list[Any] | None) -> list[Any] | None:
    """Tools without the nulls that a data frame pads them with."""

    def pruned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: pruned(v) for k, v in value.items() if v is not None}
        return [pruned(v) for v in value] if isinstance(value, list) else value

    out = None if tools is None else [pruned(t) for t in tools if t is not None]
    if out is not None:
        out = [
            {"type": "function", "function": t} if "name" in t and "function" not in t else t
            for t in out
            if isinstance(t, Mapping)
        ]
    return out or None


def _token_row(value: Mapping[str, Any], where: str) -> TokenRow:
    ids = _list(value["input_ids"], "input_ids", where)
    if "loss_mask" not in value:
        raise DataError(f"{where}: `input_ids` without `loss_mask`; give one 0 or 1 per token.")
    mask = _list(value["loss_mask"], "loss_mask", where)
    if len(ids) != len(mask):
        raise DataError(
            f"{where}: {len(ids)} input_ids but {len(mask)} values of loss_mask; expected equally many."
        )
    if not ids:
        raise DataError(f"{where}: `input_ids` is empty.")
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise DataError(f"{where}: `input_ids` holds something that is not an integer.")
    if not all(isinstance(m, bool | int) and m in (0, 1) for m in mask):
        raise DataError(f"{where}: `loss_mask` holds something other than 0, 1, true, false.")
    named = [str(value[n]) for n in CONVERSATION_IDS if value.get(n) is not None]
    return TokenRow(ids, [bool(m) for m in mask], named[0] if named else None)
