"""The demo's vision tower: what ships is what the code describes, and training it is deterministic and resumable."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from grace.demo import tower as towers
from grace.demo.images import SCENES, draw_scene, generator
from grace.demo.processor import build_processor
from grace.demo.sources import load_sources
from grace.demo.vocabulary import words
from grace.files import check_manifest


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(towers, "_BATCH", 2)
    monkeypatch.setattr(towers, "_CHECKPOINT_EVERY", 2)


def test_the_shipped_tower_is_whole_and_has_nine_tokens():
    manifest = check_manifest(towers.SHIPPED)
    assert 0.78 < manifest["held_out_accuracy"]["garment"] < 0.9
    model = AutoModel.from_pretrained(towers.SHIPPED, dtype=torch.float32)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in towers.CellClassifier().tower.named_parameters()
    }
    hidden = model(torch.zeros(1, 3, 96, 96), output_hidden_states=True).hidden_states[-1]
    assert hidden.shape == (1, 9, towers.tower_config().hidden_size)


def test_targets_say_what_each_cell_shows():
    for name in SCENES:
        scene = draw_scene(generator(1, "train", name, 0), name, load_sources("train"))
        targets = towers.cell_targets(scene)
        shown = {thing.cell: thing for thing in scene.things}
        for cell in range(9):
            thing = shown.get(cell)
            kind = 0 if thing is None else 1 + thing.kind if thing.readable else towers.IGNORED
            assert targets["kind"][cell] == kind
            assert targets["colour"][cell] == (0 if thing is None else 1 + thing.colour)
            assert targets["sharpness"][cell] == (0 if thing is None else 1 if thing.readable else 2)


def test_a_killed_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    towers.tower(tmp_path / "whole", steps=3, seed=1)
    with monkeypatch.context() as killed:
        batch = towers._batch

        def dies(seed, split, step, size, sources):
            if step == 2:
                raise KeyboardInterrupt
            return batch(seed, split, step, size, sources)

        killed.setattr(towers, "_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            towers.tower(tmp_path / "again", steps=3, seed=1)
    assert not (tmp_path / "again").exists() and list(tmp_path.glob(".again*.checkpoint.pt"))
    towers.tower(tmp_path / "again", steps=3, seed=1)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not list(tmp_path.glob(".*"))


def test_the_processor_survives_saving(tmp_path):
    from transformers import AutoProcessor

    build_processor().save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.convert_ids_to_tokens(range(len(processor.tokenizer))) == words()
    assert (
        processor.tokenizer("What colour is the bag? 47").input_ids
        == processor.tokenizer("what colour is the bag 4 7").input_ids
    )
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is blue"}]}
    prompt = processor.apply_chat_template([question], add_generation_prompt=True)
    images = [torch.zeros(3, 96, 96, dtype=torch.uint8).numpy()]
    found = processor(text=prompt, images=images, return_tensors="pt")
    said = processor.tokenizer.convert_ids_to_tokens(found["input_ids"][0])
    assert said == ["<bos>", *["<image>"] * 9, "<q>", "what", "is", "blue"]
    assert torch.all(found["pixel_values"] == -1)
