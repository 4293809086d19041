"""The import rules and the list of things this code never does, held by reading every file's syntax tree."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import sana

ROOT = Path(__file__).parents[1]
ROWS = {  # who may import whom: only from a strictly lower row, or inside one's own unit
    "sana.config": 0,
    "sana.registry": 0,
    "sana.utils": 0,
    "sana.ops": 1,
    "sana.models": 2,
    "sana.diffusion": 2,
    "sana.data": 2,
    "sana.pipelines": 3,
    "sana.training": 4,
    "sana.serving": 4,
    "sana.commands": 5,  # parsers and printing, for the command line and for scripts
    "sana.cli": 6,
    "app": 6,
    "comfyui": 6,
    "scripts": 6,
    "tools": 6,
    "train_scripts": 6,
}
HOMES = {  # third party -> the only places that may import it
    "triton": ("sana/ops/",),
    "pyrallis": ("sana/config.py",),
    "transformers": ("sana/models/text_encoder/", "sana/models/captioner/", "app/safety_check.py"),
    "tokenizers": ("sana/models/text_encoder/", "sana/training/", "sana/commands/", "tools/", "train_scripts/"),
    "accelerate": ("sana/training/",),
    "wandb": ("sana/training/tracker.py",),
    "tensorboard": ("sana/training/tracker.py",),
    "huggingface_hub": ("sana/utils/hub.py", "sana/utils/download.py"),
    "diffusers": ("sana/models/autoencoder/kl.py", "tools/"),
    "webdataset": ("sana/data/",),
    "wids": ("sana/data/",),
    "fastapi": ("sana/serving/",),
    "uvicorn": ("sana/serving/",),
    "prometheus_client": ("sana/serving/",),
    "ray": ("sana/serving/",),
    "gradio": ("app/",),
    "torchao": ("sana/models/quantization/",),
    "bitsandbytes": ("sana/models/quantization/", "sana/training/optimizer.py"),
    "mmcv": (),
    "xformers": (),
}
ENVIRONMENT_READERS = (
    "sana/utils/distributed.py",
    "sana/ops/backend.py",
    "sana/commands/",
    "app/",
    "scripts/",
    "tools/",
    "train_scripts/",
)
STRICT_FALSE = ("sana/models/weights.py",)


@cache
def sources() -> tuple[str, ...]:
    """Returns every Python file outside tests/, relative to the root."""
    folders = ("sana", "app", "comfyui", "scripts", "tools", "train_scripts")
    return tuple(
        sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    )


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str) -> Iterator[tuple[str, int]]:
    """Yields every imported module, absolute, with its line; `from a import b` counts as a.b too."""
    package = module_of(path).split(".")
    package = package if path.endswith("__init__.py") else package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def strings_to_modules(path: str) -> Iterator[tuple[str, int]]:
    """Yields "sana.x.y:attribute" texts: a registry line is an import too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("sana."):
            module, colon, _ = node.value.partition(":")
            if colon and module.replace(".", "").replace("_", "").isalnum():
                yield module, node.lineno


def unit_of(module: str) -> str | None:
    """Returns the row entry that a module belongs to; config_checks.py and the like belong to config."""
    for unit in ROWS:
        if module == unit or module.startswith((f"{unit}.", "sana.config_" if unit == "sana.config" else f"{unit}.")):
            return unit
    return None


def broken_rows(path: str) -> list[str]:
    own = unit_of(module_of(path))
    if own is None:  # sana/__init__.py: lazy names only
        return []
    broken = []
    for module, line in [*imports(path), *strings_to_modules(path)]:
        other = unit_of(module)
        if module.split(".")[0] != "sana" and other is None:
            continue
        version = module == "sana.__version__"
        lower = other is not None and ROWS[other] < ROWS[own]
        public = module == "sana" or module.removeprefix("sana.") in sana.__all__
        both_bottom = other is not None and ROWS[other] == ROWS[own] == 0  # config may use utils and registry
        if other != own and not lower and not (public and ROWS[own] == 6) and not version and not both_bottom:
            broken.append(f"{path}:{line} imports {module}")
    return broken


def test_rows() -> None:
    assert [line for path in sources() for line in broken_rows(path)] == []


def test_every_source_has_a_row() -> None:
    strangers = [path for path in sources() if unit_of(module_of(path)) is None]
    assert strangers == ["sana/__init__.py"]


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements that importing a module runs; what stands below TYPE_CHECKING is not among them."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from run_at_import([*node.body, *node.orelse])
        elif isinstance(node, ast.Try | ast.With):
            yield from run_at_import(node.body)


