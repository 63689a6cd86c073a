"""Find many plain answers of one chat at once, with one rendering instead of one per answer.

If a template puts nothing around an answer's text but its end, the prompt of a later answer
contains all earlier ones. Their positions are found from a second rendering with a placeholder word
for each: the text between the words must also be between the answers. Anything else (a thought, a
call, a template that renders its history differently) is left to ``Chat.turn``, which is the
reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from dspark.dump.corpus.template import SAID
from dspark.dump.corpus.turns import Chat, Dropped, Turn

LEAST = 8  # answers; two renderings pay off from here
CHARS_PER_TOKEN = 4  # a guess, from which the number of answers to render is doubled
PER_MESSAGE = 4  # tokens that a template writes for one, likewise


@dataclass(slots=True)
class Group:
    """Answers of one sample, by number: the text through the last one, and the characters ``[start,
    stop)`` of each in it.
    """

    numbers: list[int] = field(default_factory=list)
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)

    def takes(self, turn: Turn) -> bool:
        """Tell whether the next context begins with the text so far."""
        return turn.context.startswith(self.text[: self.spans[-1][1]])

    def add(self, turn: Turn) -> None:
        self.text = turn.text
        self.numbers.append(turn.number)
        self.spans.append((len(turn.context), len(turn.upto)))


def leading(chat: Chat, seq_length: int, count: Callable[[str], int]) -> Group | None:
    """Return the chat's first answers that are plain and follow a prompt, up to about
    ``seq_length`` tokens (``count`` counts the tokens of a text and may stop there); None if there
    are few, or if the template does not work as described above. A chat's last answer is never
    among them.
    """
    if not chat.at or chat.at[0] == 0:
        return None
    stop = next((n for n in range(len(chat.at) - 1) if not chat.simple(n)), len(chat.at) - 1)
    if stop < LEAST:
        return None
    tokens = list(
        accumulate(
            len(m["content"] or "") // CHARS_PER_TOKEN + PER_MESSAGE for m in chat.row.messages
        )
    )
    room = seq_length
    while True:
        taken = next((n for n in range(LEAST, stop) if tokens[chat.at[n]] > room), stop)
        try:
            group = _rendered(chat, taken)
        except Dropped:
            return None
        if group is None or taken == stop or count(group.text) >= seq_length:
            return group
        room *= 2


def _rendered(chat: Chat, count: int) -> Group | None:
    """Find answers ``0`` to ``count - 1`` in the prompt of answer ``count``."""
    numbers = list(range(count))
    text = chat.prompt(chat.at[count])
    words = [f"{SAID}{n:07d}" for n in numbers]
    with_words = chat.prompt_with(chat.at[count], dict(zip(chat.at, words, strict=False)))
    at = place = 0
    out = Group(numbers, text)
    for n, word in zip(numbers, words, strict=True):
        found = with_words.find(word, place)
        between = with_words[place:found]
        content = chat.row.messages[chat.at[n]]["content"]
        if (
            found < 0
            or not text.startswith(between, at)
            or not between.endswith(chat.template.opening)
        ):
            return None
        start = at + len(between)
        own = next(
            (
                t
                for t in (content, content.strip())
                if text.startswith(t + chat.template.end, start)
            ),
            None,
        )
        if own is None or not with_words.startswith(chat.template.end, found + len(word)):
            return None
        out.spans.append((start, start + len(own) + len(chat.template.end)))
        at, place = start + len(own), found + len(word)
    whole = text[at:] == with_words[place:]
    asked = all(
        chat.prompt(chat.at[n]) == text[: out.spans[n][0]] for n in {0, count // 2, count - 1}
    )
    out.text = text[: out.spans[-1][1]]
    return out if whole and asked else None
