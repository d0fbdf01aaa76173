"""The GGUF pair in llama.cpp itself: it loads both files, tokenizes, sees the image and answers as our model does."""

import json
import subprocess
import sys
from pathlib import Path

import chat_models
import pytest
import torch
from chat_models import FAMILIES, SIDES, blocks, talking_student
from PIL import Image
from transformers import AutoModelForImageTextToText

from grace.errors import GraceError
from grace.quant.export import export
from grace.quant.gguf_vocabulary import Vocabulary
from grace.quant.pack import pack

QUESTION = "what is in this image? 20 boots, naïve…"
ASK = Path(chat_models.__file__).with_name("ask_llama.py")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(family, folder with `student`, `packed` and `gguf`)."""
    folder = tmp_path_factory.mktemp(request.param)
    talking_student(folder / "student", request.param)
    pack(folder / "student", folder / "packed")
    export(folder / "packed", "gguf", folder / "gguf")
    return request.param, folder


def class_token_last(model):
    """A CLIP tower as llama.cpp's graph reads it: the class token behind the patches, which lose the first."""
    embeddings = model.model.vision_tower.embeddings
    rows = embeddings.position_embedding.weight

    def forward(pixel_values, **_):
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([patches, embeddings.class_embedding.expand(1, 1, -1)], 1) + rows

    embeddings.forward = forward
    return model


def first_token(model, processor, image):
    """fp32 log-probabilities [vocab] of the first token of the answer, and the prompt's length."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt"
    )  # fmt: skip
    with torch.no_grad():
        return model(**inputs).logits[0, -1].log_softmax(-1), inputs["input_ids"].shape[1]


def test_llama_cpp_answers_about_an_image(pair, tmp_path):
    pytest.importorskip("xllamacpp")
    family, folder = pair
    processor = FAMILIES[family]()[1]
    model = AutoModelForImageTextToText.from_pretrained(folder / "student", dtype=torch.float32)
    if family == "llava-clip":
        model = class_token_last(model)
    for seed in (0, 1):
        image = blocks(SIDES[family], seed)
        image.save(tmp_path / "image.png")
        asked = [sys.executable, str(ASK), str(folder / "gguf"), str(tmp_path / "image.png"), QUESTION]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        answer = json.loads(done.stdout.splitlines()[-1])
        wanted, length = first_token(model, processor, image)
        assert answer["usage"]["prompt_tokens"] == length
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        # llama.cpp rounds activations to 8 bits before each Q4_0 product
        found = torch.tensor([token["logprob"] for token in top])
        distance = (found - wanted[[token["id"] for token in top]]).abs().max()
        blind, _ = first_token(model, processor, Image.new("RGB", image.size, "white"))
        shown = (found - blind[[token["id"] for token in top]]).abs().max()  # how much another image would show
        assert distance < 0.3 and distance < shown / 2


def test_tokens_are_those_of_the_tokenizer(pair):
    """llama.cpp's own tokenizer gave the prompt's length above; here every token, its kind and the ends."""
    family, folder = pair
    vocabulary, tokenizer = Vocabulary.of_folder(folder / "packed"), FAMILIES[family]()[1].tokenizer
    assert vocabulary.tokens == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert vocabulary.special["eos"] == tokenizer.eos_token_id
    assert vocabulary.starts == (tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    controls = {vocabulary.tokens[index] for index, kind in enumerate(vocabulary.types) if kind == 3}
    assert controls >= {tokenizer.eos_token, tokenizer.image_token if "qwen" in family else "<image>"}
    shipped = (folder / "packed" / "chat_template.jinja").read_text()
    assert shipped.endswith(vocabulary.template) and vocabulary.template.startswith("{%- for")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vision_feature_select_strategy": "full"}, "leaves out a CLIP tower's class token"),
        ({"vision_feature_layer": [-2, -1]}, "several vision feature layers"),
        ({"vision_config.hidden_act": "relu"}, "no vision activation relu"),
        ({"vision_config.model_type": "pixtral"}, "CLIP or SigLIP tower"),
        ({"text_config.rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary scaling yarn"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_before_writing(change, says, tmp_path):
    pack(talking_student(tmp_path / "student", "llava-clip"), tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    for name, value in change.items():
        *parents, last = name.split(".")
        holder = config
        for parent in parents:
            holder = holder[parent]
        holder[last] = value
    path.write_text(json.dumps(config))
    with pytest.raises(GraceError, match=says):
        export(tmp_path / "packed", "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_tokenizer_of_whole_words_is_refused(tmp_path):
    pack(talking_student(tmp_path / "student", "llava-siglip"), tmp_path / "packed")
    path = tmp_path / "packed" / "tokenizer.json"
    about = json.loads(path.read_text())
    about["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    path.write_text(json.dumps(about))
    with pytest.raises(GraceError, match=r"type WordLevel .* is none that llama\.cpp reads"):
        export(tmp_path / "packed", "gguf", tmp_path / "gguf")
