"""A pretrained model of the user's own: whole, at rest, without code of its own, and apart from his folder."""

import json
import os

import pytest
from chat_models import FAMILIES

from grace.config.pretrained import source_hashes
from grace.errors import GraceError
from grace.files import check_manifest
from grace.models import fetch as fetching
from grace.models.fetch import fetch


@pytest.fixture
def model(tmp_path):
    """A snapshot as the hub's cache keeps it: names that are links to blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/main"
    blobs.mkdir()
    (snapshot / "sub").mkdir(parents=True)
    files = {"config.json": "{}", "model.safetensors": "weights", "sub/vocab.txt": "a", "training_args.bin": "pickle"}
    for number, (name, text) in enumerate(files.items()):
        (blobs / str(number)).write_text(text)
        (snapshot / name).symlink_to(blobs / str(number))
    return snapshot


def test_links_are_followed_and_bytes_are_copied(model, tmp_path):
    out = tmp_path / "out"
    fetch(str(model), out)
    assert sorted(check_manifest(out)["files"]) == ["config.json", "model.safetensors", "sub/vocab.txt"]
    assert not any(path.is_symlink() for path in out.rglob("*"))
    (model / "model.safetensors").resolve().write_text("others!")  # in place
    check_manifest(out)


def test_a_replaced_file_changes_the_hashes_whatever_its_time(model):

    before, blob = source_hashes(model), (model / "model.safetensors").resolve()
    state = blob.stat()
    blob.write_text("weighty")
    os.utime(blob, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = source_hashes(model)
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("family", "named", "ends"),
    [
        (
            "qwen2_vl",
            {"eos_token_id": 151645, "top_k": 1},
            ["<|im_end|>"],
        ),  # transformers' default, no row of this head
        ("qwen2_vl", {"eos_token_id": 5}, [5, "<|im_end|>"]),
        ("qwen2_vl", None, ["<|im_end|>"]),
        ("llava-clip", {"eos_token_id": [2, 7]}, None),  # as published: kept
    ],
)
def test_generation_stops_where_training_ends_an_answer(tmp_path, family, named, ends):
    model, processor = FAMILIES[family]()
    model.config.get_text_config().eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/generation_config.json"
    path.unlink(missing_ok=True)
    if named is not None:
        path.write_text(json.dumps(named))
    fetch(str(tmp_path / "model"), tmp_path / "out")
    found = json.loads((tmp_path / "out/generation_config.json").read_text())
    ids = ends and [processor.tokenizer.convert_tokens_to_ids(end) if isinstance(end, str) else end for end in ends]
    assert found == (named or {}) | ({"eos_token_id": ids} if ids else {})


def dangling(model):
    (model / "model.safetensors").resolve().unlink()


def code_of_its_own(model):
    (model / "config.json").resolve().write_text(json.dumps({"auto_map": {"AutoConfig": "modeling.Config"}}))


def processor_s_code(model):
    (model / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "processing.P"}}))


def shard_missing(model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-2.safetensors"}}))


def no_weights(model):
    (model / "model.safetensors").unlink()


def device(model):
    """What an archive may hold; a copy of it would fill the disk."""
    (model / "vocab.json").symlink_to("/dev/zero")


def pipe(model):
    os.mkfifo(model / "vocab.json")


def an_end_that_is_no_token(model):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>", 2]}))


@pytest.mark.parametrize(
    "fault, sentence",
    [
        (an_end_that_is_no_token, "generation_config.json: .*eos_token_id.* valid integer"),
        (device, "vocab.json: a pipe or a device, and no file"),
        (pipe, "vocab.json: a pipe or a device, and no file"),
        (dangling, "model.safetensors: a link to .*, which is not there"),
        (code_of_its_own, r"config.json asks for code of its own \(auto_map\), which is never run"),
        (processor_s_code, r"processor_config.json asks for code of its own \(auto_map\), which is never run"),
        (shard_missing, "names model-2.safetensors, which are not there"),
        (no_weights, "holds no .*safetensors"),
    ],
)
def test_a_model_that_cannot_be_trusted_is_refused(model, tmp_path, fault, sentence):
    fault(model)
    with pytest.raises(GraceError, match=sentence):
        fetch(str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.part"))


def test_a_folder_that_changes_while_it_is_copied_is_refused(model, tmp_path, monkeypatch):
    def copy(source, target, real=fetching.shutil.copyfile):
        real(source, target)
        target.write_text(target.read_text() + "cut")

    monkeypatch.setattr(fetching.shutil, "copyfile", copy)
    with pytest.raises(GraceError, match="changed while it was copied"):
        fetch(str(model), tmp_path / "out")


def test_what_was_exchanged_since_the_run_began_is_refused(model, tmp_path):
    before = source_hashes(model)
    (model / "config.json").resolve().write_text('{"other": 1}')
    with pytest.raises(GraceError, match="changed since the run began; run Snakemake again"):
        fetch(str(model), tmp_path / "out", expected=before)
    fetch(str(model), tmp_path / "out", expected=source_hashes(model))
    (model / "config.json").resolve().write_text("[]")
    with pytest.raises(GraceError, match=f"^{model}/config.json: holds no JSON object"):
        fetch(str(model), tmp_path / "other")
