"""Answering many questions about images, greedily and in batches.

A question costs one row of a batched prefill and one row of a few decoding steps. What would cost more is done once:
an image is decoded, preprocessed and sent through the vision tower once however many questions it serves, and
questions of equal length share a batch, so that little padding is computed. A question has one image, several or none;
an image's features take the place of its `<image>` token exactly as in the model's own forward.
"""

import hashlib
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from grace.benchmarks.extraction import Answer
from grace.data.images import EncodedImage
from grace.errors import GraceError
from grace.evaluate.answer_log import Parts
from grace.evaluate.preprocess import Pixels, pad_to_square
from grace.models import decoder, image_token_id, output_head
from grace.world import this_world

FEATURE_BYTES = 1 << 30  # visual features kept for later questions about the same images


@dataclass(frozen=True)
class Question:
    """One question as the model reads it.

    Attributes:
        id: names the row in messages.
        prompt: text rendered by the chat template, up to where the answer begins, with a placeholder for each image.
        images: the encoded images (JPEG or PNG) in the order of their placeholders; none for a question about text.
        new_tokens: longest answer; None: the runner's own.
        pad: whether images are first padded to squares of the processor's mean colour.
    """

    id: str
    prompt: str
    images: tuple[bytes, ...] = ()
    new_tokens: int | None = None
    pad: bool = False

    @property
    def digests(self) -> list[bytes]:
        """What names each image as the model is shown it."""
        return [hashlib.sha256(image + b"padded" * self.pad).digest() for image in self.images]

    @property
    def key(self) -> str:
        """A hash of all that is asked: prompt, images, longest answer."""
        digest = hashlib.sha256(f"{self.new_tokens}\0{self.prompt}".encode())
        for image in self.digests:
            digest.update(image)
        return digest.hexdigest()


class Unaskable(GraceError):
    """One question cannot be asked: `question` is its id, `reason` says why as in "row 3 has ..."."""

    def __init__(self, message: str, question: str, reason: str) -> None:
        super().__init__(message)
        self.question, self.reason = question, reason

    def __reduce__(self) -> tuple:
        return Unaskable, (str(self), self.question, self.reason)  # it travels between processes


