"""Train speculative-decoding drafts offline. Packages: ``dspark.dump``, ``dspark.cache``,
``dspark.train``, ``dspark.tools``.

This file is the root of the package ``dspark``; the four folders beside it are its packages
(pyproject.toml maps them).
"""

from __future__ import annotations

__version__ = "0.2.0.dev0"
