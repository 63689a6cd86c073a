"""``dspark-tools show``: one sample as text, with the supervised part marked, from the tokenizer that the store keeps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from dspark.cache.errors import CacheError
from dspark.cache.reader import Cache


def runs(cache: Cache, index: int) -> dict[str, Any]:
    """Sample ``index`` as runs of equal loss mask: ``{"supervised": bool, "text": str, "tokens": n}``, in order."""
    tokens = cache.tokens(index)
    tokenizer = load_tokenizer(cache)
    mask = tokens.loss_mask
    cuts = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), mask.shape[0]]
    out = []
    for a, b in itertools.pairwise(cuts):
        ids = tokens.input_ids[a:b].tolist()
        text = (
            tokenizer.decode(ids, skip_special_tokens=False)
            if tokenizer is not None
            else " ".join(map(str, ids))
        )
        out.append({"supervised": bool(mask[a]), "tokens": b - a, "text": text})
    return {
        "index": index, "row": tokens.row, "key": tokens.key.hex(), "tokens": int(mask.shape[0]), "supervised_tokens": int(mask.sum()),
        "runs": out,
    }  # fmt: skip


def load_tokenizer(cache: Cache) -> Any:
    """The target's tokenizer as kept in the store; None if its rows came tokenised and none was kept."""
    if not (cache.target_files / "tokenizer.json").is_file():
        if cache.manifest.tokenizer.sha256 is not None:
            raise CacheError(
                f"{cache.target_files / 'tokenizer.json'} is missing, though the manifest has its hash"
            )
        return None
    from transformers import PreTrainedTokenizerFast

    path = cache.target_files / "tokenizer.json"
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as wrong:  # the tokenizers library raises bare Exception
        raise CacheError(
            f"{path} is no tokenizer ({wrong}): put the target's own back, or copy the store again"
        ) from wrong
