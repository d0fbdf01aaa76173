import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def hooks(monkeypatch):
    """docs/hooks.py, also where mkdocs is not installed."""
    for name, classes in {
        "mkdocs.config.defaults": ["MkDocsConfig"],
        "mkdocs.exceptions": ["PluginError"],
        "mkdocs.structure.files": ["File", "Files"],
        "mkdocs.structure.pages": ["Page"],
    }.items():
        module = ModuleType(name)
        for kind in classes:
            setattr(module, kind, type(kind, (Exception,), {}))
        for part in ("mkdocs", name.rpartition(".")[0], name):
            monkeypatch.setitem(sys.modules, part, module)
    return SimpleNamespace(**runpy.run_path(str(DOCS / "hooks.py")))