def test_no_import_cycles() -> None:
    modules = {module_of(path): path for path in sources() if path.startswith("sana/")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        lines = {node.lineno for node in run_at_import(tree(path).body)}
        needed = {module for module, line in imports(path) if line in lines}
        graph[name] = {known for known in modules if known in needed or known in {m.rpartition(".")[0] for m in needed}}
        graph[name] -= {name, *(parent for parent in modules if name.startswith(f"{parent}."))}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_one_home_for_each_third_party() -> None:
    broken = [
        f"{path}:{line} imports {module}"
        for path in sources()
        for module, line in imports(path)
        if (package := module.split(".")[0]) in HOMES and not path.startswith(HOMES[package] or ("nowhere",))
    ]
    assert broken == []


def calls(path: str) -> Iterator[tuple[str, ast.Call]]:
    """Yields every call with the dotted text of what is called."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((argument.value for argument in call.keywords if argument.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def never(path: str) -> Iterator[str]:
    """Yields what a file does that no file may."""
    library = path.startswith("sana/") and not path.startswith(("sana/cli.py", "sana/commands/"))
    for name, call in calls(path):
        where = f"{path}:{call.lineno}"
        if name in ("eval", "exec"):
            yield f"{where} calls {name}"
        if name == "print" and library:
            yield f"{where} prints"
        if name == "torch.load" and not is_constant(keyword(call, "weights_only"), True):
            yield f"{where} torch.load without weights_only=True"
        if (
            is_constant(keyword(call, "strict"), False)
            and name.endswith("load_state_dict")
            and path not in STRICT_FALSE
        ):
            yield f"{where} strict=False"
        if name in (
            "os.umask",
            "pickle.load",
            "pickle.loads",
            "os.putenv",
            "os.environ.update",
            "os.environ.setdefault",
        ):
            yield f"{where} calls {name}"
    for node in ast.walk(tree(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Global):
            yield f"{where} global"
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"{where} star import"
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            yield f"{where} sys.path"
        if isinstance(node, ast.ExceptHandler):
            yield from swallowed(node, where)
        if library and isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            if "argparse" in names:
                yield f"{where} argparse"
        inner = path.startswith("sana/") and path != "sana/cli.py"
        if inner and isinstance(node, ast.Compare) and "__main__" in ast.unparse(node):
            yield f"{where} __main__"


def swallowed(handler: ast.ExceptHandler, where: str) -> Iterator[str]:
    if handler.type is None:
        yield f"{where} bare except"
    broad = handler.type is not None and ast.unparse(handler.type) in ("Exception", "BaseException")
    if broad and not any(isinstance(node, ast.Raise) for node in ast.walk(handler)):
        yield f"{where} swallows every exception"
    if all(isinstance(node, ast.Pass) for node in handler.body):
        yield f"{where} swallows an exception (say so with contextlib.suppress and why)"


def test_never() -> None:
    assert [line for path in sources() for line in never(path)] == []


def environment_uses(path: str) -> Iterator[tuple[str, int, bool]]:
    """Yields (text, line, writes) of every use of the process environment."""
    for node in ast.walk(tree(path)):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Subscript | ast.Call) else ""
        if isinstance(node, ast.Attribute) and text in ("os.environ", "os.getenv"):
            yield text, node.lineno, False
        if isinstance(node, ast.Subscript) and text.startswith("os.environ[") and not isinstance(node.ctx, ast.Load):
            yield text, node.lineno, True


def test_the_environment_is_read_at_its_border_and_never_written() -> None:
    broken = [
        f"{path}:{line} {text}"
        for path in sources()
        for text, line, writes in environment_uses(path)
        if writes or not path.startswith(ENVIRONMENT_READERS)
    ]
    assert broken == []


def test_the_environment_is_not_read_at_import() -> None:
    broken = []
    for path in sources():
        if path.startswith("sana/"):
            inside = {
                id(node)
                for function in ast.walk(tree(path))
                if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for node in ast.walk(function)
            }
            broken += [
                f"{path}:{node.lineno}"
                for node in ast.walk(tree(path))
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ" and id(node) not in inside
            ]
    assert broken == []


def test_files_and_functions_are_short() -> None:
    broken = []
    for path in sources():
        lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
        if lines > (500 if path.startswith("sana/ops/") else 400):
            broken.append(f"{path} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and (length := code_length(node)) > 60:
                broken.append(f"{path}:{node.lineno} {node.name} has {length} lines")
    for test in (ROOT / "tests").rglob("*.py"):
        if (lines := test.read_text(encoding="utf-8").count("\n")) > 400:
            broken.append(f"{test.relative_to(ROOT)} has {lines} lines")
    assert broken == []


def code_length(function: ast.FunctionDef) -> int:
    """Returns a function's lines without its docstring and decorators."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_modules_say_what_they_hold() -> None:
    assert [path for path in sources() if not ast.get_docstring(tree(path))] == []


def is_kernel_file(path: str) -> bool:
    """Files of Triton kernels: what decorates them is Triton's, so only functions may import these files."""
    return re.fullmatch(r"sana/ops/\w+/(forward|backward)\.py", path) is not None


def test_importing_everything_does_nothing(tmp_path: Path) -> None:
    modules = [module_of(path) for path in sources() if path.startswith("sana/") and not is_kernel_file(path)]
    code = (
        "import importlib, os, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import torch\n"
        "sys.exit('triton was imported' if 'triton' in sys.modules else\n"
        "         'CUDA was initialised' if torch.cuda.is_initialized() else\n"
        "         'files were written' if os.listdir('.') else 0)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("eval('1')", "calls eval"),
        ("def f():\n    global x", "global"),
        ("try:\n    pass\nexcept:\n    raise", "bare except"),
        ("try:\n    f()\nexcept Exception:\n    g()", "swallows every exception"),
        ("try:\n    f()\nexcept KeyError:\n    pass", "swallows an exception"),
        ("m.load_state_dict(s, strict=False)", "strict=False"),
        ("torch.load(p)", "torch.load without"),
        ("torch.load(p, weights_only=False)", "torch.load without"),
        ("print(1)", "prints"),
        ("import sys\nsys.path.append('x')", "sys.path"),
        ("from a import *", "star import"),
        ("import argparse", "argparse"),
        ("import sana.pipelines.x", "imports sana.pipelines.x"),
        ("from sana.diffusion import flow", "imports sana.diffusion.flow"),
        ("from ..diffusion import flow", "imports sana.diffusion.flow"),
        ("T = {'a': 'sana.training.x:y'}", "imports sana.training.x"),
    ],
)
def test_the_rules_bite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, complaint: str) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = "sana/models/made_up.py"
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    tree.cache_clear()
    found = [*never(path), *broken_rows(path)]
    tree.cache_clear()
    assert len(found) == 1
    assert complaint in found[0]
