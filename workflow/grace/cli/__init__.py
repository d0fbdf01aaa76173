"""The command line: one subcommand per step of the pipeline. Each imports what it needs only when it runs."""

import errno
import gc
import os
import sys

import typer

from grace.arithmetic import settle
from grace.cli import evaluation, experiment, models, results, training
from grace.errors import GraceError

app = typer.Typer(
    help="GRACE: distil a vision-language model into INT4, measure it, and rebuild the paper's tables.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for part in (training, models, evaluation, results, experiment):
    app.add_typer(part.commands)
app.add_typer(results.records_commands, name="records")
app.add_typer(training.cache_commands, name="cache")
app.add_typer(evaluation.bench_commands, name="bench")
app.add_typer(results.report_commands, name="report")
app.add_typer(experiment.config_commands, name="config")

_PATHS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST,
)  # fmt: skip
"""What the operating system says of paths that a user named, or may not touch."""


def main() -> None:
    """Entry point: a `GraceError` is one sentence on standard error and exit status 1."""
    gc.set_threshold(
        200_000
    )  # at Python's 700, importing torch and transformers spends a quarter of its time collecting
    if sys.argv[1:2] != ["bench"]:  # which measures what the machine can do
        settle()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # loading is quick here; a bar in a log says nothing
    try:
        app()
    except GraceError as error:
        print(f"grace: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"grace: {where}could not be written ({error.strerror}); free space and run again", file=sys.stderr)
        elif where and error.errno in _PATHS:
            print(f"grace: {where}{error.strerror}; correct the path, or its permissions", file=sys.stderr)
        else:
            raise
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if (
            not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError"
        ):  # torch's, not imported here
            raise
        short = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        print(f"grace: out of memory ({short}); lower the batch of this job, or give it more memory", file=sys.stderr)
        sys.exit(1)
