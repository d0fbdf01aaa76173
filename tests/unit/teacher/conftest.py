"""What several files take: a teacher, its data, its caches, and what it says of each conversation."""

import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_cache import FORMATS, IMAGE, row, run_file
from tiny_models import make_llava

from grace.data import load_examples, prepare_examples
from grace.data.conversations import SCHEMA
from grace.demo.processor import build_processor
from grace.files import whole_folder, write_manifest
from grace.models import load_model, load_processor
from grace.teacher.commands import finish, write


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Data, a teacher, and a finished cache of every format."""
    home = tmp_path_factory.mktemp("experiment")
    (home / "data").mkdir()
    processor = build_processor()
    processor.save_pretrained(home / "data/processor")
    pq.write_table(
        pa.Table.from_pylist([row(number) for number in range(8)], schema=SCHEMA), home / "data/train.parquet"
    )
    prepare_examples(home / "data", processor, tower=None)
    write_manifest(home / "data")
    for name, seed in (("teacher", 0), ("student", 1)):
        with whole_folder(home / name) as folder:
            make_llava(seed, vocabulary=len(processor.tokenizer)).to(torch.bfloat16).save_pretrained(folder)
    for format in FORMATS:
        arguments = (run_file(home, format), home / "teacher", home / "data", home / format)
        write(*arguments)
        finish(*arguments)
    return home


@pytest.fixture(scope="session")
def examples(home):
    return load_examples(home / "data", load_processor(home / "data/processor"))


@pytest.fixture(scope="session")
def seen(home, examples):
    """What the teacher says of every conversation by itself: states, labels, visual tokens, in fp32."""
    model, processor = load_model(home / "teacher", torch.float32), load_processor(home / "data/processor")
    found, penultimate = {}, []
    model.model.language_model.layers[-2].register_forward_hook(lambda *call: penultimate.append(call[-1]))
    for example in examples:
        with torch.no_grad():
            pixels = processor.image_processor(images=[example.images[0].open()], return_tensors="pt")
            out = model.model(input_ids=example.input_ids[None], **pixels)
        asked = (example.labels[1:] != -100).nonzero().flatten()
        states, labels = out.last_hidden_state[0, asked], example.labels[asked + 1]
        visual = penultimate[-1][0, example.input_ids == IMAGE]
        logits = (states @ model.lm_head.weight.T).detach()
        found[example.key] = SimpleNamespace(
            states=states, labels=labels, visual=visual.double(), logits=logits.double()
        )
    return found


@pytest.fixture
def copy(home, tmp_path):
    """A copy of the `hidden` cache to damage, with the arguments that its subcommands take."""
    shutil.copytree(home / "hidden", tmp_path / "hidden")
    return run_file(tmp_path), home / "teacher", home / "data", tmp_path / "hidden"
