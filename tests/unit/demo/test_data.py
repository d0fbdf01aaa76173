"""The demo's images and questions: no leak between splits, answers that follow from the image, the same every time."""

import io
import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from grace.config.schema import DemoData
from grace.data import load_prepared
from grace.demo import sources
from grace.demo.benchmarks import BENCHMARKS, POPULAR, draw_item, items
from grace.demo.images import CELL, SCENES, Scene, Thing, draw_scene, encode, generator, render
from grace.demo.parts import QUESTIONS, training_rows
from grace.demo.prepare import prepare
from grace.demo.questions import ASKED, caption, conversation, mistake, reading, unanswerable
from grace.demo.sources import SPLITS, load_sources
from grace.demo.vocabulary import (
    CATEGORIES,
    CATEGORY_OF,
    COLOURS,
    GARMENTS,
    KINDS,
    NUMBERS,
    POSITIONS,
    SPECIAL,
    UNANSWERABLE,
    words,
)
from grace.errors import GraceError

VOCABULARY = set(words())
COLOUR_NAMES = list(COLOURS)


def drawn(split="train", per_scene=40):
    """Scenes of every sort, each with its random numbers."""
    for name in SCENES:
        for index in range(per_scene):
            rng = generator(3, split, name, index)
            yield draw_scene(rng, name, load_sources(split)), rng


def test_no_source_image_is_in_two_splits():
    pixels = {split: {crop.tobytes() for crops in load_sources(split).crops for crop in crops} for split in SPLITS}
    names = {split: {name for ids in load_sources(split).ids for name in ids} for split in SPLITS}
    for one, other in (("train", "development"), ("train", "test"), ("development", "test")):
        assert not pixels[one] & pixels[other]
        assert not names[one] & names[other]
    assert all(len(pixels[split]) == len(names[split]) for split in SPLITS)


def test_no_background_pixel_is_in_two_splits():
    spans = {
        split: [(t.ctypes.data, t.ctypes.data + 3 * t.shape[1]) for t in load_sources(split).textures]
        for split in SPLITS
    }
    for n in range(2):  # views of one row of the same photograph: their byte ranges follow one another
        (a, b), (c, d), (e, f) = (spans[split][n] for split in SPLITS)
        assert a < b <= c < d <= e < f


def test_rows_name_only_sources_of_their_split():
    known = {split: {name for ids in load_sources(split).ids for name in ids} for split in SPLITS}
    for row in islice(training_rows(DemoData(), range(30), 0.4), 30):
        assert row["sources"] and set(row["sources"]) <= known["train"]
    for split in ("development", "test"):
        for name in BENCHMARKS:
            item = draw_item(name, split, 0, 5, load_sources(split))
            assert set(item.scene.source_ids(load_sources(split))) <= known[split]


def test_a_image_is_a_function_of_seed_split_and_index():
    one, again, other = (list(islice(training_rows(DemoData(seed=seed), range(8), 0.4), 8)) for seed in (0, 0, 1))
    assert one == again
    assert all(a["images"] != b["images"] for a, b in zip(one, other, strict=True))
    # The hundredth item alone is the hundredth of the whole series.
    alone = draw_item("colour", "test", 0, 7, load_sources("test"))
    assert np.array_equal(alone.image, list(items("colour", "test", 0, 8))[7].image)


@pytest.mark.parametrize("blur", [0.0, 3.0])
def test_an_object_stays_inside_its_cell(blur):
    found = load_sources("train")
    for cell in range(9):
        thing = Thing(kind=8, colour=7, cell=cell, crop=3, blur=blur)
        empty, shown = (
            render(generator(0, "train", "x", cell), Scene(things, noise=0), found) for things in ((), (thing,))
        )
        # The background is drawn first, so both images have the same one.
        differs = (empty != shown).any(-1).reshape(3, CELL, 3, CELL).any((1, 3)).ravel()
        assert list(np.flatnonzero(differs)) == [cell]


