"""Which kind of job, in `resources` of the configuration, each rule asks as: the rule itself says it."""

import re
from pathlib import Path

from grace.errors import GraceError

_RULE = re.compile(r"^rule (\w+):$", re.MULTILINE)
_KIND = re.compile(r"^ +\*\*jobs\.resources\(\"(\w+)\"\)", re.MULTILINE)


def kinds(rules: Path) -> dict[str, str | None]:
    """The kind of every rule of a folder of Snakemake files; None for a local rule, which only writes a file.

    Raises:
        GraceError: a rule that is not local has no kind, so that it would cost nothing in a plan.
    """
    found: dict[str, str | None] = {}
    for file in sorted(rules.glob("*.smk")):
        _, *parts = _RULE.split(file.read_text())
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            asked = _KIND.search(text)
            if asked is None and "localrule: True" not in text:
                raise GraceError(f'{file}: rule {name} has no kind; give it `resources: **jobs.resources("KIND")`')
            found[name] = asked[1] if asked else None
    return found
