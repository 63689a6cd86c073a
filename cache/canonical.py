"""Canonical JSON, over which hashes are computed, and records that carry their own checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dspark.cache.errors import DamagedCacheError
from dspark.cache.files.checksum import crc32c
from dspark.cache.json_text import Json


def canonical_text(data: Any) -> str:
    """Return JSON with sorted keys and no spaces. Values outside JSON's types (such as a message's
    date) are written as text.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def canonical(data: Any) -> bytes:
    """Return ``canonical_text`` in UTF-8, over which checksums and hashes are computed."""
    return canonical_text(data).encode(errors="surrogatepass")


def sealed(data: Mapping[str, Any]) -> Json:
    """Return ``data`` with its own ``crc32c`` added."""
    return {**data, "crc32c": crc32c(canonical(data))}


def unseal(data: Any, where: str) -> Json:
    """Check and strip the ``crc32c`` that ``sealed`` added."""
    if not isinstance(data, dict) or "crc32c" not in data:
        raise DamagedCacheError(f"{where}: no checksummed record found")
    body = {k: v for k, v in data.items() if k != "crc32c"}
    computed = crc32c(canonical(body))
    if computed != data["crc32c"]:
        raise DamagedCacheError(f"{where}: stored crc32c {data['crc32c']}, computed {computed}")
    return body
