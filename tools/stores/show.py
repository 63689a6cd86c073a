"""``dspark-tools show``: print one sample as text, with the supervised part marked, using the
tokenizer in the store.
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dspark.cache.errors import CacheError
from dspark.cache.shared.command import command, emit, json_flag, printable

if TYPE_CHECKING:
    from dspark.cache.reader import Cache
from dspark.cache.records import TokenSample


def runs(cache: Cache, index: int) -> dict[str, Any]:
    """Return sample ``index`` as runs of equal loss mask: ``{"supervised": bool, "text": str,
    "tokens": n}``, in order.
    """
    tokens = cache.tokens(index)
    mask = tokens.loss_mask
    return {
        "index": index,
        "row": tokens.row,
        "key": tokens.key.hex(),
        "tokens": int(mask.shape[0]),
        "supervised_tokens": int(mask.sum()),
        "runs": mask_runs(load_tokenizer(cache), tokens),
    }


def mask_runs(tokenizer: Any, tokens: TokenSample) -> list[dict[str, Any]]:
    """Split a sample into runs of equal loss mask; ids as text if there is no tokenizer."""
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
    return out


def load_tokenizer(cache: Cache) -> Any:
    """Load the target's tokenizer from the store; None if its rows were already tokenised and none
    was kept.
    """
    if not (cache.target_files / "tokenizer.json").is_file():
        if cache.manifest.tokenizer.sha256 is not None:
            raise CacheError(
                f"{cache.target_files / 'tokenizer.json'} is missing, though the manifest has "
                "its hash"
            )
        return None
    from transformers import PreTrainedTokenizerFast

    path = cache.target_files / "tokenizer.json"
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as wrong:  # the tokenizers library raises bare Exception
        raise CacheError(
            f"{path} is not a tokenizer ({wrong}): restore the target's tokenizer, or copy the "
            "store again"
        ) from wrong


@command("show")
@click.argument("cache")
@click.argument("index", type=click.IntRange(min=0))
@json_flag
def show_command(cache: str, index: int, as_json: bool) -> None:
    """Print sample INDEX of CACHE as text, with the supervised part between [[ and ]]."""
    import dspark.cache
    from dspark.cache.errors import UsageError

    store = dspark.cache.open(cache, allow_incomplete=True)
    if not 0 <= index < len(store):
        raise UsageError(f"{cache} has samples 0 to {len(store) - 1}; found index {index}")
    data = runs(store, index)
    if as_json:
        emit(data)
        return
    print(
        f"sample {index}: source row {data['row']}, {data['tokens']} tokens, "
        f"{data['supervised_tokens']} supervised",
        file=sys.stderr,
    )
    text = "".join(f"[[{r['text']}]]" if r["supervised"] else r["text"] for r in data["runs"])
    print(printable(text))
