"""Folders that transformers saved, as published checkpoints are: names, dtype, no path of this machine."""

import pytest
import torch
from chat_models import FAMILIES
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from grace.families import family_of
from grace.files import read_json
from grace.quant.checkpoint import Checkpoint, name_as_published


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
@pytest.mark.parametrize("family", ["llava-clip", "llava-siglip", "qwen2_vl"])
def test_names_and_config_are_those_of_the_hub(family, shard, tmp_path):
    model = FAMILIES[family]()[0].float()
    model.config._name_or_path = model.config.text_config._name_or_path = "results/demo/students"
    model.config.text_config.dtype = torch.float32
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size=shard)
    name_as_published(tmp_path, family_of(model).published)
    names = set(Checkpoint.of_folder(tmp_path))
    assert all(name.startswith("vision_tower.vision_model.") for name in names if "vision_tower" in name)
    if shard == "100KB":
        held = set()
        for path in tmp_path.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                held |= set(file.keys())
        assert held == names == set(read_json(tmp_path / "model.safetensors.index.json")["weight_map"])
    config = (tmp_path / "config.json").read_text()
    assert "results/demo" not in config and "_name_or_path" not in config and "float32" not in config
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
