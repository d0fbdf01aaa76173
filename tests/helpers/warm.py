"""Subcommands that start at once: each is forked from a process that has imported what all of them import.

Importing torch, transformers and lm-eval is most of what a job of a tiny experiment costs. The shrunken experiment, the
demo and the kills start every subcommand as users do; the families' experiments start theirs here.

    python warm.py serve SOCKET         fork for whoever connects, until standard input closes
    python warm.py grace SOCKET WORDS   be the subcommand `grace WORDS`: its output, working directory, exit status
    python warm.py snakemake SOCKET ARGUMENTS   Snakemake whose jobs start so
"""

import json
import os
import socket
import struct
import sys

LENGTH = struct.Struct("!Q")


def _exactly(connection: socket.socket, size: int) -> bytes:
    held = b""
    while len(held) < size:
        more = connection.recv(size - len(held))
        if not more:
            return b""
        held += more
    return held


def ask(path: str, words: list[str]) -> int:
    """Have the server run `grace` with these words as if it were this process; its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        told = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
        socket.send_fds(connection, [LENGTH.pack(len(told))], [0, 1, 2])
        connection.sendall(told)
        status = _exactly(connection, 1)
    return status[0] if status else 137  # a signal ended it, before it could say how


def _become(connection: socket.socket) -> None:
    """In the forked process: run the subcommand that was asked for, and end with it."""
    import signal
    import threading

    head, outputs, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
    asked = json.loads(_exactly(connection, *LENGTH.unpack(head)))
    for here, given in enumerate(outputs):
        os.dup2(given, here)
        os.close(given)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = ["grace", *asked["words"]]

    def end_with_whoever_asked() -> None:
        if not connection.recv(1):
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_whoever_asked, daemon=True).start()
    status = 1
    try:
        from grace.cli import main

        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        connection.sendall(bytes([status]))
        os._exit(status)


def serve(path: str) -> None:
    """Import, then fork for every connection until standard input closes."""
    import gc
    import select
    import signal

    from grace.arithmetic import settle

    settle()
    import datasets  # noqa: F401
    import lm_eval.evaluator
    import lm_eval.tasks  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import torch
    import transformers

    for name in ("LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "AutoProcessor"):
        getattr(transformers, name)
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a subcommand; it says how it ended itself
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                return
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _become(connection)


def snakemake(path: str, arguments: list[str]) -> None:
    """Snakemake, in whose shell commands `grace` is the server's."""
    import shlex

    from snakemake.cli import main
    from snakemake.shell import shell

    command = shlex.join([sys.executable, "-S", "-E", os.path.abspath(__file__), "grace", path])
    shell.prefix(f'grace() ( exec {command} "$@" ); ')  # braces would be Snakemake's
    sys.argv = ["snakemake", *arguments]
    sys.exit(main())


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "grace" and rest[:1] == ["bench"]:  # which measures with every instruction that the machine has
        os.execv(sys.executable, [sys.executable, "-m", "grace.cli", *rest])
    if what == "grace":
        sys.exit(ask(where, rest))
    serve(where) if what == "serve" else snakemake(where, rest)
