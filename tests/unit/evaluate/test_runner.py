"""The batched runner against transformers' own `generate` and forward."""

import pytest
import torch
from evaluate_models import make_image, model, processor, rows
from transformers import BatchFeature, Qwen2VLImageProcessorPil

from grace.data.images import EncodedImage
from grace.errors import GraceError
from grace.evaluate.runner import Question, Runner


def questions(runner: Runner, count: int) -> list[Question]:
    made = []
    for row in rows(count):
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
        made.append(Question(row["id"], runner.render(said), (row["image"]["bytes"],)))
    return made


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(model(), processor(), batch=5, max_new_tokens=4)


def test_answers_are_those_of_generate_alone(runner):
    asked = questions(runner, 13)
    found = runner.answer(asked)
    for question, answer in zip(asked, found, strict=True):
        inputs = runner.processor(
            images=EncodedImage.from_bytes(question.id, *question.images).open(),
            text=question.prompt,
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
    monkeypatch.setattr("grace.evaluate.runner.FEATURE_BYTES", 3 * 4 * 32 * 4)  # three images
    fresh = Runner(runner.model, runner.processor, batch=4, max_new_tokens=2)
    asked = questions(fresh, 12)
    forgetful = [answer.text for answer in fresh.answer(asked)]
    assert len(fresh._features) <= 3
    seen, opened = [], EncodedImage.open
    monkeypatch.setattr(EncodedImage, "open", lambda self: seen.append(self.data) or opened(self))
    monkeypatch.setattr("grace.evaluate.runner.FEATURE_BYTES", 1 << 20)
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
        runner.answer([Question("row-1", "<bos> <image> <q> what <a>", (b"not an image",))])
    with pytest.raises(GraceError, match=r"row-2: its prompt has 0 places"):
        runner.answer([Question("row-2", "<bos> <q> what <a>", (make_image(1),))])
    nameless = processor()
    nameless.chat_template = None
    with pytest.raises(GraceError, match="no chat template"):
        Runner(runner.model, nameless)


class QwenProcessor:
    """The image half of Qwen's processor, for one still a prompt: its class needs torchvision, for videos."""

    def __init__(self, words) -> None:
        self.image_processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=3136, max_pixels=12544)
        self.tokenizer, self.chat_template = words, "unused"

    def __call__(self, text, images, **settings):
        pixels = self.image_processor(images=images, return_tensors="pt")
        counts = (pixels["image_grid_thw"].prod(-1) // 4).tolist()
        whole = [one.replace("<image>", " <image>" * n) for one, n in zip(text, counts, strict=True)]
        inputs = self.tokenizer(whole, **settings)
        kinds = (inputs["input_ids"] == 4).long()
        return BatchFeature({**inputs, **pixels, "mm_token_type_ids": kinds})


@pytest.mark.parametrize("version", [2, 3])
def test_qwen_answers_through_transformers_as_one_question_alone(version):
    from infer_models import qwen

    made, words = qwen(version), processor().tokenizer
    made.config.image_token_id, made.config.vision_start_token_id, made.config.vision_end_token_id = 4, 150, 151
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = 3, 0
    runner = Runner(made, QwenProcessor(words), batch=3, max_new_tokens=4)
    asked = [
        Question(f"row-{i}", f"<bos> <image> <q> {'what is the blue ' * (i + 1)} <a>", (make_image(i),))
        for i in range(5)
    ]
    for question, answer in zip(asked, runner.answer(asked), strict=True):
        images = [EncodedImage.from_bytes(question.id, *question.images).open()]
        inputs = runner.processor([question.prompt], images, return_tensors="pt", add_special_tokens=False)
        out = made.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new = out.sequences[0, inputs["input_ids"].shape[1] :]
        logp = torch.stack(out.logits)[:, 0].log_softmax(-1)
        assert answer.text == words.decode(new, skip_special_tokens=True).strip()
        assert answer.logprob == pytest.approx(logp.gather(1, new[:, None]).sum().item(), abs=1e-3)
        assert answer.entropy == pytest.approx(
            torch.distributions.Categorical(logits=logp[0]).entropy().item(), abs=1e-3
        )
