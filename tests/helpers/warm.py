"""Python processes that start at once: forks of one that has imported torch, transformers, lm-eval, Snakemake and DVC.

These imports are most of what a process of a tiny experiment costs. The demo and the kills start every process as users
do; tests that are about what a process does, not about how it starts, put `python(...)` in place of `sys.executable`.

    python warm.py serve SOCKET                fork for whoever connects, until standard input closes
    python warm.py python SOCKET ARGUMENTS     be `python ARGUMENTS`: its output, working directory, exit status
    python warm.py grace SOCKET WORDS          be the subcommand `grace WORDS`
    python warm.py snakemake SOCKET ARGUMENTS  Snakemake whose jobs start so

A signal to the process that asked ends the forked one by SIGKILL, whatever the signal.
"""

import json
import os
import socket
import struct
import sys

HERE = os.path.abspath(__file__)
LENGTH = struct.Struct("!Q")
F_SETSIG = 10  # Linux's; `fcntl` has no name for it

LIBRARIES = (
    "compressed_tensors", "datasets", "dvc.api", "dvc.cli.parser", "lm_eval._cli.run", "lm_eval.evaluator",
    "lm_eval.models.hf_vlms", "lm_eval.tasks", "matplotlib.backends.backend_svg", "matplotlib.pyplot", "pandas",
    "PIL.JpegImagePlugin", "scipy.stats", "snakemake.cli", "snakemake.dag", "snakemake.workflow",
    "torch.distributed.run", "transformers.tokenization_mistral_common", "yte",
)  # fmt: skip
GRACE = (
    "bench.commands", "bench.decode", "bench.kernel", "cli", "cluster.job", "cluster.launch", "config.frozen",
    "config.load", "data.prepare", "demo.prepare", "evaluate.commands", "evaluate.overlap", "evaluate.pending_models",
    "infer.load", "models.fetch", "quant.awq", "quant.commands", "quant.gptq", "quant.pack", "quant.rtn",
    "report.commands", "report.figures.write", "report.metrics", "report.page.write", "report.speed",
    "report.tables.write", "teacher.commands", "teacher.writer", "train.commands", "train.distillation",
)  # fmt: skip


# In the process that asks, which imports next to nothing.


def _exactly(connection: socket.socket, size: int) -> bytes:
    held = b""
    while len(held) < size:
        more = connection.recv(size - len(held))
        if not more:
            return b""
        held += more
    return held


def ask(path: str, words: list[str]) -> int:
    """Have the server run these words as if it were this process; its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        told = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
        socket.send_fds(connection, [LENGTH.pack(len(told))], [0, 1, 2])
        connection.sendall(told)
        status = _exactly(connection, 1)
    if not status:  # a signal ended it, before it could say how
        os.kill(os.getpid(), 9)
    return status[0]


# In the forked process.


def _become(connection: socket.socket, path: str) -> None:
    """Run what was asked for, and end with it."""
    import fcntl
    import select
    import signal

    head, outputs, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
    asked = json.loads(_exactly(connection, *LENGTH.unpack(head)))
    for here, given in enumerate(outputs):
        os.dup2(given, here)
        os.close(given)
    os.chdir(asked["cwd"])
    # for processes that torchrun starts
    _take({**asked["env"], "PYTHON_EXEC": os.path.join(os.path.dirname(path), "python")})

    # the system kills this process as soon as the other end is closed
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, F_SETSIG, signal.SIGKILL)
    alone = fcntl.fcntl(connection, fcntl.F_GETFL)
    fcntl.fcntl(connection, fcntl.F_SETFL, alone | fcntl.FASYNC)
    if select.select([connection], [], [], 0)[0]:  # it was closed before that; nothing else is ever sent
        os._exit(1)
    status = 1
    try:
        _run(*asked["words"])
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        fcntl.fcntl(connection, fcntl.F_SETFL, alone)
        connection.sendall(bytes([status % 256]))
        os._exit(status)


def _take(environment: dict[str, str]) -> None:
    """Of the environment also what Python reads when it starts: the search path, and how it writes."""
    import importlib.util

    before, now = (at.get("PYTHONPATH", "").split(os.pathsep) for at in (os.environ, environment))
    rest = sys.path[1:]  # without this file's folder; this repository's package comes last, where no other is named
    sys.path[:] = [entry for entry in now if entry] + [entry for entry in rest if entry not in before]
    sys.path += [entry for entry in before if entry]
    os.environ.clear()
    os.environ.update(environment)
    importlib.invalidate_caches()
    if importlib.machinery.PathFinder.find_spec("grace").origin != sys.modules["grace"].__file__:
        for name in [name for name in sys.modules if name.partition(".")[0] == "grace"]:
            del sys.modules[name]  # whoever asks has a copy of its own
    sys.modules.pop("sitecustomize", None)
    if importlib.util.find_spec("sitecustomize"):
        importlib.import_module("sitecustomize")
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # the server's would hold what it read and wrote
        mode = "r" if number == 0 else "w"
        setattr(sys, name, open(number, mode, buffering=-1 if number != 2 else 1, closefd=False))  # noqa: SIM115


def _run(what: str, *words: str) -> None:
    import runpy

    if what == "grace":
        sys.argv = ["grace", *words]
        from grace.cli import main

        return main()
    words = words[words[0] == "-u" :]  # torchrun starts its processes with it
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})  # without this file's own names
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
    return None


def _import() -> None:
    """What the jobs of a small experiment import, and what transformers makes once in a process."""
    import importlib

    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for name in (*LIBRARIES, *(f"grace.{name}" for name in GRACE)):
        importlib.import_module(name)
    for model in ("Llava", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL"):
        getattr(transformers, f"{model}ForConditionalGeneration")
        getattr(transformers, f"{model}Processor")
    for name in ("CLIPImageProcessorPil", "Qwen2VLImageProcessorPil", "Qwen2Tokenizer", "LlamaTokenizer"):
        getattr(transformers, name)
    get_checkpoint_conversion_mapping("llava")


def serve(path: str) -> None:
    """Import, then fork for every connection until standard input closes."""
    import gc
    import select
    import signal

    from grace.arithmetic import settle

    settle()
    _import()
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a process; it says how it ended itself
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                os._exit(0)  # some libraries say at the end what they leak
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    # torch makes its thread pool anew after a fork, at the first question about it: two threads that
                    # load weights would both try, and one fails ("Invalid thread pool")
                    torch.set_num_threads(1)
                    _become(connection, path)


SNAKEMAKE = """
from snakemake.cli import main
from snakemake.shell import shell

# braces would be Snakemake's
shell.prefix('grace() ( exec {command} "$@" ); ')
main()
"""


def snakemake(path: str, arguments: list[str]) -> int:
    """Snakemake, in whose shell commands `grace` is the server's."""
    import shlex

    command = shlex.join([sys.executable, "-S", "-E", HERE, "grace", path])
    return ask(path, ["python", "-c", SNAKEMAKE.replace("{command}", command), *arguments])


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "serve":
        serve(where)
    elif what == "snakemake":
        sys.exit(snakemake(where, rest))
    else:
        sys.exit(ask(where, [what, *rest]))
