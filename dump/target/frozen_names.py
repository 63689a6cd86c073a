"""Find embedding, final norm and output head in a checkpoint: by exact names first, then by
structure. Names and shapes are enough, so a missing head is found from the headers, before any
weight is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dspark.cache.errors import TargetError
from dspark.dump.target.checkpoint import Checkpoint, Stored
from dspark.dump.target.layers import Shapes

# Modules of known checkpoints: embedding, final norm, and where the head may be. In order: what a
# wrapper calls its text model comes before the bare names, which may belong to another of its
# parts.
KNOWN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "model.language_model.embed_tokens",
        "model.language_model.norm",
        ("lm_head", "model.language_model.lm_head"),
    ),
    (
        "language_model.model.embed_tokens",
        "language_model.model.norm",
        ("language_model.lm_head", "lm_head"),
    ),
    ("thinker.model.embed_tokens", "thinker.model.norm", ("thinker.lm_head",)),
    ("model.text_model.embed_tokens", "model.text_model.norm", ("lm_head",)),
    ("model.llm.embed", "model.llm.norm", ("model.llm.unembed",)),
    ("model.embed_tokens", "model.norm", ("lm_head",)),
    ("backbone.embeddings", "backbone.norm_f", ("lm_head",)),
    ("model.embeddings", "model.norm_f", ("lm_head",)),
    ("transformer.wte", "transformer.ln_f", ("lm_head",)),
    (
        "transformer.embedding.word_embeddings",
        "transformer.encoder.final_layernorm",
        ("transformer.output_layer",),
    ),
    ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", ("embed_out",)),
    ("tok_embeddings", "norm", ("output",)),
    ("embed", "norm", ("head",)),
    ("embed_tokens", "norm", ("lm_head",)),
)
# Parts beside the language model that carry embeddings and norms of their own.
BESIDE = re.compile(
    r"(^|\.)(mtp|nextn|eagle|draft|medusa|vision\w*|visual|vit|audio\w*|image\w*|talker|code2wav|sound\w*)(\.|$)"
)
# How the matrix of a module may be stored; the scales of packed forms are stored beside it.
FORMS = ("weight", "weight_packed", "qweight")


@dataclass(frozen=True, slots=True)
class FrozenNames:
    """Module names. ``head`` None = the embedding is the head (tied)."""

    embed: str
    norm: str
    head: str | None

    def __str__(self) -> str:
        return f"{self.embed}, {self.norm}, {self.head or 'head tied to the embedding'}"


def locate(checkpoint: Checkpoint, shapes: Shapes, tied: bool) -> FrozenNames:
    """Find the modules whose weights training needs. ``tied``: the config says that the head is the
    embedding. Raises TargetError that names what is missing and what was found instead.
    """
    modules = _modules(checkpoint)
    for embed, norm, heads in KNOWN:
        if not (_is_matrix(modules.get(embed), shapes) and _is_norm(modules.get(norm), shapes)):
            continue
        head = next((h for h in heads if _is_matrix(modules.get(h), shapes)), None)
        if tied or head is not None:
            return FrozenNames(embed, norm, None if tied else head)
        break  # it has these names, but its head has another
    candidates = {n: s for n, s in modules.items() if not BESIDE.search(n)}
    matrices = [n for n, s in candidates.items() if _is_matrix(s, shapes)]
    embed = _only(
        "input embedding",
        [n for n in matrices if re.search(r"emb|wte", n)],
        matrices,
        checkpoint,
        shapes,
    )
    others = [n for n in matrices if n != embed]
    head = None if tied else _only("output head", others, others, checkpoint, shapes)
    norms = [n for n, s in candidates.items() if _is_norm(s, shapes)]
    # Some decoders have one more norm, after the embedding.
    final = [n for n in norms if not re.search(r"emb", n)]
    return FrozenNames(embed, _only("final norm", final, norms, checkpoint, shapes), head)


def _modules(checkpoint: Checkpoint) -> dict[str, tuple[str, Stored]]:
    """Map each module to the form and tensor of its matrix."""
    out: dict[str, tuple[str, Stored]] = {}
    for name, stored in checkpoint.tensors.items():
        module, _, form = name.rpartition(".")
        if form in FORMS:
            out[module] = (form, stored)
    return out


def _is_matrix(found: tuple[str, Stored] | None, shapes: Shapes) -> bool:
    """Tell whether it can be [V, H]: rows beyond V are padding; a packed form has another shape."""
    if found is None:
        return False
    form, stored = found
    if form != "weight" or stored.shape is None:
        return True
    if len(stored.shape) != 2 or stored.shape[0] < shapes.vocab_size:
        return False
    return stored.shape[1] == shapes.hidden_size or (
        stored.dtype == "U8" and stored.shape[1] * 2 == shapes.hidden_size
    )


def _is_norm(found: tuple[str, Stored] | None, shapes: Shapes) -> bool:
    return found is not None and (found[1].shape is None or found[1].shape == (shapes.hidden_size,))


def _only(
    what: str, found: list[str], near: list[str], checkpoint: Checkpoint, shapes: Shapes
) -> str:
    if len(found) == 1:
        return found[0]
    shape = (
        f"[{shapes.hidden_size}]"
        if "norm" in what
        else f"[{shapes.vocab_size}, {shapes.hidden_size}]"
    )
    seen = ", ".join(sorted(found or near)[:6]) or "none"
    raise TargetError(
        f"{checkpoint.model}: looked for one {what} of shape {shape} outside the decoder "
        f"layers, found {len(found)} (tensors of such a shape: {seen}). Use a complete "
        "checkpoint of the target; if this one is complete, its tensor names are not "
        "supported yet."
    )
