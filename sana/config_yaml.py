"""The text forms of a config: YAML as version 1.2 means it, and "--key=value". What keys mean is not known here.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is false and `1:30` is the number 90.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sana.config_checks import ConfigError

NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|^\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2 scalars that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the base class refuses it
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}  # not inherited: they are the rules of 1.1
for _tag, _pattern, _first in (
    ("null", NULL, ["~", "n", "N", ""]),
    ("bool", BOOL, list("tTfF")),
    ("int", INT, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"^<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def parse_yaml(text: str, source: str) -> Any:
    """Returns the value of a YAML text.

    Args:
        text: YAML.
        source: what a message calls the text ("configs/a.yaml", "--train.seed").

    Raises:
        ConfigError: the text is no YAML; line and column are named.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{source}: not valid YAML{where}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: not valid YAML: it is nested too deeply.") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, no YAML, empty, or holds something other than a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"Cannot read the config file {str(path)!r}: {reason}.") from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: a config file holds a mapping of sections (data, model, ...), not {content!r:.60}.")
    return content


def split_overrides(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (key, text) of "--key=text" and "--key", "text"; a flag without a text is "true".

    Raises:
        ConfigError: something else than a flag stands where a flag belongs.
    """
    pairs: list[tuple[str, str]] = []
    items = list(overrides)
    while items:
        flag = items.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            raise ConfigError(f"Override {flag!r} is not of the form --section.key=value.")
        key, given, text = flag[2:].partition("=")
        if not given:
            text = items.pop(0) if items and not items[0].startswith("--") else "true"
        pairs.append((key, text))
    return pairs
