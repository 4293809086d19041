"""Kinds of methods. No method is here."""

import functools
from collections.abc import Callable
from typing import Any


class OnClassOrInstance:
    """A method that is called on a class, and gets the class, or on an instance, and gets that."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return functools.partial(self._function, owner if instance is None else instance)
