"""The pack as ComfyUI loads it, ComfyUI's stand-ins around it, and the pipeline that its pictures must equal."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sana import SanaPipeline
from tests.comfyui import comfy_sampling, stand_ins
from tests.comfyui.executor import Executor

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "asset/models/sana_tiny"
BUNDLED = "sana_tiny (bundled)"
KIND = "dcae-f32c32-sana-1.0-diffusers"


def load_pack(folder: Path) -> ModuleType:
    """Imports a folder of custom_nodes as ComfyUI does: by its path, under its path as a name."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Comfy:
    """A ComfyUI with the pack.

    Attributes:
        pack: the module.
        nodes: ComfyUI's own and the pack's.
        executor: runs graphs.
        models: ComfyUI's folder of models.
        output: its folder of pictures.
        bars: what progress bars showed.
    """

    pack: ModuleType
    nodes: dict[str, type]
    executor: Executor
    models: Path
    output: Path
    bars: stand_ins.Bars

    def part(self, name: str) -> Any:
        """Returns a module of the pack."""
        return sys.modules[f"{self.pack.__name__}.{name}"]

    def node(self, name: str, **inputs: Any) -> Any:
        """Returns the first result of a node."""
        cls: Any = self.nodes[name]
        return getattr(cls(), cls.FUNCTION)(**inputs)[0]


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The pack, linked into custom_nodes."""
    link = tmp_path_factory.mktemp("ComfyUI") / "custom_nodes" / "sana"
    link.parent.mkdir()
    link.symlink_to(ROOT / "comfyui")
    return load_pack(link)


def _start(pack: ModuleType, base: Path, extra: dict[str, ModuleType]) -> Iterator[Comfy]:
    models, output = base / "models", base / "output"
    for kind in ("checkpoints", "vae", "text_encoders", "diffusers"):
        (models / kind).mkdir(parents=True)
    output.mkdir()
    modules, bars = stand_ins.modules(models)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in (modules | extra).items():
            patch.setitem(sys.modules, name, module)
        nodes = stand_ins.nodes(output) | pack.NODE_CLASS_MAPPINGS
        executor = Executor(nodes, stand_ins.InterruptProcessingException)
        yield Comfy(pack, nodes, executor, models, output, bars)


@pytest.fixture
def comfy(pack: ModuleType, tmp_path: Path) -> Iterator[Comfy]:
    """ComfyUI without its model classes: a MODEL is then the pack's own."""
    yield from _start(pack, tmp_path, {})


@pytest.fixture
def comfy_with_models(pack: ModuleType, tmp_path: Path) -> Iterator[Comfy]:
    """ComfyUI with stand-ins for what its KSampler is made of: a MODEL is a ModelPatcher."""
    yield from _start(pack, tmp_path, comfy_sampling.modules())


@pytest.fixture(scope="session")
def pipeline() -> SanaPipeline:
    """The judge."""
    return SanaPipeline.from_pretrained(MODEL)
