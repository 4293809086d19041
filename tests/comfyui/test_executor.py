"""The tests' executor keeps every rule that the contract records, on nodes made for it."""

from typing import Any

import pytest
import torch

from tests.comfyui.executor import Executor, NodeError, PromptError
from tests.comfyui.stand_ins import CONTRACT


class Source:
    RETURN_TYPES, FUNCTION = ("INT",), "make"
    made = 0

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"number": ("INT", {"min": 1, "max": 9}), "word": (["a", "b"],)},
            "optional": {"extra": ("STRING", {"default": "x"})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, extra: str = "x") -> bool | str:  # noqa: N802
        return extra != "bad" or "bad it is"

    def make(self, number: int, word: str, extra: str = "x") -> tuple[int]:
        assert torch.is_inference_mode_enabled()
        self.made += 1
        if word == "b":
            raise RuntimeError("b is broken")
        return (number * 10 + self.made,)


class Sink:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "show", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        hidden = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "me": "UNIQUE_ID"}
        return {"required": {"value": ("INT",)}, "hidden": hidden}

    def show(self, value: int, prompt: Any, extra_pnginfo: Any, me: str) -> dict[str, Any]:
        return {"ui": {"seen": [(value, len(prompt), extra_pnginfo, me)]}}


class Words(Source):
    RETURN_TYPES = ("STRING",)


NODES = {"Source": Source, "Sink": Sink, "Words": Words}


@pytest.fixture
def executor() -> Executor:
    return Executor(NODES, KeyboardInterrupt)  # type: ignore[arg-type]


def graph(**changes: Any) -> dict[str, Any]:
    inputs = {"number": 3, "word": "a", **changes}
    return {
        "7": {"class_type": "Sink", "inputs": {"value": ["2", 0]}},
        "2": {"class_type": "Source", "inputs": inputs},
        "5": {"class_type": "Source", "inputs": {}},  # invalid, and nothing depends on it
    }


def test_nodes_run_in_order_with_hidden_inputs_and_keep_their_outputs(executor: Executor) -> None:
    assert executor.run(graph(), extra_pnginfo="page") == {"7": {"seen": [(31, 3, "page", "7")]}}
    assert executor.ran == ["2", "7"]
    assert executor.run(graph()) == {} and executor.ran == []
    assert executor.run(graph(number="4"))["7"]["seen"][0][0] == 42  # converted, the same object as before


def broken() -> dict[str, tuple[dict[str, Any], str]]:
    link: dict[str, Any] = graph()
    link["7"]["inputs"]["value"] = ["9", 0]
    kind: dict[str, Any] = graph()
    kind["2"]["class_type"] = "Words"
    missing: dict[str, Any] = graph()
    del missing["2"]["inputs"]["word"]
    return {
        "invalid_prompt": ({"1": {"class_type": "Nothing", "inputs": {}}}, "1"),
        "prompt_no_outputs": ({"2": graph()["2"]}, ""),
        "required_input_missing": (missing, "2"),
        "bad_linked_input": (link, "7"),
        "return_type_mismatch": (kind, "7"),
        "invalid_input_type": (graph(number="three"), "2"),
        "value_smaller_than_min": (graph(number=0), "2"),
        "value_bigger_than_max": (graph(number=10), "2"),
        "value_not_in_list": (graph(word="c"), "2"),
        "custom_validation_failed": (graph(extra="bad"), "2"),
    }


@pytest.mark.parametrize("kind", CONTRACT["validation"])
def test_every_rule_of_validation_bites(executor: Executor, kind: str) -> None:
    prompt, node = broken()[kind]
    with pytest.raises(PromptError) as raised:
        executor.run(prompt)
    assert (raised.value.kind, raised.value.node) == (kind, node)
    assert executor.ran == []


def test_what_a_node_raises_is_told_with_its_id(executor: Executor) -> None:
    with pytest.raises(NodeError, match="^b is broken$") as raised:
        executor.run(graph(word="b"))
    assert (raised.value.node, raised.value.kind) == ("2", RuntimeError)
