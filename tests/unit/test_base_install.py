"""What a user imports without the extra `pipeline`: losses, quantiser, kernels, exports, decoding, `grace` itself."""

import subprocess
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
ROOMS = ("kernels", "families", "models", "distill", "data", "quant", "infer", "cluster", "cli")
IMPORTED_AS = {"lm-eval": "lm_eval", "scikit-learn": "sklearn"}
FROM_OTHERS = {"jinja2"}  # comes with torch

CODE = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

absent, rooms = (words.split(",") for words in sys.argv[1:])
find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.split(".")[0] in absent else find_spec(name, *rest)
)
for room in rooms:
    package = importlib.import_module(f"grace.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"grace.{room}."):
        importlib.import_module(module.name) if not module.name.endswith("__main__") else None
        print(module.name)
"""


def test_nothing_of_the_pipeline_is_imported():
    extra = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["pipeline"]
    names = {package.split("=")[0].rstrip(">") for package in extra} - FROM_OTHERS
    absent = {IMPORTED_AS.get(name, name) for name in names}
    assert {"pandas", "snakemake", "lm_eval"} <= absent
    done = subprocess.run(
        [sys.executable, "-c", CODE, ",".join(absent), ",".join(ROOMS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"grace.quant.export", "grace.distill.gated_dkd", "grace.infer.chat"} <= set(done.stdout.split())
