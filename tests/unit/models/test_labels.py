"""Which token is asked for, written by hand: per family a table of conversations, their tokens and their labels.

`[token]` is asked for. The tokenizers are small ones of the real kinds: SentencePiece as Llama has it, in both ways
that it treats text behind a control token, and byte-level BPE as Qwen has it. Real vocabularies:
test_real_tokenizers.py.
"""

from types import SimpleNamespace

import pytest
from some_conversations import BRIEF, model, shown, user
from transformers import LlamaTokenizer, Qwen2Tokenizer

from grace.data.conversations import IMAGE, asked_and_answered
from grace.errors import GraceError
from grace.families import FAMILIES
from grace.families.llava import SYSTEM, _as_read
from grace.models.template import Template, marks_answers

WORDS = ["USER", "ASSISTANT", "Be", "brief.", "What", "is", "it?", "red", "shirt", "and", "now?", "yes"]
QWEN_CONTROLS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def merges(words):
    """Merges that join each word from the left, and every piece on the way."""
    found = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    return list(dict.fromkeys(found)), list(dict.fromkeys(a + b for a, b in found))


def sentencepiece(legacy):
    # "▁" and a whole word join last, so that a word has one piece with the space and one without
    rules, pieces = merges(WORDS)
    spaced = [("▁", word) for word in WORDS]
    letters = sorted({letter for word in WORDS for letter in word} | {"▁", "<", "/", "s", ">", ":", "é", "m", "g"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    tokens += [f"▁{word}" for word in WORDS]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=rules + spaced, legacy=legacy, add_bos_token=True,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    return Template(
        SimpleNamespace(tokenizer=_as_read(tokenizer), chat_template=FAMILIES["llava"].template, image_token="<image>")
    )


def byte_level(family):
    from tokenizers import pre_tokenizers

    rules, pieces = merges(["system", "user", "assistant", "What", "red", "yes", "now", "Ġis", "Ġit", "ĊĊ"])
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))},
        merges=rules,
        eos_token="<|im_end|>",
        extra_special_tokens=QWEN_CONTROLS,
    )
    return Template(
        SimpleNamespace(tokenizer=tokenizer, chat_template=FAMILIES[family].template, image_token="<|image_pad|>")
    )


LLAVA = {
    "a word": ([BRIEF, user(IMAGE, "What is it?"), model("red")], [2],
        "<s> ▁Be ▁brief. ▁USER : ▁ <image> <image> {n}<0x0A> What ▁is ▁it? ▁ASSISTANT : [▁red] [</s>]"),
    "turns": ([BRIEF, user(IMAGE, "What is it?"), model("red shirt"), user("and now?"), model("yes")], [1],
        "<s> ▁Be ▁brief. ▁USER : ▁ <image> {n}<0x0A> What ▁is ▁it? ▁ASSISTANT : [▁red] [▁shirt] [</s>] {u}USER : ▁and "
        "▁now? ▁ASSISTANT : [▁yes] [</s>]"),
    "unicode": ([BRIEF, user(IMAGE, "é"), model("é 你")], [1],
        "<s> ▁Be ▁brief. ▁USER : ▁ <image> {n}<0x0A> é ▁ASSISTANT : [▁] [é] [▁] [<0xE4>] [<0xBD>] [<0xA0>] [</s>]"),
    "spaces": ([BRIEF, user(IMAGE, "What"), model(" red ")], [1],
        "<s> ▁Be ▁brief. ▁USER : ▁ <image> {n}<0x0A> What ▁ASSISTANT : [▁] [▁red] [▁] [</s>]"),
    "spelled control tokens": ([BRIEF, user("</s>", IMAGE, "<image>"), model("<s></s>")], [1],
        "<s> ▁Be ▁brief. ▁USER : ▁ < / s > <0x0A> <image> {n}<0x0A> < i m a g e > ▁ASSISTANT : [▁] [<] [s] [>] [<] [/] "
        "[s] [>] [</s>]"),
    "several images": ([BRIEF, user(IMAGE, IMAGE, "What"), model("red"), user("and", IMAGE), model("yes")], [1, 2, 1],
        "<s> ▁Be ▁brief. ▁USER : ▁ <image> {n}<0x0A> <image> <image> {n}<0x0A> What ▁ASSISTANT : [▁red] [</s>] "
        "{u}USER : ▁and <0x0A> <image> ▁ASSISTANT : [▁yes] [</s>]"),
    "text alone": ([BRIEF, user("What"), model("red")], [],
        "<s> ▁Be ▁brief. ▁USER : ▁What ▁ASSISTANT : [▁red] [</s>]"),
    "an empty answer": ([BRIEF, user("What"), model("")], [], "<s> ▁Be ▁brief. ▁USER : ▁What ▁ASSISTANT : [▁] [</s>]"),
}  # fmt: skip

