"""`grace provenance PATH`: what made an output, back to the data, as a tree or as JSON."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from grace.files import MANIFEST, read_manifest, sha256
from grace.nested import flatten
from grace.provenance.chain import Input, Results, Step

SHOWN = 6  # inputs of one rule under one output; --all shows every one
WIDE = 2000  # columns of a file or pipe, where nothing is wrapped
_MARKS = {"changed": "[red]changed since[/]", "missing": "[red]missing[/]", "unknown": "[yellow]not compared[/]"}


def provenance(path: str | Path, as_json: bool = False, everything: bool = False) -> dict[str, Any]:
    """Print the chain of a file or folder of results/{experiment} and return it as JSON-able values.

    Args:
        path: an output folder, a file in one, or an output that is a single file.
        as_json: print JSON instead of the tree.
        everything: do not shorten long lists of inputs.

    Returns:
        `output`, `chain` (one entry per output that it was made from, itself first; see `Step`) and, where `path` is a
        file of a folder, `file`: whether it is as the folder's manifest says.

    Raises:
        GraceError: the path is missing, not below results/, or no rule made it.
    """
    results = Results(path)
    output = results.output_of(path)
    chain = results.chain(output)
    found: dict[str, Any] = {"output": output, "chain": {name: asdict(step) for name, step in chain.items()}}
    file = _file(Path(path).absolute(), results.root / output)
    if file:
        found["file"] = file
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        if file:
            console.print(f"{escape(file['path'])}: {file['state']}")
        console.print(_Drawing(chain, everything).tree(output))
    return found


def _file(path: Path, output: Path) -> dict[str, Any] | None:
    """A file of a folder against the folder's manifest; None where the whole output was asked for."""
    if path in (output, output.parent) or output.name != MANIFEST:
        return None
    name = path.relative_to(output.parent).as_posix()
    entry = read_manifest(output)["files"].get(name)
    now = sha256(path) if path.is_file() else None
    if entry is None:
        state = "not listed in the manifest of its folder"
    elif now is None:
        state = "missing"
    else:
        state = "as its manifest says" if now == entry["sha256"] else "differs from its manifest"
    return {"path": name, "sha256": now, "state": state}


