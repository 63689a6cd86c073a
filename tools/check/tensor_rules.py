"""What the tensors of a draft show: names, shapes, values, vocabulary, copies of the target's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dspark.tools.check.files import Files, Finding
from dspark.train.draft.saved import folder as export
from dspark.train.draft.saved.vocabulary import faults, ids_of

NORMS = ("norm.weight", "hidden_norm.weight")


def tensors(files: Files, target: Mapping[str, Any]) -> Iterator[Finding]:
    """Check names, shapes, dtypes and values of the tensors."""
    stored = files.tensors
    prefixed = [n for n in stored if n.startswith("model.")]
    if prefixed:
        yield Finding(
            "error",
            "tensors",
            (
                f"{len(prefixed)} tensor names begin with `model.` ({prefixed[0]}): vLLM adds "
                "that prefix itself"
            ),
        )
    described = files.described()
    if described is None:
        return
    wanted = export.trained_shapes(described)
    missing = sorted(set(wanted) - set(stored))
    for name in missing:
        kind = "norm" if "norm" in name else "tensors"
        yield Finding(
            "error",
            kind,
            f"model.safetensors lacks {name}; a server would run it with its initial values, or "
            "refuse the draft",
        )
    known = {*wanted, *export.FROZEN, "d2t", "t2d"}
    for name in sorted(set(stored) - known):
        hint = (
            " (vLLM treats every name that contains lm_head as the output matrix)"
            if "lm_head" in name
            else ""
        )
        yield Finding(
            "error",
            "tensors",
            f"model.safetensors has {name}, which the config does not describe{hint}",
        )
    for name, shape in wanted.items():
        if name in stored and tuple(stored[name].shape) != shape:
            yield Finding(
                "error",
                "tensors",
                f"{name} is {list(stored[name].shape)}, but the config describes {list(shape)}",
            )
    dtypes = {str(t.dtype).removeprefix("torch.") for n, t in stored.items() if n in wanted}
    if len(dtypes) > 1:
        yield Finding(
            "suspicion", "tensors", f"the trained tensors have several dtypes: {sorted(dtypes)}"
        )
    for name, value in stored.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            yield Finding("error", "tensors", f"{name} has values that are not finite")
    for name in NORMS:
        if name in stored and bool((stored[name] == 1).all()):
            yield Finding(
                "suspicion",
                "norm",
                (
                    f"{name} is all ones: it was never trained, or was lost and replaced by "
                    "its initial value"
                ),
            )


def vocabulary(files: Files, target: Mapping[str, Any]) -> Iterator[Finding]:
    """Check d2t, t2d and the output matrix of a reduced vocabulary."""
    size, whole = (
        files.flat.get("draft_vocab_size") or files.flat.get("vocab_size"),
        files.flat.get("vocab_size"),
    )
    if isinstance(size, int) and isinstance(whole, int):
        for wrong in faults(files.tensors, size, whole):
            yield Finding("error", "vocabulary", wrong)


def frozen(files: Files, target: Any) -> list[Finding]:
    """Compare included matrices with the target's: ``target`` has ``embed_tokens`` and ``lm_head``
    [V, H].
    """
    out = []
    size, offsets = files.flat.get("draft_vocab_size"), files.tensors.get("d2t")
    embed, head = files.tensors.get("embed_tokens.weight"), files.tensors.get("lm_head.weight")
    if embed is not None and not export.same_matrix(embed, target.embed_tokens):
        out.append(
            Finding(
                "error",
                "head",
                "embed_tokens.weight is not the target's; the draft was trained for another model",
            )
        )
    if head is None:
        return out
    rows = target.lm_head
    if isinstance(size, int) and offsets is not None and offsets.shape == (size,):
        ids = ids_of(offsets)
        if int(ids.min()) < 0 or int(ids.max()) >= rows.shape[0]:
            return out
        rows = rows[ids.to(rows.device)]
    if not export.same_matrix(head, rows):
        out.append(_wrong_head(head, rows, target.lm_head, offsets is not None))
    return out


def _wrong_head(head: Tensor, rows: Tensor, whole: Tensor, reduced: bool) -> Finding:
    """Tell whether the rows are the target's under other ids (d2t is wrong), or another model's (or
    an untied copy).
    """
    if reduced and head.shape == rows.shape:
        narrow, wide = head.to(torch.bfloat16), whole.detach().cpu().to(torch.bfloat16)
        bad = int((narrow != rows.detach().cpu().to(torch.bfloat16)).any(1).nonzero()[0, 0])
        at = (wide == narrow[bad]).all(1).nonzero().flatten()
        if at.numel():
            return Finding(
                "error",
                "vocabulary",
                f"row {bad} of lm_head is the target's row {int(at[0])}, but d2t maps it to "
                "another token: d2t is wrong",
            )
    return Finding(
        "error",
        "head",
        "lm_head.weight is not the target's (the embedding and the head are frozen): the head "
        "was trained, untied or taken from another model",
    )
