"""Decoding over the static cache against transformers' own generate."""

import pytest
import torch
from infer_models import QUESTIONS, make_image, qwen, qwen_inputs, save_llava, save_packed, theirs

from grace.errors import GraceError
from grace.infer.decode import Session, generate, stream
from grace.infer.fuse import fuse_dense
from grace.infer.load import load_for_inference
from grace.infer.prompt import build_prompts
from grace.models import load_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def prompts(folder):
    return build_prompts(load_processor(folder), [(make_image(i), text) for i, text in enumerate(QUESTIONS)])


def test_a_padded_batch_answers_as_transformers_does(folder, prompts):
    assert (prompts["attention_mask"] == 0).any()
    expected = theirs(folder, prompts, 10)
    model = load_for_inference(folder, dtype=torch.float32)  # in bf16 two tokens may tie, and the order of sums decides
    assert torch.equal(generate(model, prompts, 10), expected)


def test_a_session_answers_prompt_after_prompt(folder, prompts):
    model = load_for_inference(folder)
    session = Session(model, 3, prompts["input_ids"].shape[1] + 12)
    first = torch.stack(list(stream(session, prompts, 10)), dim=1)
    other = {**prompts, "pixel_values": prompts["pixel_values"].flip(0)}
    assert not torch.equal(torch.stack(list(stream(session, other, 10)), dim=1), first)
    assert torch.equal(torch.stack(list(stream(session, prompts, 10)), dim=1), first)


def test_a_step_is_one_graph(folder, prompts, tmp_path):
    """What CUDA graphs need and no CPU can show: no value of a tensor is looked at on the way."""
    model = load_for_inference(save_packed(folder, tmp_path / "packed"))
    expected = generate(model, prompts, 5)
    session = Session(model, 3, expected.shape[1] + prompts["input_ids"].shape[1])
    session._step = torch.compile(session._step, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(torch.stack(list(stream(session, prompts, 5)), dim=1), expected)


def test_ends_early_when_every_row_has_ended(folder, prompts):
    model = load_for_inference(folder)
    free = generate(model, prompts, 8)
    model.generation_config.eos_token_id = [int(free[0, 2]), int(free[1, 1]), int(free[2, 3])]
    ended = generate(model, prompts, 8)
    ends = torch.tensor(model.generation_config.eos_token_id)
    assert ended.shape[1] < 8
    for row, full in zip(ended, free, strict=True):
        stop = int(torch.isin(row, ends).nonzero()[0])
        assert torch.equal(row[: stop + 1], full[: stop + 1])
        assert (row[stop + 1 :] == ends[0]).all()


@pytest.mark.parametrize("version", [2, 3])
def test_positions_of_time_height_and_width(version):
    model = qwen(version)
    inputs = qwen_inputs()
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, 11:]
    assert torch.equal(generate(model, inputs, 8), expected)
    fuse_dense(model.model.language_model)
    assert torch.equal(generate(model, inputs, 8), expected)


def test_a_session_that_is_too_small_is_refused(folder, prompts):
    session = Session(load_for_inference(folder), 2, 30)
    with pytest.raises(GraceError, match="got 3 prompts"):
        session.prefill(prompts)
    with pytest.raises(GraceError, match="do not fit a session of 30"):
        next(stream(session, prompts, 20))
    session = Session(load_for_inference(folder), 3, prompts["input_ids"].shape[1] + 1)
    with pytest.raises(GraceError, match="padded on the right; pad them on the left"):
        session.prefill({**prompts, "attention_mask": prompts["attention_mask"].flip(1)})
    session.prefill(prompts)
    session.step()
    with pytest.raises(GraceError, match="slots of the session are full"):
        session.step()


def test_a_card_without_memory_is_said(folder, prompts, monkeypatch):
    model = load_for_inference(folder)
    session = Session(model, 3, 80)

    def full(**inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(GraceError, match="no memory left on cpu for 3 sequences of 80 tokens; decode fewer"):
        session.prefill(prompts)
