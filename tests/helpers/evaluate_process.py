"""`grace evaluate` that keeps every batch at once and can be killed in the middle: python FILE BATCHES ARGUMENTS."""

import os
import signal
import sys
import time

import grace.evaluate.answer_log as parts
import grace.evaluate.commands as commands
from grace.cli import app
from grace.evaluate.runner import Runner

parts.SECONDS_BETWEEN_PARTS = 0.0
left, real, write = int(sys.argv.pop(1)), Runner._generate, commands.write_predictions


def counted(self, prompts, new_tokens):
    """Say how many questions are asked; after so many batches die as by `kill -9`."""
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    os.write(1, b"asked %d\n" % len(prompts))  # one write: two processes share the pipe
    return real(self, prompts, new_tokens)


def late(*arguments):
    """A write that other processes do not wait for is caught by what they do then."""
    time.sleep(float(os.environ.get("WRITING_TAKES", 0)))
    write(*arguments)


Runner._generate = counted
commands.write_predictions = late
app()
