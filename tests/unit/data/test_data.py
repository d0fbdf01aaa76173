"""Labels cover the answers and nothing else; the order of the data is a function of seed and step."""

import io
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from grace.data import Conversation, EncodedImage, collate, load_conversations, load_examples, plan_batches
from grace.data.conversations import SCHEMA, as_row, asked_and_answered
from grace.data.examples import IGNORED
from grace.demo.processor import build_processor
from grace.errors import GraceError


def jpeg(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), colour).save(buffer, "JPEG")
    return buffer.getvalue()


TURNS = [("describe the picture", "red shirt"), ("what colour is the shirt", "red"), ("is there a bag", "no")]


def write(folder, rows, schema=True):
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA if schema else None), folder / "train.parquet")
    return folder


def row(name="one", image=None, turns=TURNS):
    image = EncodedImage.from_bytes(name, jpeg("red") if image is None else image)
    return as_row(Conversation(name, (image,), asked_and_answered(turns)))


def test_labels_are_the_answers_and_their_ends(tmp_path):
    processor = build_processor()
    (example,) = load_examples(write(tmp_path, [row()]), processor)
    said = processor.tokenizer.convert_ids_to_tokens(example.input_ids[example.labels != IGNORED])
    end = processor.tokenizer.eos_token
    assert said == ["red", "shirt", end, "red", end, "no", end]
    assert torch.equal(example.labels[example.labels != IGNORED], example.input_ids[example.labels != IGNORED])
    assert (example.input_ids == processor.tokenizer.convert_tokens_to_ids(processor.image_token)).sum() == 9


def test_a_template_without_answer_marks_is_refused(tmp_path):
    processor = build_processor()
    for mark in ("{% generation %}", "{% endgeneration %}"):
        processor.chat_template = processor.chat_template.replace(mark, "")
    with pytest.raises(GraceError, match="put each answer and its end token between"):
        load_examples(write(tmp_path, [row()]), processor)


def test_the_prompt_of_evaluation_is_a_prefix_of_training(tmp_path):
    processor = build_processor()
    turns = [("what colour is the shirt", "red")]
    (example,) = load_examples(write(tmp_path, [row(turns=turns)]), processor)
    content = [{"type": "image"}, {"type": "text", "text": turns[0][0]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor(text=[prompt], images=[Image.new("RGB", (96, 96))], return_tensors="pt")["input_ids"][0]
    assert torch.equal(ids, example.input_ids[: len(ids)])
    assert (example.labels[: len(ids)] == IGNORED).all() and example.labels[len(ids)] != IGNORED


def test_the_key_depends_on_tokens_and_image(tmp_path):
    rows = [row("a"), row("b", image=jpeg("blue")), row("c", turns=TURNS[:2]), row("d")]
    a, b, c, d = load_examples(write(tmp_path, rows), build_processor())
    assert a.key == d.key
    assert len({a.key, b.key, c.key}) == 3


def test_collate_pads_on_the_right(tmp_path):
    processor = build_processor()
    examples = load_examples(write(tmp_path, [row("a"), row("b", turns=TURNS[:1])]), processor)
    batch = collate(examples, processor)
    assert batch.pixels["pixel_values"].shape == (2, 3, 96, 96)
    assert batch.attention_mask.sum(1).tolist() == [len(e.input_ids) for e in examples]
    rows, columns, labels = batch.supervised()
    assert torch.equal(labels, batch.input_ids[rows, columns + 1])


@pytest.mark.parametrize("count, size", [(10, 4), (64, 4), (5, 8), (1, 1)])
def test_every_epoch_is_a_permutation(count, size):
    lengths = [10 + (7 * i) % 13 for i in range(count)]
    plan = plan_batches(lengths, size, seed=3)
    seen, epochs = [], 3
    while len(seen) < epochs * count:
        seen += next(plan)
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    again = [i for batch in islice(plan_batches(lengths, size, seed=3), 50) for i in batch]
    assert again[: len(seen)] == seen[: len(again)]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: r | {"images": [{"bytes": None, "path": None, "sha256": None}]}, "row 0 .*has an empty image"),
        (lambda r: r | {"images": []}, "row 0 .*has 0 images and 1 places for them"),
        (lambda r: r | {"messages": []}, "row 0 .*has no answer"),
        (lambda r: r | {"messages": [m | {"role": "tool"} for m in r["messages"]] + r["messages"]}, "of role 'tool'"),
        (lambda r: r | {"messages": r["messages"][:1] * 2 + [r["messages"][1]]}, "has 1 images and 2 places"),
        (lambda r: {"id": r["id"], "images": r["images"]}, "column messages, caption is missing"),
    ],
)
def test_broken_rows_are_named(tmp_path, change, reason):
    write(tmp_path, [change(row())], schema=False)
    with pytest.raises(GraceError, match=reason):
        load_conversations(tmp_path / "train.parquet")


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(GraceError, match="image of one: cannot be read"):
        load_examples(write(tmp_path, [row(image=b"\xff\xd8 not an image")]), build_processor())
    with pytest.raises(GraceError, match=r"gone.jpg: the image of x cannot be read"):
        EncodedImage("x", None, str(tmp_path / "gone.jpg"), "0" * 64).open()


def test_duplicate_ids_are_refused(tmp_path):
    with pytest.raises(GraceError, match="the same id stands twice"):
        load_examples(write(tmp_path, [row(), row()]), build_processor())
