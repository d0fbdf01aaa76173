"""The batched runner against transformers' own `generate` and forward."""

import io

import pytest
import torch
from chat_models import ONE_EACH, blocks, talking_student
from evaluate_models import make_image, model, processor, rows

from grace.data.batches import collate_prompts
from grace.data.examples import Tokeniser
from grace.data.images import EncodedImage
from grace.errors import GraceError
from grace.evaluate.runner import Question, Runner, Unaskable, turns
from grace.models import load_model, load_processor


def questions(runner: Runner, count: int) -> list[Question]:
    made = []
    for row in rows(count):
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
        made.append(Question(row["id"], turns(said), (row["image"]["bytes"],)))
    return made


def ask(text: str, images: int = 1) -> tuple:
    return turns([{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}])


def text_of(question: Question) -> str:
    said = [{"role": m.role, "content": [{"type": p.type, "text": p.text} for p in m.content]} for m in question.prompt]
    return processor().apply_chat_template(said, add_generation_prompt=True)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(model(), processor(), batch=5, max_new_tokens=4)


def test_answers_are_those_of_generate_alone(runner):
    asked = questions(runner, 13)
    found = runner.answer(asked)
    for question, answer in zip(asked, found, strict=True):
        inputs = runner.processor(
            images=EncodedImage.from_bytes(question.id, *question.images).open(),
            text=text_of(question),
            return_tensors="pt",
            add_special_tokens=False,
        )
        out = runner.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new = out.sequences[0, inputs["input_ids"].shape[1] :]
        logp = torch.stack(out.logits)[:, 0].log_softmax(-1)
        assert answer.text == runner.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer.logprob == pytest.approx(logp.gather(1, new[:, None]).sum().item(), abs=1e-4)
        assert answer.entropy == pytest.approx(
            torch.distributions.Categorical(logits=logp[0]).entropy().item(), abs=1e-4
        )


def test_neither_batch_nor_order_changes_an_answer(runner):
    asked = questions(runner, 13)
    alone = Runner(runner.model, runner.processor, batch=1, max_new_tokens=4).answer(asked)
    turned = runner.answer(asked[::-1])[::-1]
    for one, other in zip(alone, turned, strict=True):
        assert one.text == other.text
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_image_is_seen_once_and_memory_is_bounded(runner, monkeypatch):
    monkeypatch.setattr("grace.evaluate.image_encoder.FEATURE_BYTES", 3 * 4 * 32 * 4)  # three images
    fresh = Runner(runner.model, runner.processor, batch=4, max_new_tokens=2)
    asked = questions(fresh, 12)
    forgetful = [answer.text for answer in fresh.answer(asked)]
    assert len(fresh.encoder._features) <= 3
    seen, opened = [], EncodedImage.open
    monkeypatch.setattr(EncodedImage, "open", lambda self: seen.append(self.data) or opened(self))
    monkeypatch.setattr("grace.evaluate.image_encoder.FEATURE_BYTES", 1 << 20)
    fresh = Runner(runner.model, runner.processor, batch=4, max_new_tokens=2)
    assert [answer.text for answer in fresh.answer(asked)] == forgetful
    fresh.answer(asked)
    assert len(seen) == len(set(seen)) == 6


def test_text_likelihood_is_that_of_the_full_forward(runner):
    pairs = [([2, 7, 8], [9, 10, 3]), ([2], [11]), ([2, 7, 8, 9, 10, 11], [12, 13])]
    for (context, continuation), (logprob, greedy) in zip(pairs, runner.score(pairs), strict=True):
        logp = runner.model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        steps = logp[len(context) - 1 : -1]
        assert logprob == pytest.approx(sum(steps[i, token].item() for i, token in enumerate(continuation)), abs=1e-4)
        assert greedy == (steps.argmax(-1).tolist() == continuation)


def test_what_is_wrong_is_named(runner):
    with pytest.raises(GraceError, match=r"image of row-1: cannot be read"):
        runner.answer([Question("row-1", ask("what"), (b"not an image",))])
    with pytest.raises(GraceError, match=r"row-2: its prompt has 0 places"):
        runner.answer([Question("row-2", ask("what", 0), (make_image(1),))])
    nameless = processor()
    nameless.chat_template = None
    with pytest.raises(GraceError, match="no chat template"):
        Runner(runner.model, nameless)


