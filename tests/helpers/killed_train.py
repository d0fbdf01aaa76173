"""For torchrun: `grace train`, killed at a step behind its last checkpoint, or not at all at a negative step."""

import os
import signal
import sys
from pathlib import Path

from grace.train import commands
from grace.train.loop import Trainer

plain_step = Trainer._step


def step(self, number, *rest):
    if number == int(sys.argv[1]):
        self.saver.wait()
        self.world.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain_step(self, number, *rest)


Trainer._step = step
commands.train(*map(Path, sys.argv[2:]))
