"""Make vLLM's CUDA wheel small enough to be carried to a machine that no package registry can be
reached from.

    python bench/carry_vllm.py --version 0.33.0 --out vllm.tar.xz [--python 3.12] [--sm 90]
        [--keep-heads 64,128]

The machine has torch and transformers; the archive holds a folder for PYTHONPATH with vLLM and what
it imports. From its kernels only machine code for one GPU architecture is kept (300 MB become 30),
and of FlashAttention 3 only bfloat16 of some head sizes. Left out: FlashAttention 2, kernels that
exist as PTX alone (Marlin, GPTQ), video, grammars in Mistral's tokenizer. What is imported on the
way but not used by a dump is a stub (``carried_stubs.py``, ``carried_cutlass.py``).

vLLM's kernels use torch's stable interface: 0.33.0, built for torch 2.14, also links with 2.11.
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import carried_cutlass

MAGIC = b"\x50\xed\x55\xba"  # of a container of machine code ("fatbin")
PTX, ELF = 1, 2
# Of the wheel: what a dump does not run.
LEFT_OUT = re.compile(
    r"_fa2_C|qutlass|_rust_tool_parser|flashkda|vllm-rs|fmha_sm100|/cutlass_fp4|\.pyc$"
)
# vLLM's imports, and ours. Without: torch, transformers and what comes with them.
PACKAGES = [
    "aiohttp",
    "aiohappyeyeballs",
    "aiosignal",
    "annotated-doc",
    "annotated-types",
    "anyio",
    "attrs",
    "blake3",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "compressed-tensors==0.17.0",
    "depyf==0.20.0",
    "astor",
    "diskcache",
    "dill",
    "distro",
    "dnspython",
    "einops",
    "email-validator",
    "fastapi<0.137",
    "frozenlist",
    "h11",
    "httpcore",
    "httpcore2",
    "httpx",
    "httpx2",
    "truststore",
    "ijson",
    "interegular",
    "jiter",
    "jsonschema",
    "jsonschema-specifications",
    "lark==1.2.2",
    "lm-format-enforcer==0.11.3",
    "loguru",
    "model-hosting-container-standards",
    "msgspec",
    "multidict",
    "openai",
    "openai-harmony",
    "partial-json-parser",
    "prometheus-client",
    "prometheus-fastapi-instrumentator",
    "propcache",
    "protobuf",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic",
    "pydantic-core",
    "pydantic-settings",
    "pydantic-extra-types",
    "python-dotenv",
    "python-json-logger",
    "python-multipart",
    "pyzmq",
    "referencing",
    "regex",
    "rpds-py",
    "setproctitle",
    "sniffio",
    "starlette",
    "supervisor",
    "jmespath",
    "typing-inspection",
    "uvicorn",
    "watchfiles",
    "xgrammar",
    "yarl",
    "apache-tvm-ffi",
    "xxhash",
    "packaging",
    "httptools",
    "opentelemetry-api",
    "requests",
    "urllib3",
    "idna",
    "certifi",
    "charset-normalizer",
    "click",
    "fastcrc",
    "numcodecs==0.16.6",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "zarr==3.1.6",
    "donfig",
    "google-crc32c",
    "jinja2",
    "markupsafe",
    "pyyaml",
]


class Entry(NamedTuple):
    """One piece of a container: header and code are data[at : at + header + size]."""

    at: int
    kind: int
    sm: int
    header: int
    size: int


def containers(data: bytes) -> Iterator[tuple[int, list[Entry]]]:
    """Where each container begins, and what is in it."""
    at = data.find(MAGIC)
    while at >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        if (version, header) != (1, 16) or at + 16 + size > len(data):
            at = data.find(MAGIC, at + 4)
            continue
        entries, end, here = [], at + 16 + size, at + 16
        while here < end:
            kind, _, head, payload = struct.unpack_from("<HHIQ", data, here)
            (sm,) = struct.unpack_from("<I", data, here + 28)
            entries.append(Entry(here, kind, sm, head, payload))
            here += head + payload
        yield at, entries
        at = data.find(MAGIC, end)


def prune(path: Path, sm: int, heads: set[tuple[int, int]]) -> str:
    """Keep machine code for ``sm`` in a library, and of FlashAttention 3 that of ``heads``. Empty
    pieces stay, as zeros.
    """
    data = bytearray(path.read_bytes())
    source, kept, total = bytes(data), 0, 0
    for at, entries in containers(source):
        total += len(entries)
        keep = [e for e in entries if e.kind == ELF and e.sm == sm]
        if "fa3" in path.name:
            keep = [
                e for e in keep if wanted(source[e.at + e.header : e.at + e.header + e.size], heads)
            ]
        kept += len(keep)
        size = sum(e.header + e.size for e in entries)
        if keep:
            body = b"".join(source[e.at : e.at + e.header + e.size] for e in keep)
            struct.pack_into("<Q", data, at + 8, len(body))
            data[at + 16 : at + 16 + size] = body.ljust(size, b"\0")
        else:  # loaded when first used, which it is not
            for e in entries:
                data[e.at + e.header : e.at + e.header + e.size] = bytes(e.size)
    path.write_bytes(data)
    subprocess.run(["strip", "--strip-unneeded", str(path)], check=True)
    return f"{path.name}: {kept} of {total} pieces"


def wanted(code: bytes, heads: set[tuple[int, int]]) -> bool:
    """Whether a piece of FlashAttention 3 is bfloat16 for one of ``heads``, or no attention at
    all.
    """
    names = b"\n".join(re.findall(rb"\.text\.(_Z[A-Za-z0-9_]+)", code))
    plain = subprocess.run(
        ["c++filt"], input=names, stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    found = re.findall(
        r"CollectiveMainloopFwdSm90<\d+.*?cute::C<(\d+)> ?>, (\d+), ([a-z_:0-9]+)", plain
    )
    return not found or any(
        (int(a), int(b)) in heads and kind == "cutlass::bfloat16_t" for a, b, kind in found
    )


def download(names: list[str], python: str, out: Path) -> list[Path]:
    """Wheels for Linux on x86-64, without what they need."""
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            python,
            "--implementation",
            "cp",
            "--abi",
            "cp" + python.replace(".", ""),
            "--abi",
            "none",
            *platforms,
            "--platform=manylinux2014_x86_64",
            "--platform=manylinux1_x86_64",
            "-d",
            str(out),
            *names,
        ],
        check=True,
    )
    return sorted(out.glob("*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", required=True)
    parser.add_argument("--out", type=Path, help="the archive, .tar.xz")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument(
        "--keep-heads", default="64,128", help="head sizes; multi-head latent attention always"
    )
    parser.add_argument("--site", type=Path, help="leave the folder here too")
    parser.add_argument(
        "--alone", action="store_true", help="vLLM without the packages that it imports"
    )
    args = parser.parse_args()
    heads = {(int(h), int(h)) for h in args.keep_heads.split(",")} | {(64, 512), (192, 128)}
    with tempfile.TemporaryDirectory() as scratch:
        site, wheels = Path(scratch) / "site", Path(scratch) / "wheels"
        other = re.compile(rf"cpython-(?!{args.python.replace('.', '')})\d+")
        for wheel in download(
            [f"vllm=={args.version}", *([] if args.alone else PACKAGES)], args.python, wheels
        ):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    ours = wheel.name.startswith("vllm-")
                    if (
                        not (ours and (LEFT_OUT.search(name) or other.search(name)))
                        and "/tests/" not in name
                    ):
                        archive.extract(name, site)
        for library in sorted((site / "vllm").rglob("*.so")):
            print(prune(library, args.sm, heads), flush=True)
        for name in carried_cutlass.replace(site, args.sm):
            print(f"{name}: answers that sm_{args.sm} cannot use it")
        shutil.copy(Path(__file__).with_name("carried_stubs.py"), site / "sitecustomize.py")
        if args.site:
            shutil.copytree(site, args.site, symlinks=True, dirs_exist_ok=True)
        if args.out:
            with tarfile.open(args.out, "w:xz", preset=3) as archive:
                archive.add(site, "site")
            print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
