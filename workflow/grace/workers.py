"""Work shared among processes of this machine, each on one thread: how many there are changes no result."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


def end_with_parent() -> None:
    """Let this worker process end when the one that started it does, even by SIGKILL: it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def submitting(workers: int, *preloaded: str) -> Iterator[Any]:
    """Yield `submit(function, argument)`, which runs here for one worker and in processes for several.

    `preloaded` are the modules that all workers need; the server that forks them imports these once.
    """
    if workers <= 1:

        def here(function: Any, argument: Any) -> Future:
            future: Future = Future()
            future.set_result(function(argument))
            return future

        yield here
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
