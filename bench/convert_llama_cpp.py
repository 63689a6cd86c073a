"""Drafts through llama.cpp's own converter and loader: does it take them, and do the values in the
GGUF file equal ours?

    python bench/convert_llama_cpp.py --llama-cpp CHECKOUT --model TARGET [--draft DIR ...]
        [--library DIR] [--name convert_llama_cpp]

CHECKOUT is a folder with ``convert_hf_to_gguf.py``, ``conversion/`` and ``gguf-py/`` (the sdist of
llama-cpp-python has one under vendor/llama.cpp). Without ``--draft``, a random draft of every type
and vocabulary is made for TARGET, and every export of it converted. Every tensor of the GGUF is
compared with the draft's, float for float. ``--library``: a folder with libllama and libggml (npm's
@node-llama-cpp/linux-x64 has them built for a CPU), whose loader then opens every file. Writes
bench/results/NAME.json; what is refused is recorded with the last line of what refused it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import RESULTS, write
from dspark.dump.target.config import load_target
from dspark.dump.target.weights import read_frozen
from dspark.tools.publish.export import export
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.saved.folder import load_config, read_tensors, save_draft
from dspark.train.draft.types import drafter

# Name of a GGUF tensor -> ours, and of a block's.
NAMES = {
    "fc": "fc", "output_norm": "norm", "enc.output_norm": "hidden_norm", "output": "lm_head",
    "markov_w1": "markov_head.markov_w1", "markov_w2": "markov_head.markov_w2",
    "conf_proj": "confidence_head.proj",
}  # fmt: skip
IN_BLOCK = {
    "attn_norm": "input_layernorm", "attn_norm_2": "hidden_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def random_drafts(model: str, folder: Path) -> list[Path]:
    """Of each type with each vocabulary, flat; the converter looks at names and shapes only."""
    target, made = load_target(model), list[Path]()
    frozen, _ = read_frozen(model, target.shapes)
    ids = torch.arange(0, target.shapes.vocab_size, 5)
    last = target.shapes.num_layers - 1
    for kind, own in (
        ("dspark", {"markov_rank": 16}),
        ("dspark", {"markov_rank": 16, "markov_head_type": "gated"}),
        ("dflash", {}),
        ("eagle3", {"num_layers": 1}),
        ("peagle", {"num_layers": 1}),
    ):
        for reduced in (False, True):
            config = DraftConfig.sized_for(
                target.config,
                target_layer_ids=(1, last // 2, last - 2),
                mask_token_id=0,
                speculator_type=kind,
                draft_vocab_size=len(ids) if reduced else None,
                **{"num_layers": 2, "block_size": 7, **own},
            )
            draft = drafter(kind).network(config, frozen, ids if reduced else None)
            head = "-" + own["markov_head_type"] if "markov_head_type" in own else ""
            made.append(folder / f"{kind}{head}{'-reduced' if reduced else ''}")
            save_draft(made[-1], draft, dtype=torch.float32)
    return made


def ours(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """Our tensor of a GGUF name, in its file's order of rows."""
    stem, suffix = name.rsplit(".", 1) if "." in name else (name, "")
    if not stem.startswith("blk."):
        return tensors.get(f"{NAMES.get(stem, stem)}.{suffix}")
    _, block, part = stem.split(".", 2)
    layer = "midlayer" if "midlayer.input_layernorm.weight" in tensors else f"layers.{block}"
    return tensors.get(f"{layer}.{IN_BLOCK.get(part, part)}.{suffix}")


def as_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k as llama.cpp's Llama turns them, a pair side by side; ours are half a head
    apart.
    """
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def compared(file: Path, draft: Path, gguf: Any) -> dict[str, Any]:
    """Counts of the GGUF's tensors that are ours, and what of either side has no partner."""
    reader, tensors = gguf.GGUFReader(str(file)), dict(read_tensors(draft))
    config = load_config(draft)
    equal, strange, used = 0, list[str](), set[int]()
    for entry in reader.tensors:
        data = torch.from_numpy(np.array(entry.data))
        if entry.name == "d2t":
            own = tensors["d2t"] + torch.arange(len(tensors["d2t"]))  # theirs are ids, ours offsets
            used.add(id(tensors["d2t"]))
        else:
            found = ours(entry.name, tensors)
            if found is None:
                strange.append(entry.name)
                continue
            used.add(id(found))
            turned = config.speculator_type in ("eagle3", "peagle")
            pairs = turned and entry.name.endswith(("attn_q.weight", "attn_k.weight"))
            own = as_pairs(found, config.head_dim) if pairs else found
        if torch.equal(data.reshape(own.shape).to(own.dtype), own):
            equal += 1
        else:
            strange.append(f"{entry.name} differs")
    left = [name for name, tensor in tensors.items() if id(tensor) not in used]
    fields = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith(("tokenizer.", "GGUF.", "general."))
    }
    return {
        "architecture": reader.fields["general.architecture"].contents(),
        "tensors_equal": equal,
        "not_ours": strange,
        "not_in_the_file": left,
        "fields": fields,
    }