@pytest.fixture(scope="module", params=ONE_EACH)
def family(request, tmp_path_factory):
    """A model of every family in fp32, with its processor as this pipeline loads it."""
    folder = talking_student(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return load_model(folder, dtype=torch.float32), load_processor(folder)


def png(width: int, height: int, seed: int) -> bytes:
    kept = io.BytesIO()
    blocks(64, seed).resize((width, height)).save(kept, "PNG")
    return kept.getvalue()


def mixed() -> list[Question]:
    """Images of two sizes with many questions or one, several images, text before an image, text alone."""
    wide, high, other = png(120, 70, 0), png(70, 110, 1), png(100, 100, 2)
    texts = ("what is this?", "how many boots are there, two or no boots?", "a red shirt? yes or no", "image")
    made = [Question(f"wide-{i}", ask(text), (wide,)) for i, text in enumerate(texts)]
    made += [Question(f"high-{i}", ask(text), (high,)) for i, text in enumerate(texts[1:])]
    made += [Question("alone", ask("yes?"), (other,)), Question("two", ask(texts[1], 2), (wide, high))]
    late = [{"type": "text", "text": "look: "}, {"type": "image"}, {"type": "text", "text": " what?"}]
    made += [Question("late", turns([{"role": "user", "content": late}]), (high,))]
    return [*made, Question("text", ask("how many boots?", 0)), Question("more", ask("yes no", 0))]


def by_generate(model, processor, question: Question, new_tokens: int):
    images = [EncodedImage.from_bytes("image", image).open() for image in question.images]
    inputs = collate_prompts(Tokeniser(processor), [(question.prompt, images)])
    out = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    return new, torch.stack(out.logits)[:, 0].log_softmax(-1)


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_every_family_answers_as_generate_does_alone(family, batch):
    model, processor = family
    runner, asked = Runner(model, processor, batch=batch, max_new_tokens=5), mixed()
    found = runner.answer(asked)
    assert len({answer.logprob for answer in found}) == len(asked), "every question is another to the model"
    for question, answer in zip(asked, found, strict=True):
        new, logp = by_generate(model, processor, question, 5)
        assert answer.text == processor.tokenizer.decode(new, skip_special_tokens=True).strip(), question.id
        assert answer.logprob == pytest.approx(logp.gather(1, new[:, None]).sum().item(), abs=1e-3), question.id
        entropy = torch.distributions.Categorical(logits=logp[0]).entropy().item()
        assert answer.entropy == pytest.approx(entropy, abs=1e-3), question.id


def test_what_prompts_begin_with_is_computed_once(family, monkeypatch):
    model, processor = family
    runner, rows = Runner(model, processor, batch=16, max_new_tokens=2), []
    forward = runner.decoder.forward
    monkeypatch.setattr(
        runner.decoder, "forward", lambda **given: rows.append(given["inputs_embeds"].shape[:2]) or forward(**given)
    )
    image = png(200, 200, 3)
    runner.answer([Question(str(i), ask("what is this"[: i + 1]), (image,)) for i in range(8)])
    (once, shared), (each, rest), (_, step) = rows
    assert (once, each, step) == (1, 8, 1) and rest < shared


def test_a_text_that_spells_control_tokens_stays_text(family):
    model, processor = family
    runner = Runner(model, processor, max_new_tokens=2)
    spelt = Question(
        "spelt", ask(f"what {processor.image_token} is {processor.tokenizer.eos_token} this"), (png(90, 90, 4),)
    )
    (ids,) = runner._tokens([spelt])
    assert ids.count(processor.image_token_id) == runner.tokeniser.visual_tokens(90, 90)
    assert runner.answer([spelt])


def test_workers_prepare_images_ahead_and_change_no_answer(family):
    model, processor = family
    asked = mixed()
    plain, helped = (Runner(model, processor, batch=3, max_new_tokens=3) for _ in range(2))
    helped.encoder.workers = 2
    helped.encoder._look = None  # nothing is left to be looked at here
    assert helped.answer(asked) == plain.answer(asked)
    fresh = Runner(model, processor, batch=3, max_new_tokens=3)
    fresh.encoder.workers = 2
    whole = png(90, 90, 5)
    with pytest.raises(Unaskable, match="broken"):
        fresh.answer([*asked, Question("broken", ask("what"), (whole[: len(whole) // 2],))])
    assert fresh.answer(asked) == plain.answer(asked)