BRIEFLY = "<|im_start|> system Ċ B e Ġ b r i e f . <|im_end|> Ċ "
SEEN = "<|vision_start|> <|image_pad|> <|vision_end|>"
ASKED, ANSWERED = "<|im_start|> user Ċ", "<|im_end|> Ċ <|im_start|> assistant Ċ"
QWEN = {
    "a word": ([BRIEF, user(IMAGE, "What is it?"), model("red")], [2],
        f"<|im_start|> user Ċ <|vision_start|> <|image_pad|> <|image_pad|> <|vision_end|> What Ġis Ġit ? {ANSWERED} "
        "[red] [<|im_end|>] Ċ"),
    "turns": ([BRIEF, user(IMAGE, "What"), model("red"), user("now?"), model("yes")], [1],
        f"{ASKED} {SEEN} What {ANSWERED} [red] [<|im_end|>] Ċ {ASKED} now ? {ANSWERED} [yes] [<|im_end|>] Ċ"),
    "unicode": ([BRIEF, user(IMAGE, "é"), model("é 你")], [1],
        f"{ASKED} {SEEN} Ã © {ANSWERED} [Ã] [©] [Ġ] [ä] [½] [ł] [<|im_end|>] Ċ"),
    "spaces": ([BRIEF, user(IMAGE, "What"), model(" red ")], [1],
        f"{ASKED} {SEEN} What {ANSWERED} [Ġ] [red] [Ġ] [<|im_end|>] Ċ"),
    "a line break first": ([BRIEF, user("What"), model("\nred")], [],  # "ĊĊ" is one token, but not one to be made here
        f"{ASKED} What {ANSWERED} [Ċ] [red] [<|im_end|>] Ċ"),
    "spelled control tokens": ([BRIEF, user("<|im_end|>", IMAGE), model("<|image_pad|>")], [1],
        f"{ASKED} < | i m _ e n d | > {SEEN} {ANSWERED} [<] [|] [i] [m] [a] [g] [e] [_] [p] [a] [d] [|] [>] "
        "[<|im_end|>] Ċ"),
    "several images": ([BRIEF, user(IMAGE, IMAGE, "What"), model("red"), user("now?", IMAGE), model("yes")], [1, 2, 1],
        f"{ASKED} {SEEN} <|vision_start|> <|image_pad|> <|image_pad|> <|vision_end|> What {ANSWERED} [red] "
        f"[<|im_end|>] Ċ {ASKED} now ? {SEEN} {ANSWERED} [yes] [<|im_end|>] Ċ"),
    "text alone": ([BRIEF, user("What"), model("red")], [], f"{ASKED} What {ANSWERED} [red] [<|im_end|>] Ċ"),
}  # fmt: skip


@pytest.mark.parametrize("name", LLAVA)
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not legacy"])
def test_llava_asks_for_each_answer_and_its_end(name, legacy):
    messages, counts, expected = LLAVA[name]
    expected = expected.format(n="▁ " if legacy else "", u="▁" if legacy else "")
    assert shown(sentencepiece(legacy), messages, counts) == expected


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_asks_for_each_answer_and_its_end(name, family):
    messages, counts, expected = QWEN[name]
    assert shown(byte_level(family), messages, counts) == BRIEFLY + expected


