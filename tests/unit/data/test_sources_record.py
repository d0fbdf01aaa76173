"""Records of every kind become messages with their images in place, or are refused with a reason."""

import base64

import pytest
from own_data import dialogue, image_bytes, llava

from grace.data.sources import BadRecord, ImageReference, understand


def said(record, format="auto"):
    """(role, parts) of every message, an image part as its path or bytes."""
    found = understand(record, format)
    images = iter(found.images)
    return [
        (m.role, [p.text if p.type == "text" else (i := next(images)).path or i.data for p in m.content])
        for m in found.messages
    ]


A = ImageReference("a.jpg")
RED = [("user", ["a.jpg", "what colour"]), ("assistant", ["red"])]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (llava(said=("<image>\nwhat colour", "red")), RED),
        (llava(said=("<image>what colour", "red")), RED),
        (llava(said=("what colour\n<image>", "red")), [("user", ["what colour", "a.jpg"]), RED[1]]),
        (llava(said=("is <image> red or", "red")), [("user", ["is ", "a.jpg", " red or"]), RED[1]]),
        (  # two questions, one after the other, at the end: neither has an answer
            {**llava(),
             "conversations": [*dialogue("<image>\nwhat colour", "red"), *dialogue("what"), *dialogue("and")]},
            RED,
        ),
        (llava(said=("what colour", "red")), RED),  # no tag: before the first question
        ({**llava(image=None), "conversations": dialogue("what colour", "red")}, [("user", ["what colour"]), RED[1]]),
        (
            {"image": "a.jpg", "conversations": dialogue("<image>\nwhat colour", "red", roles=("user", "assistant"))},
            RED,
        ),
        (
            {"image": "a.jpg", "conversations": [{"from": "system", "value": "Be brief."}, *dialogue("<image>q", "a")]},
            [("system", ["Be brief."]), ("user", ["a.jpg", "q"]), ("assistant", ["a"])],
        ),
        (
            llava(image=["a.jpg", "b.png"], said=("<image>\n<image>\nwhat differs", "colour", "and <image>", "x"))
            | {"image": ["a.jpg", "b.png", "c.png"]},
            [
                ("user", ["a.jpg", "b.png", "what differs"]),
                ("assistant", ["colour"]),
                ("user", ["and ", "c.png"]),
                ("assistant", ["x"]),
            ],
        ),
        (
            {
                "image": "a.jpg",
                "messages": dialogue(
                    "<image>\nwhat colour", "red", keys=("role", "content"), roles=("user", "assistant")
                ),
            },
            RED,
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "compare"},
                            {"type": "image_url", "image_url": {"url": "a.jpg"}},
                            {"type": "image", "image": "b.png"},
                            {"type": "image", "path": "c.png"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
                ]
            },
            [("user", ["compare", "a.jpg", "b.png", "c.png"]), RED[1]],
        ),
        (
            {
                "images": ["a.jpg"],
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour"}]},
                    {"role": "assistant", "content": "red"},
                ],
            },
            RED,
        ),
        (
            {
                "images": [{"bytes": b"123", "path": None}],
                "texts": [{"user": "what colour", "assistant": "red", "source": "x"}],
            },
            [("user", [b"123", "what colour"]), RED[1]],
        ),
        # a tag in an answer is text, and so is what spells a control token
        (llava(said=("<image>\nwhich tag", "<image> </s>")),
            [("user", ["a.jpg", "which tag"]), ("assistant", ["<image> </s>"])]),
        (llava(said=("<image>\nhow many", 3)), [("user", ["a.jpg", "how many"]), ("assistant", ["3"])]),
        (llava(said=("<image>\nq", " spaced ")), [("user", ["a.jpg", "q"]), ("assistant", [" spaced "])]),
    ],
)  # fmt: skip
def test_messages(record, expected):
    assert said(record) == expected


def test_what_teaches_nothing_is_left_out_with_its_images():
    record = llava(image=["a.jpg", "b.png"], said=("<image>\nq", "a", "and <image>"))
    assert said(record) == [("user", ["a.jpg", "q"]), ("assistant", ["a"])]
    record["conversations"] = [{"from": "gpt", "value": "hello"}, *dialogue("<image>\nq <image>", "a")]
    found = understand(record)
    assert [m.role for m in found.messages] == ["user", "assistant"] and len(found.images) == 2
    assert found.notes == ["an answer before the first question was left out"]


