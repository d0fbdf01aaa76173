"""What a subcommand's code is: what it can reach, and nothing that Python does not read."""

from pathlib import Path

import pytest

from grace.config.code import CodeIndex, changed

MODULES = {
    "__init__.py": "",
    "cli/__init__.py": "from grace.cli import rest, work\nfor part in (rest, work): register(part.commands)\n",
    "cli/common.py": "def job(): return 1\n\ndef start(): return 2\n",
    "cli/work.py": '''
        from grace.cli.common import job
        commands = Commands()

        @commands.command()
        def work(out: "help text"):
            """Help."""
            from grace.steps import step
            from grace.progress import bar
            with job():
                return step(out)

        @commands.command()
        def neighbour():
            from grace.steps import unused
            return unused()
    ''',
    "cli/rest.py": """
        def other_work():
            import grace.loose
            return grace.loose.first()

        def import_():
            from grace.late import value
            return value(1)
    """,
    "progress.py": "def bar(): print('.')\n",
    "steps/__init__.py": "from grace.steps.one import step\nfrom grace.steps.two import unused\n",
    "steps/one.py": '''
        """What a step is."""
        from grace import constants as c
        from .two import helper
        WEIGHTS = {"a": 1}

        @some.decorator
        def registered(): return 1

        def step(x):
            """Do it."""
            return helper(x) * c.FACTOR + len(WEIGHTS)

        def other(): return 2
    ''',
    "steps/two.py": """
        def helper(x):
            from importlib import import_module
            return import_module("grace.late").value(x)

        def unused(): return 3
    """,
    "steps/table.json": "[1]",
    "constants.py": "FACTOR = 2\nUNUSED = 3\n",
    "late.py": "def value(x): return x\n",
    "loose.py": """
        import grace.constants
        REGISTRY = {}
        REGISTRY["a"] = grace.constants.UNUSED

        def first(): return REGISTRY
    """,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, text in MODULES.items():
        path = tmp_path / "grace" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        path.write_text("\n".join(line[indent:] for line in lines) + "\n")
    return tmp_path / "grace"


def edited(package: Path, file: str, old: str, new: str, subcommand: str = "work") -> list[str]:
    """What differs in a subcommand's code after an edit."""
    before = CodeIndex(package).fingerprint(subcommand)
    path = package / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return changed(before, CodeIndex(package).fingerprint(subcommand))


def test_what_is_reached_is_followed_through_every_kind_of_import(package: Path) -> None:
    reached = CodeIndex(package).reached("work")
    assert {name: sorted(found) for name, found in reached.items()} == {
        "grace.cli.work": ["work"],
        "grace.cli.common": ["job"],
        "grace.steps.one": ["WEIGHTS", "step"],
        "grace.steps.two": ["helper"],
        "grace.constants": ["FACTOR"],
        "grace.late": ["value"],
    }


@pytest.mark.parametrize(
    "edit",
    [
        ("steps/one.py", '"""Do it."""', '"""Do something else."""'),
        ("steps/one.py", '"""What a step is."""', "# a comment"),
        ("steps/one.py", "return helper(x) * c.FACTOR + len(WEIGHTS)",
            "return (helper( x )*c.FACTOR\n        +len(WEIGHTS))"),
        ("steps/one.py", '{"a": 1}', "{'a': 1,}"),
        ("steps/one.py", "def other(): return 2", "def other(): return 4"),
        ("steps/two.py", "def unused(): return 3", "def unused(): return 4"),
        ("constants.py", "UNUSED = 3", "UNUSED = 4"),
        ("progress.py", "'.'", "'!'"),
        ("cli/work.py", '"help text"', '"another help text"'),
        ("cli/work.py", "return unused()", "return unused() + 1"),
        ("cli/work.py", "Commands()", "Commands(name=1)"),
        ("cli/common.py", "return 2", "return 3"),
        ("cli/rest.py", "grace.loose.first()", "grace.loose.first() + 1"),
        ("cli/__init__.py", "(rest, work)", "(work, rest)"),
    ],
    ids=lambda edit: f"{edit[0]}: {edit[1]}",
)  # fmt: skip
def test_what_python_does_not_read_or_the_job_not_reach_changes_nothing(package: Path, edit: tuple) -> None:
    assert edited(package, *edit) == []


@pytest.mark.parametrize(
    "edit, module",
    [
        (("steps/one.py", "c.FACTOR", "c.FACTOR + 1"), "grace.steps.one"),
        (("steps/one.py", '{"a": 1}', '{"a": 2}'), "grace.steps.one"),
        (("steps/one.py", "def registered(): return 1", "def registered(): return 2"), "grace.steps.one"),
        (("steps/two.py", '"grace.late"', '"grace.later"'), "grace.steps.two"),
        (("constants.py", "FACTOR = 2", "FACTOR = 2.5"), "grace.constants"),
        (("late.py", "return x", "return -x"), "grace.late"),
        (("steps/table.json", "[1]", "[2]"), "steps/table.json"),
        (("cli/work.py", "return step(out)", "return step(out) or 1"), "grace.cli.work"),
        (("cli/common.py", "return 1", "return 3"), "grace.cli.common"),
    ],
    ids=lambda edit: f"{edit[0]}: {edit[1]}" if isinstance(edit, tuple) else "",
)
def test_what_the_job_can_reach_is_named(package: Path, edit: tuple, module: str) -> None:
    assert module in edited(package, *edit)


def test_what_a_module_does_on_import_counts(package: Path) -> None:
    """A registry that is filled at the top level, with what that refers to."""
    assert edited(package, "constants.py", "UNUSED = 3", "UNUSED = 4", "other-work") == ["grace.constants"]
    assert edited(package, "loose.py", '["a"]', '["b"]', "other-work") == ["grace.loose"]


def test_parsed_files_are_remembered_and_never_stale(package: Path) -> None:
    first = CodeIndex(package).fingerprint("work")
    times = package.joinpath("late.py").stat()
    (memory,) = (package.parent / "cache/grace/definitions").iterdir()
    assert CodeIndex(package).fingerprint("work") == first
    edited(package, "late.py", "return x", "return y")
    import os

    os.utime(package / "late.py", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed(first, CodeIndex(package).fingerprint("work")) == ["grace.late"]
    memory.write_text("{")
    assert changed(first, CodeIndex(package).fingerprint("work")) == ["grace.late"]


def test_an_unknown_subcommand_is_an_error(package: Path) -> None:
    with pytest.raises(KeyError, match="no subcommand `nothing`"):
        CodeIndex(package).fingerprint("nothing")


def test_a_subcommand_named_like_a_keyword(package: Path) -> None:
    assert CodeIndex(package).reached("import") == {"grace.cli.rest": {"import_"}, "grace.late": {"value"}}


def test_a_subcommand_of_the_package_reaches_itself_alone_in_the_command_line() -> None:
    reached = CodeIndex().reached("train")
    commands = {name: found for name, found in reached.items() if name.startswith("grace.cli")}
    assert commands == {"grace.cli.training": {"train"}, "grace.cli.common": {"job", "start"}}
