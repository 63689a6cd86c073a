"""The target's frozen weights, kept beside the states so that no trainer ever loads the target.

``target/model.safetensors`` holds ``embed_tokens.weight`` [V, H], ``norm.weight`` [H] and, unless
tied, ``lm_head.weight`` [V, H].
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.cache import json_text
from dspark.cache.errors import DamagedCacheError, reading
from dspark.cache.files.checksum import file_sha256
from dspark.cache.target.logits import PLAIN, Logits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class FrozenTarget:
    """Embedding ``embed_tokens`` [V, H], final norm weight ``norm`` [H], output head ``lm_head``
    [V, H]; ``tied``: the head is the embedding;
    ``logits``: what the target does to the head's output.
    """

    embed_tokens: torch.Tensor
    norm: torch.Tensor
    lm_head: torch.Tensor
    tied: bool
    logits: Logits = PLAIN

    def to(self, device: torch.device) -> FrozenTarget:
        """Return the same weights on ``device``, without copying those already there."""
        embed, norm = self.embed_tokens.to(device), self.norm.to(device)
        return FrozenTarget(
            embed, norm, embed if self.tied else self.lm_head.to(device), self.tied, self.logits
        )

    def save(self, path: Path) -> str:
        """Write to ``path``; returns the file's sha256."""
        from safetensors.torch import save_file

        save_file({k: v.detach().cpu().contiguous() for k, v in self._tensors().items()}, path)
        return file_sha256(path)

    def sha256_in(self, path: Path) -> str:
        """Return the sha256 that the file at ``path``, written by ``save``, would have with these
        weights; nothing is written. Uses that file's own header, which another release of
        safetensors may write differently. As fast as ``file_sha256``.
        """
        import torch

        tensors = self._tensors()
        with open(path, "rb") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
        places = {n: v["data_offsets"] for n, v in json_text.loads(header).items() if n in tensors}
        out = hashlib.sha256(length + header)
        # Weights that are not in the file come last, so that a head that is no longer tied changes
        # the hash, too.
        for name in sorted(tensors, key=lambda n: (n not in places, places.get(n, n))):
            data = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
            out.update(data.numpy().data)
        return out.hexdigest()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by their names in the file."""
        out = {"embed_tokens.weight": self.embed_tokens, "norm.weight": self.norm}
        return out if self.tied else {**out, "lm_head.weight": self.lm_head}

    @classmethod
    def load(cls, path: Path, sha256: str) -> FrozenTarget:
        """Read what ``save`` wrote, whose hash is ``sha256``; tied weights share memory. ``logits``
        comes from the config (``Cache.target``).

        The file is read once more for its hash, at 0.7 GB/s on a core without instructions for it
        (4 GB: 6 s) and once per run: nothing else would notice a flipped bit in the weights.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            with reading(path):
                if (found := file_sha256(path)) != sha256:
                    raise DamagedCacheError(
                        f"{path}: sha256 is {found}, the manifest says {sha256}"
                    )
                tensors = load_file(path)
        except SafetensorError as error:
            raise DamagedCacheError(
                f"{path}: the target's frozen weights cannot be read: {error}"
            ) from error
        names = set(tensors)
        tied = "lm_head.weight" not in names
        expected = {"embed_tokens.weight", "norm.weight"} | (set() if tied else {"lm_head.weight"})
        if names != expected:
            raise DamagedCacheError(
                f"{path}: found tensors {sorted(names)}, expected {sorted(expected)}"
            )
        embed = tensors["embed_tokens.weight"]
        return cls(
            embed, tensors["norm.weight"], embed if tied else tensors["lm_head.weight"], tied
        )
