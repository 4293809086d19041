"""Runs a notebook and stores what its cells show in the file itself, so that it can be read without running it.

    python tools/make_notebook.py            runs asset/notebooks/quickstart.ipynb and rewrites it (under a minute)
    python tools/make_notebook.py --check    runs nothing; says whether the stored outputs belong to the cells

Needs `pip install nbclient ipykernel`. The kernel is the Python that runs this. Nothing that names this machine is
stored: a path in an output, or a message on standard error, is a failure. Exit codes: 0 done, 1 a cell failed or stored
outputs are out of step, 2 wrong usage.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "asset/notebooks/quickstart.ipynb"
SECONDS = 300  # a cell may take
HASH_KEY = "sana_sources"  # in the notebook's metadata
ABSOLUTE = re.compile(r"(?<![\w/.:~])/(?:home|root|tmp|usr|var|opt|mnt|work|Users|private|content)/|[A-Z]:\\")


def source_hash(notebook: Mapping[str, Any]) -> str:
    """Returns 64 hexadecimal digits over the cells in order: kind, id, tags and source. Outputs do not count."""
    cells = [
        [cell["cell_type"], cell["id"], cell["metadata"].get("tags", []), cell["source"]] for cell in notebook["cells"]
    ]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def execute(notebook: Any, folder: Path, environment: Mapping[str, str] | None = None) -> Any:
    """Runs every cell in a fresh kernel of this very Python, and stores the outputs in the notebook.

    Args:
        notebook: as nbformat reads it; changed.
        folder: where the kernel starts, as if the notebook lay there.
        environment: of the kernel, beside this process's own.

    Returns:
        The notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory(prefix="sana-notebook-") as scratch:
        spec = Path(scratch, "kernels", "python3")
        spec.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec.joinpath("kernel.json").write_text(
            json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}), encoding="utf-8"
        )
        specs = KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False)
        manager = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=specs, connection_file=str(Path(scratch, "connection.json"))
        )
        if os.name == "posix":  # files in a folder of our own instead of open ports
            manager.transport, manager.ip = "ipc", str(Path(scratch, "kernel"))
        own = {"IPYTHONDIR": scratch, "JUPYTER_RUNTIME_DIR": scratch, "MPLCONFIGDIR": scratch}
        client = NotebookClient(
            notebook, km=manager, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}, record_timing=False
        )
        client.execute(cleanup_kc=True, env={**os.environ, **own, **(environment or {})})
    return notebook


def outputs(notebook: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the outputs of all cells, in order."""
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def problems(notebook: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with a notebook that is to be stored, one sentence each; an empty list for a good one."""
    found = []
    if notebook["metadata"].get(HASH_KEY) != source_hash(notebook):
        found.append("The stored outputs are of other cells; run tools/make_notebook.py.")
    for cell in notebook["cells"]:
        shown = cell.get("outputs", [])
        if "pictures" in cell["metadata"].get("tags", []) and not any(
            "image/jpeg" in one.get("data", {}) for one in shown
        ):
            found.append(f"The cell {cell['id']} is tagged as one that shows pictures, and shows none.")
        for one in shown:
            if one["output_type"] == "error" or one.get("name") == "stderr":
                text = one.get("evalue") or "".join(one.get("text", ""))
                found.append(f"The cell {cell['id']} complains: {text.strip().splitlines()[-1:]}.")
            text = json.dumps({name: value for name, value in one.items() if name != "data"})
            text += json.dumps({kind: value for kind, value in one.get("data", {}).items() if "image" not in kind})
            if str(ROOT) in text or str(Path.home()) + "/" in text or ABSOLUTE.search(text):
                found.append(f"The cell {cell['id']} shows a path of this machine: {text[:200]}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or checks the notebook; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="?", type=Path, default=QUICKSTART, help="(default: the quickstart)")
    parser.add_argument("--check", action="store_true", help="run nothing, compare")
    options = parser.parse_args(arguments)
    if not options.notebook.is_file():
        parser.error(f"{options.notebook} is not there")
    try:
        import nbformat
        from nbclient.exceptions import CellExecutionError
    except ImportError as error:
        print(f"{error.name} is missing: pip install nbclient ipykernel", file=sys.stderr)
        return 1
    notebook = nbformat.read(options.notebook, as_version=4)
    if not options.check:
        try:
            execute(notebook, options.notebook.parent, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        except CellExecutionError as error:
            print(error, file=sys.stderr)
            return 1
        for cell in notebook["cells"]:
            cell["metadata"].pop("execution", None)
        notebook["metadata"][HASH_KEY] = source_hash(notebook)
        notebook["metadata"]["language_info"] = {"name": "python"}
    found = problems(notebook)
    for line in found:
        print(line, file=sys.stderr)
    if not found and not options.check:
        nbformat.write(notebook, options.notebook)
        print(f"{options.notebook}: {options.notebook.stat().st_size / 1000:.0f} kB")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
