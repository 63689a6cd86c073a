"""States taken at the norms: right where vLLM's own are one rank's part, and chosen where vLLM's
source says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.cache.errors import EngineError, UsageError
from dspark.dump.engines.registry import ENGINES, EngineKind, choose_engine
from dspark.dump.engines.vllm.capture import StatesAtNorms, Watch
from dspark.dump.engines.vllm.engine import same_on_ranks
from dspark.dump.engines.vllm.launch import capture_arguments
from dspark.dump.engines.vllm.source import ModelSource, model_source, vllm_root


@pytest.mark.vllm
def test_on_two_ranks_ours_are_whole_and_vllm_s_are_not(tmp_path: Path) -> None:
    """vLLM's own GLM-5.2 class for CUDA, driven over gloo: once the norm is called, once a kernel
    stands for it.
    """
    pytest.importorskip("vllm")
    script, out = Path(__file__).with_name("vllm_ranks_script.py"), tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(script), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    for rank in found["ranks"]:
        for way in ("norm called", "kernel"):
            ours, plain = rank[f"ours, {way}"], rank[f"plain, {way}"]
            assert ours["states"] == 3
            assert max(ours["gaps"]) < 1e-5 * found["size"]
            assert plain["states"] == 2, "the last layer's is never there"
            assert min(plain["gaps"]) > 0.1 * found["size"], "one rank's part"


class Norm(torch.nn.Module):
    """Adds to the residual where it lies, as vLLM's kernels do."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return x / 2
        residual += x
        return residual / 2, residual


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post = Norm(), Norm()

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = x.clone()
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post(x + 1, residual)
        return x + 3, residual


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = torch.nn.ModuleList([Layer(), Layer()]), Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        out: torch.Tensor = self.norm(x, residual)[0]
        return out


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


class Ours(StatesAtNorms, Model):
    pass


def test_states_are_kept_before_the_next_norm_changes_them() -> None:
    ours = Ours()
    x = torch.randn(5, 4)
    assert torch.equal(ours(x.clone()), Model()(x.clone())), (
        "without layers asked for, nothing changes"
    )
    ours.set_aux_hidden_state_layers((0, 1, 2))
    out, states = ours(x.clone())
    assert torch.equal(out, Model()(x.clone()))
    # By hand: r entering, x/2 + 1 into the residual, half of that + 3 beside it.
    want = [x]
    for _ in range(2):
        middle = want[-1] + want[-1] / 2 + 1
        want.append(middle + middle / 2 + 3)
    for state, expected in zip(states, want, strict=True):
        torch.testing.assert_close(state, expected)
    assert ours.get_eagle3_default_aux_hidden_state_layers() == (2,)


def test_what_cannot_be_taken_is_refused() -> None:
    ours = Ours()
    ours.model.layers[1] = SimpleNamespaceModule()
    with pytest.raises(EngineError, match="entering layer 1 cannot be captured"):
        ours.set_aux_hidden_state_layers((1, 2))
    ours = Ours()
    ours.model.do_not_compile = False
    with pytest.raises(EngineError, match="run vLLM eagerly"):
        ours.set_aux_hidden_state_layers((1,))
    watch = Watch(Decoder(), [1])
    with pytest.raises(EngineError, match=r"skipped the norms before layers \[1\]"):
        watch.take(3)


class SimpleNamespaceModule(torch.nn.Module):
    """A layer without a norm of that name."""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.parents:
            if folder != root.parent and root in (folder, *folder.parents):
                (folder / "__init__.py").touch()
    return root


NORMS = "class XLayer:\n    def __init__(self): self.input_layernorm = self.norm = 1\n"
TAKES = (
    "class XModel:\n    def forward(self):\n        if idx in self.aux_hidden_state_layers: pass\n"
)
SOURCES = {
    "model_executor/models/registry.py": """
_TEXT = {"AForCausalLM": ("a", "AForCausalLM"), "BForCausalLM": ("b", "BForCausalLM"),
  "CForCausalLM": ("vllm.models.c", "CForCausalLM"), "DForCausalLM": ("d", "DForCausalLM")}
""",
    "model_executor/models/interfaces.py": "class SupportsEagle3: pass\n",
    # A: all is there. B: extends A. C: by platform; on CUDA fused and without the last. D: no
    # interface.
    "model_executor/models/a.py": "from .interfaces import SupportsEagle3\n"
    + NORMS
    + TAKES
    + "        if self.end_layer in self.aux_hidden_state_layers: pass\nclass "
    "AForCausalLM(SupportsEagle3): pass\n",
    "model_executor/models/b.py": "from vllm.model_executor.models.a import AForCausalLM, XModel\n"
    "class BModel(XModel): pass\nclass BForCausalLM(AForCausalLM): pass\n",
    "models/c/__init__.py": "if cuda:\n    from .nvidia.model import C1 as CForCausalLM\n"
    "else:\n    from vllm.model_executor.models.a import AForCausalLM as CForCausalLM\n",
    "models/c/nvidia/model.py": "from vllm.model_executor.models.a import AForCausalLM\n"
    "from vllm.x import fused_allreduce_rms_norm\n"
    + NORMS
    + TAKES
    + "class C1(AForCausalLM): pass\n",
    "model_executor/models/d.py": "@support_torch_compile\nclass DModel: pass\n"
    "class DForCausalLM: pass\n",
}


