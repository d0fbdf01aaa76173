"""Nested values as one level of names."""

from collections.abc import Iterator
from typing import Any


def flatten(value: Any, name: str = "", *, lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dictionaries with its dotted name: `{"a": {"b": [1, 2]}}` -> `("a.b", [1, 2])`.

    With `lists` their elements are leaves too: `("a.b[0]", 1), ("a.b[1]", 2)`. Empty containers are values.
    """
    if isinstance(value, dict) and value:
        for key in value:
            yield from flatten(value[key], f"{name}.{key}" if name else str(key), lists=lists)
    elif lists and isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from flatten(item, f"{name}[{index}]", lists=lists)
    else:
        yield name, value
