"""Modules of a carried vLLM (``carry_vllm.py``) that import ``cutlass``, which is not carried,
before they say that an older GPU cannot use them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

# Imported on every GPU; what is in there runs from the capability beside it on.
MODULES = {"vllm/models/deepseek_v32/nvidia/ops/fused_q_cutedsl.py": 100}


def replace(site: Path, sm: int) -> list[str]:
    """Replace those modules that ``sm`` cannot use by ones that say so without an import.

    Returns their names. Raises SystemExit where such a module's own check is another one than when
    this was written: look at it.
    """
    done = []
    for name, needs in MODULES.items():
        path = site / name
        if sm >= needs or not path.is_file():
            continue
        path.write_text(stand_in(name, path.read_text(), needs))
        done.append(name)
    return done


def stand_in(name: str, source: str, needs: int) -> str:
    """The module's public functions: ``is_..._supported`` answers False, the others raise."""
    checks = {int(n) for n in re.findall(r"has_device_capability\((\d+)\)", source)}
    public = [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    asked = [n for n in public if n.startswith("is_") and n.endswith("_supported")]
    if checks != {needs} or not asked:
        raise SystemExit(f"{name}: it asks for {sorted(checks)} by {asked}, expected [{needs}]")
    lines = [f"# carry_vllm.py: this GPU cannot use it (it needs capability {needs})."]
    for function in public:
        body = (
            "return False"
            if function in asked
            else f'raise RuntimeError("{function}: cutlass is not carried")'
        )
        lines.append(f"\n\ndef {function}(*args, **kwargs):\n    {body}")
    return "\n".join(lines) + "\n"
