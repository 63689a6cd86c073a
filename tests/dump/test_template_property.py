"""Random conversations through every real template: what is supervised of a turn is what the
template writes for that turn alone.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_cells import templates, tokenizer

from dspark.dump.corpus.masks import SampleMaker
from dspark.dump.corpus.rows import row_of

WORDS = st.text(alphabet="abc dé\n.,", min_size=1, max_size=12).filter(lambda t: bool(t.strip()))


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 4))):
        out.append({"role": "user", "content": draw(WORDS)})
        out.append({"role": "assistant", "content": draw(WORDS)})
    return out


@pytest.mark.parametrize("name", sorted(templates()))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(chat=chats())
def test_a_turn_is_what_the_template_writes_for_it(name: str, chat: list[dict[str, Any]]) -> None:
    tok = tokenizer(name)
    maker = SampleMaker(
        tok, tokenised=False, vocab_size=9999, seq_length=8000, min_supervised=1, day="2026-01-01"
    )
    made = maker.make(row_of(0, "f:1", {"messages": chat}))
    assert made.dropped is None, made
    texts: list[str] = []
    for sample in made.samples:
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        on = [i for i, m in enumerate(mask) if m]
        starts = [i for i in on if i == 0 or not mask[i - 1]]
        for start in starts:
            stop = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
            texts.append(tok.decode(ids[start:stop]))
    assert len(texts) == len(chat) // 2
    template = maker.template
    forms = [template.form(m) for m in chat]
    for n, text in enumerate(texts):
        through = template.render(forms[: 2 * n + 2])
        prompt = template.render(forms[: 2 * n + 1], prompt=True)
        assert str(chat[2 * n + 1]["content"]).strip() in text
        assert text in through
        if through.startswith(prompt):
            assert through[len(prompt) :].startswith(text)
            # What is left over is the template's, behind the end that it writes of every answer.
            assert through[len(prompt) + len(text) :] == template.tail[len(template.end) :]
