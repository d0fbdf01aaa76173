"""Model folders broken at random: each is used, or refused in one sentence, whoever reads it.

    PYTHONPATH=tests/helpers python tests/fuzz/models.py --seconds 600 --seed 1

A folder as transformers writes it, one in several weight files, a quantised and a packed student each lose, change or gain
something in one of their small files or in a weight file's header. Then every reader of the pipeline looks at it. The first
folder of each new kind of failure is kept in --keep.
"""

import argparse
import contextlib
import io
import logging
import random
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import yaml
from chat_models import talking_student
from mutate import damage
from stub_tree import CONFIG
from transformers import AutoModelForImageTextToText

from grace.config.load import load_experiment
from grace.config.preflight import missing
from grace.errors import GraceError
from grace.infer.load import load_for_inference
from grace.models import load_model, load_processor
from grace.models.families.__init__ import check_family
from grace.models.fetch import fetch
from grace.models.pair import check_pair
from grace.quant.card import Origin, write_card
from grace.quant.pack import pack

FAMILY = "llava-siglip"


def folders(home: Path) -> dict[str, Path]:
    """The sound folders."""
    made = {"quantised": talking_student(home / "quantised", FAMILY)}
    pack(made["quantised"], home / "packed")
    made |= {"packed": home / "packed", "plain": home / "plain", "parts": home / "parts"}
    model = AutoModelForImageTextToText.from_pretrained(made["quantised"])
    for name, size in (("plain", "5GB"), ("parts", "100KB")):
        model.save_pretrained(made[name], max_shard_size=size)
        for file in made["quantised"].iterdir():
            if not file.name.startswith(("model", "quantization", "manifest", "environment")):
                shutil.copyfile(file, made[name] / file.name)
    for folder in made.values():  # those of others have none; with one, every change is a change of a listed file
        (folder / "manifest.json").unlink(missing_ok=True)
    return made


def broken(draw: random.Random, folder: Path) -> str:
    """Break one file of a folder; its name."""
    small = sorted(
        p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".txt") and p.name != "environment.json"
    )
    known = [p for p in small if p.name in ("config.json", "model.safetensors.index.json")]
    path = draw.choice(sorted(folder.glob("*.safetensors")) if draw.random() < 0.15 else [*small, *known, *known])
    damage(draw, path)
    return path.name


def readers(folder: Path, sound: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Whatever reads a model folder before anything expensive is done with it."""
    config = yaml.safe_load(CONFIG)
    config["teacher"] = {"pretrained": str(folder)}
    experiment = load_experiment(config)
    return {
        "preflight": lambda: missing(experiment, out / "none"),
        "fetch": lambda: fetch(str(folder), out / "fetched"),
        "family": lambda: check_family(folder, "llava"),
        "processor": lambda: load_processor(folder),
        "pair": lambda: check_pair(folder, sound),
        "model": lambda: load_model(folder),
        "inference": lambda: load_for_inference(folder),
        "pack": lambda: pack(folder, out / "packed"),
        "card": lambda: write_card(folder, Origin(None, None, (), {}), out / "README.md"),
    }


def failures(number: int, sound: dict[str, Path], home: Path) -> dict[str, Path]:
    """One case: every kind of failure, with the folder."""
    draw, found = random.Random(number), {}
    kind = draw.choice(list(sound))
    folder, out = home / f"case-{number}", home / "out"
    shutil.copytree(sound[kind], folder)
    name = broken(draw, folder)
    for act, read in readers(folder, sound["plain"], out).items():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                read()
        except GraceError as error:
            if "\n" in str(error) or len(str(error)) > 2000:
                found[f"{act} of {kind} {name}: a sentence of {len(str(error))} letters"] = folder
        except Exception as error:
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "/grace/" in f.filename][-1]
            found[f"{act}: {type(error).__name__} at {Path(ours.filename).stem}:{ours.lineno} ({kind} {name})"] = folder
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    parser.add_argument("--keep", type=Path, default=None, help="folder for the first folder of each kind of failure")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    end, seen, number = time.monotonic() + arguments.seconds, {}, arguments.seed
    with TemporaryDirectory() as temporary:
        home = Path(temporary)
        sound = folders(home)
        while number < arguments.seed + arguments.cases and time.monotonic() < end:
            for kind, folder in failures(number, sound, home).items():
                if (place := kind.partition(" (")[0]) not in seen:
                    seen[place] = number
                    print(f"case {number}: {kind}", flush=True)
                    if arguments.keep:
                        shutil.copytree(folder, arguments.keep / str(number), dirs_exist_ok=True)
            shutil.rmtree(home / f"case-{number}")
            number += 1
    print(f"cases {arguments.seed} to {number - 1}: {len(seen)} kinds of failure")
    return int(bool(seen))


if __name__ == "__main__":
    sys.exit(main())
