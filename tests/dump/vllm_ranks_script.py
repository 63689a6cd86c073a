"""Two gloo ranks run vLLM's own DeepSeek V3.2 / GLM-5.2 class for CUDA, its all-reduce fused into
the next norm.

    python vllm_ranks_script.py OUT.json

Attention and MLP are small row-parallel layers, each rank holding half; everything else is vLLM's
code. Written is, by way of capture and of fusion, how many states came back and how far each is
from a model on one rank.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import vllm.models.common.ops.fused_allreduce_rms_norm as fused
import vllm.models.deepseek_v32.nvidia.model as cuda_model
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    init_distributed_environment,
    initialize_model_parallel,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.layernorm import RMSNorm

from dspark.dump.engines.vllm.capture import extended

RANKS, LAYERS, HIDDEN, INNER, TOKENS, VOCAB = 2, 4, 16, 8, 7, 32
IDS = (1, 3, LAYERS)


class Half(torch.nn.Module):
    """``tanh(x A) B`` with this rank's columns of A and rows of B: summed over the ranks, the whole
    layer.
    """

    def __init__(self, seed: int, shard: slice) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randn(HIDDEN, INNER, generator=generator)[:, shard]
        self.b = torch.randn(INNER, HIDDEN, generator=generator)[shard]

    def forward(
        self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        return torch.tanh(hidden_states @ self.a) @ self.b


def build(kind: type, shard: slice) -> Any:
    """A model of class ``kind`` without what a checkpoint and a GPU would be needed for."""
    decoder = bare(cuda_model.DeepseekV32Model)
    decoder.config = SimpleNamespace(rms_norm_eps=1e-6)
    decoder.use_sequence_parallel, decoder.replicated_embed = False, False
    decoder.aux_hidden_state_layers = ()
    decoder.start_layer, decoder.end_layer = 0, LAYERS
    torch.manual_seed(0)
    decoder.embed_tokens = torch.nn.Embedding(VOCAB, HIDDEN)
    decoder.norm = RMSNorm(HIDDEN, eps=1e-6)
    decoder.layers = torch.nn.ModuleList()
    for i in range(LAYERS):
        layer = bare(cuda_model.DeepseekV32DecoderLayer)
        layer.use_sequence_parallel = False
        layer.self_attn, layer.mlp = Half(2 * i, shard), Half(2 * i + 1, shard)
        layer.input_layernorm = RMSNorm(HIDDEN, eps=1e-6)
        layer.post_attention_layernorm = RMSNorm(HIDDEN, eps=1e-6)
        decoder.layers.append(layer)
    model = bare(kind)
    model.model = decoder
    return model


def bare(kind: type) -> Any:
    out = kind.__new__(kind)
    torch.nn.Module.__init__(out)
    return out


def whole(ids: torch.Tensor) -> list[torch.Tensor]:
    """The same model on one rank, in plain torch: states entering IDS."""
    model = build(cuda_model.DeepseekV32ForCausalLM, slice(None))
    x, out = model.model.embed_tokens(ids), {}
    for i, layer in enumerate(model.model.layers):
        out[i] = x
        x = x + layer.self_attn(layer.input_layernorm(x))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    out[LAYERS] = x
    return [out[i] for i in IDS]


def like_flashinfer(
    allreduce_in: Any, residual: Any, rms_gamma: Any, norm_out: Any, **_: Any
) -> None:
    """The fused kernel's contract: the residual goes into the buffer of what was reduced, the norm
    is not called.
    """
    summed = tensor_model_parallel_all_reduce(allreduce_in) + residual
    allreduce_in.copy_(summed)
    norm_out.copy_(summed * torch.rsqrt(summed.pow(2).mean(-1, keepdim=True) + 1e-6) * rms_gamma)


def run(rank: int, meet: str, out: str) -> None:
    # Names that differ keep vLLM from its own shared memory: gloo adds.
    os.environ |= {"LOCAL_RANK": str(rank), "VLLM_DIST_IDENT": f"rank{rank}"}
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(RANKS, rank, f"file://{meet}", rank, "gloo")
        initialize_model_parallel(RANKS)
        half = INNER // RANKS
        shard = slice(rank * half, (rank + 1) * half)
        ids, positions = torch.arange(TOKENS) * 3 % VOCAB, torch.arange(TOKENS)
        want = whole(ids)
        found: dict[str, Any] = {}
        for way in ("norm called", "kernel"):
            if way == "kernel":
                fused.flashinfer_trtllm_fused_allreduce_norm = like_flashinfer
                fused._can_use_flashinfer = lambda *_: (True, 1 << 20)
            own = cuda_model.DeepseekV32ForCausalLM
            plain, ours = build(own, shard), build(extended(own), shard)
            plain.model.aux_hidden_state_layers = IDS
            ours.set_aux_hidden_state_layers(IDS)
            for name, model in (("plain", plain), ("ours", ours)):
                _, states = model.forward(ids, positions)
                gaps = [float((a - b).abs().max()) for a, b in zip(states, want, strict=False)]
                found[f"{name}, {way}"] = {"states": len(states), "gaps": gaps}
        every: list[Any] = [None] * RANKS
        dist.all_gather_object(every, found)
        if rank == 0:
            with open(out, "w") as file:
                json.dump({"size": max(float(x.abs().max()) for x in want), "ranks": every}, file)
        dist.barrier()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        meet = os.path.join(folder, "meet")
        children = []
        for rank in range(RANKS):
            child = os.fork()  # vLLM is imported once
            if not child:
                try:
                    run(rank, meet, sys.argv[1])
                    os._exit(0)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
