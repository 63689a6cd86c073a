"""Where a draft runs, in which dtype and how."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark.cache.errors import UsageError
from dspark.cache.shared.process import choose_device, make_current
from dspark.train import ops
from dspark.train.distributed import World
from dspark.train.draft.attention import Backend

COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # torch's own name for where it keeps compiled code


@dataclass(frozen=True, slots=True)
class Compute:
    """Where the draft runs, and in which dtype."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend
    compiled: bool


def choose_compute(
    device: str, dtype: str, compiled: bool | None, world: World | None = None
) -> Compute:
    """``auto`` takes cuda with bfloat16 if there is one, else cpu with float32 (bfloat16 is
    emulated and slow on most CPUs). A GPU by number becomes the process's current one.
    """
    chosen = choose_device(device)
    cuda = chosen.type == "cuda"
    if cuda and world is not None and world.size > 1:
        chosen = torch.device("cuda", world.local_rank)
    names = {
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "auto": torch.bfloat16 if cuda else torch.float32,
    }
    if dtype not in names:
        raise UsageError(f"--dtype {dtype}: expected auto, bfloat16 or float32")
    make_current(chosen)
    return Compute(
        chosen, names[dtype], "flex" if cuda else "sdpa", cuda if compiled is None else compiled
    )


def keep_compiled() -> Path:
    """Let torch keep what it compiles in the user's cache, so that the next training of these
    shapes starts without compiling; by default torch keeps it in /tmp, which a restart clears.
    A folder named by ``TORCHINDUCTOR_CACHE_DIR`` stays. Returns the folder; call it before anything
    is compiled.

    torch then also keeps backward passes of graphs with autograd functions of our own: their two
    passes are part of the key. That of ``train/ops`` is not, as it is behind operators, so the
    source of these is added to the key.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = base / "dspark" / f"compiled-torch-{torch.__version__}"
    if COMPILED not in os.environ and writable(kept):
        os.environ[COMPILED] = str(kept)
    from torch._functorch import config as autograd
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.compiler import config as compiler

    tag = f"dspark-ops-{digest_of(Path(ops.__file__).parent)}"
    if tag not in compiler.cache_key_tag:
        compiler.cache_key_tag += tag
    if hasattr(autograd, "autograd_cache_allow_custom_autograd_functions"):
        autograd.autograd_cache_allow_custom_autograd_functions = True
    return Path(cache_dir())


def digest_of(package: Path) -> str:
    """Digest the source files of a package."""
    found = hashlib.sha256()
    for path in sorted(package.glob("*.py")):
        found.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def start_compilers(device: torch.device) -> None:
    """Import torch's compiler, and for a GPU start the processes in which it compiles kernels, so
    that they import torch before they are needed. torch does both with the first graph, and
    compiles that graph's kernels one after another in this process until the others are there.
    Call it after ``keep_compiled``.
    """
    from torch._inductor import async_compile, compile_fx

    del compile_fx
    if device.type != "cuda":
        return

    # since torch 2.9; before, importing the module does it
    start = getattr(async_compile, "maybe_warm_pool", None)
    if start is not None:
        start()


def writable(folder: Path) -> bool:
    """Make ``folder`` and tell whether files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
