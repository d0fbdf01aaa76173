"""A teacher and a student that cannot be distilled are told apart before anything is computed."""

import json
import shutil

import pytest
import torch
from chat_models import FAMILIES

from grace.errors import GraceError
from grace.families import check_family
from grace.files import read_json
from grace.models.pair import check_pair


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model, processor = FAMILIES["qwen2_vl"]()
    model.save_pretrained(home / "student")
    processor.save_pretrained(home / "student")
    model.resize_token_embeddings(576)  # as the larger models pad their heads further
    model.save_pretrained(home / "teacher")
    processor.save_pretrained(home / "teacher")
    return home


def test_heads_may_be_padded_differently(home):
    check_pair(home / "teacher", home / "student")
    sizes = [read_json(home / name / "config.json")["text_config"]["vocab_size"] for name in ("teacher", "student")]
    assert sizes == [576, 512]


def test_another_token_behind_an_id_is_refused(home, tmp_path):
    shutil.copytree(home / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher/tokenizer.json"
    about = json.loads(file.read_text())
    vocabulary = about["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    file.write_text(json.dumps(about))
    with pytest.raises(
        GraceError, match=r"2 token ids differ \(id \d+ is .* and .*\); distil between models of one tokenizer"
    ):
        check_pair(tmp_path / "teacher", home / "student")


def test_another_geometry_is_refused(home, tmp_path):
    shutil.copytree(home / "teacher", tmp_path / "teacher")
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = tmp_path / "teacher" / name
        if file.is_file():
            file.write_text(file.read_text().replace('"patch_size": 14', '"patch_size": 16'))
    with pytest.raises(GraceError, match=r"differ in patch_size \(16 and 14\)"):
        check_pair(tmp_path / "teacher", home / "student")


def test_a_head_without_a_row_for_each_token_is_refused(home, tmp_path):
    shutil.copytree(home / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher/config.json"
    about = read_json(file)
    about["text_config"]["vocab_size"] = 300
    file.write_text(json.dumps(about))
    with pytest.raises(GraceError, match=r"its head has 300 rows and the tokenizer \d+ tokens"):
        check_pair(tmp_path / "teacher", home / "student")


def test_another_image_token_than_the_configs_is_refused(home, tmp_path):
    shutil.copytree(home / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher/config.json"
    file.write_text(json.dumps(read_json(file) | {"image_token_id": 7}))
    with pytest.raises(
        GraceError, match=r"<\|image_pad\|> is token \d+ and config\.json says 7; use the model's own tokenizer"
    ):
        check_pair(tmp_path / "teacher", home / "student")


def test_a_tokenizer_without_the_templates_control_tokens_is_refused(home, tmp_path):
    for role in ("teacher", "student"):
        shutil.copytree(home / role, tmp_path / role)
        file = tmp_path / role / "tokenizer.json"
        file.write_text(file.read_text().replace("<|vision_start|>", "<|seen|>"))
    with pytest.raises(
        GraceError, match=r"teacher: its tokenizer has no token <\|vision_start\|>; use the model's own"
    ):
        check_pair(tmp_path / "teacher", tmp_path / "student")


def test_an_image_processor_of_no_size_is_refused(home, tmp_path):
    for role in ("teacher", "student"):
        shutil.copytree(home / role, tmp_path / role)
        for file in (tmp_path / role).glob("*processor_config.json"):
            file.write_text(file.read_text().replace('"merge_size": 2', '"merge_size": 0'))
    with pytest.raises(GraceError, match="teacher: its image processor cannot count patches"):
        check_pair(tmp_path / "teacher", tmp_path / "student")


def test_the_configuration_names_the_family_that_is_there(home):
    check_family(home / "student", "qwen2_vl")
    with pytest.raises(GraceError, match=r"config\.json says qwen2_vl and the configuration family: llava"):
        check_family(home / "student", "llava")
