"""A teacher and a student that cannot be distilled are told apart before anything is computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chat_models import FAMILIES

from grace.errors import GraceError
from grace.families import check_family
from grace.files import read_json
from grace.models.pair import check_pair

PROCESSOR = "*processor_config.json"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A student, and a teacher whose head is padded further."""
    home = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model, processor = FAMILIES["qwen2_vl"]()
    model.save_pretrained(home / "student")
    processor.save_pretrained(home / "student")
    model.resize_token_embeddings(576)  # as the larger models pad their heads further
    model.save_pretrained(home / "teacher")
    processor.save_pretrained(home / "teacher")
    return home


@pytest.fixture
def pair(home, tmp_path):
    """Copies of both folders, to be changed."""
    return [shutil.copytree(home / role, tmp_path / role) for role in ("teacher", "student")]


def edit(file: Path, change: Callable[[dict], None]) -> None:
    """Change what a JSON file says."""
    about = json.loads(file.read_text())
    change(about)
    file.write_text(json.dumps(about))


def replace(folder: Path, pattern: str, old: str, new: str) -> None:
    """Replace a text that stands in some of the folder's files."""
    saying = [file for file in folder.glob(pattern) if old in file.read_text()]
    assert saying, old
    for file in saying:
        file.write_text(file.read_text().replace(old, new))


def test_heads_may_be_padded_differently(home):
    check_pair(home / "teacher", home / "student")
    sizes = [read_json(home / name / "config.json")["text_config"]["vocab_size"] for name in ("teacher", "student")]
    assert sizes == [576, 512]


def test_another_token_behind_an_id_is_refused(pair):
    def exchange(tokenizer: dict) -> None:
        words = tokenizer["model"]["vocab"]
        words["!"], words['"'] = words['"'], words["!"]

    edit(pair[0] / "tokenizer.json", exchange)
    said = r"2 token ids differ \(id \d+ is .* and .*\); distil between models of one tokenizer"
    with pytest.raises(GraceError, match=said):
        check_pair(*pair)


def test_another_geometry_is_refused(pair):
    replace(pair[0], PROCESSOR, '"patch_size": 14', '"patch_size": 16')
    with pytest.raises(GraceError, match=r"differ in patch_size \(16 and 14\)"):
        check_pair(*pair)


def test_a_head_without_a_row_for_each_token_is_refused(pair):
    edit(pair[0] / "config.json", lambda config: config["text_config"].update(vocab_size=300))
    with pytest.raises(GraceError, match=r"its head has 300 rows and the tokenizer \d+ tokens"):
        check_pair(*pair)


def test_another_image_token_than_the_configs_is_refused(pair):
    edit(pair[0] / "config.json", lambda config: config.update(image_token_id=7))
    said = r"<\|image_pad\|> is token \d+ and config\.json says 7; use the model's own tokenizer"
    with pytest.raises(GraceError, match=said):
        check_pair(*pair)


def test_a_tokenizer_without_the_templates_control_tokens_is_refused(pair):
    for folder in pair:
        replace(folder, "tokenizer.json", "<|vision_start|>", "<|seen|>")
    said = r"teacher: its tokenizer has no token <\|vision_start\|>; use the model's own"
    with pytest.raises(GraceError, match=said):
        check_pair(*pair)


def test_an_image_processor_of_no_size_is_refused(pair):
    for folder in pair:
        replace(folder, PROCESSOR, '"merge_size": 2', '"merge_size": 0')
    with pytest.raises(GraceError, match="teacher: its image processor cannot count patches"):
        check_pair(*pair)


def test_the_configuration_names_the_family_that_is_there(home):
    check_family(home / "student", "qwen2_vl")
    with pytest.raises(GraceError, match=r"config\.json says qwen2_vl and the configuration family: llava"):
        check_family(home / "student", "llava")
