"""What a user imports works where only the package's base dependencies, and theirs, are installed."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIPELINE = {"snakemake", "dvc", "lm_eval", "datasets", "pandas", "matplotlib"}

SCRIPT = f"""
import importlib, pkgutil, sys
import grace.distill, grace.quant, grace.kernels, grace.infer

for room in (grace.distill, grace.quant, grace.infer):
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # torch brings Triton where there is a GPU
            assert error.name == "triton" and "step" in module.name, module.name

import torch
from grace.distill import distillation_loss_from_hidden, load_objective

torch.manual_seed(0)
hidden, head, labels = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.arange(5)
for mode in ("gated", load_objective("reverse_kl", dict(temperature=2.0))):
    distillation_loss_from_hidden(hidden, head, hidden.detach() + 0.1, head, labels, mode=mode)["loss"].backward()
assert hidden.grad.abs().sum() > 0
for name in {sorted(PIPELINE)}:
    assert importlib.util.find_spec(name) is None, name
"""


def _installed_with(requirements: list[str]) -> set[Path]:
    """Files and folders of site-packages that belong to these packages and to all that they require here."""
    waiting, seen, entries = list(requirements), set(), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = requirement.name.lower().replace("_", "-")
        if name in seen or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        waiting += package.requires or []
        for file in package.files or []:
            if file.parts[0] not in ("..", "__pycache__"):
                entries.add(Path(package.locate_file(file.parts[0])))
    return entries


def test_losses_quantiser_and_decoding_need_the_base_dependencies_alone(tmp_path: Path) -> None:
    for entry in _installed_with(PROJECT["dependencies"]):
        if entry.exists():
            (tmp_path / entry.name).symlink_to(entry)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'workflow'}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-S", "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