def check(question, answer, scene):
    """Work out the answer to a question from the scene, by a way of its own."""
    seen = [t for t in scene.things if t.readable]
    text, key = question.rsplit(" ", 1)
    of_kind = [t for t in seen if KINDS[t.kind] == key]
    of_colour = [t for t in scene.things if COLOUR_NAMES[t.colour] == key]
    if text == "what colour is the":
        assert [COLOUR_NAMES[t.colour] for t in of_kind] == ([answer] if answer != UNANSWERABLE else [])
    elif text == "where is the":
        assert [POSITIONS[t.cell] for t in of_kind] == ([answer] if answer != UNANSWERABLE else [])
    elif text in ("what is", "what kind is"):
        names = [
            (CATEGORY_OF[KINDS[t.kind]] if text.endswith("kind is") else KINDS[t.kind]) for t in of_colour if t.readable
        ]
        assert names == ([answer] if answer != UNANSWERABLE else [])
        assert len(of_colour) <= 1
    elif text == "is there a":
        assert answer == ("yes" if of_kind else "no") and len(seen) == len(scene.things)
    elif text.startswith("is the "):
        (thing,) = (t for t in seen if KINDS[t.kind] == text.removeprefix("is the "))
        assert answer == ("yes" if COLOUR_NAMES[thing.colour] == key else "no")
    elif text == "count the":
        assert answer == NUMBERS[sum(CATEGORY_OF[KINDS[t.kind]] == key for t in seen)] and len(seen) == len(
            scene.things
        )
    elif text.startswith("which is shown"):
        offered = question.removeprefix("which is shown ").replace(" or ", " ").split()
        assert len(offered) == len(set(offered)) == 4
        assert [word for word in offered if word in {KINDS[t.kind] for t in seen}] == [answer]
    else:
        assert question == "read the digits"
        written = [t for t in scene.things if t.kind >= len(GARMENTS)]
        expected = " ".join(KINDS[t.kind] for t in written) if all(t.readable for t in written) else UNANSWERABLE
        assert answer == expected and written
        assert [t.cell for t in written] == list(range(written[0].cell, written[0].cell + len(written)))
    return text


def test_every_answer_follows_from_the_image():
    asked = Counter()
    for scene, rng in drawn():
        for ask in ASKED:
            for question in ask(scene, rng):
                asked[ask.__name__] += 1
                check(question.question, question.answer, scene)
                assert set(f"{question.question} {question.answer}".split()) <= VOCABULARY
    assert set(asked) == {ask.__name__ for ask in ASKED} and min(asked.values()) > 20


def test_captions_name_every_object():
    for scene, rng in drawn(per_scene=5):
        said = caption(scene, rng).answer.split()
        assert set(said) <= VOCABULARY
        triples = {frozenset(said[i : i + 3]) for i in range(0, len(said), 3)}
        assert triples == {
            frozenset((POSITIONS[t.cell], COLOUR_NAMES[t.colour], KINDS[t.kind] if t.readable else "blurred"))
            for t in scene.things
        }


def test_no_question_of_a_conversation_asks_what_was_told_before():
    lengths = []
    for scene, rng in drawn():
        asked = conversation(scene, rng, 12)
        lengths.append(len(asked))
        told = set()
        for question in asked:
            assert question.fact not in told
            told |= question.tells | {question.fact}
    assert max(lengths) == 12 and np.mean(lengths) > 8


def test_what_is_asked_of_the_whole_image_was_not_spoken_of_before():
    """By the words alone: a garment or a category that was named tells something of what is shown."""
    asked = Counter()
    for scene, rng in drawn(per_scene=150):
        spoken: set[str] = set()
        for question in conversation(scene, rng, 12):
            words = question.question.replace(" or ", " ").split()
            if words[0] in ("count", "which") or words[:3] == ["is", "there", "a"]:
                asked[words[0]] += 1
                for name in set(words) & {*GARMENTS, *CATEGORIES}:
                    assert not spoken & {name, *CATEGORIES.get(name, ())}, (spoken, question)
            if words[:2] == ["read", "the"] and question.answer != UNANSWERABLE:
                asked["read"] += 1
                assert not spoken, "a number is read before anything else"
            spoken |= set(words) | set(question.answer.split())
    assert set(asked) == {"count", "which", "is", "read"} and min(asked.values()) > 50


