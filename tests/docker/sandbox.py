"""A stand-in for a container engine: runs the lines of a Dockerfile in a copy-on-write image of this machine.

The base image cannot be pulled without a registry, so this machine's Debian stands for it: an overlay over its root
folder takes every change, in a mount namespace of its own. RUN lines run as they are written, as root, with the
package manager; the machine itself stays as it is. It needs root and a kernel with overlayfs.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

from tests.docker.dockerfile import Instruction, context_files, pairs, substitute

FOREIGN = ("root", "tmp", "home", "work", "opt")  # of this machine, and not of an image
NETWORK = ("PIP_", "SSL_", "REQUESTS_", "HTTP_", "HTTPS_", "NO_PROXY", "http_", "https_", "no_proxy")
USERS = """
passwd, group, shadow = "ubuntu:x:1000:1000::/home/ubuntu:/bin/bash", "ubuntu:x:1000:", "ubuntu:!:::::::"
users = [line.split(":") for line in open("/etc/passwd")]
people = {user[0] for user in users if 1000 <= int(user[2]) < 60000}
for name, entry in {"passwd": passwd, "group": group, "shadow": shadow}.items():
    kept = [line for line in open(f"/etc/{name}").read().splitlines() if line.split(":")[0] not in people]
    open(f"/etc/{name}", "w").write("".join(f"{line}\\n" for line in [*kept, entry]))
"""  # the people of this machine make room for the one of Ubuntu's image
MOUNT = """set -e
mount -t overlay image -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
for name in dev sys; do mount --rbind "/$name" "$1/root/$name"; done
mount -t proc proc "$1/root/proc"
for name in {foreign}; do
  if [ -d "$1/root/$name" ]; then mount --bind "$1/own/$name" "$1/root/$name"; fi
done
mkdir -p "$1/root/root/.cache/pip"
mount --bind "$2" "$1/root/root/.cache/pip"
echo ready
exec sleep infinity
"""


def missing() -> str | None:
    """Returns what this machine lacks to hold a sandbox, None if nothing."""
    if os.geteuid() != 0:
        return "needs a container engine (docker), or root"
    for program in ("unshare", "nsenter", "chroot", "apt-get"):
        if shutil.which(program) is None:
            return f"needs a container engine (docker), or {program}: apt-get install util-linux coreutils apt"
    try_it = "d=$(mktemp -d); mkdir $d/u $d/w $d/m; mount -t overlay o -o lowerdir=/,upperdir=$d/u,workdir=$d/w $d/m"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", try_it], capture_output=True, text=True, check=False)
    return f"needs a container engine (docker), or overlayfs: {done.stderr.strip()}" if done.returncode else None


class Sandbox:
    """An image in the making, and then its container.

    Args:
        folder: for its files; removed by `close`.
        context: the folder of the build.
        downloads: pip's cache, which outlives the sandbox as a cache mount outlives a build.
    """

    def __init__(self, folder: Path, context: Path, downloads: Path) -> None:
        self.folder, self.context = folder, context
        self.root = folder / "root"
        self.variables: dict[str, str] = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.arguments: dict[str, str] = {}
        self.directory, self.user = "/", "0"
        for name in ("upper", "work", "root", *(f"own/{name}" for name in FOREIGN)):
            (folder / name).mkdir(parents=True)
        (folder / "own/tmp").chmod(0o1777)
        (folder / "own/root").chmod(0o700)
        downloads.mkdir(parents=True, exist_ok=True)
        script = MOUNT.replace("{foreign}", " ".join(FOREIGN))
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, "sh", str(folder), str(downloads)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"the sandbox cannot be made: {self._holder.stderr.read()}")
        try:
            self._python(USERS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the sandbox; its mounts end with its last process."""
        self._holder.kill()
        self._holder.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def build(self, instructions: list[Instruction]) -> None:
        """Carries the instructions out, as `docker build` does."""
        ignore = (self.context / ".dockerignore").read_text(encoding="utf-8")
        for instruction in instructions:
            known = self.arguments | self.variables
            value = substitute(instruction.value, known)
            if instruction.name == "RUN":
                words = instruction.words() or ["/bin/sh", "-c", instruction.value]
                done = subprocess.run(
                    self.command(words, self.arguments | carried()), capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, f"line {instruction.line}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
            elif instruction.name == "COPY":
                self._copy(value.split(), context_files(self.context, ignore))
            elif instruction.name == "ENV":
                self.variables |= pairs(instruction, known)
            elif instruction.name == "ARG":
                self.arguments |= pairs(instruction, known)
            elif instruction.name == "WORKDIR":
                self.directory = os.path.join(self.directory, value)
                self._python(f"import os; os.makedirs({self.directory!r}, exist_ok=True)")
            elif instruction.name == "USER":
                self.user = value

    def _copy(self, words: list[str], files: list[str]) -> None:
        """Copies files of the context; a folder's content goes into the target, as in Docker."""
        *sources, target = words
        target = os.path.join(self.directory, target)
        into_folder = len(sources) > 1 or words[-1].endswith(("/", "."))
        staged = self.folder / "own/tmp/copied"
        for source in sources:
            source = os.path.normpath(source)
            inside = [path for path in files if source in (".", path) or path.startswith(f"{source}/")]
            assert inside, f"COPY {source}: no such file in the build's folder"
            for path in inside:
                name = (
                    os.path.relpath(path, source) if path != source else os.path.basename(path) if into_folder else ""
                )
                to = staged / name if name else staged
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.context / path, to)
        self._python(
            "import os, shutil\n"
            f"source, target = '/tmp/copied', {target!r}\n"
            "os.makedirs(os.path.dirname(target.rstrip('/')) or '/', exist_ok=True)\n"
            "if os.path.isdir(source): shutil.copytree(source, target, dirs_exist_ok=True); shutil.rmtree(source)\n"
            "else: shutil.move(source, target)\n"
        )

    def _python(self, code: str) -> None:
        """Runs Python in the sandbox as root."""
        subprocess.run([*self._enter("0"), "/usr/bin/python3", "-c", code], check=True, timeout=120)

    def _enter(self, user: str, pids: bool = False) -> list[str]:
        """Returns the words that run what follows in the sandbox; `pids` makes it process 1."""
        alone = ["unshare", "--pid", "--fork", "--kill-child"] if pids else []
        user = user if ":" in user else f"{user}:{user}"
        mounts = f"--mount=/proc/{self._holder.pid}/ns/mnt"
        return [*alone, "nsenter", mounts, "chroot", f"--userspec={user}", "--groups=", str(self.root)]

    def command(
        self, words: list[str], more: dict[str, str] | None = None, process_1: bool = False, user: str = ""
    ) -> list[str]:
        """Returns the words that run a command with the image's user, folder and variables, and with no others."""
        variables = [f"{name}={value}" for name, value in (self.variables | (more or {})).items()]
        there = ["/usr/bin/env", "-i", f"--chdir={self.directory}", *variables, *words]
        return [*self._enter(user or self.user, process_1), *there]


def carried() -> dict[str, str]:
    """Returns how this machine reaches package registries; a build gets it from Docker's configuration."""
    return {name: value for name, value in os.environ.items() if name.startswith(NETWORK)}


def child(process: subprocess.Popen) -> int | None:
    """Returns the process that a running `unshare --fork` started: process 1 of the container."""
    words = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(words[0]) if words else None


def stop(process: subprocess.Popen, seconds: float = 60) -> int:
    """Does what `docker stop` does: SIGTERM to process 1; returns the container's exit code."""
    first = child(process)
    assert first is not None
    os.kill(first, signal.SIGTERM)
    return process.wait(timeout=seconds)
