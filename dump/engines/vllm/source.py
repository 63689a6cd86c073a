"""Find out from its source what an installed vLLM does with a target, before any weights are read.

vLLM's classes are not imported for this, which would take half a minute, need the platform they
were written for, and work for one version only. The source tells the class that an architecture
maps to, whether it returns states (``SupportsEagle3``), whether it leaves the sum over
tensor-parallel ranks to the next norm (a state taken between the layers is then one rank's part),
whether the last layer's state is available, and whether the class is compiled.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Capture = Literal["vllm", "norms", "none"]
MODELS = "model_executor/models"
# How a class shows that it captures the state after its last layer.
TAKES_LAST = re.compile(
    r"_maybe_add_hidden_state\(|end_layer in self\.aux_hidden_state_layers|\w+ \+ 1\)? in "
    r"self\.aux_hidden_state_layers"
)
FUSED = re.compile(r"\bfused_allreduce\w*norm\b")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What vLLM does with one architecture. ``gives_states``: it has vLLM's interface for them.
    ``partial``: they are one rank's part. ``takes_last``: the last layer's is among them.
    ``has_norms``: every layer has an ``input_layernorm`` and the decoder a ``norm``, where ours can
    be captured. ``compiled``: by torch.compile, unless vLLM runs eagerly.
    """

    architecture: str
    module: str
    name: str
    gives_states: bool
    partial: bool
    takes_last: bool
    has_norms: bool
    compiled: bool

    @property
    def capture(self) -> Capture:
        """Return what captures the states: vLLM, our code at the norms, or nothing."""
        if self.gives_states and self.takes_last and not self.partial:
            return "vllm"
        return "norms" if self.has_norms else "none"

    @property
    def why(self) -> str:
        """Say why vLLM's own states are not used, as the end of a sentence."""
        if not self.gives_states:
            return "its model class there has no interface for hidden states"
        if self.partial:
            return "its model class there returns one tensor-parallel rank's part of them"
        return "its model class there leaves out the last layer's" if not self.takes_last else ""


def vllm_root() -> Path | None:
    """Return the installed package's folder, without importing it."""
    try:
        spec = importlib.util.find_spec("vllm")
    except ValueError:  # a module without one takes its place
        spec = None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def model_source(root: Path, architectures: Sequence[str], *, cuda: bool) -> ModelSource | None:
    """Return the first of a config's ``architectures`` that the vLLM in ``root`` has; None if it
    has none.
    """
    known = registered(root)
    for architecture in architectures:
        if architecture not in known:
            continue
        path, name = definition(root, *known[architecture], cuda=cuda)
        if path is None:
            return None
        text = "\n".join(_read(p) for p in _family(root, path, name))
        return ModelSource(
            architecture=architecture,
            module=path.relative_to(root).with_suffix("").as_posix().replace("/", "."),
            name=name,
            gives_states=_inherits(root, path, name, "SupportsEagle3"),
            partial=FUSED.search(text) is not None,
            # A class that captures none itself runs another one, about which nothing is known here;
            # the self-check tests it.
            takes_last=TAKES_LAST.search(text) is not None
            or "in self.aux_hidden_state_layers" not in text,
            has_norms="self.input_layernorm" in text
            and re.search(r"self\.norm\b", text) is not None,
            compiled="@support_torch_compile" in text,
        )
    return None


@cache
def registered(root: Path) -> dict[str, tuple[str, str]]:
    """architecture -> (module as the registry writes it, class)."""
    out: dict[str, tuple[str, str]] = {}
    for node in ast.walk(_tree(root / MODELS / "registry.py")):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if (
                isinstance(key, ast.Constant)
                and isinstance(value, ast.Tuple)
                and len(value.elts) == 2
            ):
                pair = [e.value for e in value.elts if isinstance(e, ast.Constant)]
                if len(pair) == 2 and isinstance(key.value, str):
                    out.setdefault(key.value, (str(pair[0]), str(pair[1])))
    return out


def definition(root: Path, module: str, name: str, *, cuda: bool) -> tuple[Path | None, str]:
    """Find the file that defines a class, also through packages that choose one by platform."""
    path = _file(
        root, module if module.startswith("vllm.") else f"vllm.{MODELS.replace('/', '.')}.{module}"
    )
    while path is not None and name not in _classes(path):
        found = _imported(root, path).get(name, [])
        if not found:
            return None, name
        on_cuda = [(p, n) for p, n in found if "nvidia" in p.parts]
        elsewhere = [(p, n) for p, n in found if not {"nvidia", "amd"} & set(p.parts)]
        path, name = ((on_cuda if cuda else elsewhere) or found)[0]
    return path, name


def _family(root: Path, path: Path, name: str) -> list[Path]:
    """Return the files that define a target's decoder: that of ``name``, and those of the decoders
    it extends.
    """
    decoders = [c for c in _classes(path) if c.endswith("Model")]
    out = [path]
    for own in decoders or [name]:
        for base in _bases(path, own):
            for p, n in _imported(root, path).get(base, []):
                if p.name not in ("interfaces.py", "utils.py") and p not in out:
                    out += _family(root, p, n)
    return out


def _inherits(root: Path, path: Path, name: str, wanted: str) -> bool:
    for base in _bases(path, name):
        if base == wanted:
            return True
        places = [(path, base)] if base in _classes(path) else _imported(root, path).get(base, [])
        if any(p.name != "interfaces.py" and _inherits(root, p, n, wanted) for p, n in places):
            return True
    return False


@cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(_read(path))


@cache
def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _tree(path).body if isinstance(node, ast.ClassDef)}


def _bases(path: Path, name: str) -> list[str]:
    node = _classes(path).get(name)
    return [b.id for b in node.bases if isinstance(b, ast.Name)] if node else []


@cache
def _imported(root: Path, path: Path) -> dict[str, list[tuple[Path, str]]]:
    """name -> the vLLM files it may come from, with its name there."""
    package = ["vllm", *path.relative_to(root).parent.parts]
    out: dict[str, list[tuple[Path, str]]] = {}
    for node in ast.walk(_tree(path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        here = package[: len(package) - node.level + 1] if node.level else []
        file = _file(root, ".".join([*here, *([node.module] if node.module else [])]))
        if file is not None:
            for alias in node.names:
                out.setdefault(alias.asname or alias.name, []).append((file, alias.name))
    return out


def _file(root: Path, dotted: str) -> Path | None:
    parts = dotted.split(".")
    if parts[0] != "vllm":
        return None
    at = root.joinpath(*parts[1:])
    candidates = [at / "__init__.py", at.with_suffix(".py")]
    return next((p for p in candidates if p.is_file()), None)