def test_training_asks_for_what_is_there_as_often_as_for_what_is_not():
    answers = Counter(
        question.answer
        for scene, rng in drawn(per_scene=150)
        for question in conversation(scene, rng, 12)
        if question.question.startswith("is there a")
    )
    assert 0.45 < answers["yes"] / answers.total() < 0.55


def check_polls(found):
    """As many yes as no in each of POPE's polls, and what makes a "no" of the poll holds."""
    polls = Counter((q.group, q.answer) for item in found for q in item.questions)
    assert set(polls.values()) == {20} and len(polls) == 6
    for item in found:
        shown = {CATEGORY_OF.get(KINDS[thing.kind]) for thing in item.scene.things}
        (absent,) = (q for q in item.questions if q.answer == "no")
        name = absent.question.split()[-1]
        if absent.group == "adversarial":
            assert CATEGORY_OF[name] in shown
        if absent.group == "popular":
            assert name in ("trouser", "dress", "bag")


def test_the_popular_garments_are_those_shown_most_often():
    shown = Counter()
    for index in range(2000):
        rng = generator(0, "train", "popularity", index)
        scene = draw_scene(rng, ("garments", "crowd")[index % 2], load_sources("train"))
        shown.update({KINDS[thing.kind] for thing in scene.things})
    assert {name for name, _ in shown.most_common(3)} == set(POPULAR)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_are_balanced_and_answered_by_the_image(name):
    found = list(items(name, "test", 0, 120))
    questions = [q for item in found for q in item.questions]
    assert len(questions) == 120
    assert len({item.id for item in found}) == len(found)
    answers, groups = Counter(q.answer for q in questions), Counter(q.group for q in questions)
    for item in found:
        for question in item.questions:
            check(question.question, question.answer, item.scene)
            assert not question.options or question.answer in question.options
    if name in ("presence", "pairs", "digits"):
        assert answers == {"yes": 60, "no": 60}
        assert all([q.answer for q in item.questions] == ["yes", "no"] for item in found)
        if name == "presence":
            check_polls(found)
    elif name == "unanswerable":
        assert groups == {"answerable": 60, "absent": 30, "blurred": 30} and answers[UNANSWERABLE] == 60
    elif name == "reading":
        assert groups == {"1": 40, "2": 40, "3": 40}
    else:
        assert max(answers.values()) - min(answers.values()) <= 1 and len(answers) >= 5


def test_an_odd_number_of_questions_is_kept_exactly():
    assert sum(len(item.questions) for item in items("presence", "test", 0, 7)) == 7


def test_the_vocabulary_has_each_word_once():
    listed = words()
    assert len(listed) == len(set(listed)) and tuple(listed[: len(SPECIAL)]) == SPECIAL


def test_encoded_images_decode_to_nearly_the_same():
    scene, rng = next(drawn())
    image = render(rng, scene, load_sources("train"))
    again = np.asarray(Image.open(io.BytesIO(encode(image))), float)
    assert image.shape == (96, 96, 3) and np.abs(again - image).mean() < 12


def test_prepare_writes_the_same_folder_with_one_process_and_with_two(tmp_path):
    data = DemoData(images=12, questions_per_image=4, development_questions=3, benchmark_questions=5)
    for workers, out in enumerate(("one", "two"), start=1):
        prepare(data, ["colour", "presence"], tmp_path / out, workers)
    manifests = [(tmp_path / out / "manifest.json").read_text() for out in ("one", "two")]
    assert manifests[0] == manifests[1]
    train = pd.read_parquet(tmp_path / "one" / "train.parquet")
    assert (
        list(train.columns) == ["id", "images", "messages", "caption", "sources", "wrong"]
        and train.id.is_unique
        and len(train) == 12
    )
    assert all(len(said) <= 8 for said in train.messages)
    test = pd.read_parquet(tmp_path / "one" / "benchmarks" / "presence.parquet")
    assert test.id.is_unique and len(test) == 5 and test.image_id.nunique() == 3
    assert not (tmp_path / "one" / "pretraining").exists() and not any(wrong.any() for wrong in train.wrong)
    for name in ("colour", "presence"):
        assert len(pd.read_parquet(tmp_path / "one" / "development" / "benchmarks" / f"{name}.parquet")) == 3


