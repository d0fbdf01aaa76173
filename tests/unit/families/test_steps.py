"""One small run of every family through the pipeline's own subcommands: cache, training, AWQ, GPTQ, questions."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_models import FAMILIES, ONE_EACH
from some_conversations import conversations, picture

from grace.config.job_parameters import CacheRun, QuantizeRun, TrainRun
from grace.config.schema import Cache, Method, Optimisation, Quantization
from grace.data import load_prepared, prepare_examples
from grace.data.conversations import SCHEMA, as_row
from grace.errors import GraceError
from grace.evaluate.runner import Question, Runner, turns
from grace.files import read_json, whole_folder, write_json
from grace.models import load_model, load_processor, output_head, vocabulary
from grace.quant.commands import quantize
from grace.teacher.commands import finish, write
from grace.teacher.reader import TeacherCache
from grace.train.commands import train

WEIGHTS = Quantization(group_size=32, calibration=3)


@pytest.fixture(scope="module", params=ONE_EACH)
def home(request, tmp_path_factory):
    """Data with text alone and several images, a teacher whose head is padded further than the student's, its cache."""
    home = tmp_path_factory.mktemp(request.param)
    for name, seed in (("student", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        model, processor = FAMILIES[request.param]()
        for key, parameter in model.named_parameters():
            if "language_model" not in key and "lm_head" not in key and parameter.ndim > 1:
                parameter.data *= 4  # what is seen matters
        if name == "teacher":
            model.resize_token_embeddings(576)
        with whole_folder(home / name) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    processor = load_processor(home / "student")
    with whole_folder(home / "data") as folder:
        rows = [as_row(conversation) for conversation in conversations()]
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "train.parquet")
        processor.save_pretrained(folder / "processor")
        prepare_examples(folder, processor, tower=None)
    family = request.param.split("-")[0]
    run = CacheRun(family=family, compute_dtype="float32", cache=Cache(audit=0.5), temperature=2.0)
    write_json(home / "cache.json", run.model_dump())
    write(home / "cache.json", home / "teacher", home / "data", home / "cache")
    finish(home / "cache.json", home / "teacher", home / "data", home / "cache")
    return home, family, vocabulary(processor)


def test_the_cache_holds_a_gram_matrix_an_image_and_no_padded_row(home):
    home, _, size = home
    cache = TeacherCache.open(home / "cache")
    examples = load_prepared(home / "data")
    assert [len(cache.batch([example.key]).grams) for example in examples] == [1, 2, 0]
    assert cache.vocabulary == size == len(cache.head) < 512
    assert read_json(home / "cache/manifest.json")["audit_results"]["relational_cka"]["images"] > 0


def training(home, family, name, **change):
    optimisation = Optimisation(epochs=2, batch=3, micro_batch=1, learning_rate=1e-3, checkpoint_every=50)
    values = dict(family=family, compute_dtype="float32", seed=0, optimisation=optimisation, method=Method(), bits=4)
    write_json(home / f"{name}.json", TrainRun(**{**values, "quantization": WEIGHTS, **change}).model_dump())
    train(
        home / f"{name}.json", home / "data", home / name, home / f"{name}.jsonl", home / f".{name}",
        home / "student", home / "cache", home / "teacher",
    )  # fmt: skip
    return load_model(home / name, torch.float32)


def test_training_distils_from_every_conversation_and_leaves_padded_rows_alone(home):
    home, family, size = home
    trained = training(home, family, "grace", kd="gated", rcka=True)
    before = load_model(home / "student", torch.bfloat16).float()
    rows, old = output_head(trained).weight, output_head(before).weight
    assert not torch.equal(rows[:size], old[:size])
    decay = rows[size:] / old[size:]  # weight decay alone
    assert torch.allclose(decay[old[size:] != 0], torch.ones(()), atol=1e-2)
    log = [line for line in (home / "grace.jsonl").read_text().splitlines() if line]
    assert len(log) == 2 and '"rcka"' in log[0] and '"kd"' in log[0]


def test_micro_batches_of_text_alone_change_nothing_of_the_sums(home):
    home, family, _ = home
    found = []
    for micro_batch in (1, 3):
        optimisation = Optimisation(steps=1, batch=3, micro_batch=micro_batch, learning_rate=1e-3, checkpoint_every=50)
        training(home, family, f"cut-{micro_batch}", kd="gated", rcka=True, optimisation=optimisation)
        found.append(json.loads((home / f"cut-{micro_batch}.jsonl").read_text().splitlines()[0]))
    for name in ("ce", "kd", "rcka", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_rounding_with_activations_sees_images_and_text(home, method):
    home, family, _ = home
    run = QuantizeRun(family=family, post_training=method, bits=4, quantization=WEIGHTS, seed=0)
    write_json(home / f"{method}.json", run.model_dump())
    quantize(home / f"{method}.json", home / "student", home / "data", home / method)
    load_model(home / method)


def test_questions_are_answered(home):
    home, _, _ = home
    model, processor = load_model(home / "student", torch.float32), load_processor(home / "student")
    runner = Runner(model, processor, batch=2, max_new_tokens=3)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}]
    asked = [Question(str(n), turns(said), (picture(str(n), n).data,)) for n in range(3)]
    together, alone = runner.answer(asked), [runner.answer([question])[0] for question in asked]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def test_a_teacher_of_another_family_is_refused(home):
    home, family, _ = home
    other = "llava" if family != "llava" else "qwen2_vl"
    run = CacheRun(family=other, compute_dtype="float32", cache=Cache(), temperature=2.0)
    write_json(home / "other.json", run.model_dump())
    with pytest.raises(GraceError, match=rf"config\.json says {family} and the configuration family: {other}"):
        write(home / "other.json", home / "teacher", home / "data", home / "other-cache")
