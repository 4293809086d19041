"""Runs a graph in the API format as ComfyUI does, by the rules of `contract.json`. Nodes and files are given."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Prompt = Mapping[str, Mapping[str, Any]]


class PromptError(Exception):
    """A graph that ComfyUI would not start; `kind` is a key of the contract's "validation"."""

    def __init__(self, kind: str, node: str, details: str) -> None:
        super().__init__(f"{kind}: node {node}: {details}")
        self.kind, self.node, self.details = kind, node, details


class NodeError(Exception):
    """A node raised; the text is what ComfyUI shows."""

    def __init__(self, node: str, error: Exception) -> None:
        super().__init__(str(error))
        self.node, self.kind = node, type(error)


@dataclass
class Executor:
    """One running ComfyUI.

    Attributes:
        nodes: class_type -> class.
        interrupt: the exception of the stop button.
        ran: ids of the nodes of the last run that were not cached, in order.
    """

    nodes: Mapping[str, type]
    interrupt: type[Exception]
    ran: list[str] = field(default_factory=list)
    _objects: dict[tuple[str, str], Any] = field(default_factory=dict)
    _outputs: dict[str, list[list[Any]]] = field(default_factory=dict)
    _signatures: dict[str, Any] = field(default_factory=dict)

    def run(self, prompt: Prompt, extra_pnginfo: Any = None) -> dict[str, Any]:
        """Validates and runs a prompt.

        Returns:
            The "ui" of its output nodes, by id.

        Raises:
            PromptError: it is not valid; nothing ran.
            NodeError: a node raised.
        """
        outputs = self._output_nodes(prompt)
        for node in outputs:
            self._validate(prompt, node, set())
        self.ran, shown = [], {}
        for known in list(self._outputs):
            if known not in prompt or self._signature(prompt, known) != self._signatures[known]:
                del self._outputs[known]
        with torch.inference_mode():
            for node in outputs:
                for one in self._order(prompt, node, []):
                    if one not in self._outputs:
                        shown |= self._execute(prompt, one, extra_pnginfo)
        return shown

    def result(self, node: str, slot: int = 0) -> Any:
        """Returns an output of the last run."""
        return self._outputs[node][slot][0]

    def _output_nodes(self, prompt: Prompt) -> list[str]:
        for node, entry in prompt.items():
            if entry.get("class_type") not in self.nodes:
                raise PromptError("invalid_prompt", node, f"{entry.get('class_type')} does not exist")
        found = [
            node for node, entry in prompt.items() if getattr(self.nodes[entry["class_type"]], "OUTPUT_NODE", False)
        ]
        if not found:
            raise PromptError("prompt_no_outputs", "", "")
        return found

    def _validate(self, prompt: Prompt, node: str, done: set[str]) -> None:
        if node in done:
            return
        done.add(node)
        cls, given = self.nodes[prompt[node]["class_type"]], prompt[node]["inputs"]
        types = cls.INPUT_TYPES()
        checked = inspect.signature(cls.VALIDATE_INPUTS).parameters if hasattr(cls, "VALIDATE_INPUTS") else ()
        for name, info in (types.get("required", {}) | types.get("optional", {})).items():
            if name not in given:
                if name in types.get("required", {}):
                    raise PromptError("required_input_missing", node, name)
            elif isinstance(given[name], list):
                self._validate_link(prompt, node, name, info[0])
                self._validate(prompt, given[name][0], done)
            else:
                given[name] = _value(node, name, given[name], info, listed=name not in checked)
        values = {name: given[name] for name in checked if name in given and not isinstance(given[name], list)}
        if checked and (answer := cls.VALIDATE_INPUTS(**values)) is not True:
            raise PromptError("custom_validation_failed", node, str(answer))

    def _validate_link(self, prompt: Prompt, node: str, name: str, wanted: str) -> None:
        link = prompt[node]["inputs"][name]
        returns = self.nodes[prompt[link[0]]["class_type"]].RETURN_TYPES if link[:1] and link[0] in prompt else ()
        if len(link) != 2 or not isinstance(link[1], int) or not 0 <= link[1] < len(returns):
            raise PromptError("bad_linked_input", node, f"{name}, {link}")
        if returns[link[1]] != wanted:
            raise PromptError("return_type_mismatch", node, f"{name}, {returns[link[1]]} != {wanted}")

    def _order(self, prompt: Prompt, node: str, found: list[str]) -> list[str]:
        for before in _links(prompt, node):
            self._order(prompt, before, found)
        if node not in found:
            found.append(node)
        return found

    def _signature(self, prompt: Prompt, node: str) -> Any:
        entry = prompt[node]
        cls = self.nodes[entry["class_type"]]
        plain = {name: value for name, value in entry["inputs"].items() if not isinstance(value, list)}
        changed = cls.IS_CHANGED(**plain) if hasattr(cls, "IS_CHANGED") else None
        before = [self._signature(prompt, one) for one in _links(prompt, node)]
        return entry["class_type"], repr(sorted(entry["inputs"].items(), key=str)), changed, before

    def _execute(self, prompt: Prompt, node: str, extra_pnginfo: Any) -> dict[str, Any]:
        cls, given = self.nodes[prompt[node]["class_type"]], prompt[node]["inputs"]
        types = cls.INPUT_TYPES()
        inputs = {
            name: self._outputs[value[0]][value[1]] if isinstance(value, list) else [value]
            for name, value in given.items()
            if isinstance(value, list) or name in types.get("required", {}) | types.get("optional", {})
        }
        hidden = {"PROMPT": prompt, "EXTRA_PNGINFO": extra_pnginfo, "UNIQUE_ID": node}
        inputs |= {name: [hidden[kind]] for name, kind in types.get("hidden", {}).items()}
        key = (node, prompt[node]["class_type"])
        self._objects.setdefault(key, None)
        self._objects[key] = self._objects[key] or cls()
        self.ran.append(node)
        try:
            results = list(
                _calls(getattr(self._objects[key], cls.FUNCTION), inputs, getattr(cls, "INPUT_IS_LIST", False))
            )
        except self.interrupt:
            raise
        except Exception as error:
            raise NodeError(node, error) from error
        shown = [result["ui"] for result in results if isinstance(result, dict) and "ui" in result]
        rows = [result.get("result", ()) if isinstance(result, dict) else result for result in results]
        as_list = getattr(cls, "OUTPUT_IS_LIST", [False] * len(cls.RETURN_TYPES))
        self._outputs[node] = [
            [one for row in rows for one in (row[slot] if listed else [row[slot]])]
            for slot, listed in zip(range(len(cls.RETURN_TYPES)), as_list, strict=True)
        ]
        self._signatures[node] = self._signature(prompt, node)
        return {node: {name: [one for ui in shown for one in ui[name]] for name in shown[0]}} if shown else {}


