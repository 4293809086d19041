"""What is installed and in order here, and the command that mends what is not. Nothing is printed or installed.

The machine and the kernels are looked at in `doctor_machine.py`. This file imports no third party at its top, so that
it can speak where one is missing or broken.
"""

import importlib
import importlib.metadata
import platform
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sana import __version__

OK, ABSENT, BROKEN = "ok", "absent", "broken"  # absent: optional, and not here; broken: needed, and not in order
DISTRIBUTION = "sana-python"
NATIVE = ("torch", "torchvision")  # compiled against one another: installed does not mean that they can be imported
IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)
DEVELOPMENT = "dev"
EXTRAS = {  # what an optional extra is for
    "triton": "fused kernels on CUDA GPUs",
    "bitsandbytes": "nf4 weights, 8-bit optimisers",
    "torchao": "int8, int8-dynamic and int4 weights",
    "gradio": "the web app",
    "serve": "sana serve",
    "ray": "serving on several machines",
    "notebook": "the notebook asset/notebooks/quickstart.ipynb",
    "docs": "building the documentation site",
    "wandb": "tracking of training",
    "tensorboard": "tracking of training",
    "plot": "plots of runs and benchmarks",
    "diffusers": "diffusers' own autoencoders, comparisons",
}
GIB = 2**30
CHECK_STEPS, CHECK_SIDE = 2, 64  # of the picture that the self-check makes


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        part: "python", "packages", "extras", "devices", "kernels", "model", "hub" or "disk".
        name: what it is, unique in its part.
        state: "ok", "absent" or "broken".
        text: what was found, and why it is so.
        fix: the command that mends it, None where nothing is to do.
        data: the same as numbers and names, for programs.
    """

    part: str
    name: str
    state: str
    text: str
    fix: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything that is needed is in order; optional parts may be absent."""
        return all(finding.state != BROKEN for finding in self.findings)

    @property
    def fixes(self) -> tuple[str, ...]:
        """The commands that mend what is broken, each once."""
        return tuple(dict.fromkeys(one.fix for one in self.findings if one.state == BROKEN and one.fix))

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "version": __version__,
            "healthy": self.healthy,
            "fixes": list(self.fixes),
            "findings": [asdict(finding) for finding in self.findings],
        }


def diagnose(*, self_check: bool = True) -> Diagnosis:
    """Looks at Python, packages, devices, kernels, the bundled model, the hub's settings and disks.

    Args:
        self_check: load the bundled model and make one small picture of 2 steps; takes a few seconds.

    Returns:
        The findings. Errors are among them, none is raised.
    """
    project = read_project()
    findings = [*check_python(project), *check_packages(project), *check_extras(project)]
    torch_works = all(one.state != BROKEN for one in findings if one.name in NATIVE)
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [("hub", check_hub), ("disk", check_disk)]
    if torch_works:
        from sana.pipelines.doctor_machine import check_devices, check_kernels

        checks[:0] = [("devices", check_devices), ("kernels", check_kernels)]
        if self_check:
            checks.append(("model", check_model))
    for part, check in checks:
        findings += guarded(part, check)
    return Diagnosis(tuple(findings))


