"""What can be asked of a scene. Every question ends on its key word, and every answer follows from the scene alone.

A conversation asks several questions of one image. So that none can be answered from the text before it, each
question names the fact that its answer tells (`fact`), the facts that would help to answer it (`hints`) and all facts
that it gives away (`tells`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace.demo.images import Scene, Thing
from grace.demo.vocabulary import (
    CATEGORIES,
    CATEGORY_OF,
    COLOURS,
    DIGITS,
    GARMENTS,
    KINDS,
    NUMBERS,
    POSITIONS,
    UNANSWERABLE,
)  # fmt: skip

_COLOURS = tuple(COLOURS)
Fact = tuple[str, Any]


@dataclass(frozen=True)
class Question:
    """One question with its answer; `group` is its sub-task, `options` the words it offers."""

    question: str
    answer: str
    fact: Fact
    tells: frozenset[Fact] = frozenset()
    hints: frozenset[Fact] = frozenset()
    group: str = ""
    options: tuple[str, ...] = ()


def _unique(things: list[Thing], key: Callable[[Thing], int]) -> list[Thing]:
    counts = Counter(map(key, things))
    return [thing for thing in things if counts[key(thing)] == 1]


def _nameable(scene: Scene) -> list[Thing]:
    """The readable objects that are the only ones of their kind: "the dress" means something."""
    return _unique([thing for thing in scene.things if thing.readable], lambda thing: thing.kind)


def _by_colour(scene: Scene) -> list[Thing]:
    """The garments whose colour nothing else has."""
    return [t for t in _unique(list(scene.things), lambda thing: thing.colour) if t.kind < len(GARMENTS)]


def _members(category: str) -> list[int]:
    return [KINDS.index(garment) for garment in CATEGORIES[category]]


def _is_clear(scene: Scene) -> bool:
    return all(thing.readable for thing in scene.things)


def _bound(thing: Thing) -> Fact:
    return ("kind and colour", thing.cell)


def _present(kind: int) -> Fact:
    return ("present", kind)


def _some(category: str) -> Fact:
    return ("some", category)


def _told(kind: int) -> frozenset[Fact]:
    """What is known once it is known whether there is one of `kind`: something of its category's count too."""
    category = CATEGORY_OF.get(KINDS[kind])
    return frozenset({_present(kind)} if category is None else {_present(kind), _some(category)})


