"""Graphs of ComfyUI's page (version 0.4) as prompts of its API, as the page itself sends them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).parents[2] / "comfyui" / "workflows"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")


def load(name: str) -> dict[str, Any]:
    """Returns one of our example workflows."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def to_prompt(graph: Mapping[str, Any], nodes: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """Returns the prompt of a graph: widgets by name, links as [node, slot].

    `widgets_values` are in the order of INPUT_TYPES; a seed has a second one, what to do with it after a run. The page
    gives a widget that an older graph lacks its default.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    return {str(node["id"]): _entry(node, nodes[node["type"]], links) for node in graph["nodes"]}


def _entry(node: Mapping[str, Any], cls: type, links: Mapping[int, list[Any]]) -> dict[str, Any]:
    types = cls.INPUT_TYPES()
    inputs: dict[str, Any] = {}
    values = list(node.get("widgets_values", []))
    for name, info in (types.get("required", {}) | types.get("optional", {})).items():
        if isinstance(info[0], str) and info[0] not in WIDGETS:
            continue
        options = info[1] if len(info) > 1 else {}
        fallback = options.get("default", info[0][0] if not isinstance(info[0], str) else "")
        inputs[name] = values.pop(0) if values else fallback
        if options.get("control_after_generate") and values:
            values.pop(0)
    if values:
        raise AssertionError(f"{node['type']} has no widgets for {values}")
    inputs |= {one["name"]: links[one["link"]] for one in node["inputs"] if one["link"] is not None}
    return {"class_type": node["type"], "inputs": inputs}