def guarded(part: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Returns what a check finds; where a package that it needs fails, that."""
    try:
        return list(check())
    except IMPORT_ERRORS as error:
        return [Finding(part, "check", BROKEN, f"cannot be looked at: {one_line(error)}")]


@dataclass(frozen=True)
class Project:
    """What this package asks for: of Python, always, and by optional extra."""

    python: str
    packages: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]


def read_project() -> Project:
    """Reads pyproject.toml beside the package, or, where it is installed without, what pip wrote down of it."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if file.is_file():
        content = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        extras = {name: tuple(wanted) for name, wanted in content["optional-dependencies"].items()}
        return Project(content["requires-python"], tuple(content["dependencies"]), extras)
    found = importlib.metadata.metadata(DISTRIBUTION)
    lines = [line.partition(";") for line in found.get_all("Requires-Dist") or ()]
    extras = {
        name: tuple(wanted.strip() for wanted, _, marker in lines if f'"{name}"' in marker)
        for name in found.get_all("Provides-Extra") or ()
    }
    always = tuple(wanted.strip() for wanted, _, marker in lines if "extra" not in marker)
    return Project(str(found["Requires-Python"]), always, extras)


def check_python(project: Project) -> Iterator[Finding]:
    """The interpreter against the range that is asked for."""
    version = platform.python_version()
    low = tuple(int(part) for part in project.python.removeprefix(">=").split(".")[:2])
    fits = sys.version_info[:2] >= low
    yield Finding(
        "python",
        "version",
        OK if fits else BROKEN,
        f"{version} at {sys.executable}" if fits else f"{version}, and {project.python} is needed",
        None if fits else "./environment_setup.sh",
        {"version": version, "executable": sys.executable, "needed": project.python, "system": platform.platform()},
    )


def installed(requirement: str) -> tuple[str, str | None, bool]:
    """Returns (name, installed version or None, whether it is in range) of a line such as "torch>=2.11,<2.12".

    Raises:
        ImportError: packaging is missing, which transformers brings.
    """
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return wanted.name, None, False
    return wanted.name, version, wanted.specifier.contains(version, prereleases=True)


def check_packages(project: Project) -> Iterator[Finding]:
    """What is always needed: installed, in range, and for compiled packages importable."""
    try:
        import packaging  # noqa: F401  every check below reads ranges with it
    except ImportError as error:
        yield Finding("packages", "packaging", BROKEN, one_line(error), "pip install packaging")
        return
    for requirement in project.packages:
        name, version, fits = installed(requirement)
        fix = f"pip install '{requirement}'"
        data = {"version": version, "needed": requirement}
        if version is None:
            yield Finding("packages", name, BROKEN, f"not installed; {requirement} is needed", fix, data)
        elif not fits:
            yield Finding("packages", name, BROKEN, f"{version} is installed; {requirement} is needed", fix, data)
        elif name in NATIVE and (problem := import_problem(name)):
            fix = "pip install --force-reinstall " + " ".join(f"'{one}'" for one in native_requirements(project))
            yield Finding("packages", name, BROKEN, f"{version} cannot be imported: {problem}", fix, data)
        else:
            yield Finding("packages", name, OK, version, None, data)


def native_requirements(project: Project) -> Sequence[str]:
    """Returns the requirement lines of the packages that must fit one another."""
    return [one for one in project.packages if installed(one)[0] in NATIVE]


def import_problem(name: str) -> str | None:
    """Returns why a package cannot be imported, None where it can."""
    try:
        importlib.import_module(name)
    except IMPORT_ERRORS as error:
        return one_line(error)
    return None


def check_extras(project: Project) -> Iterator[Finding]:
    """The optional extras, and the command that installs each one that is not here."""
    for extra, requirements in project.extras.items():
        if extra == DEVELOPMENT:
            continue
        try:
            found = [installed(one) for one in requirements]
        except ImportError:
            return  # said by check_packages
        purpose = EXTRAS.get(extra, "")
        lacking = [
            requirement for requirement, (_, _, fits) in zip(requirements, found, strict=True) if not fits
        ]  # fmt: skip
        versions = ", ".join(f"{name} {version}" for name, version, _ in found if version)
        text = f"needs {', '.join(lacking)}" + (f" (here: {versions})" if versions else "") if lacking else versions
        yield Finding(
            "extras",
            extra,
            ABSENT if lacking else OK,
            f"{text}; {purpose}" if purpose else text,
            f"pip install '{DISTRIBUTION}[{extra}]'" if lacking else None,
            {"versions": {name: version for name, version, _ in found}, "purpose": purpose},
        )


def check_model() -> Iterator[Finding]:
    """The bundled model: it is there, and makes a picture of numbers that are finite."""
    from sana.pipelines.options import BUNDLED_MODEL, bundled

    folder = bundled(BUNDLED_MODEL)
    data: dict[str, Any] = {"path": str(folder)}
    if not (folder / "model.safetensors").is_file():
        text = f"{BUNDLED_MODEL} is not here; give every command a --model_path, or restore it"
        checkout = (Path(__file__).parents[2] / ".git").exists()
        fix = f"git checkout -- {BUNDLED_MODEL}" if checkout else None
        yield Finding("model", "bundled", BROKEN if checkout else ABSENT, text, fix, data)
        return
    try:
        seconds = make_picture(folder)
    except (*IMPORT_ERRORS, ValueError, TypeError, KeyError, MemoryError) as error:
        text = f"{folder} made no picture: {type(error).__name__}: {one_line(error)}"
        yield Finding("model", "bundled", BROKEN, text, f"git checkout -- {BUNDLED_MODEL}", data)
        return
    what = f"a picture of {CHECK_SIDE} x {CHECK_SIDE} pixels in {CHECK_STEPS} steps"
    text = f"{folder}: loaded in {seconds[0]:.1f} s, {what} made in {seconds[1]:.1f} s"
    yield Finding("model", "bundled", OK, text, None, data | dict(zip(("load_s", "make_s"), seconds, strict=True)))


def make_picture(folder: Path) -> tuple[float, float]:
    """Loads a model and makes one small picture; returns the seconds of both."""
    from sana.pipelines.sana_pipeline import SanaPipeline

    start = time.perf_counter()
    pipeline = SanaPipeline.from_pretrained(folder)
    _ = pipeline.text_encoder, pipeline.autoencoder  # loaded when first asked for
    loaded = time.perf_counter()
    pipeline(
        "a red circle", height=CHECK_SIDE, width=CHECK_SIDE, num_inference_steps=CHECK_STEPS, seed=0,
        use_resolution_binning=False, progress_bar=False,
    )  # fmt: skip
    return loaded - start, time.perf_counter() - loaded


def check_hub() -> Iterator[Finding]:
    """Where weights come from and are kept. Nothing is asked over the network."""
    from sana.utils.hub import hub_settings

    settings = hub_settings()
    offline = "offline (HF_HUB_OFFLINE is set): only what is cached" if settings["offline"] else "online"
    yield Finding("hub", "access", OK, f"{offline}; {settings['endpoint']}", None, settings)
    token = "there is one" if settings["token"] else "none; gated weights need one: hf auth login"
    yield Finding("hub", "token", OK, token, None, {"token": settings["token"]})
    yield Finding("hub", "cache", OK, str(settings["cache"]), None, {"cache": settings["cache"]})


def check_disk() -> Iterator[Finding]:
    """Free space where weights are kept and pictures go."""
    from sana.utils.hub import hub_settings

    for name, folder in (("weights", Path(str(hub_settings()["cache"]))), ("pictures", Path.cwd())):
        free = free_bytes(folder)
        yield Finding("disk", name, OK, f"{amount(free)} free at {folder}", None, {"path": str(folder), "free": free})


def amount(size: int) -> str:
    """Returns bytes in words."""
    return f"{size / GIB:.1f} GiB"


def free_bytes(folder: Path) -> int:
    """Returns the free space of the disk that a folder is on, or would be on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def one_line(error: BaseException) -> str:
    """Returns an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
