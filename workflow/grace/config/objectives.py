"""What the config may say of distillation objectives, read from their files without importing them (or torch)."""

import ast
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "distill" / "objectives"
SAMPLED = ("none", "plain", "gated")
"""What can be computed from a `sampled` cache, which lacks the teacher's full logits."""


def objective_names() -> list[str]:
    """The objectives there are: one per file of grace/distill/objectives, named like it."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


@cache
def objective_constants(name: str) -> list[str]:
    """The constants of an objective's own: keyword arguments with a default, `method`'s among them."""
    path = FOLDER / f"{name}.py"
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name]
    if not functions:
        raise ValueError(f"{path.name} defines no function `{name}`; name it like its file")
    arguments = functions[0].args
    return [
        argument.arg
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is not None
    ]
