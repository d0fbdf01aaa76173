"""The demo's benchmarks: which task of the paper's each one mirrors, and how its questions are chosen and balanced."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from grace.demo import questions
from grace.demo.images import Scene, draw_scene, generator, render
from grace.demo.questions import Question
from grace.demo.sources import Sources, load_sources
from grace.demo.vocabulary import CATEGORIES, CATEGORY_OF, COLOURS, GARMENTS, KINDS, NUMBERS, POSITIONS
from grace.errors import GraceError

_TRIES = 2000

Asked = Callable[[Scene, np.random.Generator], Iterator[Question]]
Wish = dict[str, str]


@dataclass(frozen=True)
class Benchmark:
    """One task.

    `mirrors` names the paper's benchmark; `ask` yields what can be asked of a scene; `scenes` are the sorts of
    images; `wishes(n)` says which answers or groups the n-th image's questions must have, so that the benchmark is
    balanced; with `same_fact` they are about one fact, as in MME's pairs.
    """

    mirrors: str
    ask: Asked
    scenes: tuple[str, ...]
    wishes: Callable[[int], list[Wish]]
    same_fact: bool = False


@dataclass(frozen=True)
class Item:
    """One benchmark image with its questions."""

    id: str
    image: np.ndarray
    questions: list[Question]
    scene: Scene


def _cycle(field: str, values: tuple[str, ...]) -> Callable[[int], list[Wish]]:
    return lambda index: [{field: values[index % len(values)]}]


def _yes_and_no(index: int) -> list[Wish]:
    return [{"answer": "yes"}, {"answer": "no"}]


POLLS = ("random", "popular", "adversarial")
POPULAR = tuple(garment for members in CATEGORIES.values() if len(members) == 1 for garment in members)
"""The garments that are shown most often: crowds choose a category first, and these have theirs to themselves."""


def _yes_and_no_of_a_poll(index: int) -> list[Wish]:
    return [{"answer": answer, "group": POLLS[index % len(POLLS)]} for answer in ("yes", "no")]


def _polled(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """POPE's three polls: its "no" asks for anything absent, for what is common, or for what goes with the shown.

    The question with answer "yes" belongs to the poll of its image, as in POPE; so each poll is balanced.
    """
    categories = {CATEGORY_OF.get(KINDS[thing.kind]) for thing in scene.things}
    for question in questions.presence(scene, rng):
        name = KINDS[question.fact[1]]
        fits = {"random": True, "popular": name in POPULAR, "adversarial": CATEGORY_OF[name] in categories}
        for poll in POLLS:
            if question.answer == "yes" or fits[poll]:
                yield replace(question, group=poll)


def _degraded(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    yield from questions.unanswerable(scene, rng)
    for ask in (questions.colour, questions.object_, questions.position, questions.reading):
        for q in ask(scene, rng):
            yield replace(q, group="answerable")


BENCHMARKS = {
    "colour": Benchmark("GQA, attribute", questions.colour, ("garments", "crowd"), _cycle("answer", tuple(COLOURS))),
    "object": Benchmark("GQA, object", questions.object_, ("garments", "crowd"), _cycle("answer", GARMENTS)),
    "position": Benchmark("GQA, relation", questions.position, ("garments", "crowd"), _cycle("answer", POSITIONS)),
    "presence": Benchmark("POPE", _polled, ("garments", "crowd"), _yes_and_no_of_a_poll),
    "pairs": Benchmark("MME, colour", questions.pairs, ("garments", "crowd"), _yes_and_no, same_fact=True),
    "digits": Benchmark("MME, OCR", questions.digits, ("text", "keypad"), _yes_and_no),
    "reading": Benchmark("TextVQA", questions.reading, ("text",), _cycle("group", ("1", "2", "3"))),
    "options": Benchmark("MMBench", questions.options, ("garments",), _cycle("answer", GARMENTS)),
    "category": Benchmark("ScienceQA", questions.category, ("garments", "crowd"), _cycle("answer", tuple(CATEGORIES))),
    "count": Benchmark("GQA, count", questions.count, ("garments", "crowd"), _cycle("answer", NUMBERS)),
    "unanswerable": Benchmark(
        "VizWiz", _degraded, ("degraded",), _cycle("group", ("answerable", "absent", "answerable", "blurred"))
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; an unknown one is a `GraceError` that lists those there are."""
    if name not in BENCHMARKS:
        raise GraceError(f"evaluation.benchmarks: no benchmark `{name}` in the demo; it has {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _grant(
    found: list[Question], wishes: list[Wish], same_fact: bool, rng: np.random.Generator
) -> list[Question] | None:
    chosen: list[Question] = []
    for wish in wishes:
        fitting = [q for q in found if all(getattr(q, field) == value for field, value in wish.items())]
        if same_fact and chosen:
            fitting = [q for q in fitting if q.fact == chosen[0].fact]
        if not fitting:
            return None
        chosen.append(fitting[rng.integers(len(fitting))])
    return chosen


def draw_item(name: str, split: str, seed: int, index: int, sources: Sources) -> Item:
    """The index-th image of a benchmark, with its questions: a function of the arguments alone."""
    benchmark, rng = find_benchmark(name), generator(seed, split, name, index)
    wishes = benchmark.wishes(index)
    for _ in range(_TRIES):
        scene = draw_scene(rng, benchmark.scenes[rng.integers(len(benchmark.scenes))], sources)
        chosen = _grant(list(benchmark.ask(scene, rng)), wishes, benchmark.same_fact, rng)
        if chosen is not None:
            return Item(f"{name}/{split}/{index}", render(rng, scene, sources), chosen, scene)
    raise AssertionError(f"no scene of {benchmark.scenes} grants {wishes}")


def items(name: str, split: str, seed: int, questions_wanted: int) -> Iterator[Item]:
    """Images of a benchmark until `questions_wanted` questions are asked; the last image's surplus is dropped."""
    sources, asked, index = load_sources(split), 0, 0
    while asked < questions_wanted:
        item = draw_item(name, split, seed, index, sources)
        kept = item.questions[: questions_wanted - asked]
        yield Item(item.id, item.image, kept, item.scene)
        asked, index = asked + len(kept), index + 1
