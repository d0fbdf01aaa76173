"""`grace evaluate` that keeps every batch at once and can be killed in the middle: python FILE BATCHES ARGUMENTS."""

import os
import signal
import sys

import grace.evaluate.answer_log as parts
from grace.cli import app
from grace.evaluate.runner import Runner

parts.SECONDS_BETWEEN_PARTS = 0.0
left, real = int(sys.argv.pop(1)), Runner._generate


def counted(self, prompts, new_tokens):
    """Say how many questions are asked; after so many batches die as by `kill -9`."""
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    os.write(1, b"asked %d\n" % len(prompts))  # one write: two processes share the pipe
    return real(self, prompts, new_tokens)


Runner._generate = counted
app()