def test_vllm_s_source_says_who_takes_the_states(tmp_path: Path) -> None:
    root = write(tmp_path / "vllm", SOURCES)

    def of(architecture: str, cuda: bool = True) -> ModelSource:
        found = model_source(root, ["NotThere", architecture], cuda=cuda)
        assert found is not None
        return found

    assert of("AForCausalLM").capture == "vllm"
    assert of("BForCausalLM").capture == "vllm"
    c = of("CForCausalLM")
    assert (c.name, c.module, c.partial, c.takes_last, c.capture) == (
        "C1",
        "models.c.nvidia.model",
        True,
        False,
        "norms",
    )
    assert "one tensor-parallel rank's part" in c.why
    assert capture_arguments(c) == {
        "model_class_overrides": {"CForCausalLM": "dspark.dump.engines.vllm.capture:CForCausalLM"}
    }
    assert of("CForCausalLM", cuda=False).capture == "vllm"
    d = of("DForCausalLM")
    assert (d.capture, d.compiled) == ("none", True)
    (root / "model_executor/models/e.py").write_text(
        SOURCES["model_executor/models/d.py"].replace("D", "E") + NORMS
    )
    registry = root / "model_executor/models/registry.py"
    other = write(
        tmp_path / "other" / "vllm",
        {
            "model_executor/models/registry.py": registry.read_text()
            .replace('"D', '"E')
            .replace('"d"', '"e"'),
            "model_executor/models/e.py": (root / "model_executor/models/e.py").read_text(),
        },
    )
    e = model_source(other, ["EForCausalLM"], cuda=True)
    assert e is not None
    assert capture_arguments(e)["enforce_eager"] is True
    assert model_source(root, ["Other"], cuda=True) is None


@pytest.mark.vllm
def test_the_installed_version_s_families() -> None:
    pytest.importorskip("vllm")
    root = vllm_root()
    assert root is not None

    def capture(name: str, cuda: bool = True) -> str:
        found = model_source(root, [name], cuda=cuda)
        assert found is not None
        return found.capture

    for name in (
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "GptOssForCausalLM",
    ):
        assert capture(name) == "vllm"
    for name in ("GlmMoeDsaForCausalLM", "DeepseekV32ForCausalLM", "MiniMaxM3SparseForCausalLM"):
        assert capture(name) == "norms"
    assert capture("GlmMoeDsaForCausalLM", cuda=False) == "vllm", "the generic class"
    for name in ("Gemma3ForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"):
        assert capture(name) == "norms"


def test_auto_takes_transformers_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = write(tmp_path / "vllm", SOURCES)
    monkeypatch.setattr("dspark.dump.engines.vllm.source.vllm_root", lambda: root)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    kind = ENGINES["vllm"]
    monkeypatch.setitem(
        ENGINES, "vllm", EngineKind(kind.start, "numpy", ("numpy",), refuses=kind.refuses)
    )
    engine, _, why = choose_engine("auto", "auto", ["DForCausalLM"])
    assert engine == "transformers"
    assert (
        "returns no hidden states for DForCausalLM: its model class there has no interface"
        in str(why)
    )
    assert choose_engine("auto", "auto", ["CForCausalLM"]) == ("vllm", "cuda", None)
    assert choose_engine("auto", "auto", ["Unknown"]) == ("vllm", "cuda", None)
    with pytest.raises(
        UsageError, match="--engine vllm: vllm .* returns no hidden states for DForCausalLM"
    ):
        choose_engine("vllm", "cuda", ["DForCausalLM"])


def test_ranks_that_hold_parts_are_named() -> None:
    states = torch.randn(7, 2, 8)
    with pytest.raises(EngineError, match="layers 3 are a tensor-parallel rank's partial sum"):
        same_on_ranks(states, torch.stack([states[:, 0], states[:, 1] / 2], dim=1), 1, [1, 3])


def test_check_says_what_to_serve_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dspark.tools.check.servers import served_states

    root = write(tmp_path / "vllm", SOURCES)
    monkeypatch.setattr("dspark.dump.engines.vllm.source.vllm_root", lambda: root)
    told = str(served_states(["CForCausalLM"]))
    assert "feeds a draft of CForCausalLM one rank's part" in told
    ours = '{"CForCausalLM": "dspark.dump.engines.vllm.capture:CForCausalLM"}'
    assert f"--model-class-overrides '{ours}'" in told
    assert served_states(["AForCausalLM"]) is None
    assert served_states(["DForCausalLM"]) is None
    assert served_states([]) is None
