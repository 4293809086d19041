"""Writes what the image installs: the package's dependencies and chosen extras, at the versions of requirements.lock.

Reads pyproject.toml and requirements.lock beside this file or in the folder above it. It runs before anything is
installed, so it uses the standard library only; which versions fit together is pip's to check.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXTRAS_OF_A_PACKAGE = re.compile(r"\[[^\]]*\]")


def requirements(pyproject: dict, extras: list[str]) -> list[str]:
    """Returns the requirements of the package, of what builds it, and of some extras.

    Args:
        pyproject: the parsed pyproject.toml.
        extras: names of its optional dependencies.

    Raises:
        ValueError: the package has no such extra.
    """
    project = pyproject["project"]
    known = project["optional-dependencies"]
    for name in extras:
        if name not in known:
            raise ValueError(f"EXTRAS names {name!r}; pyproject.toml has the extras {', '.join(sorted(known))}.")
    wanted = [*pyproject["build-system"]["requires"], *project["dependencies"]]
    wanted += [requirement for name in extras for requirement in known[name]]
    return list(dict.fromkeys(wanted))


def constraints(lock: str) -> list[str]:
    """Returns the lines of a lock file as pip takes constraints: without comments, and without extras of a package."""
    lines = [line.strip() for line in lock.splitlines()]
    return [EXTRAS_OF_A_PACKAGE.sub("", line, count=1) for line in lines if line and not line.startswith("#")]


def main(arguments: list[str] | None = None) -> int:
    """Writes requirements.txt and constraints.txt into a folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where requirements.txt and constraints.txt go")
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml")
    options = parser.parse_args(arguments)
    source = HERE if (HERE / "pyproject.toml").exists() else HERE.parent
    try:
        wanted = requirements(tomllib.loads((source / "pyproject.toml").read_text("utf-8")), options.extras)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    held = constraints((source / "requirements.lock").read_text("utf-8"))
    (options.folder / "constraints.txt").write_text("".join(f"{line}\n" for line in held), "utf-8")
    (options.folder / "requirements.txt").write_text("".join(f"{line}\n" for line in wanted), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
