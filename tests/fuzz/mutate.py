"""Random damage to files: JSON with one node another, bytes cut and changed, a weight file's header rewritten."""

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None, True, 0, -1, 1, 7, 2**40, 1.5, float("nan"), "", "x", "a" * 5000, "\x00", "../../x.safetensors",
    "/etc/passwd",
    "llava", "qwen2_vl", "bfloat16", [], {}, [None], ["x"], {"x": 1}, [[]], {"type": "int"}, "model.safetensors",
]  # fmt: skip
KEYS = ("x", "auto_map", "quantization_config", "text_config", "files", "")


def changed(draw: random.Random, value: Any) -> Any:
    """A JSON value with one node, somewhere inside, another."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        value, key = dict(value), draw.choice(list(value))
        way = draw.randrange(8)
        if way == 0:
            del value[key]
        elif way == 1:
            value[draw.choice(KEYS)] = deepcopy(draw.choice(VALUES))
        else:
            value[key] = changed(draw, value[key])
        return value
    if isinstance(value, list) and value and draw.random() < 0.6:
        value, at = list(value), draw.randrange(len(value))
        value[at] = changed(draw, value[at])
        return value
    return deepcopy(draw.choice(VALUES))


def damage(draw: random.Random, path: Path) -> None:
    """Break one file: JSON, JSON lines and safetensors by what they say, or any by its bytes."""
    way = draw.random()
    if way < 0.05:
        path.unlink()
    elif path.suffix == ".safetensors" and way < 0.5:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        text = json.dumps(changed(draw, json.loads(data[8 : 8 + size]))).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    elif path.suffix == ".json" and way > 0.2:
        value = json.loads(path.read_text())
        for _ in range(draw.choice([1, 1, 2])):
            value = changed(draw, value)
        path.write_text(json.dumps(value))
    elif path.suffix == ".jsonl" and way > 0.2:
        lines = path.read_text().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(changed(draw, json.loads(lines[at])))
        path.write_text("\n".join(lines))
    else:
        data = bytearray(path.read_bytes())
        for _ in range(draw.choice([1, 1, 3])):
            at = draw.randrange(min(len(data), draw.choice([100, len(data) or 1])) + 1)
            data[at : at + draw.choice([0, 1, 20])] = draw.choice([b"", b"\xff", b"{", b"]", b"\x00", b"NaN", b"{{ x"])
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data) + 1)]
        path.write_bytes(bytes(data))
