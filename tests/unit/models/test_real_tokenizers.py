"""The tables of labels once more, by hand, with real vocabularies: Llama's SentencePiece and Qwen's byte-level BPE.

`[token]` is asked for. What the tokenizers themselves make of plain text is held against sentencepiece and tiktoken.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import real_tokenizers
from some_conversations import BRIEF, model, shown, user

from grace import families
from grace.data.conversations import IMAGE
from grace.errors import GraceError
from grace.families import FAMILIES
from grace.families.llama_vocabulary import read_sentencepiece
from grace.families.llava import _as_read
from grace.models import load_processor
from grace.models.template import Template

TEXTS = [
    "What is it? red shirt",
    "é 你好 ω",
    "A  dog, 12 of 345.",
    "1. red\n2. blue\n\n",
    "it's HERE_now <b>",
    "a  led ",
]
TALKS = {
    "a word": ([BRIEF, user(IMAGE, "What is it?"), model("red")], [2]),
    "turns": ([BRIEF, user(IMAGE, "What is it?"), model("A red shirt."), user("Sure?"), model("yes")], [1]),
    "unicode": ([BRIEF, user(IMAGE, "é"), model("é 你好 ω")], [1]),
    "spaces": ([BRIEF, user(IMAGE, "What"), model(" red  ")], [1]),
    "lines": ([BRIEF, user("What"), model("\n\n1. red\n2. blue")], []),
    "spelled": ([BRIEF, user("</s>", IMAGE, "<image><|im_end|>"), model("<|im_end|></s><image><|image_pad|>")], [1]),
    "images": ([BRIEF, user(IMAGE, IMAGE, "What"), model("red"), user("and", IMAGE), model("yes")], [1, 2, 1]),
    "number": ([BRIEF, user("How many?"), model("12")], []),
    "empty": ([BRIEF, user("What"), model("")], []),
}

# {n}: what legacy Llama tokenizers put before text behind a control token; {u}: and how they begin USER there.
SEEN = "<s> ▁Be ▁brief . ▁US ER : ▁ <image> {n}<0x0A>"
SAYS = "▁ASS IST ANT :"
LLAVA = {
    "a word": f"<s> ▁Be ▁brief . ▁US ER : ▁ <image> <image> {{n}}<0x0A> What ▁is ▁it ? {SAYS} [▁red] [</s>]",
    "turns": f"{SEEN} What ▁is ▁it ? {SAYS} [▁A] [▁red] [▁shirt] [.] [</s>] {{u}} : ▁Sure ? {SAYS} [▁yes] [</s>]",
    "unicode": f"{SEEN} é {SAYS} [▁é] [▁] [你] [好] [▁] [ω] [</s>]",
    "spaces": f"{SEEN} What {SAYS} [▁] [▁red] [▁▁] [</s>]",
    "lines": f"<s> ▁Be ▁brief . ▁US ER : ▁What {SAYS} [▁] [<0x0A>] [<0x0A>] [1] [.] [▁red] [<0x0A>] [2] [.] "
    "[▁blue] [</s>]",
    "spelled": f"<s> ▁Be ▁brief . ▁US ER : ▁</ s > <0x0A> <image> {{n}}<0x0A> < image >< | im _ end | > {SAYS} [▁<] "
    "[|] [im] [_] [end] [|] [></] [s] [><] [image] [><] [|] [image] [_] [pad] [|] [>] [</s>]",
    "images": f"{SEEN} <image> <image> {{n}}<0x0A> What {SAYS} [▁red] [</s>] {{u}} : ▁and <0x0A> <image> "
    f"{SAYS} [▁yes] [</s>]",
    "number": f"<s> ▁Be ▁brief . ▁US ER : ▁How ▁many ? {SAYS} [▁] [1] [2] [</s>]",
    "empty": f"<s> ▁Be ▁brief . ▁US ER : ▁What {SAYS} [▁] [</s>]",
}
BRIEFLY = "<|im_start|> system Ċ Be Ġbrief . <|im_end|> Ċ"
ASKS, ANSWERS = "<|im_start|> user Ċ", "<|im_end|> Ċ <|im_start|> assistant Ċ"
ONE = "<|vision_start|> <|image_pad|> <|vision_end|>"
TWO = "<|vision_start|> <|image_pad|> <|image_pad|> <|vision_end|>"
QWEN = {
    "a word": f"{ASKS} {TWO} What Ġis Ġit ? {ANSWERS} [red] [<|im_end|>] Ċ",
    "turns": f"{ASKS} {ONE} What Ġis Ġit ? {ANSWERS} [A] [Ġred] [Ġshirt] [.] [<|im_end|>] Ċ {ASKS} "
    f"Sure ? {ANSWERS} [yes] [<|im_end|>] Ċ",
    "unicode": f"{ASKS} {ONE} Ã© {ANSWERS} [Ã©] [Ġ] [ä½łå¥½] [ĠÏ] [ī] [<|im_end|>] Ċ",
    "spaces": f"{ASKS} {ONE} What {ANSWERS} [Ġred] [ĠĠ] [<|im_end|>] Ċ",
    "lines": f"{ASKS} What {ANSWERS} [ĊĊ] [1] [.] [Ġred] [Ċ] [2] [.] [Ġblue] [<|im_end|>] Ċ",
    "spelled": f"{ASKS} </ s > {ONE} < image >< | im _end | > {ANSWERS} [<] [|] [im] [_end] [|] [></] [s] [><] [image] "
    "[><] [|] [image] [_pad] [|] [>] [<|im_end|>] Ċ",
    "images": f"{ASKS} {ONE} {TWO} What {ANSWERS} [red] [<|im_end|>] Ċ {ASKS} and {ONE} {ANSWERS} [yes] [<|im_end|>] Ċ",
    "number": f"{ASKS} How Ġmany ? {ANSWERS} [1] [2] [<|im_end|>] Ċ",
    "empty": f"{ASKS} What {ANSWERS} [<|im_end|>] Ċ",
}


def template(tokenizer, family: str) -> Template:
    about = FAMILIES[family]
    return Template(SimpleNamespace(tokenizer=tokenizer, chat_template=about.template, image_token=about.image_token))


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not legacy"])
def test_llava_asks_for_each_answer_and_its_end(legacy, tmp_path):
    made = template(_as_read(real_tokenizers.llama(tmp_path, legacy)), "llava")
    places = {"n": "▁ ", "u": "▁US ER"} if legacy else {"n": "", "u": "USER"}
    for name, talk in TALKS.items():
        assert shown(made, *talk) == LLAVA[name].format(**places), name


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_asks_for_each_answer_and_its_end(family):
    made = template(real_tokenizers.qwen(), family)
    for name, talk in TALKS.items():
        assert shown(made, *talk) == f"{BRIEFLY} {QWEN[name]}", name


def test_llamas_tokens_are_sentencepieces(tmp_path):
    """Runs of spaces too, which transformers alone would join first."""
    import sentencepiece

    tokenizer = _as_read(real_tokenizers.llama(tmp_path, legacy=True))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    letters = np.array([*"  \n<.aeiostn", " the ", " dog", "é", "你", "12", "    "])
    drawn = ["x" + "".join(np.random.default_rng(seed).choice(letters, 40)) for seed in range(200)]
    for text in [*TEXTS, "A   dog      of", *drawn]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), text


def test_a_folder_with_tokenizer_model_alone_is_read_as_sentencepiece_does(tmp_path):
    real_tokenizers.llama(tmp_path, legacy=True)
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {"patch_size": 14}}')
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    processor = load_processor(tmp_path)
    assert processor.tokenizer.tokenize("A  dog") == ["▁A", "▁", "▁dog"]
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text((tmp_path / "config.json").read_text())
    assert load_processor(tmp_path / "saved").tokenizer.tokenize("A  dog") == ["▁A", "▁", "▁dog"]


def test_qwens_tokens_are_tiktokens():
    import tiktoken

    tokenizer = real_tokenizers.qwen()
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|image_pad|>"]) == [151643, 151645, 151655]
    reference = tiktoken.Encoding(
        "qwen", pat_str=real_tokenizers.PRETOKEN, mergeable_ranks=real_tokenizers.qwen_ranks(), special_tokens={}
    )
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == reference.encode_ordinary(text), text


@pytest.mark.parametrize("lacking", ["sentencepiece", "google.protobuf"])
def test_what_reading_tokenizer_model_needs_is_said(lacking, tmp_path, monkeypatch):
    real_tokenizers.llama(tmp_path, legacy=False)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    find = families.importlib.util.find_spec
    monkeypatch.setattr(families.importlib.util, "find_spec", lambda name: None if name == lacking else find(name))
    package = lacking.removeprefix("google.")
    with pytest.raises(
        GraceError, match=rf"tokenizer\.json is not there, and reading tokenizer\.model needs {package}; pip install"
    ):
        load_processor(tmp_path)


def _own_sentencepiece(folder, **more):
    """`folder`/tokenizer.model of 400 pieces, of Llama's kind but for `more`."""
    import io

    import sentencepiece

    model, lines = io.BytesIO(), ["The dog looks over 12 lazy dogs.", "é 你好  double   spaces", "ASSISTANT: USER:"] * 9
    kind = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False, **kind | more,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize(
    "more", [{}, {"add_dummy_prefix": False}, {"user_defined_symbols": ["FOX"], "unk_id": 2, "bos_id": 0, "eos_id": 1}]
)
def test_other_models_of_llamas_kind_give_sentencepieces_tokens(tmp_path, more):
    reference = _own_sentencepiece(tmp_path, **more)
    tokenizer = read_sentencepiece(tmp_path)
    for text in ["Red", "The  dog", "12 é 你", "\n\nx", "aFOXb over"]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model_type": "unigram"}, "it is no byte-pair encoding"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it changes texts before it cuts them"),
        ({"treat_whitespace_as_suffix": True}, "it puts spaces behind words"),
        (None, "no SentencePiece model, or a damaged one"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, more, said):
    if more is None:
        (tmp_path / "tokenizer.model").write_bytes(b"\x08\xff garbage")
    else:
        _own_sentencepiece(tmp_path, **more)
    with pytest.raises(GraceError, match=said):
        read_sentencepiece(tmp_path)
