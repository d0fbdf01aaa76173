"""`grace accept`: take a change of code as harmless, and leave a trace of it; see `grace.config.accepted`."""

import getpass
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grace.config.accepted import accepted, accepted_file, code_folder, read_fingerprint, resolved
from grace.config.code import changed
from grace.config.frozen import Frozen
from grace.config.load import load_experiment
from grace.config.plan import Plan
from grace.errors import GraceError
from grace.files import whole_file
from grace.git import git_or_none


def accept_code(configfile: str | Path, reason: str, subcommands: list[str] | None = None) -> list[dict[str, Any]]:
    """Accept the present code of an experiment's subcommands as equal to what its results were made with.

    Args:
        configfile: the experiment.
        reason: why no result changes; kept for ever.
        subcommands: these alone, by the names of the files in `config/code/`; None: all that changed.

    Returns:
        The changes that were written down, as `accepted` reads them.

    Raises:
        GraceError: no reason, nothing was built yet, nothing changed, or no such subcommand.
    """
    plan = Plan(load_experiment(configfile))
    if not reason.strip():
        raise GraceError("--reason is empty; say why this change leaves every result as it is")
    code, folder = Frozen(plan), code_folder(plan.folder)
    built = sorted(path.stem for path in folder.glob("*.json"))
    if not built:
        raise GraceError(f"{folder}: holds no frozen code; there is nothing to accept before the experiment is built")
    for name in subcommands or ():
        if name not in built:
            raise GraceError(f"--subcommand {name}: not among what was built ({', '.join(built)})")
    at, by = datetime.now(UTC).isoformat(timespec="seconds"), _who()
    changes = []
    for name in subcommands or built:
        frozen, now = read_fingerprint(folder / f"{name}.json"), code.fingerprint(name)
        if resolved(plan.folder, now) != frozen:
            about = {"changed": changed(frozen, now), "by": by, "at": at, "reason": reason.strip()}
            changes.append({"subcommand": name, "frozen": frozen, "accepted": now, **about})
    if not changes:
        if git_or_none(".", "diff", "--name-only", "HEAD", "--", f"{folder}/*.json"):  # by a run that was ended, say
            raise GraceError(
                f"{folder}: a run has frozen the present code already; where the results are the last commit's, take "
                f"back what they were made with, `git checkout -- {folder}`, and run this again"
            )
        raise GraceError(f"{folder}: the code is what the results were made with; there is nothing to accept")
    with whole_file(accepted_file(plan.folder)) as part:
        lines = [*accepted(plan.folder), *changes]
        part.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    return changes


def _who() -> str:
    """Name and address as git knows them, or the login name, or the number of a user who has none."""
    name, address = (git_or_none(".", "config", key) or "" for key in ("user.name", "user.email"))
    if address or name:
        return f"{name} <{address}>" if address else name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container that runs under any number
        return f"user {os.getuid()}"
