"""What an experiment's models and data amount to, before anything runs: weights are counted without being made."""

import random
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from grace.cluster.predict import DataSize, ModelSize
from grace.config.sections import FilesData, Source
from grace.data.prepared import FILE, Examples
from grace.errors import GraceError, reason
from grace.families import family_of
from grace.models import decoder, decoder_linears, freeze_vision, load_processor, output_head

SAMPLE = 256  # conversations of a source, or of a data folder


def model_size(folder: Path) -> ModelSize:
    """Of the model that a folder's config.json describes; its weights need not be there."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as error:
        raise GraceError(
            f"{folder}: no model can be made of its config.json ({reason(error)}); fetch it first"
        ) from error
    freeze_vision(model)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    text = config.get_text_config()
    return ModelSize(
        weights=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        matrices=sum(p.numel() for p in trained if p.ndim > 1),
        decoder=sum(linear.weight.numel() for linear in decoder_linears(model).values()),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=len(decoder(model).layers),
        head=len(output_head(model).weight),
    )


def prepared_size(folder: Path) -> DataSize:
    """Of a data folder: lengths are counted, what is asked for is drawn from some conversations."""
    examples = Examples(folder)
    asked = np.flatnonzero(~examples.captions)
    drawn = np.random.default_rng(0).permutation(asked)[:SAMPLE]
    some = [examples[int(number)] for number in drawn]
    tokens = int(examples.lengths[asked].sum())
    share = sum(example.supervised_tokens() for example in some) / sum(len(example.input_ids) for example in some)
    images = int(examples.images_of(asked).sum())
    token = _image_token(folder / "processor")
    shown = sum(len(example.images) for example in some)
    visual = sum(int((example.input_ids == token).sum()) for example in some)
    return DataSize(
        len(asked), tokens, round(share * tokens), images, visual / max(shown, 1),
        int(examples.lengths[asked].max()),
    )  # fmt: skip


def _image_token(processor: Path) -> int:
    """The id of a visual token."""
    found = load_processor(processor)
    return found.tokenizer.convert_tokens_to_ids(family_of(found).image_token)


def sampled_size(data: FilesData, processor: Path) -> DataSize:
    """Of sources that are not prepared yet: records are counted, and some of each are read as `grace prepare` would."""
    sizes = [_source_size(data, number, section, processor) for number, section in enumerate(data.sources)]
    total = {
        name: sum(getattr(size, name) for size in sizes)
        for name in ("conversations", "tokens", "supervised", "images", "sampled")
    }
    visual = sum(size.visual * size.images for size in sizes) / max(total["images"], 1)
    return DataSize(**total, visual=visual, longest=max(size.longest for size in sizes))


def _source_size(data: FilesData, number: int, section: Source, processor: Path) -> DataSize:
    from grace.data.sources import open_source
    from grace.data.tokenise import Task, make_part

    draw, kept, count = random.Random(0), [], 0
    for record in islice(open_source(section.path).records(), section.limit):
        count += 1  # each record stays with the same probability
        if len(kept) < SAMPLE:
            kept.append(record)
        elif (at := draw.randrange(count)) < SAMPLE:
            kept[at] = record
    with tempfile.TemporaryDirectory() as folder:
        part = make_part(Task(data, processor, number, 0, kept, Path(folder) / "part.arrow"))
        rows = pa.ipc.open_file(str(part)).read_all().to_pylist()
    if not rows:
        raise GraceError(f"{section.path}: no record of {len(kept)} can be trained on; `grace prepare` says why")
    factor = count / len(kept) * section.weight
    lengths = [len(row["input_ids"]) for row in rows]
    images = sum(len(row["images"]) for row in rows)
    token = _image_token(processor)
    visual = sum(row["input_ids"].count(token) for row in rows)
    return DataSize(
        round(factor * len(rows)), round(factor * sum(lengths)),
        round(factor * sum(label != -100 for row in rows for label in row["labels"])), round(factor * images),
        visual / max(images, 1), max(lengths), len(rows),
    )  # fmt: skip


def data_size(data: Any, folder: Path, processor: Path | None) -> DataSize:
    """Of the experiment's data: of `folder` where it is prepared, else from the sources by the `processor`."""
    if (folder / FILE).is_file():
        return prepared_size(folder)
    if isinstance(data, FilesData) and processor is not None:
        return sampled_size(data, processor)
    raise GraceError(f"{folder}: not prepared yet; build it first: `snakemake {folder}/manifest.json`")