def test_finetuning_has_images_of_its_own_and_its_share_of_wrong_answers(tmp_path):
    data = DemoData(images=9, finetune_images=40, label_noise=0.4, development_questions=1, benchmark_questions=2)
    prepare(data, ["options"], tmp_path)
    pretraining, finetuning = (load_prepared(folder) for folder in (tmp_path / "pretraining", tmp_path))
    assert len(pretraining) == 9 and len(finetuning) == 40
    assert not {e.key for e in pretraining} & {e.key for e in finetuning}
    assert not any(e.caption for e in finetuning)
    clean = {row["id"]: row for row in training_rows(data, range(9, 49), 0.0)}
    told = []
    for row in training_rows(data, range(9, 49), 0.0, data.label_noise):
        for now, right, wrong in zip(
            row["messages"], clean[row["id"]]["messages"], np.repeat(row["wrong"], 2), strict=True
        ):
            assert (now != right) == (wrong and now["role"] == "assistant")
        told += row["wrong"]
    assert 0.3 < np.mean(told) < 0.5
    rows = pd.read_parquet(tmp_path / "train.parquet")
    assert np.concatenate(list(rows.wrong)).tolist() == told
    assert (tmp_path / "pretraining" / "vision_tower" / "model.safetensors").is_file()


@pytest.mark.parametrize("ask", ASKED)
def test_a_mistake_is_another_answer_of_the_same_kind(ask):
    rng = np.random.default_rng(0)
    answers, mistakes = set(), set()
    for index in range(300):
        scene = draw_scene(generator(0, "train", "mistakes", index), SCENES[index % len(SCENES)], load_sources("train"))
        for question in ask(scene, rng):
            wrong = mistake(question, rng)
            assert wrong != question.answer
            assert not question.options or wrong in question.options
            answers.add(question.answer), mistakes.add(wrong)
    if ask not in (unanswerable, reading):  # these are mistaken for an answer; numbers are many
        assert mistakes <= answers and len(mistakes) > 1


def test_datasets_decodes_the_images(tmp_path):
    from datasets import load_dataset

    prepare(DemoData(images=2, development_questions=1, benchmark_questions=2), ["options"], tmp_path / "data")
    file = str(tmp_path / "data" / "benchmarks" / "options.parquet")
    rows = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["image"].size == (96, 96) and len(rows[0]["options"]) == 4


def test_the_questions_schema_is_the_one_that_datasets_would_write():
    from datasets import Features, Image, List, Value

    texts = dict.fromkeys(("id", "image_id", "question", "answer", "group"), Value("string"))
    features = {**texts, "image": Image(), "options": List(Value("string")), "sources": List(Value("string"))}
    assert QUESTIONS.equals(Features({n: features[n] for n in QUESTIONS.names}).arrow_schema, check_metadata=True)


def test_who_hands_the_parts_out_imports_neither_torch_nor_transformers():
    code = "import sys, grace.demo.prepare; print({'torch', 'transformers', 'datasets', 'pandas'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_an_unknown_benchmark_is_named_with_those_there_are(tmp_path):
    with pytest.raises(GraceError, match=r"no benchmark `colours`.*colour, object"):
        prepare(DemoData(), ["colour", "colours"], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_an_unreadable_source_is_named(tmp_path, monkeypatch):
    damaged = tmp_path / "garments.npz"
    damaged.write_bytes(sources.GARMENTS_FILE.read_bytes()[:100_000])
    monkeypatch.setattr(sources, "GARMENTS_FILE", damaged)
    sources._garments.cache_clear()
    try:
        with pytest.raises(GraceError, match=r"garments\.npz.*cannot be read"):
            sources._garments()
    finally:
        sources._garments.cache_clear()
