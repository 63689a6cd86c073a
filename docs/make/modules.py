"""List the modules that docs/architecture.md does not name: ``python docs/make/modules.py``. Exit 1
if there are any.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("cache", "dump", "train", "tools")


def modules() -> set[str]:
    """Every module of the four packages as a path from the root; ``__init__.py`` only where it has
    code of its own.
    """
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py" or path.parent.name == package:
                found.add(path.relative_to(ROOT).as_posix())
    return found


def named() -> list[str]:
    """The modules that begin a line of a table: a path from the root in backticks."""
    return re.findall(r"^\| `([a-z_0-9/]+\.py)` \|", PAGE.read_text(), re.MULTILINE)


def main() -> int:
    """Print what is missing, what is gone and what stands there twice."""
    there, said = modules(), named()
    lines = [f"not named: {name}" for name in sorted(there - set(said))]
    lines += [f"gone: {name}" for name in sorted(set(said) - there)]
    lines += [f"twice: {name}" for name in sorted({name for name in said if said.count(name) > 1})]
    print("\n".join(lines) or f"all {len(there)} modules are named")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