def convert(draft: Path, out: Path, args: argparse.Namespace, gguf: Any) -> dict[str, Any]:
    command = [
        sys.executable, str(args.llama_cpp / "convert_hf_to_gguf.py"), str(draft),
        "--outfile", str(out), "--outtype", "f32", "--target-model-dir", args.model,
    ]  # fmt: skip
    path = str(args.llama_cpp / "gguf-py")
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    if ran.returncode or not out.exists():
        return {"converted": False, "says": lines[-1][-300:] if lines else ""}
    return {"converted": True, **compared(out, draft, gguf)}


class Opaque(ctypes.Structure):
    """llama_model_params, whatever is in it: it is only handed on. Larger than it is."""

    _fields_ = (("bytes", ctypes.c_char * 512),)


def load(file: str, library: Path) -> None:
    """Open ``file`` with libllama's loader; a line on stdout if it did."""
    ggml, llama = (
        ctypes.CDLL(str(next(library.glob(f"lib{name}.*so*"))), ctypes.RTLD_GLOBAL)
        for name in ("ggml", "llama")
    )
    ggml.ggml_backend_load_all_from_path(str(library).encode())
    llama.llama_backend_init()
    llama.llama_model_default_params.restype = Opaque
    opened = llama.llama_model_load_from_file
    opened.restype, opened.argtypes = ctypes.c_void_p, (ctypes.c_char_p, Opaque)
    model = opened(file.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit("libllama did not load it")
    text = ctypes.create_string_buffer(256)
    llama.llama_model_desc(ctypes.c_void_p(model), text, 256)
    llama.llama_model_n_params.restype = ctypes.c_uint64
    print(text.value.decode(), llama.llama_model_n_params(ctypes.c_void_p(model)))


def loaded(file: Path, library: Path) -> dict[str, Any]:
    """What libllama says of ``file``, in a process of its own: it may end one."""
    path = {"LD_LIBRARY_PATH": str(library)}
    ran = subprocess.run(
        [sys.executable, __file__, "--load", str(file), "--library", str(library)],
        capture_output=True,
        text=True,
        env=os.environ | path,
        check=False,
    )
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    if ran.returncode:
        wrong = [line for line in lines if "error" in line.lower()] or lines
        return {"loads": False, "loader_says": (wrong or [""])[0][-300:]}
    return {"loads": True, "loader_says": ran.stdout.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--load", help="only open this GGUF file, with --library")
    parser.add_argument("--draft", action="append", default=[], type=Path)
    parser.add_argument("--name", default="convert_llama_cpp")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.load:
        load(args.load, args.library)
        return
    if not args.llama_cpp or not args.model:
        parser.error("--llama-cpp and --model are needed")
    sys.path.insert(0, str(args.llama_cpp / "gguf-py"))
    import gguf

    rows = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for draft in args.draft or random_drafts(args.model, folder):
            kind = drafter(load_config(draft).speculator_type)
            for layout in ("flat", "speculators") if kind.spelled_by_speculators else ("flat",):
                exported = folder / "out" / f"{draft.name}-{layout}"
                about = {"draft": draft.name, "type": kind.name, "format": layout}
                export(
                    str(draft), str(exported), layout=layout, dtype="fp32", target=args.model,
                    pictures=False,
                )  # fmt: skip
                file = folder / f"{exported.name}.gguf"
                row = convert(exported, file, args, gguf)
                if row["converted"] and args.library:
                    row |= loaded(file, args.library.absolute())
                rows.append(about | row)
                print(rows[-1], flush=True)
    config = {"target": Path(args.model).name, "gguf": getattr(gguf, "__version__", None)}
    write(args.name, config, rows, args.results, show=False)


if __name__ == "__main__":
    main()
