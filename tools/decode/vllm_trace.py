"""Record a running vLLM's drafts: position of the anchor and tokens of every block, for each of its
drafting paths.

vLLM 0.32 drafts in three places: ``DSparkSpeculator`` and ``TargetDependentARSpeculator`` (EAGLE-3)
of model runner V2, and ``SpecDecodeBaseProposer`` of V1, which it still uses for P-EAGLE. vLLM also
drafts after the last verified block of a request; that one is never judged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

Blocks = list[tuple[int, tuple[int, ...]]]


def watch() -> Blocks:
    """Return a list that fills with (position of the anchor, drafted tokens) of every block drafted
    from now on.
    """
    blocks: Blocks = []
    for place, name, anchors, laid_out_by_call in _PLACES:
        try:
            owner = getattr(import_module(f"vllm.v1.{place}"), name)
        except (
            ModuleNotFoundError
        ):  # another version of vLLM; what it drafts elsewhere is missed, not invented
            continue
        _wrap(owner, anchors, laid_out_by_call, blocks)
    return blocks


def _wrap(
    owner: Any, anchors: Callable[..., list[int]], laid_out_by_call: bool, blocks: Blocks
) -> None:
    """Note what ``owner.propose`` returns, at the positions that ``anchors`` reads before or after
    the call.
    """
    original = owner.propose

    @wraps(original)
    def propose(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):
            return original(self, *args, **kwargs)
        at = None if laid_out_by_call else anchors(self, *args, **kwargs)
        drafted = original(self, *args, **kwargs)
        at = anchors(self, *args, **kwargs) if at is None else at
        blocks.extend((position, tuple(drafted[i].tolist())) for i, position in enumerate(at))
        return drafted

    owner.propose = propose


def _dspark_anchors(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> list[int]:
    """Read the anchors: a block's first query is its anchor; the call lays them out."""
    count = len(input_batch.req_ids)
    return [int(self.input_buffers.positions[i * self.num_query_per_req]) for i in range(count)]


def _chain_anchors(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> list[int]:
    """Read the anchors: each follows the accepted tokens of a request that the target has
    processed.
    """
    rejected = kwargs["num_rejected"] if "num_rejected" in kwargs else args[5]
    return [
        int(input_batch.seq_lens[i]) - int(rejected[i]) for i in range(len(input_batch.req_ids))
    ]


def _v1_anchors(self: Any, **kwargs: Any) -> list[int]:
    """Read the anchors: V1 passes every row of the target's forward pass; the last accepted one
    precedes the anchor.
    """
    at = kwargs.get("token_indices_to_sample")
    if at is None:
        at = kwargs["common_attn_metadata"].query_start_loc[1:] - 1
        rejected = kwargs.get("num_rejected_tokens_gpu")
        at = at if rejected is None else at - rejected
    return [int(p) + 1 for p in kwargs["target_positions"][at]]


# Module, class, how to read the anchors' positions, whether only after the call.
_PLACES: tuple[tuple[str, str, Callable[..., list[int]], bool], ...] = (
    ("worker.gpu.spec_decode.dspark.speculator", "DSparkSpeculator", _dspark_anchors, True),
    (
        "worker.gpu.spec_decode.target_dependent_ar.speculator",
        "TargetDependentARSpeculator",
        _chain_anchors,
        False,
    ),
    ("spec_decode.llm_base_proposer", "SpecDecodeBaseProposer", _v1_anchors, False),
)
