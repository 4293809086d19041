"""Tables from a name to an object that is imported on first use. No table is defined here: each lives with its room."""

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any


class UnknownNameError(ValueError):
    """A name that a table does not have. The message lists the known names and the nearest one."""


def suggest(name: str, known: list[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the nearest known name, or the empty string when none is near."""
    lowered = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


class Registry(Mapping[str, Any]):
    """A read-only table `name -> "module:attribute"`; reading a name imports the module and returns the attribute.

    Args:
        kind: what the table holds, for messages ("transformer", "sampler").
        targets: name -> "module:attribute". Several names may point to one object.
    """

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self.kind = kind
        self._targets = dict(targets)
        for name, target in self._targets.items():
            module, _, attribute = target.partition(":")
            if not module or not attribute:
                raise ValueError(f"{kind} {name!r} must point to 'module:attribute', not to {target!r}.")

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self.target(name).partition(":")
        return getattr(import_module(module), attribute)

    def target(self, name: str) -> str:
        """Returns the "module:attribute" text of a name without importing anything.

        Raises:
            UnknownNameError: the table has no such name.
        """
        if name not in self._targets:
            known = ", ".join(sorted(self._targets)) or "none"
            raise UnknownNameError(
                f"Unknown {self.kind} {name!r}.{suggest(str(name), list(self._targets))} Known names: {known}."
            )
        return self._targets[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._targets else default

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {len(self)} names)"