def _links(prompt: Prompt, node: str) -> list[str]:
    return [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]


def _calls(function: Callable[..., Any], inputs: Mapping[str, Sequence[Any]], whole: bool) -> Iterator[Any]:
    if whole or not inputs:
        yield function(**inputs)
        return
    for index in range(max(len(values) for values in inputs.values())):
        yield function(**{name: values[min(index, len(values) - 1)] for name, values in inputs.items()})


def _value(node: str, name: str, value: Any, info: Sequence[Any], *, listed: bool) -> Any:
    """Returns a widget's value as the node gets it."""
    kinds = {"INT": int, "FLOAT": float, "STRING": str}
    if isinstance(info[0], str) and info[0] in kinds:
        try:
            value = kinds[info[0]](value)
        except (TypeError, ValueError) as error:
            raise PromptError("invalid_input_type", node, f"{name}, {value}") from error
    options = info[1] if len(info) > 1 else {}
    if "min" in options and value < options["min"]:
        raise PromptError("value_smaller_than_min", node, f"{name}, {value}")
    if "max" in options and value > options["max"]:
        raise PromptError("value_bigger_than_max", node, f"{name}, {value}")
    if listed and not isinstance(info[0], str) and value not in info[0]:
        raise PromptError("value_not_in_list", node, f"{name}, {value}")
    return value