def test_a_conversation_without_a_system_turn_opens_as_its_family_does():
    asked = asked_and_answered([("What", "red")], images=0)
    assert shown(byte_level("qwen3_vl"), asked, []).startswith("<|im_start|> user Ċ What")
    opened = "<|im_start|> system Ċ Y o u Ġ a re Ġ a Ġ h e l p f u l Ġ assistant . <|im_end|> Ċ <|im_start|> user"
    for family in ("qwen2_vl", "qwen2_5_vl"):
        assert shown(byte_level(family), asked, []).startswith(opened)
    template = sentencepiece(True)
    ((ids, _),) = template.tokens([(asked, [])])
    assert template.tokenizer.decode(ids) == f"<s> {SYSTEM} USER: What ASSISTANT: red</s>"


@pytest.mark.parametrize("legacy", [True, False])
def test_llavas_tokens_are_those_of_the_whole_string(legacy):
    """Where no text spells a control token: what tokenising the original recipe's concatenated string gives."""
    template = sentencepiece(legacy)
    turns = [("What is it?", "red shirt"), ("and now?", " yes  é"), ("it?", "red ")]
    ((ids, _),) = template.tokens([(asked_and_answered(turns), [3])])
    said = "</s>".join(f"USER: {q} ASSISTANT: {a}" for q, a in turns).replace(
        "USER: What", "USER: <image><image><image>\nWhat", 1
    )
    assert ids == template.tokenizer(f"{SYSTEM} {said}</s>")["input_ids"]


@pytest.mark.parametrize(
    "make", [lambda: sentencepiece(True), lambda: sentencepiece(False), lambda: byte_level("qwen3_vl")]
)
def test_a_prompt_is_what_training_has_before_the_answer(make):
    template = make()
    for messages, counts, _ in (QWEN if "<|im_end|>" in template.source else LLAVA).values():
        ((whole, asked),) = template.tokens([(messages, counts)])
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = messages[:turn]
            images = sum(part is IMAGE for said in before for part in said.content)
            ((prompt, _),) = template.tokens([(before, counts[:images])], prompt=True)
            assert prompt == whole[: len(prompt)] and asked[len(prompt)] and not asked[len(prompt) - 1]


def test_transformers_own_mask_agrees_where_texts_are_plain():
    template = byte_level("qwen2_vl")
    turns = [("What is it?", "red"), ("now?", "yes it is")]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
    ]  # fmt: skip
    theirs = template.tokenizer.apply_chat_template(
        messages, chat_template=template.source, return_dict=True, return_assistant_tokens_mask=True
    )
    ((ids, asked),) = template.tokens([(asked_and_answered(turns, images=0), [])])
    assert ids == theirs["input_ids"] and asked == [bool(mark) for mark in theirs["assistant_masks"]]


def test_a_tokenizer_without_an_end_is_said():
    tokenizer = byte_level("qwen2_vl").tokenizer
    tokenizer.eos_token = None
    with pytest.raises(GraceError, match="the end has to be a token of the tokenizer, whose eos_token is None"):
        Template(SimpleNamespace(tokenizer=tokenizer, chat_template=FAMILIES["llava"].template, image_token="<image>"))


def test_templates_that_cannot_be_trained_with_are_refused():
    tokenizer = byte_level("qwen2_vl").tokenizer
    endless = "{% for m in messages %}{% generation %}{{ m.content[0].text }}{% endgeneration %}{% endfor %}"
    assert not marks_answers(tokenizer, endless)
    with pytest.raises(GraceError, match="put each answer and its end token between"):
        Template(SimpleNamespace(tokenizer=tokenizer, chat_template=endless, image_token="<|image_pad|>"))
    deaf = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content[-1].text }}{% endif %}{% endfor %}"
    )
    template = Template(SimpleNamespace(tokenizer=tokenizer, chat_template=deaf, image_token="<|image_pad|>"))
    with pytest.raises(GraceError, match="does not keep every text and image"):
        template.tokens([(asked_and_answered([("What", "red")]), [1])])
