"""Model folders broken at random: each is used, or refused in one sentence, whoever reads it.

    PYTHONPATH=tests/helpers python tests/fuzz/models.py --seconds 600 --first 1000

A folder as transformers writes it, one in several weight files, a quantised and a packed student each lose, change or
gain something in one of their small files or in a weight file's header. Then every reader of the pipeline looks at it.
What failed is kept in --keep.
"""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import yaml
from cases import failure, flags, run
from chat_models import talking_student
from mutate import damage
from stub_tree import CONFIG
from transformers import AutoModelForImageTextToText

from grace.config.load import load_experiment
from grace.config.preflight import missing
from grace.families.__init__ import check_family
from grace.infer.load import load_for_inference
from grace.models import load_model, load_processor
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


def failures(number: int, sound: dict[str, Path], home: Path) -> dict[str, str]:
    """One case: every kind of failure, with the file and the folder's kind; the folder is `case` below `home`."""
    draw, found = random.Random(number), {}
    kind = draw.choice(list(sound))
    folder, out = home / "case", home / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound[kind], folder)
    name = broken(draw, folder)
    for act, read in readers(folder, sound["plain"], out).items():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if failed := failure(read, one_line=True):
            found[f"{act}: {failed}"] = f"{name} of {kind}"
    return found


def main() -> int:
    parser = flags(__doc__)
    parser.add_argument("--keep", type=Path, default=None, help="folder for the folders that failed, by their numbers")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        home = Path(temporary)
        sound = folders(home)

        def case(number: int) -> dict[str, str]:
            found = failures(number, sound, home)
            if found and arguments.keep:
                shutil.copytree(home / "case", arguments.keep / str(number), dirs_exist_ok=True)
            return found

        return run(arguments, case)


if __name__ == "__main__":
    sys.exit(main())
