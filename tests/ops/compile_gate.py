"""Compiles every kernel of `tests/ops/specs_*.py` for every architecture, without a GPU, and prints JSON. Runs nothing.

    python -m tests.ops.compile_gate [operator ...]

Run it from the root of the repository in a process without TRITON_INTERPRET, which would leave nothing to compile.
"""

import functools
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.ops.kernels import Spec

ARCHITECTURES = (80, 90, 100)


def load_specs(operators: list[str]) -> Iterator[Spec]:
    """Yields the specs of the named operators, or of all."""
    for path in sorted(Path(__file__).parent.glob("specs_*.py")):
        if not operators or path.stem.removeprefix("specs_") in operators:
            yield from importlib.import_module(f"tests.ops.{path.stem}").specs()


def compile_spec(spec: Spec, architecture: int) -> dict[str, object]:
    """Compiles one kernel and returns the sizes of what came out, or the error.

    Returns:
        {"name", "arch", "ptx": characters, "cubin": bytes, "shared": bytes of shared memory, "error": text or None}.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    result: dict[str, object] = {"name": spec.name, "arch": architecture, "ptx": 0, "cubin": 0, "error": None}
    try:
        unknown = set(spec.signature) ^ {name for name in names if name not in spec.constexprs}
        if unknown:
            raise ValueError(f"signature and arguments differ in {sorted(unknown)}")
        signature = {name: spec.signature.get(name, "constexpr").partition(":")[0] for name in names}
        attributes = {
            (names.index(name),): [["tt.divisibility", 16]] for name, kind in spec.signature.items() if ":16" in kind
        }
        source = ASTSource(spec.kernel, signature, spec.constexprs, attributes)
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        result |= {"ptx": len(compiled.asm["ptx"]), "cubin": len(compiled.asm["cubin"])}
        result["shared"] = compiled.metadata.shared
    except Exception as error:  # one kernel that fails must not hide the others: the caller fails on the text
        result["error"] = f"{type(error).__name__}: {error}"
    return result


@functools.cache
def specs_by_name() -> dict[str, Spec]:
    return {spec.name: spec for spec in load_specs([])}


def compile_named(name: str) -> list[dict[str, object]]:
    """Compiles one kernel for every architecture; takes a name, since kernels do not travel between processes."""
    return [compile_spec(specs_by_name()[name], architecture) for architecture in ARCHITECTURES]


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 leaves nothing to compile: unset it.")
    names = [spec.name for spec in load_specs(sys.argv[1:])]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=multiprocessing.get_context("spawn")) as pool:
        results = [result for results in pool.map(compile_named, names) for result in results]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
