"""Bounds for what others wrote and this process runs, such as a chat template."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from grace.errors import GraceError


class _TooLong(BaseException):
    """Raised from outside in a thread that works for too long."""


@contextmanager
def within(seconds: float, sentence: str) -> Iterator[None]:
    """End the block's Python code after `seconds` with a `GraceError` that says `sentence`.

    It works in every thread and for code that is Python's own, as a template's is; a single call into C is not ended.
    """
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def end() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooLong))

    clock = threading.Timer(seconds, end)
    clock.daemon = True
    clock.start()
    try:
        try:
            yield
        finally:
            with lock:  # from here on nothing is raised any more
                over = True
            clock.cancel()
    except _TooLong:
        raise GraceError(sentence) from None