def colour(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """What colour is the X."""
    for thing in _nameable(scene):
        told = _told(thing.kind) | {_bound(thing)}
        yield Question(f"what colour is the {KINDS[thing.kind]}", _COLOURS[thing.colour], _bound(thing), told)


def object_(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """What is C, where nothing else has colour C."""
    for thing in _by_colour(scene):
        if thing.readable:
            told = _told(thing.kind) | {_bound(thing)}
            yield Question(f"what is {_COLOURS[thing.colour]}", KINDS[thing.kind], _bound(thing), told)


def category(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """What kind of garment is C, where nothing else has colour C."""
    for thing in _by_colour(scene):
        if thing.readable:
            name = CATEGORY_OF[KINDS[thing.kind]]
            told = frozenset({_bound(thing), _some(name)} | set(map(_present, _members(name))))
            yield Question(f"what kind is {_COLOURS[thing.colour]}", name, _bound(thing), told)


def position(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Where is the X."""
    for thing in _nameable(scene):
        fact = ("place", thing.cell)
        told = _told(thing.kind) | {fact}
        yield Question(f"where is the {KINDS[thing.kind]}", POSITIONS[thing.cell], fact, told)


def _presence(scene: Scene, rng: np.random.Generator, kinds: range) -> Iterator[Question]:
    shown = {thing.kind for thing in scene.things} & set(kinds)
    if not _is_clear(scene) or not shown:
        return
    absent = rng.permutation([kind for kind in kinds if kind not in shown])[: len(shown)]
    for kind in [*sorted(shown), *map(int, absent)]:
        yield Question(f"is there a {KINDS[kind]}", "yes" if kind in shown else "no", _present(kind), _told(kind))


def presence(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Is there a X, for as many absent as shown."""
    return _presence(scene, rng, range(len(GARMENTS)))


def digits(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Is there a 7."""
    return _presence(scene, rng, range(len(GARMENTS), len(KINDS)))


def pairs(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Is the X C; where it is not, C is the colour of something else in the image."""
    for thing in _nameable(scene):
        told = _told(thing.kind) | {_bound(thing)}
        others = sorted({other.colour for other in scene.things} - {thing.colour})
        for shown, answer in [(thing.colour, "yes"), *((c, "no") for c in rng.permutation(others)[:1])]:
            yield Question(f"is the {KINDS[thing.kind]} {_COLOURS[shown]}", answer, _bound(thing), told)


def _number(scene: Scene) -> list[Thing]:
    """The digits of a written number: one to three in neighbouring cells of one row; else nothing."""
    written = [thing for thing in scene.things if thing.kind >= len(GARMENTS)]
    cells = [thing.cell for thing in written]
    in_a_row = cells and cells[0] // 3 == cells[-1] // 3 and cells[-1] - cells[0] == len(cells) - 1
    return written if in_a_row else []


def reading(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Read the digits: "4 7 1"."""
    number = _number(scene)
    if number and all(thing.readable for thing in number):
        told = frozenset(("present", len(GARMENTS) + digit) for digit in range(len(DIGITS)))
        answer = " ".join(KINDS[thing.kind] for thing in number)
        yield Question("read the digits", answer, ("number", 0), told, group=f"{len(number)}")


def options(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Which of four garments is shown; the other three are not."""
    shown = {thing.kind for thing in scene.things}
    absent = [kind for kind in range(len(GARMENTS)) if kind not in shown]
    if not _is_clear(scene) or len(absent) < 3:
        return
    for kind in sorted(shown & set(range(len(GARMENTS)))):
        offered = rng.permutation([kind, *rng.permutation(absent)[:3]])
        a, b, c, d = words = tuple(KINDS[k] for k in offered)
        told = frozenset().union(*map(_told, map(int, offered)))
        known = frozenset(_present(int(k)) for k in offered)
        text = f"which is shown {a} {b} {c} or {d}"
        yield Question(text, KINDS[kind], _present(kind), told, known, options=words)


def count(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Count the garments of a category, up to five; of those that are not shown, one is asked for."""
    if not _is_clear(scene) or any(thing.kind >= len(GARMENTS) for thing in scene.things):
        return
    counts = Counter(CATEGORY_OF[KINDS[thing.kind]] for thing in scene.things)
    absent = rng.permutation([name for name in CATEGORIES if name not in counts])[:1]
    for name in [*counts, *map(str, absent)]:
        if counts[name] < len(NUMBERS):
            told = frozenset({_some(name), *map(_present, _members(name))})
            yield Question(f"count the {name}", NUMBERS[counts[name]], _some(name), told)


def unanswerable(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Questions about what is not there ("absent") or cannot be made out ("blurred")."""
    readable = {thing.kind for thing in scene.things if thing.readable}
    for kind in rng.permutation([kind for kind in range(len(GARMENTS)) if kind not in readable])[:1]:
        text = ("what colour is the", "where is the")[rng.integers(2)]
        yield Question(f"{text} {KINDS[kind]}", UNANSWERABLE, _present(kind), _told(int(kind)), group="absent")
    shown = {thing.colour for thing in scene.things}
    for c in rng.permutation([c for c in range(len(COLOURS)) if c not in shown])[:1]:
        fact = ("colour", int(c))
        yield Question(f"what is {_COLOURS[c]}", UNANSWERABLE, fact, group="absent")
    for thing in _by_colour(scene):
        if not thing.readable:
            yield Question(f"what is {_COLOURS[thing.colour]}", UNANSWERABLE, _bound(thing), group="blurred")
    number = _number(scene)
    if number and not any(thing.readable for thing in number):
        yield Question("read the digits", UNANSWERABLE, ("number", 0), group="blurred")


def caption(scene: Scene, rng: np.random.Generator) -> Question:
    """Every object in random order: what it is, then its place and colour, whichever comes first.

    To go on after a kind, one has to find it in the image and read off what else is known of it. That is what the
    questions ask for too, and the hardest part of them; a caption is the densest lesson in it.
    """
    words = []
    for thing in rng.permutation(np.array(scene.things, dtype=object)):
        kind = KINDS[thing.kind] if thing.readable else "blurred"
        words += [kind, *rng.permutation([POSITIONS[thing.cell], _COLOURS[thing.colour]])]
    return Question("describe the picture", " ".join(words), ("caption", 0))


WHOLE = (presence, digits, options, options, count, count)
"""What is asked about the image as a whole, by how often: nearly every other question would help to answer these."""

BOUND = (colour, object_, category, position, pairs, pairs, unanswerable)
"""What is asked about one object, found by its kind or its colour, by how often."""

ASKED = (reading, *dict.fromkeys(WHOLE + BOUND))


def _sorts(asks: tuple[Callable, ...], scene: Scene, rng: np.random.Generator) -> list[list[Question]]:
    """The questions of every sort that the scene has some of, each sort in random order."""
    return [[found[i] for i in rng.permutation(len(found))] for ask in asks if (found := list(ask(scene, rng)))]


def _opening(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions of one sort about the whole image, in three of four conversations."""
    if rng.random() < 0.25:
        return []
    sorts = _sorts((reading, digits), scene, rng) if _number(scene) else _sorts(WHOLE, scene, rng)
    return sorts[rng.integers(len(sorts))] if sorts else []


def conversation(scene: Scene, rng: np.random.Generator, length: int) -> list[Question]:
    """Up to `length` questions; none can be answered from the questions and answers before it.

    What is asked about the whole image comes first and fills up to half of it.
    """
    chosen: list[Question] = []
    known: set[Fact] = set()
    for sorts, end in (([_opening(scene, rng)], (length + 1) // 2), (_sorts(BOUND, scene, rng), length)):
        sorts = [sort for sort in sorts if sort]
        while sorts and len(chosen) < end:
            which = int(rng.integers(len(sorts)))
            question = sorts[which].pop()
            if not sorts[which]:
                sorts.pop(which)
            if not known & (question.hints | {question.fact}):
                known |= question.tells | {question.fact}
                chosen.append(question)
    return chosen


_ANSWERS = {
    "what colour is the": _COLOURS,
    "what kind is": tuple(CATEGORIES),
    "what is": GARMENTS,
    "where is the": POSITIONS,
    "is": ("yes", "no"),
    "count the": NUMBERS,
}
"""What a question that begins so can be answered with, beside that it is unanswerable."""


def mistake(question: Question, rng: np.random.Generator) -> str:
    """A wrong answer of the same kind as the right one: another colour, place, garment or number; a caption stays."""
    if question.fact[0] == "caption":
        return question.answer
    if question.question == "read the digits":
        length = len(question.answer.split()) if question.answer != UNANSWERABLE else int(rng.integers(1, 4))
        while True:
            read = " ".join(str(digit) for digit in rng.integers(len(DIGITS), size=length))
            if read != question.answer:
                return read
    known = next((answers for start, answers in _ANSWERS.items() if question.question.startswith(start)), ())
    wrong = [answer for answer in question.options or known if answer != question.answer]
    return str(rng.choice(wrong))
