"""Ways to end, halt or starve what builds an experiment, at a moment that is drawn."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass

from place import Place, until

WAYS = {
    "job KILL": 3, "job TERM": 1, "engine KILL": 3, "engine TERM": 1, "engine INT": 1, "group KILL": 3, "group TERM": 1,
    "group INT": 1, "group STOP": 2, "disk": 3, "dvc KILL": 1, "dvc INT": 1,
}  # fmt: skip
"""Each with how often it is drawn; the last two only under `dvc repro`."""
PUSH = ("KILL", "TERM", "INT", "STOP")
GOES_ON = ("job", "disk", "group STOP")  # the engine lives on after these
ROOM = (0, 2_000, 30_000, 300_000, 1_000_000)  # bytes that a full disk still has


@dataclass(frozen=True)
class Draw:
    """One kill before it is done: the way, what it waits for, and how long after that."""

    way: str
    moment: str  # start: at once; job: a job runs; write: something is being written
    share: float  # of the usual time of that moment
    room: int
    halt_s: float

    @classmethod
    def of(cls, chance: random.Random, dvc: bool) -> "Draw":
        """The next one; every draw takes the same numbers, whatever the last one came to."""
        ways = [way for way in WAYS if dvc or not way.startswith("dvc")]
        way = chance.choices(ways, [WAYS[way] for way in ways])[0]
        moment = chance.choices(("start", "job", "write"), (1, 2, 4))[0]
        return cls(way, moment, chance.random(), chance.choice(ROOM), chance.uniform(0.3, 2.5))


def reached(place: Place, running: subprocess.Popen, draw: Draw, job_s: float) -> bool:
    """Wait for the moment of a draw; False where the program had ended before.

    Args:
        job_s: seconds that a job usually takes on this machine now.
    """
    over = lambda: running.poll() is not None  # noqa: E731
    if draw.moment == "start":
        until(over, draw.share * job_s)
        return not over()
    before = place.written() if draw.moment == "write" else set()
    fresh = {"job": lambda: place.processes("grace"), "write": lambda: place.written() - before}[draw.moment]
    until(lambda: over() or fresh(), 4 * job_s)
    until(over, draw.share * (job_s if draw.moment == "job" else 0.3))
    return not over()


def kill(place: Place, running: subprocess.Popen, draw: Draw, chance: random.Random) -> bool:
    """Do it; False where there was nothing to kill."""
    target, _, name = draw.way.partition(" ")
    if target == "disk":
        with place.full_disk(draw.room):
            time.sleep(draw.halt_s)
        return True
    number = getattr(signal, f"SIG{name}")
    if target == "group":
        os.killpg(running.pid, number)
        if name == "STOP":
            time.sleep(draw.halt_s)
            os.killpg(running.pid, signal.SIGCONT)
        return True
    found = place.processes({"job": "grace", "engine": "snakemake", "dvc": "dvc"}[target])
    if not found:
        return False
    with suppress(ProcessLookupError):
        os.kill(chance.choice(found), number)
        return True
    return False
