"""python tests/kills/run.py --kills 200 --seed 0: kill a real experiment again and again, and compare what it made.

A small experiment with real training is built once untouched. Then, folder by folder, the same is built by Snakemake or
`dvc repro`, which are killed at drawn moments in drawn ways and simply started again, as a user would, until the folder
is built; and `dvc push` is killed while it brings the results to a remote. Afterwards predictions, weights and
manifests must have the untouched run's bits, no `.part` or lock file may be left, a dry run must find nothing to do,
and a pull from the remote must bring the same bits. Nothing is repaired by hand: no --unlock, no deleted file.

Ways: one job (KILL, TERM), Snakemake alone (KILL, TERM, INT; its jobs go on as orphans), DVC alone (KILL, INT), the
whole group (KILL, TERM, INT), the group halted for a while (STOP and CONT), and a disk that is full for a while (a
small file system as root, elsewhere a limit of file sizes). Moments: while the engine starts, while a job runs, and
within 0.3 s of something being written.

The draws follow from --seed alone; exit status 0 when everything held. Results lie in memory, up to 192 MiB.
"""

import argparse
import random
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent))

from place import GOAL, RESULTS, SNAKEMAKE, Place, hashes, own_mounts, until, wait
from ways import GOES_ON, PUSH, Draw, kill, reached

ATTEMPT_S = 1800.0
JOBS = 8  # of the experiment, apart from those that only freeze parameters
FRUITLESS = 8  # starts one after the other that failed without a kill
MOST_PER_FOLDER = 40


def untouched(place: Place) -> tuple[dict[str, str], float]:
    """What a run makes that nobody touches, and the seconds that one of its jobs takes."""
    began = time.monotonic()
    if wait(place.build(), ATTEMPT_S):
        raise SystemExit(f"kills: a run that nobody touched failed\n{place.words.read_text()[-3000:]}")
    return place.made(), (time.monotonic() - began) / JOBS


def ordeal(place: Place, kills: int, job_s: float, chance: random.Random) -> list[str]:
    """Start, kill and start again until everything is built; returns the ways."""
    done: list[str] = []
    fruitless = 0
    while True:
        dvc, retries = chance.random() < 0.25, chance.choice((0, 0, 3))
        before = len(done)
        running = place.start("dvc", "repro", "-q") if dvc else place.build("--retries", str(retries))
        while len(done) < kills:
            draw = Draw.of(chance, dvc)
            if not reached(place, running, draw, job_s):
                break
            if kill(place, running, draw, chance):
                done.append(draw.way)
                print(f"  {len(done)}: {draw.way} ({draw.moment}{', dvc repro' * dvc})", flush=True)
                if not draw.way.startswith(GOES_ON):
                    break
        if wait(running, ATTEMPT_S) == 0:
            return done
        fruitless = 0 if len(done) > before else fruitless + 1
        if fruitless >= FRUITLESS:
            raise SystemExit(f"kills: not built after {done}\n{place.words.read_text()[-4000:]}")
        if fruitless:  # an orphaned Snakemake has the folder: its lock says so, and a user would wait
            until(lambda: not place.processes("snakemake"), ATTEMPT_S, every=0.5)


def pushes(place: Place, kills: int, chance: random.Random) -> list[str]:
    """Kill `dvc push` some times, then let it end, and hold what a pull brings elsewhere against what was pushed."""
    if wait(place.start("dvc", "repro", "-q"), ATTEMPT_S):
        raise SystemExit(f"kills: dvc repro failed\n{place.words.read_text()[-3000:]}")
    began, done = time.monotonic(), []
    place.run("dvc", "push", "-q")  # how long it takes; what it brought is taken away again
    usual = time.monotonic() - began
    shutil.rmtree(place.remote)
    for _ in range(kills):
        running = place.start("dvc", "push", "-q")
        draw = Draw("group " + chance.choice(PUSH), "start", chance.random(), 0, chance.uniform(0.3, 1.0))
        if reached(place, running, draw, usual) and kill(place, running, draw, chance):
            done.append(f"push {draw.way.removeprefix('group ')}")
            print(f"  push: {draw.way.removeprefix('group ')}", flush=True)
        if wait(running, ATTEMPT_S) == 0:  # all of it is there: the next one would have nothing to do
            shutil.rmtree(place.remote)
    place.run("dvc", "push", "-q")
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("config.yaml", "dvc.yaml", "dvc.lock"):
        (elsewhere / name).write_bytes((place.folder / name).read_bytes())
    place.run("dvc", "init", "--no-scm", "-q", folder=elsewhere)
    place.run("dvc", "remote", "add", "-q", "-d", "storage", str(place.remote), folder=elsewhere)
    place.run("dvc", "pull", "-q", folder=elsewhere)
    pulled, made = hashes(elsewhere / RESULTS / "students"), place.made()
    if pulled != made or not made:
        wrong = sorted(name for name in pulled.keys() | made.keys() if pulled.get(name) != made.get(name))
        raise SystemExit(f"kills: a pull after {done} brings other files: {', '.join(wrong) or 'none'}")
    return done


def check(place: Place, right: dict[str, str], done: list[str]) -> None:
    """What must hold afterwards."""
    until(lambda: not place.processes("grace"), ATTEMPT_S, every=0.2)  # an orphan whose result is not needed
    made = place.made()
    if made != right:
        wrong = sorted(name for name in right.keys() | made.keys() if right.get(name) != made.get(name))
        raise SystemExit(f"kills: after {done}: other bits than the untouched run's in {', '.join(wrong)}")
    if left := place.left():
        raise SystemExit(f"kills: after {done}: left behind: {', '.join(left)}")
    said = place.run(*[word for word in SNAKEMAKE if word not in ("--quiet", "all")], "--dry-run", "--", GOAL)
    if "Nothing to be done" not in said:
        raise SystemExit(f"kills: after {done}: a dry run finds something to do\n{said[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="begin no further folder after so long; 0: no bound")
    parser.add_argument("--folder", type=int, default=0, help="begin with the draws of this folder, to see one again")
    chosen = parser.parse_args()
    own_mounts()
    began, done = time.monotonic(), []
    with TemporaryDirectory(prefix="grace-kills-") as home:
        first = Place(Path(home, "untouched"))
        right, job_s = untouched(first)
        first.remove()
        print(f"untouched: {job_s * JOBS:.0f} s, {len(right)} files to compare", flush=True)
        number = chosen.folder
        while len(done) < chosen.kills and not (chosen.seconds and time.monotonic() - began > chosen.seconds):
            print(f"folder {number}, {time.monotonic() - began:.0f} s", flush=True)
            chance = random.Random(f"{chosen.seed} {number}")
            place = Place(Path(home, str(number)))
            try:
                here = ordeal(place, min(MOST_PER_FOLDER, chosen.kills - len(done)), job_s, chance)
                check(place, right, here)
                if number % 2 and len(done) + len(here) < chosen.kills:
                    here += pushes(place, 3, chance)
            finally:
                place.remove()
            done += here
            number += 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    folders = number - chosen.folder
    print(f"{len(done)} kills in {folders} folders, seed {chosen.seed}: {time.monotonic() - began:.0f} s, ", end="")
    print(f"{(used.ru_utime + used.ru_stime) / 60:.0f} minutes of processor time")
    print(", ".join(f"{way} {count}" for way, count in sorted(Counter(done).items())))
    print("predictions, weights and manifests equal, nothing left behind, nothing repaired by hand")


if __name__ == "__main__":
    main()