def test_a_data_url_holds_the_image():
    data = image_bytes()
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    record = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "red"}]}
    assert said(record) == [("user", [data]), ("assistant", ["red"])]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "record is not an object"),
        ([1], "record is not an object"),
        ({"id": 1}, "conversation is missing"),
        ({**llava(image=None, said=("<video>\nwhat", "red")), "video": "a.mp4"}, "record has video"),
        ({**llava(image=None, said=("<audio>\nwhat", "red")), "audios": ["a.wav"]}, "record has audios"),
        (llava() | {"conversations": "ab"}, "conversation is not a list"),
        (llava() | {"conversations": {"a": 1}}, "conversation is not a list"),
        (llava() | {"conversations": []}, "conversation is empty"),
        (llava() | {"conversations": [1, 2]}, "message is malformed"),
        (llava() | {"conversations": [{"value": "x"}]}, "message is malformed"),
        (llava(said=("<image>", None)), "message is malformed"),
        (llava(said=("<image>", ["red"])), "message is malformed"),
        (llava(said=("<image>", True)), "message is malformed"),
        (llava(said=("<image>", float("nan"))), "message is malformed"),
        (llava(said=("<image>", "\ud800")), "message is malformed"),
        (llava(said=("<image>", "")), "answer is empty"),
        (llava(said=("<image>", " \n")), "answer is empty"),
        (llava(image=None, said=("", "red")), "question is empty"),
        (llava(said=("<image>",)), "no question with an answer"),
        (llava(image=None), "tags and images differ"),
        (llava(image=["a.jpg", "b.png"]), "tags and images differ"),
        (llava(said=("<image><image>", "x")), "tags and images differ"),
        (llava(image={"a": 1}), "neither a path nor an encoded image"),
        (llava(image=7), "neither a path nor an encoded image"),
        (llava(image=["a.jpg", None]), "neither a path nor an encoded image"),
        (llava(image="https://example.org/a.jpg"), "web address"),
        (llava(image="data:image/png;base64,@@"), "not base64"),
        (llava() | {"conversations": dialogue("<image>", "a", roles=("human", "tool"))}, "role is unknown"),
        (
            llava() | {"conversations": dialogue("<image>", "a", "b", roles=("human", "human"))},
            "no question with an answer",
        ),
        (llava() | {"messages": []} | {"messages": [1]}, "two conversations"),
    ],
)
def test_bad_records_have_a_reason(record, reason):
    with pytest.raises(BadRecord, match=reason):
        understand(record)


def openai(*parts, **more):
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "q"}]}
    return {"messages": [asked, {"role": "assistant", "content": "a", **more.pop("answer", {})}], **more}


def test_an_image_that_a_part_and_the_record_name_is_one():
    record = openai({"type": "image", "image": "a.jpg"}, images=["a.jpg"])
    assert said(record) == [("user", ["a.jpg", "q"]), ("assistant", ["a"])]
    assert said(llava(image="a.jpg") | {"images": ["a.jpg"]})[0][1][0] == "a.jpg"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (openai({"type": "image", "image": "a.jpg"}, images=["b.jpg"]), "two lists of images"),
        (llava(image="a.jpg") | {"images": ["b.jpg"]}, "two lists of images"),
        (openai(image_path="a.JPG"), "unknown key.*'image_path'; call it"),
        (openai(pictures=[{"bytes": b"x", "path": None}]), "unknown key.*'pictures'"),
        (openai(answer={"tool_calls": [{"type": "function"}]}), r"messages\[1\].tool_calls: models here call no tools"),
        (openai(answer={"weight": 0}), r"messages\[1\].weight: every answer is trained on alike"),
        (openai(answer={"content": None}), r"messages\[1\].content: must be text, not null"),
    ],
)
def test_nothing_is_left_out_without_a_word(record, sentence):
    with pytest.raises(BadRecord, match=sentence):
        understand(record)


def test_the_format_decides_between_two_conversations():
    record = llava() | {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    assert said(record, "llava")[1] == ("assistant", ["red"])
    with pytest.raises(BadRecord, match="conversation is missing"):
        understand(llava(), "openai")


@pytest.mark.parametrize(("given", "kept"), [(7, "7"), ("x", "x"), (None, None), ({"a": 1}, None), ("\ud800", None)])
def test_ids(given, kept):
    found = understand(llava(id=given))
    assert found.id == kept and (("an id was given" in found.notes) == (kept is None))
