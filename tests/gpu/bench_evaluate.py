"""Measure what evaluation makes of a GPU: questions/s of the runner, its share of the decoder alone, and host memory.

    python tests/gpu/bench_evaluate.py --out evaluate.json [--images 64] [--questions 16] [--batch 128] [--int4]
    python tests/gpu/bench_evaluate.py --out evaluate.json --tiny     (a check of this script, on any machine)

LLaVA-1.5-7B's shape with random weights, `--questions` about every image of 640 x 480. Three ways, each asked twice and
timed the second time: `generate`, transformers' own, batch by batch (every question decodes and reads its image: the
way before prefixes were shared); `runner`, all that `grace evaluate` does from encoded images to texts; `decoder`, the
runner's prompts with tokens made and images seen already. The tables of answers are compared: bf16 rounding may differ.
"""

import argparse
import io
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from grace.data.batches import collate_prompts
from grace.data.images import EncodedImage
from grace.evaluate.runner import Question, Runner, turns
from grace.families import family_of
from grace.files import write_json
from grace.infer.fuse import fuse_dense
from grace.models import decoder

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from bench_decode import random_model, round_in_place
from chat_models import FAMILIES, blocks, sentencepiece

TEXT = "What is in this image, and how many of them are there? Answer with a short phrase. Case "


def model_and_processor(tiny: bool, device: torch.device):
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    if tiny:
        torch.manual_seed(0)
        model, processor = FAMILIES["llava-clip"]()
        model = model.eval().requires_grad_(False).to(device)
    else:
        model = random_model("llava-1.5-7b", device)
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessorPil(
                size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
            ),
            tokenizer=sentencepiece(), patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
    processor.chat_template = family_of(model).template
    model.config.image_token_id = processor.image_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.eos_token_id
    return model, processor


def asked(images: int, questions: int) -> list[Question]:
    made = []
    for image in range(images):
        kept = io.BytesIO()
        blocks(64, image).resize((640, 480)).save(kept, "JPEG")
        for number in range(questions):
            parts = [{"type": "image"}, {"type": "text", "text": f"{TEXT}{number}."}]
            made.append(Question(f"{image}-{number}", turns([{"role": "user", "content": parts}]), (kept.getvalue(),)))
    return made


def by_generate(runner: Runner, questions: Sequence[Question], new_tokens: int) -> list[str]:
    texts: list[str] = []
    for start in range(0, len(questions), runner.batch):
        part = questions[start : start + runner.batch]
        opened = [(q.prompt, [EncodedImage.from_bytes(q.id, image).open() for image in q.images]) for q in part]
        inputs = {
            name: value.to(runner.model.device) for name, value in collate_prompts(runner.tokeniser, opened).items()
        }
        inputs["pixel_values"] = inputs["pixel_values"].to(runner.model.dtype)
        made = runner.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        found = made[:, inputs["input_ids"].shape[1] :].cpu()
        texts += [text.strip() for text in runner.tokenizer.batch_decode(found, skip_special_tokens=True)]
    return texts


def seconds(work: Callable[[], object]) -> float:
    """Of the second call: the first one captures, tunes and starts what is kept."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - start
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=10)
    parser.add_argument("--int4", action="store_true", help="decoder linears rounded to INT4")
    parser.add_argument("--runner", action="store_true", help="time the runner alone")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to check this script")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = model_and_processor(chosen.tiny, device)
    questions = asked(chosen.images, chosen.questions)
    made = {"settings": {name: str(value) for name, value in vars(chosen).items()}, "questions": len(questions)}

    def fresh() -> Runner:
        return Runner(model, processor, chosen.batch, chosen.new_tokens)

    if not chosen.runner:
        before = fresh()
        texts = by_generate(before, questions, chosen.new_tokens)
        made["generate"] = len(questions) / seconds(lambda: by_generate(before, questions, chosen.new_tokens))
    if not chosen.tiny:
        fuse_dense(decoder(model))
        if chosen.int4:
            round_in_place(model, device)
    runner = fresh()

    def whole() -> list[str]:
        runner.encoder._features.clear()
        runner.encoder._held = 0
        return [answer.text for answer in runner.answer(questions)]

    made["runner"] = len(questions) / seconds(whole)
    if chosen.runner:
        print(f"runner: {made['runner']:.1f} questions/s")
        return write_json(chosen.out, made)
    made["same_answers"] = sum(a == b for a, b in zip(texts, whole(), strict=True)) / len(questions)
    batches, real = [], runner._generate
    runner._generate = lambda prompts, new_tokens: batches.append(prompts) or real(prompts, new_tokens)
    whole()
    made["decoder"] = len(questions) / seconds(lambda: [real(prompts, chosen.new_tokens) for prompts in batches])
    made["share_of_decoder"] = made["runner"] / made["decoder"]
    made["times_generate"] = made["runner"] / made["generate"]
    made["host_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for name in ("generate", "runner", "decoder"):
        print(f"{name}: {made[name]:.1f} questions/s")
    print(
        f"runner is {made['share_of_decoder']:.2f} of the decoder and {made['times_generate']:.2f} times generate; "
        f"same answers {made['same_answers']:.3f}; host memory {made['host_memory_gib']:.2f} GiB"
    )
    write_json(chosen.out, made)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
