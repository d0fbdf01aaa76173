"""config.json, index and tokenizer files that others wrote: used, or refused in one sentence."""

import contextlib
import io
import json

import pytest

from fuzz import models as fuzz
from grace.errors import GraceError
from grace.families.files import read_config, read_weight_map
from grace.models import load_model, load_processor

CONFIGS = {
    "[]": "holds no JSON object",
    '{"model_type": ["llava"]}': "`model_type`: input should be a valid string",
    '{"text_config": {"vocab_size": "many"}}': "`text_config.vocab_size`: input should be a valid integer",
    '{"text_config": {"num_hidden_layers": 1000000000}}': "`text_config.num_hidden_layers`: input should be less than",
    '{"vision_config": {"depth": 1000000000}}': "`vision_config.depth`: input should be less than or equal to 2000",
    '{"text_config": 3}': "`text_config`: input should be a valid dictionary",
    '{"quantization_config": {}}': "`quantization_config.quant_method`: field required",
    '{"auto_map": {"AutoModel": "x.Model"}}': "`auto_map`: asks for code of its own, which is never run",
    "{" * 5000: "not valid JSON",
    '{"eps": NaN}': "not valid JSON (NaN is no number of JSON)",
    '{"eps": 1e999}': "not valid JSON (1e999 is no number of JSON)",
}
INDEXES = {
    "{}": "`weight_map`: field required",
    '{"weight_map": {}}': "`weight_map`: it lists no weights",
    '{"weight_map": {"a": 1}}': "`weight_map.a`: input should be a valid string",
    '{"weight_map": {"a": "../b.safetensors"}}': "../b.safetensors is no name of a *.safetensors file beside it",
    '{"weight_map": {"a": "/etc/passwd"}}': "/etc/passwd is no name of a *.safetensors file beside it",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_a_config_is_held_against_what_is_read_of_it(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(GraceError) as error:
        read_config(tmp_path)
    assert CONFIGS[text] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", INDEXES)
def test_an_index_names_files_beside_it(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(GraceError) as error:
        read_weight_map(tmp_path)
    assert INDEXES[text] in str(error.value)


def test_what_is_not_read_is_kept(tmp_path):
    about = {
        "model_type": "llava",
        "own": [1, {"x": None}],
        "text_config": {"vocab_size": 7, "more": 1},
        "auto_map": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert read_config(tmp_path) == about
    assert read_weight_map(tmp_path) is None


@pytest.mark.parametrize("read", [load_model, load_processor])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json", "config.json"])
def test_code_of_its_own_is_refused_in_whichever_file_it_is_asked_for(tmp_path, read, name):
    """Folders that lie there as they are, without `grace fetch`."""
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "model.safetensors").touch()
    (tmp_path / name).write_text('{"model_type": "llava", "auto_map": {"AutoModel": "own.Model"}}')
    with pytest.raises(GraceError, match=r"code of its own.*never run"):
        read(tmp_path)


def test_a_config_without_its_sizes_takes_no_memory(tmp_path):
    """transformers would make its default, seven billion random weights, and then say which did not fit."""
    with contextlib.redirect_stdout(io.StringIO()):
        folder = fuzz.folders(tmp_path)["plain"]
    about = read_config(folder)
    (folder / "config.json").write_text(json.dumps({**about, "text_config": {}}))
    with pytest.raises(GraceError, match=r"describes a model of [67],\d{3},\d{3},\d{3} weights and its files have"):
        load_model(folder)


def test_a_tokenizer_that_makes_its_library_panic_is_refused(tmp_path):
    """tokenizers (0.23) cuts each merge behind a prefix that none of them has; its panic is no `Exception`."""
    with contextlib.redirect_stdout(io.StringIO()):
        folder = fuzz.folders(tmp_path)["plain"]
    about = json.loads((folder / "tokenizer.json").read_text())
    assert about["model"]["type"] == "BPE" and about["model"]["merges"]
    about["model"]["continuing_subword_prefix"] = "longer than any token"
    (folder / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(GraceError, match=r"no usable processor \(range .* out of range"):
        load_processor(folder)


def test_broken_folders_are_used_or_refused_in_a_sentence(tmp_path):
    """A short run of tests/fuzz/models.py; the numbers are of cases that once were tracebacks."""
    with contextlib.redirect_stdout(io.StringIO()):
        sound = fuzz.folders(tmp_path)
    for number in (3, 12, 14, 15, 17, 34, 36, 49, 3042, 3064, 3173, 2000190, 2000219, 2000246, 2001180):
        assert fuzz.failures(number, sound, tmp_path) == {}, number
