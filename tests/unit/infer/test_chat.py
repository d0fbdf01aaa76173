"""`grace chat`: what it sees, what it says, a conversation that goes on, and one sentence for whatever is wrong."""

import io
import json
import os
import subprocess
import sys
import zlib

import pytest
import torch
from infer_models import make_image, save_llava, save_packed
from PIL import Image

import grace.infer.chat as module
from grace.errors import GraceError
from grace.infer.chat import chat, check_model, pieces
from grace.infer.decode import generate
from grace.infer.load import load_for_inference
from grace.infer.prompt import build_conversations, build_prompts, model_turn, open_image, user_turn
from grace.models import load_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def image(tmp_path):
    make_image(0).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_it_streams_what_generate_says(folder, image, tmp_path, capfd):
    packed = save_packed(folder, tmp_path / "packed")
    (answer,) = chat(packed, [image], "what is this", device="cpu", new_tokens=6)
    processor = load_processor(packed)
    tokens = generate(load_for_inference(packed), build_prompts(processor, [(make_image(0), "what is this")]), 6)
    assert answer == processor.tokenizer.decode(tokens[0], skip_special_tokens=True)
    out, err = capfd.readouterr()
    assert out == answer + "\n" and "Compressing" not in err


def test_a_conversation_goes_on(folder, image):
    """The second question is asked after the first answer, with the image still there."""
    first, second = chat(folder, [image], device="cpu", new_tokens=4, questions=["what is this", "what colour"])
    processor = load_processor(folder)
    turns = [user_turn([make_image(0)], "what is this"), model_turn(first), user_turn([], "what colour")]
    inputs = build_conversations(processor, [turns])
    tokens = generate(load_for_inference(folder), inputs, 4)
    assert second == processor.tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 9


def test_several_images_reach_the_prompt(folder, image, tmp_path, capfd):
    make_image(1).save(tmp_path / "other.png")
    chat(folder, [image, tmp_path / "other.png"], "what", device="cpu", new_tokens=2, as_json=True)
    said = json.loads(capfd.readouterr().out)
    assert said["images"] == [str(image), str(tmp_path / "other.png")] and said["question"] == "what"
    assert said["tokens"] <= 2 and isinstance(said["ended"], bool) and isinstance(said["answer"], str)
    inputs = build_conversations(load_processor(folder), [[user_turn([make_image(0), make_image(1)], "what")]])
    assert (inputs["input_ids"] == load_processor(folder).image_token_id).sum() == 18


def test_images_are_seen_as_a_viewer_shows_them(tmp_path):
    wide = Image.new("RGB", (8, 4), "black")
    wide.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn right to show
    wide.save(tmp_path / "phone.png", exif=exif)
    shown = open_image(tmp_path / "phone.png")
    assert shown.size == (4, 8) and shown.getpixel((1, 0)) == (255, 255, 255) and shown.getpixel((1, 7)) == (0, 0, 0)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("I;16", (4, 4), 32768).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def bomb(path):
    """A PNG of a few hundred bytes whose header promises four thousand million pixels."""
    Image.new("1", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (65535).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def test_images_that_cannot_be_seen(tmp_path, image):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (tmp_path / "half.png").write_bytes(image.read_bytes()[:200])
    bomb(tmp_path / "bomb.png")
    for name, says in [
        (tmp_path / "none.png", "no such image"),
        (tmp_path / "text.png", "not a readable image"),
        (tmp_path / "cut.png", "not a readable image"),
        (tmp_path / "half.png", "not a readable image"),
        (tmp_path / "bomb.png", "more pixels than max_pixels .* scale it down"),
        (tmp_path, "not a readable image"),
        ("https://example.org/a.png", "an address; download the image"),
        ("data:image/png;base64,AAAA", "an address"),
    ]:
        with pytest.raises(GraceError, match=says):
            open_image(name)


def test_questions_that_cannot_be_asked(folder, image):
    for question, says in [
        ("  ", "the question is empty"),
        ("what\udcff", "no valid text in this terminal's encoding"),
    ]:
        with pytest.raises(GraceError, match=says):
            chat(folder, [image], question)
    with pytest.raises(GraceError, match=r"more than the model's .* positions"):
        chat(folder, [image], "what", device="cpu", new_tokens=100_000)


@pytest.mark.parametrize(
    ("about", "files", "says"),
    [
        ({"quant_method": "awq"}, ["model.safetensors"], "an AWQ export .vLLM opens it"),
        ({"quant_method": "gptq"}, ["model.safetensors"], "a.* GPTQ export"),
        (None, ["model-Q4_0.gguf", "mmproj-BF16.gguf"], "llama-server -m .*--mmproj"),
    ],
)
def test_exports_name_what_opens_them(about, files, says, tmp_path):
    if about:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": about}))
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(GraceError, match=says):
        check_model(tmp_path)


def test_what_is_no_model_folder(tmp_path, image):
    with pytest.raises(GraceError, match="a file; --model takes the folder"):
        check_model(image)
    with pytest.raises(GraceError, match="grace fetch Qwen/Qwen2-VL-2B-Instruct --out FOLDER"):
        check_model(type(image)("Qwen/Qwen2-VL-2B-Instruct"))
    with pytest.raises(GraceError, match="no such folder"):
        check_model(tmp_path / "none")
    with pytest.raises(GraceError, match="not a model folder"):
        chat(tmp_path, [image], "what")


def test_the_command_in_a_terminal_without_utf8(folder, image):
    """Whatever letters the answer has, an ASCII terminal shows the rest; questions come from standard input."""
    done = subprocess.run(
        [sys.executable, "-m", "grace.cli", "chat", str(image), "--model", str(folder), "--device", "cpu",
         "--new-tokens", "3"],
        input="what is this\nwhat colour\n\n", text=True, capture_output=True, timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stderr


def test_letters_that_the_terminal_lacks(folder, image, monkeypatch):
    monkeypatch.setattr(
        module, "pieces", lambda tokenizer, tokens: [f"{len(list(tokens))} caf\N{LATIN SMALL LETTER E WITH ACUTE}"]
    )
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    chat(folder, [image], "what", device="cpu", new_tokens=1)
    out.flush()
    assert out.buffer.getvalue() == b"1 caf?\n"


def test_pieces_hold_back_half_a_character():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    assert list(pieces(Bytes(), iter("né".encode()))) == ["n", "é"]


def test_the_tower_sees_the_image(folder):
    """Another image is another prompt: the pixels differ where the text is the same."""
    prompts = [build_prompts(load_processor(folder), [(make_image(seed), "what")]) for seed in (0, 1)]
    assert torch.equal(prompts[0]["input_ids"], prompts[1]["input_ids"])
    assert not torch.equal(prompts[0]["pixel_values"], prompts[1]["pixel_values"])