class Runner:
    """Greedy answers of one model; also the likelihood of plain text under its decoder.

    LLaVA is decoded here. Other families (Qwen2-VL, Qwen3-VL) go through their processor and transformers' own
    `generate`, because only their forward knows how images and positions enter: slower, the same questions and files.

    Args:
        model: a vision-language model in evaluation mode, on any device, in any dtype.
        processor: its processor, with a chat template.
        batch: sequences per forward pass.
        max_new_tokens: longest answer in tokens.
        kept: what the model's tower makes of images, bf16 [n, d] by SHA-256, where that was kept.

    Attributes:
        parts: where answers are kept as they come, if anywhere; set before each benchmark.
        known: answers that earlier runs kept, by `Question.key`.
        world: the processes that ask together.
    """

    def __init__(
        self,
        model,
        processor,
        batch: int = 128,
        max_new_tokens: int = 8,
        kept: Mapping[bytes, torch.Tensor] | None = None,
    ) -> None:
        if not processor.chat_template:
            raise GraceError("the processor has no chat template; save one beside it (chat_template.jinja)")
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.batch, self.max_new_tokens, self.pixels = batch, max_new_tokens, Pixels(processor.image_processor)
        self.decoder, self.head, self.image_id = decoder(model), output_head(model), image_token_id(model)
        ends = model.generation_config.eos_token_id
        ends = ends if ends is not None else self.tokenizer.eos_token_id
        self.ends = torch.tensor([ends] if isinstance(ends, int) else sorted(ends), device=model.device)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else int(self.ends[0])
        self.decoded_here = model.config.model_type == "llava"
        self.kept = kept or {}
        self.parts: Parts | None = None
        self.known: dict[str, Answer] = {}
        self.world = this_world()
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._held = 0

    def render(self, messages: list[dict]) -> str:
        """A conversation in the chat template's own text, with the opening of the answer."""
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts; BOS is added only where the template has not written it (as transformers does)."""
        bos = self.tokenizer.bos_token
        written = bool(bos) and bool(texts) and texts[0].startswith(bos)
        return self.tokenizer(list(texts), add_special_tokens=not written)["input_ids"]

    @torch.inference_mode()
    def answer(
        self, questions: Sequence[Question], advance: Callable[[int], None] = lambda steps: None
    ) -> list[Answer]:
        """Answer every question, in order; `advance(n)` is called whenever n more are done."""
        prompts = self.encode([question.prompt for question in questions])
        for question, ids in zip(questions, prompts, strict=True):
            if ids.count(self.image_id) != len(question.images):
                places = f"{ids.count(self.image_id)} places for {len(question.images)} images"
                raise Unaskable(
                    f"question {question.id}: its prompt has {places}; check the chat template, and that its text does not "
                    "spell the model's image token",
                    question.id,
                    f"makes a prompt with {places}, because its text spells the model's image token or the chat template lacks it",
                )
        images = [question.digests for question in questions]
        alike = [(self._longest(question), bool(question.images)) for question in questions]  # may share a batch
        order = sorted(range(len(questions)), key=lambda i: (alike[i], len(prompts[i]), images[i], i))
        name = self._name(questions) if self.parts else ""
        kept = self.parts.read(name) if self.parts else {}
        kept |= {i: self.known[q.key] for i, q in enumerate(questions) if q.key in self.known} if self.known else {}
        answers = self.world.agreed(kept)
        advance(len(answers))

        def ask(rows: list[int]) -> list[Answer]:
            asked = [questions[i] for i in rows]
            if self.decoded_here:
                found = self._generate([prompts[i] for i in rows], self._look(asked), alike[rows[0]][0])
            else:
                found = self._by_transformers(asked, alike[rows[0]][0])
            if self.parts:
                self.parts.add(name, rows, found)
            advance(len(rows) * self.world.size)
            return found

        answers |= self._together(self._batches(order, alike), ask, answers)
        return [answers[i] for i in range(len(questions))]

    def _longest(self, question: Question) -> int:
        return question.new_tokens or self.max_new_tokens

    def _batches(self, order: list[int], alike: Sequence[Any]) -> list[list[int]]:
        """`order` cut into batches of numbers that are alike."""
        batches: list[list[int]] = []
        for i in order:
            if not batches or len(batches[-1]) == self.batch or alike[batches[-1][0]] != alike[i]:
                batches.append([])
            batches[-1].append(i)
        return batches

    def _together(
        self, batches: list[list[int]], work: Callable[[list[int]], list], done: Mapping[int, Any]
    ) -> dict[int, Any]:
        """What `work` makes of each batch, by number; batches that are done are left out, others shared."""
        mine, failed = {}, None
        try:
            for rows in self.world.dealt([rows for rows in batches if any(i not in done for i in rows)]):
                mine |= dict(zip(rows, work(rows), strict=True))
        except Exception as error:  # raised in every process, or the others would wait for this one
            if self.world.size > 1 and not isinstance(error, GraceError):  # others' kinds may not travel
                traceback.print_exc()
                error = RuntimeError(f"{type(error).__name__}: {error}")
            failed = error
        found = {}
        for theirs, error in self.world.gathered((mine, failed)):
            if error is not None:
                raise error
            found |= theirs
        return found

    def _name(self, questions: Sequence[Question]) -> str:
        """A hash of all that is asked, and of how it is cut into batches."""
        digest = hashlib.sha256(f"{self.batch} {self.max_new_tokens}".encode())
        for question in questions:
            digest.update(question.key.encode())
        return digest.hexdigest()[:16]

    def _look(self, questions: list[Question]) -> list[list[torch.Tensor]]:
        """Visual features [visual tokens, d] of each question's images, each image computed once while remembered."""
        wanted = {d: (q, image) for q in questions for d, image in zip(q.digests, q.images, strict=True)}
        new = {digest: shown for digest, shown in wanted.items() if digest not in self._features}
        here = {digest: self._features[digest] for digest in wanted if digest in self._features}
        if new:
            for digest, row in zip(new, self._project(new), strict=True):
                here[digest] = self._features[digest] = row
                self._held += row.nbytes
            while self._held > FEATURE_BYTES:
                self._held -= self._features.popitem(last=False)[1].nbytes
        return [[here[digest] for digest in question.digests] for question in questions]

    def _project(self, new: Mapping[bytes, tuple[Question, bytes]]) -> Iterable[torch.Tensor]:
        """The visual features of images not seen yet, each [visual tokens, d]."""
        if all(digest in self.kept for digest in new):
            features = torch.stack([self.kept[digest] for digest in new])
            return self.model.model.multi_modal_projector(features.to(self.model.device, self.model.dtype))
        images = [self._open(question, image) for question, image in new.values()]
        pixels = self.pixels(images).to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixels).pooler_output

    def _open(self, question: Question, image: bytes) -> Image.Image:
        """The decoded image, RGB, padded where that is asked."""
        try:
            opened = EncodedImage.from_bytes(question.id, image).open()
        except GraceError as error:
            raise Unaskable(str(error), question.id, "has an image that cannot be decoded") from error
        return pad_to_square(opened, self.processor.image_processor.image_mean) if question.pad else opened

    def _generate(self, prompts: list[list[int]], features: list[list[torch.Tensor]], new_tokens: int) -> list[Answer]:
        """Greedy decoding of one batch: left-padded, so that every row's next token is in the last column."""
        whole = [self._spread(prompt, shown) for prompt, shown in zip(prompts, features, strict=True)]
        width = max(map(len, whole))
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros((len(prompts), width), dtype=torch.int64)
        for row, sequence in enumerate(whole):
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        embedded = self.decoder.get_input_embeddings()(ids)  # [rows, width, d]
        seen = [each for shown in features for each in shown]  # in the order of their places, row by row
        if seen:
            embedded[(ids == self.image_id) & (mask == 1)] = torch.cat(seen).to(embedded.dtype)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.decoder.config)
        tokens, logprob, alive, entropy = [], torch.zeros(len(prompts), device=ids.device), None, None
        padded = bool((mask == 0).any())
        for step in range(new_tokens):
            hidden = self.decoder(
                inputs_embeds=embedded,
                attention_mask=mask if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            logp = self.head(hidden).float().log_softmax(-1)  # [rows, vocab]
            best, chosen = logp.max(-1)
            if step == 0:
                alive = torch.ones_like(chosen, dtype=torch.bool)
                entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1)
            logprob += torch.where(alive, best, 0.0)
            tokens.append(torch.where(alive, chosen, self.pad))
            alive &= ~torch.isin(chosen, self.ends)
            if not alive.any():
                break
            embedded = self.decoder.get_input_embeddings()(tokens[-1])[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        return self._answers(torch.stack(tokens, 1), logprob, entropy)

    def _spread(self, prompt: list[int], shown: list[torch.Tensor]) -> list[int]:
        """Token ids with each image's place repeated for every visual token."""
        left, spread = iter(shown), []
        for token in prompt:
            spread += [token] * len(next(left)) if token == self.image_id else [token]
        return spread

    def _by_transformers(self, questions: list[Question], new_tokens: int) -> list[Answer]:
        """One batch through the processor and `generate`, left-padded."""
        self.tokenizer.padding_side = "left"
        bos = self.tokenizer.bos_token
        images = [self._open(question, image) for question in questions for image in question.images]
        inputs = self.processor(
            text=[question.prompt for question in questions],
            images=images or None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and questions[0].prompt.startswith(bos)),
        ).to(self.model.device)
        if images:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        made = self.model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = made.sequences[:, inputs["input_ids"].shape[1] :]  # [rows, steps]
        alive = torch.ones_like(tokens[:, 0], dtype=torch.bool)
        logprob, entropy = torch.zeros(len(questions), device=tokens.device), None
        for step, logits in enumerate(made.logits):  # each [rows, vocab]
            logp = logits.float().log_softmax(-1)
            if entropy is None:
                entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1)
            chosen = tokens[:, step]
            logprob += torch.where(alive, logp.gather(1, chosen[:, None])[:, 0], 0.0)
            alive &= ~torch.isin(chosen, self.ends)
        return self._answers(tokens, logprob, entropy)

    def _answers(self, tokens: torch.Tensor, logprob: torch.Tensor, entropy: torch.Tensor) -> list[Answer]:
        texts = self.tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)
        values = zip(texts, logprob.tolist(), entropy.tolist(), strict=True)
        return [Answer(text.strip(), *numbers) for text, *numbers in values]

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For (context, continuation) token ids: log-probability (nats) of the continuation, and whether it is greedy."""
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]) + len(pairs[i][1]), i))
        batches = self._batches(order, [None] * len(pairs))
        scores = self._together(batches, lambda rows: self._score([pairs[i] for i in rows]), {})
        return [scores[i] for i in range(len(pairs))]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One batch of `score`, right-padded: the padding is never seen."""
        whole = [(context + continuation)[:-1] for context, continuation in pairs]
        ids = torch.full((len(pairs), max(map(len, whole))), self.pad)
        for row, sequence in enumerate(whole):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        hidden = self.decoder(input_ids=ids.to(self.model.device)).last_hidden_state
        scores = []
        for row, (context, continuation) in enumerate(pairs):
            steps = hidden[row, len(context) - 1 : len(context) - 1 + len(continuation)]
            logp = self.head(steps).float().log_softmax(-1)
            labels = torch.tensor(continuation, device=logp.device)
            greedy = bool((logp.argmax(-1) == labels).all())
            scores.append((logp.gather(1, labels[:, None]).sum().item(), greedy))
        return scores
