"""The option that an answer names, as each protocol reads it. All return a letter, or "" where none can be read.

Sources (functions read, rules restated): lmms-eval 0.7.3 `tasks/{scienceqa,ai2d,seedbench,mmmu}/utils.py`,
`tasks/_task_utils/{mcq_extract,mmmu_mcq_utils}.py`, `tasks/mmbench/mmbench_evals.py`; VLMEvalKit e8e78f05
`vlmeval/utils/matching_util.py`; LLaVA c121f04 `llava/eval/eval_science_qa.py`; GRACE b73fa9b `evaluation/*/eval_*.py`.
"""

import re
from collections.abc import Collection, Iterable, Mapping

Options = Mapping[str, str]  # letter -> the option's text

_OPENING = re.compile(r"^\(?([A-Z])(?:[).:,\s]|$)")
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)  # what VLMEvalKit takes for a refusal, which it writes as the letter Z
REFUSED = "Z"


def leading(text: str, options: Options) -> str:
    """The letter that the answer opens with ("B", "B.", "(B) red").

    A letter further on is not taken: "The answer is B" begins with no option, and "A dog" would be A.
    """
    found = _OPENING.match(text.strip())
    if not found or re.match(r"^A\s+[a-z]", text.strip()):
        return ""
    return found.group(1)


# --- lmms-eval ---


def lmms_scienceqa(text: str, options: Options) -> str:
    """A lone letter of either case, or a capital with a full stop in front."""
    said = text.strip()
    if len(said) == 1:
        return said.upper() if said.isalpha() else ""
    return said[0] if len(said) >= 2 and said[0].isupper() and said[1] == "." else ""


def lmms_ai2d(text: str, options: Options) -> str:
    """The letter in front of a full stop; else the whole answer, which then is compared as it stands."""
    found = re.match(r"\s*([A-Z])\.", text)
    return found.group(1) if found else text


def lmms_seed(text: str, options: Options) -> str:
    """The first character, whatever it is ("The answer is A" -> T)."""
    return text.strip()[:1].upper()


_PHRASES = tuple(
    [f"{the}{what} is" for what in ("answer", "correct answer", "best answer", "correct option", "best option",
                                   "choice", "correct choice") for the in ("the ", "")]
    + ["i choose", "i select", "i pick", "my answer is", "my choice is"]
    + ["옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]
)  # fmt: skip
_MARKS = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))  # rank, form


def lmms_ranked(text: str, letters: Collection[str]) -> str:
    """lmms-eval's shared reader: of all forms found, the highest-ranked, and of equals the last in the text.

    Ranks: opens with the letter 10, ends with it 9, behind a phrase such as "the answer is" 7, (A) 6, A. 5, A: 4,
    A) 3, A and a space 2, anywhere 0.
    """
    if not text.strip():
        return ""
    said = text.strip()
    for mark in ",.!?;:'\"":
        said = said.strip(mark)
    said = f" {said} "
    found = [(rank, said.rfind(form.format(x)), x) for rank, form in _MARKS for x in letters if form.format(x) in said]
    lower = said.lower()
    for phrase in _PHRASES:
        if phrase in lower:
            after = lower.find(phrase) + len(phrase)
            found += [(7, said.find(x, after), x) for x in letters if said.find(x, after) != -1]
    bare = said.strip()
    found += [(10, 0, x) for x in letters if bare.startswith(x) and (len(bare) == 1 or not bare[1].isalpha())]
    found += [(9, len(said) - 1, x) for x in letters if bare.endswith(x) and (len(bare) == 1 or not bare[-2].isalpha())]
    if not found:
        found = [(0, said.rfind(x), x) for x in letters if x in said]
    # of equal rank and place the first that was found, as a stable sort leaves it
    return max(found, key=lambda each: each[:2])[2] if found else ""


def lmms_mmstar(text: str, options: Options) -> str:
    """`lmms_ranked` over A to D."""
    return lmms_ranked(text, "ABCD")


_MMBENCH_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def lmms_mmbench(text: str, options: Options) -> str:
    """One letter as a word of its own, or in one of twelve forms; else the one option whose text is said;
    else ranked.
    """
    words = text.split()

    def lone(form: str) -> str:
        said = [x for x in "ABCDE" if form.format(x) in words]
        return said[0] if len(said) == 1 else ""

    letter = lone("{}")
    if letter and "A" in words and len(words) > 3:  # A may be an article
        letter = ""
    letter = letter or next(filter(None, map(lone, _MMBENCH_FORMS)), "")
    first = {x: option for x, option in options.items() if x in "ABCD"}  # it knows four options
    return letter or _only_named(text, first) or lmms_ranked(text, sorted(first))


def _only_named(text: str, options: Options) -> str:
    """The letter of the only option whose text stands in the answer."""
    found = [x for x, option in options.items() if option.lower() in text.lower()]
    return found[0] if len(found) == 1 else ""


def lmms_mmmu(text: str, options: Options) -> str:
    """MMMU's own parser: (A), else "A ", else "A.", else an option's text in a long answer; of several the last.

    Where it finds nothing it guesses at random; here that is "", which is wrong.
    """
    said = text
    for mark in ",.!?;:'":
        said = said.strip(mark)
    said = f" {said} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [x for x in options if form.format(x) in said]
        if found:
            return max(found, key=lambda x: said.rfind(place.format(x)))
    if len(said.split()) > 5:
        found = [x for x, option in options.items() if option.lower() in said.lower()]
        return max(found, key=lambda x: said.lower().rfind(options[x].lower()), default="")
    return ""


# --- VLMEvalKit ---


def vlmevalkit(text: str, options: Options) -> str:
    """Exact matching, without the LLM judge: the only letter said, where it is among the last four words; "answer is
    X"; else the only option whose text is said, in an answer at most twice as long as all options together."""
    if any(refusal in text for refusal in _REFUSALS):
        return REFUSED
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    said = [x for x in options if x in words]
    if len(said) == 1 and words.index(said[0]) > len(words) - 5:
        return said[0]
    if not said and REFUSED in words:
        return REFUSED
    found = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", text)
    if found and found.group(1).upper() in options:
        return found.group(1).upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return ""
    return _only_named(text, options)


# --- LLaVA-1.5 ---


def llava_scienceqa(text: str, options: Options) -> str:
    """A lone letter A to E, one with a full stop and a space in front, or the only "The answer is X."."""
    letter = ""
    if text in tuple("ABCDE"):
        letter = text
    elif len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter in options else ""


# --- the released GRACE scripts ---


def grace_first(text: str, options: Options) -> str:
    """The first character that is an option's letter, of either case, inside words too ("Based on" -> B)."""
    return next((x for x in text.strip().upper() if x in options), "")


def grace_last(text: str, options: Options) -> str:
    """The last option's letter that stands alone, of either case (the article "a" counts); else the last anywhere."""
    said = text.strip().upper()
    alone: Iterable[str] = re.findall(rf"\b([{''.join(sorted(options))}])\b", said) if options else ()
    return next(reversed([*alone]), "") or next((x for x in reversed(said) if x in options), "")
