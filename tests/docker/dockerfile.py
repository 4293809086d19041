"""A Dockerfile as data: instructions with their flags, words and variables; what .dockerignore leaves of a folder."""

import json
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = (
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "SHELL",
    "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
)  # fmt: skip
HEREDOC = re.compile(r"<<(-?)([\"']?)(\w+)\2")
VARIABLE = re.compile(r"(\\\$)|\$(?:(\w+)|\{(\w+)(?::([-+])([^}]*))?\})")


class DockerfileError(ValueError):
    """A Dockerfile that Docker would refuse."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: in capitals.
        value: everything after the name and its flags, continued lines joined.
        flags: `--name=value` before the value, in their order; a flag may stand more than once.
        heredocs: bodies of `<<EOF` by their word.
        line: where it begins, from 1.
    """

    name: str
    value: str
    flags: tuple[tuple[str, str], ...] = ()
    heredocs: dict[str, str] = field(default_factory=dict)
    line: int = 0

    def words(self) -> list[str] | None:
        """Returns the words of the exec form, `["a", "b"]`; None for the shell form."""
        if not self.value.startswith("["):
            return None
        try:
            words = json.loads(self.value)
        except json.JSONDecodeError:
            return None  # as Docker does: what is no JSON is a line for the shell
        return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None

    def flag(self, name: str) -> list[str]:
        """Returns the values of a flag."""
        return [value for key, value in self.flags if key == name]


def parse(text: str) -> list[Instruction]:
    """Returns the instructions of a Dockerfile.

    Raises:
        DockerfileError: an unknown instruction, an unfinished line or heredoc, or no FROM at the start.
    """
    lines, instructions, index = text.splitlines(), [], 0
    while index < len(lines):
        start = index
        if not lines[index].strip() or lines[index].lstrip().startswith("#"):
            index += 1
            continue
        parts: list[str] = []
        while True:
            if index >= len(lines):
                raise DockerfileError(f"line {start + 1}: the last line goes on, but there is no more")
            line, index = lines[index], index + 1
            if line.lstrip().startswith("#") or (parts and not line.strip()):
                continue  # comments and empty lines between continued lines are left out
            more = re.search(r"\\[ \t]*$", line)
            parts.append(line[: more.start()] if more else line)
            if not more:
                break
        name, _, rest = "".join(parts).strip().partition(" ")
        heredocs: dict[str, str] = {}
        for tabs, _, word in HEREDOC.findall(rest) if name.upper() in ("RUN", "COPY", "ADD") else ():
            body: list[str] = []
            while index < len(lines) and (lines[index].lstrip("\t") if tabs else lines[index]) != word:
                body.append(lines[index].lstrip("\t") if tabs else lines[index])
                index += 1
            if index == len(lines):
                raise DockerfileError(f"line {start + 1}: <<{word} is not closed")
            index += 1
            heredocs[word] = "".join(f"{one}\n" for one in body)
        instructions.append(_instruction(name.upper(), rest, heredocs, start + 1))
    if not instructions or instructions[0].name not in ("FROM", "ARG"):
        raise DockerfileError("a Dockerfile begins with FROM, or with ARG before it")
    return instructions


def _instruction(name: str, rest: str, heredocs: dict[str, str], line: int) -> Instruction:
    """Takes the flags off an instruction."""
    if name not in KNOWN:
        raise DockerfileError(f"line {line}: unknown instruction {name}")
    flags, rest = [], rest.strip()
    while name != "CMD" and (found := re.match(r"--([\w-]+)(?:=(\S+))?(?:\s+|$)", rest)):
        flags.append((found[1], found[2] or ""))
        rest = rest[found.end() :]
    if not rest:
        raise DockerfileError(f"line {line}: {name} says nothing")
    return Instruction(name, rest, tuple(flags), heredocs, line)


def substitute(text: str, variables: dict[str, str]) -> str:
    """Replaces `$name`, `${name}`, `${name:-other}` and `${name:+other}`, as Docker does except in RUN and CMD."""

    def one(found: re.Match[str]) -> str:
        if found[1]:
            return "$"
        value, kind, other = variables.get(found[2] or found[3], ""), found[4], found[5]
        if kind == "-":
            return value or other
        if kind == "+":
            return other if value else ""
        return value

    return VARIABLE.sub(one, text)


def pairs(instruction: Instruction, variables: dict[str, str]) -> dict[str, str]:
    """Returns what ENV, LABEL or ARG sets. All values see the variables as they were before the instruction."""
    words = shlex.split(substitute(instruction.value, variables))
    if instruction.name == "ENV" and words and "=" not in words[0]:
        return {words[0]: " ".join(words[1:])}  # the old form: ENV name value
    return {
        word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word or instruction.name != "ARG"
    }


def context_files(root: Path, ignore: str, skip: tuple[str, ...] = (".git",)) -> list[str]:
    """Returns the files that Docker sends to a build, relative to the root, by the rules of a .dockerignore.

    Args:
        root: the folder of the build.
        ignore: text of its .dockerignore.
        skip: folders at the top that are not walked, because no rule takes them back.
    """
    rules = []
    for line in ignore.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            takes_back = pattern.startswith("!")
            rules.append((_pattern(pattern.lstrip("!").strip("/")), takes_back))
    kept = []
    for folder, folders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        if relative == Path():
            folders[:] = [name for name in folders if name not in skip]
        kept += [path for name in files if not _ignored(path := (relative / name).as_posix(), rules)]
    return sorted(kept)


def _ignored(path: str, rules: list[tuple[re.Pattern[str], bool]]) -> bool:
    """The last rule that matches a path or a folder above it decides."""
    parts = path.split("/")
    parents = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    ignored = False
    for pattern, takes_back in rules:
        if any(pattern.fullmatch(parent) for parent in parents):
            ignored = not takes_back
    return ignored


def _pattern(text: str) -> re.Pattern[str]:
    """Go's filepath.Match, with `**` for any number of folders."""
    out, index = "", 0
    while index < len(text):
        if text.startswith("**/", index):
            out, index = out + "(?:.*/)?", index + 3
        elif text.startswith("**", index):
            out, index = out + ".*", index + 2
        elif text[index] == "*":
            out, index = out + "[^/]*", index + 1
        elif text[index] == "?":
            out, index = out + "[^/]", index + 1
        elif text[index] == "[":
            end = text.index("]", index)
            out, index = out + text[index : end + 1], end + 1
        else:
            index += text[index] == "\\"
            out, index = out + re.escape(text[index]), index + 1
    return re.compile(out)
