"""Model folders broken at random: each is used, or refused in one sentence, whoever reads it.

    PYTHONPATH=tests/helpers python tests/fuzz/models.py --seconds 600 --seed 1

A folder as transformers writes it, one in several weight files, a quantised and a packed student each lose, change or gain
something in one of their small files or in a weight file's header. Then every reader of the pipeline looks at it. The first
folder of each new kind of failure is kept in --keep.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from chat_models import talking_student
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

VALUES: list[Any] = [
    None, True, 0, -1, 1, 7, 2**40, 1.5, float("nan"), "", "x", "a" * 5000, "\x00", "../../x.safetensors", "/etc/passwd",
    "llava", "qwen2_vl", "bfloat16", [], {}, [None], ["x"], {"x": 1}, [[]], {"type": "int"}, "model.safetensors",
]  # fmt: skip
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


def _change(draw: random.Random, value: Any) -> Any:
    """A JSON value with one node, somewhere inside, another."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        value, key = dict(value), draw.choice(list(value))
        way = draw.randrange(8)
        if way == 0:
            del value[key]
        elif way == 1:
            value[draw.choice(["x", "auto_map", "quantization_config", "text_config", ""])] = deepcopy(
                draw.choice(VALUES)
            )
        else:
            value[key] = _change(draw, value[key])
        return value
    if isinstance(value, list) and value and draw.random() < 0.6:
        value, at = list(value), draw.randrange(len(value))
        value[at] = _change(draw, value[at])
        return value
    return deepcopy(draw.choice(VALUES))


def damage(draw: random.Random, folder: Path) -> str:
    """Break one file of a folder; its name."""
    small = sorted(
        p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".txt") and p.name != "environment.json"
    )
    weights = sorted(folder.glob("*.safetensors"))
    if draw.random() < 0.15:
        path = draw.choice(weights)
        data = bytearray(path.read_bytes())
        size = int.from_bytes(data[:8], "little")
        if draw.random() < 0.5:
            data[draw.randrange(min(len(data), size + 8))] = draw.randrange(256)
            path.write_bytes(bytes(data))
        else:
            text = json.dumps(_change(draw, json.loads(data[8 : 8 + size]))).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        return path.name
    path = draw.choice([*small, *[p for p in small if p.name in ("config.json", "model.safetensors.index.json")] * 2])
    way = draw.random()
    if way < 0.05:
        path.unlink()
    elif way < 0.2 or path.suffix != ".json":
        data = bytearray(path.read_bytes())
        for _ in range(draw.choice([1, 1, 3])):
            at = draw.randrange(len(data) + 1)
            data[at : at + draw.choice([0, 1, 20])] = draw.choice([b"", b"\xff", b"{", b"]", b"\x00", b"NaN", b"{{ x"])
        path.write_bytes(bytes(data))
    else:
        value = json.loads(path.read_text())
        for _ in range(draw.choice([1, 1, 2])):
            value = _change(draw, value)
        path.write_text(json.dumps(value))
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
    name = damage(draw, folder)
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
