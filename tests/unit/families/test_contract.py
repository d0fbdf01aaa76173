"""What every family promises, held against tiny random models of transformers' own classes."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_models import FAMILIES
from safetensors.torch import load_file, save_file
from some_conversations import conversations, picture

from grace.data import collate, load_examples
from grace.data.batches import collate_prompts, image_runs
from grace.data.conversations import IMAGE, SCHEMA, Message, Part, as_row
from grace.data.examples import IGNORED, Tokeniser
from grace.errors import GraceError
from grace.families import family_of, family_of_folder
from grace.files import whole_folder
from grace.models import (
    decoder,
    decoder_linears,
    freeze_vision,
    head_weight,
    image_token_id,
    load_model,
    load_processor,
    output_head,
    vision_tower,
    vocabulary,
)
from grace.teacher.forward import check_examples, check_sight, check_sight_alone, see


@pytest.fixture(scope="module", params=list(FAMILIES))
def home(request, tmp_path_factory):
    """A folder as the hub has it (its template marks no answers), and data."""
    home = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model, processor = FAMILIES[request.param]()
    for name, parameter in model.named_parameters():
        if "language_model" not in name and "lm_head" not in name and parameter.ndim > 1:
            parameter.data *= 4  # what is seen matters
    with whole_folder(home / "model") as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    (home / "data").mkdir()
    rows = [as_row(conversation) for conversation in conversations()]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), home / "data/train.parquet")
    load_processor(home / "model").save_pretrained(home / "data/processor")
    return home


@pytest.fixture(scope="module")
def loaded(home):
    processor = load_processor(home / "data/processor")
    return load_model(home / "model"), processor, load_examples(home / "data", processor)


def test_a_processor_reads_back_as_it_was_saved(home, tmp_path):
    published, kept = load_processor(home / "model"), load_processor(home / "data/processor")
    family = family_of_folder(home / "model")
    assert published.chat_template == kept.chat_template == family.template
    assert type(kept).__name__ == family.processor and family_of(kept).processor == family.processor
    assert [e.input_ids.tolist() for e in Tokeniser(published)(conversations())] == [
        e.input_ids.tolist() for e in Tokeniser(kept)(conversations())
    ]
    image = picture("x", 9, 50, 120).open()
    first, again = (p.image_processor(images=[image], return_tensors="pt") for p in (published, kept))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_every_image_has_the_visual_tokens_that_the_model_gives_it(loaded):
    model, processor, examples = loaded
    check_examples(examples, model, vocabulary(processor))
    assert [len(image_runs(e.input_ids, image_token_id(model))) for e in examples] == [1, 2, 0]
    batch = collate(examples, processor)
    _, _, sizes = batch.visual(image_token_id(model))
    with torch.inference_mode():
        seen = model.get_image_features(
            **{name: value for name, value in batch.pixels.items() if name in ("pixel_values", "image_grid_thw")}
        ).pooler_output
    assert sizes == [len(part) for part in seen]


def test_a_conversation_is_read_alike_alone_and_in_a_batch(loaded):
    model, processor, examples = loaded
    together = dict(see(model, processor, examples))
    for index, example in enumerate(examples):
        ((_, alone),) = see(model, processor, [example])
        torch.testing.assert_close(together[index].states, alone.states, atol=2e-5, rtol=2e-4)
        assert len(together[index].visual) == len(example.images)


def test_a_prompt_gives_the_logits_of_training(loaded):
    model, processor, examples = loaded
    conversation, example = conversations()[1], examples[1]
    images = [image.open() for image in conversation.images]
    inputs = collate_prompts(Tokeniser(processor), [(conversation.messages[:1], images)])
    first = int((example.labels != IGNORED).nonzero()[0])
    assert inputs["input_ids"][0].tolist() == example.input_ids[:first].tolist()
    ((_, seen),) = see(model, processor, [example])
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1]
        torch.testing.assert_close(output_head(model)(seen.states[0]), logits, atol=2e-5, rtol=2e-4)


def test_plain_questions_have_the_tokens_of_transformers_own_processor(loaded):
    _, processor, _ = loaded
    image = picture("x", 4, 70, 90).open()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    begun = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
    theirs = processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=not begun)
    said = (Message("user", (IMAGE, Part("text", "what is this"))),)
    ours = collate_prompts(Tokeniser(processor), [(said, [image])])
    assert set(ours) == set(theirs) and all(
        torch.equal(ours[name], theirs[name]) for name in ours if name != "pixel_values"
    )


def test_another_image_changes_the_logits_or_the_run_stops(loaded, monkeypatch):
    model, processor, examples = loaded
    check_sight(model, processor, examples)
    check_sight_alone(model, processor)
    check_sight(model, processor, examples[2:])  # text alone: nothing to see
    forward = model.model.forward

    def deaf(pixel_values=None, image_grid_thw=None, mm_token_type_ids=None, **inputs):
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", deaf)
    with pytest.raises(GraceError, match="conversation one: another image changes none of the model's logits"):
        check_sight(model, processor, examples)
    with pytest.raises(GraceError, match="conversation noise: another image changes none"):
        check_sight_alone(model, processor)


def test_only_the_tower_is_frozen(home):
    model = load_model(home / "model")
    freeze_vision(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    family = family_of(model)
    assert frozen and all(name.startswith(f"{family.tower}.") for name in frozen)
    assert not any("merger" in name or "projector" in name for name in frozen)
    assert len(decoder_linears(model)) == 7 * len(decoder(model).layers)
    assert (vision_tower(model) is None) == (family.name != "llava")


def test_rows_that_pad_the_head_are_cut(loaded):
    model, processor, _ = loaded
    size = vocabulary(processor)
    assert size == len(processor.tokenizer) < len(output_head(model).weight)
    assert head_weight(model, size).shape[0] == size


def test_names_on_disk_are_those_of_published_checkpoints(home):
    family = family_of_folder(home / "model")
    keys = [family.published(key) for file in (home / "model").glob("*.safetensors") for key in load_file(file)]
    beginnings = {
        key.split(".layers.")[0].split(".blocks.")[0] for key in keys if ".layers." in key or ".blocks." in key
    }
    published = {
        "llava": {"language_model.model", "vision_tower.vision_model.encoder"},
        "qwen2_vl": {"model", "visual"},
        "qwen2_5_vl": {"model", "visual"},
        "qwen3_vl": {"model.language_model", "model.visual"},
    }
    assert beginnings == published[family.name]


@pytest.mark.parametrize("fault", ["lacks", "has unknown", "has other shapes of"])
def test_weights_that_do_not_fit_are_named(home, tmp_path, fault):
    shutil.copytree(home / "model", tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight"))
    if fault == "lacks":
        del tensors[name]
    elif fault == "has unknown":
        tensors["something.else.weight"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    wanted = "something.else.weight" if fault == "has unknown" else "layers.0.mlp.up_proj.weight"
    with pytest.raises(GraceError, match=f"{fault} .*{wanted}.*fetch it again"):
        load_model(tmp_path / "model")


def test_code_of_its_own_is_never_run(home, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "own.Model"}}))
    for load in (load_model, load_processor):
        with pytest.raises(GraceError, match="asks for code of its own"):
            load(tmp_path / "model")


def test_another_transformers_is_refused(home, monkeypatch):
    monkeypatch.setattr("grace.models.load.importlib.metadata.version", lambda name: "5.17.0")
    for load in (load_model, load_processor):
        with pytest.raises(
            GraceError, match=r"transformers 5\.17\.0 is installed, and this pipeline was tested with 5"
        ):
            load(home / "model")
