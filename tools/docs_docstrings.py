"""Docstrings of this repository as mkdocstrings reads them: an extension of griffe. The site itself is in docs_site.py.

Two things of the house style are not Google's: `height, width: in pixels` describes several arguments in one line, and
brackets such as `owner/repo[@revision][/path]` are text, not links of Markdown.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Attributes|Yields|Returns|Raises|Examples?):\s*$")
GROUP = re.compile(r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+):(?P<text>.*)$")
SIDE_BY_SIDE = re.compile(r"(?<=\])(?=\[)")


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = prepared(obj.docstring.value)


def prepared(docstring: str) -> str:
    """Returns a docstring in which every argument has a line of its own, and brackets are no links."""
    lines, described = [], False
    rest = docstring.splitlines()
    while rest:
        line = rest.pop(0)
        if SECTION.match(line):
            described = line.startswith(("Args", "Attributes"))
        elif line.strip() and not line.startswith(" "):
            described = False
        group = GROUP.match(line) if described else None
        more = []
        while group and rest and rest[0].startswith("     "):
            more.append(rest.pop(0))
        if group:
            for name in group["names"].split(", "):
                lines += [f"    {name}:{group['text']}", *more]
        else:
            lines.append(line)
    parts = re.split(r"(`[^`]*`)", "\n".join(lines))
    return "".join(part if part.startswith("`") else SIDE_BY_SIDE.sub(r"\\", part) for part in parts)