class _Drawing:
    """The tree on a terminal: each output in full once, afterwards by name."""

    def __init__(self, chain: dict[str, Step], everything: bool) -> None:
        self.chain, self.everything = chain, everything
        self.drawn: set[str] = set()
        self.jobs: dict[tuple[str | None, str | None], str] = {}  # rule and log of a job -> the first of its outputs
        self.environment: dict[str, Any] | None = None

    def tree(self, output: str) -> Tree:
        tree = Tree(self._head(self.chain[output]))
        self._fill(tree, output, first=True)
        return tree

    def _fill(self, branch: Tree, output: str, first: bool = False) -> None:
        step = self.chain[output]
        self.drawn.add(output)
        self.jobs.setdefault((step.rule, step.log), output)
        if first and step.command:
            branch.add(f"command  {escape(step.command)}")
        if step.parameters:
            branch.add(self._parameters(step.parameters, step.seed, first))
        if step.code:
            branch.add(_code(step.code))
        self._environment(branch, step)
        shown: Counter[str] = Counter()
        hidden: Counter[str] = Counter()
        for given in step.inputs:
            if step.parameters and given.path == step.parameters["path"]:
                continue
            maker = self.chain[given.path].rule if given.path in self.chain else None
            shown[maker or ""] += 1
            if shown[maker or ""] > SHOWN and not self.everything:
                hidden[maker or "source data"] += 1
                continue
            self._input(branch, given)
        for maker, count in hidden.items():
            branch.add(f"… {count} more by {maker} (--all shows them)")

    def _input(self, branch: Tree, given: Input) -> None:
        mark = f"  {_MARKS[given.state]}" if given.state in _MARKS else ""
        if given.path not in self.chain:
            branch.add(f"{escape(given.path)}  {_short(given.sha256)}{mark}")
            return
        step = self.chain[given.path]
        twin = self.jobs.get((step.rule, step.log)) if step.log else None
        above = "above" if given.path in self.drawn else f"by the same job as {escape(_shown(twin))}" if twin else ""
        if above:
            branch.add(f"{escape(_shown(given.path))}  {_short(given.sha256)}{mark}  ({above})")
        else:
            self._fill(branch.add(self._head(step) + mark), given.path)

    @staticmethod
    def _head(step: Step) -> str:
        parts = [f"[bold]{escape(_shown(step.output))}[/]  {_short(step.sha256)}"]
        if step.output.endswith(MANIFEST):
            parts.append(f"{step.files} files, {_bytes(step.size)}")
        if step.rule is None:
            return ", ".join(parts) + "  [yellow]no record of its making[/]"
        made = f"by [cyan]{escape(step.rule)}[/] at {step.ended}"
        if step.seconds is not None:
            made += f" in {_seconds(step.seconds)}"
        if step.peak_mib is not None:
            made += f", peak {step.peak_mib:,.0f} MiB"
        if step.cpu_seconds is not None:
            made += f", {step.cpu_seconds / 3600:.3g} core hours"
        if step.gpu_hours is not None:
            made += f", {step.gpu_hours:.2f} GPU hours"
        state = f"  {_MARKS[step.state]}" if step.state in _MARKS else ""
        return ", ".join([*parts, made]) + state

    @staticmethod
    def _parameters(parameters: dict[str, Any], seed: int | None, in_full: bool) -> str:
        mark = f"  {_MARKS[parameters['state']]}" if parameters["state"] in _MARKS else ""
        text = f"parameters  {escape(parameters['path'])}  {_short(parameters['sha256'])}{mark}"
        if seed is not None:
            text += f", seed {seed}"
        if in_full and parameters["values"]:
            text += "\n" + escape("\n".join(_lines(parameters["values"])))
        return text

    def _environment(self, branch: Tree, step: Step) -> None:
        """In full once; afterwards only what differs from the first."""
        if not step.environment:
            return
        about = dict(flatten(step.environment))
        if self.environment is None:
            self.environment = about
            code, hardware = step.environment["code"], step.environment["hardware"]
            changes = " and changes" if code["modified"] else ""
            branch.add(f"code revision  {escape(str(code['revision']))}{changes}, {_short(code['sha256'])}")
            packages = ", ".join(f"{name} {found}" for name, found in step.environment["packages"].items())
            branch.add(f"packages  {escape(packages)}")
            gpus = ", ".join(hardware["gpus"]) or "no GPU"
            machine = f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB, {gpus}"
            branch.add(f"machine  {escape(machine)}, Python {escape(step.environment['python'])}")
            return
        keys = sorted(about.keys() | self.environment.keys())
        other = [f"{key} {about.get(key)}" for key in keys if about.get(key) != self.environment.get(key)]
        if other:
            branch.add(f"other environment: {escape(', '.join(other))}")


def _code(code: dict[str, Any]) -> str:
    text = f"code  {escape(code['path'])}  {_short(code['sha256'])}"
    if code["state"] in _MARKS:
        text += f"  {_MARKS[code['state']]}"
    elif code["changed"]:
        named = ", ".join(code["changed"][:4]) + (", …" if len(code["changed"]) > 4 else "")
        text += f", {code['modules']} modules, [red]{len(code['changed'])} changed since[/]: {escape(named)}"
    elif code["changed"] is not None:
        text += f", {code['modules']} modules, as they are now"
    for change in code["accepted"]:
        text += f"\naccepted as harmless at {change['at']} by {escape(change['by'])}: {escape(change['reason'])} "
        text += f"({escape(', '.join(change['changed']))})"
    return text


def _shown(output: str) -> str:
    """A folder by its name, not its manifest's."""
    return output.removesuffix(MANIFEST) if output.endswith(f"/{MANIFEST}") else output


def _short(digest: str | None) -> str:
    return f"[dim]{digest[:12]}[/]" if digest else "[dim]not hashed[/]"


def _bytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _lines(values: dict[str, Any]) -> list[str]:
    return [f"{name}: {value}" for name, value in flatten(values)]
