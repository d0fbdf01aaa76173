"""Reading one YAML file that anybody may have written: whatever is wrong with it is one sentence, soon.

PyYAML alone keeps the last of two equal keys in silence, spells out aliases of aliases without end, and answers a date
that does not exist, a list as a key or deep nesting with exceptions of many kinds.
"""

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from grace.errors import GraceError

LARGEST_FILE = 1 << 20  # bytes
DEEPEST = 32  # levels
MOST_VALUES = 100_000  # with aliases spelt out
LARGEST_INT = 2**63


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _problem(f"the key {_excerpt(key_node)} is not text; put it in quotes", key_node)
            if key in seen:
                raise _problem(f"the key `{key[:60]}` is given twice; drop one", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise _problem(f"{_excerpt(node)} is no valid {kind}; put text in quotes, or correct it", node) from None
        if isinstance(value, int) and abs(value) >= LARGEST_INT:
            raise _problem(f"{_excerpt(node)} is larger than any number here may be", node)
        return value


def _problem(text: str, node: yaml.Node) -> ConstructorError:
    return ConstructorError(None, None, text, node.start_mark)


def _excerpt(node: yaml.Node) -> str:
    """What a file says at a node, in a few characters."""
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    return repr(node.value if len(node.value) <= 40 else f"{node.value[:40]}…")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file into a dictionary.

    Raises:
        GraceError: no such file, not YAML, a key given twice or that is no text, values that do not exist, more or
            deeper values than any configuration has, or not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)  # a device has no size, and no end
        if len(text) > LARGEST_FILE:
            raise GraceError(f"{path}: is larger than {LARGEST_FILE >> 20} MiB; give a configuration file")
        values = _read(text)
    except OSError as error:
        raise GraceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except RecursionError:
        raise GraceError(f"{path}: nested too deeply; a configuration has a handful of levels") from None
    except (yaml.YAMLError, UnicodeDecodeError, AssertionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split()) or "PyYAML gives it up"
        raise GraceError(f"{path}{where}: not valid YAML ({why[:200]})") from None
    if not isinstance(values, dict):
        raise GraceError(f"{path}: holds no keys; start from the default, `grace config default`")
    return values


def _read(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}, 1) > MOST_VALUES:
            raise _problem(f"aliases stand for more than {MOST_VALUES:,} values; write out what is meant", node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, counted: dict[int, int], depth: int) -> int:
    """How many values a node holds with every alias spelt out; each is counted once and remembered."""
    if depth > DEEPEST:
        raise _problem("nested too deeply; a configuration has a handful of levels", node)
    if id(node) not in counted:
        counted[id(node)] = MOST_VALUES + 1  # while it is being counted: a node that holds itself has no end
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        held = 0 if isinstance(node, yaml.ScalarNode) else sum(_values(part, counted, depth + 1) for part in inner)
        counted[id(node)] = 1 + held
    return counted[id(node)]
