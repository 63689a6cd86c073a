"""Print an answer with the tokens that the draft predicted correctly in colour, and how many target
steps that saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dspark.cache.shared.command import printable

if TYPE_CHECKING:
    from rich.text import Text

    from dspark.tools.decode.outcome import Outcome

ACCEPTED = "bold green"


def accepted(prompt_tokens: int, outcome: Outcome) -> list[bool]:
    """Tell, for each token of the answer, whether it was drafted and accepted. All False if the
    blocks were not recorded.

    The draft of the anchor at position ``a`` begins with the token at ``a + 1``; its tokens up to
    the first that differs from the answer were accepted.
    """
    out = [False] * len(outcome.tokens)
    for anchor, drafted in outcome.drafted:
        start = anchor + 1 - prompt_tokens
        for i, token in enumerate(drafted, start):
            if i >= len(out) or outcome.tokens[i] != token:
                break
            out[i] = True
    return out


def coloured(tokenizer: Any, tokens: Sequence[int], marks: Sequence[bool]) -> Text:
    """Return the text of ``tokens``, with the marked ones in colour. A character made of several
    tokens has the last one's colour.
    """
    from rich.text import Text

    out, shown = Text(), ""
    for i, mark in enumerate(marks):
        text = tokenizer.decode(tokens[: i + 1], skip_special_tokens=False)
        if text.endswith("\ufffd") and i + 1 < len(marks):  # the first bytes of a character
            continue
        out.append(printable(text[len(shown) :]), ACCEPTED if mark else "")
        shown = text
    return out


def steps(outcome: Outcome) -> str:
    """``64 tokens in 40 target steps, 1.60 tokens per step``; the prefill counts as a step."""
    count = outcome.drafts + 1
    return (
        f"{len(outcome.tokens)} tokens in {count} target steps: "
        f"{len(outcome.tokens) / count:.2f} tokens per step (1.00 without the draft)"
    )
