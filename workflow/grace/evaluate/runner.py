"""Answering many questions about images, greedily and in batches.

A question costs a few tokens of prefill and a few decoding steps. What would cost more is done once: an image is
decoded, preprocessed and sent through the vision tower once however many questions it serves, questions about it share
a batch and what their prompts begin with, and batches hold questions of like length, so that little padding is
computed. Decoding is `grace.infer`'s, for every family and for packed weights as they ship.
"""

import hashlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from grace.benchmarks.extraction import Answer
from grace.data.examples import Tokeniser
from grace.errors import GraceError
from grace.evaluate.answer_log import AnswerLog
from grace.evaluate.image_encoder import ImageEncoder, Unaskable
from grace.evaluate.question import Question, turns
from grace.families.files import end_tokens
from grace.infer.decode import CHECK_EVERY, Session
from grace.infer.prefill import Prompt, follow, read
from grace.models import decoder, image_token_id, output_head
from grace.world import this_world

__all__ = ["Question", "Runner", "Unaskable", "turns"]

SLOTS = 64  # a session's length is a multiple, so that one serves many batches


class Runner:
    """Greedy answers of one model; also the likelihood of plain text under its decoder.

    In exact arithmetic an answer does not depend on what shares its batch; in fp32 on a CPU sums differ in their last
    bits, which only changes an answer where two tokens are equally likely to about 1e-6. The same questions, batch size
    and number of processes give the same batches, and the same bits on the same machine.

    Args:
        model: a vision-language model in evaluation mode, on any device, in any dtype.
        processor: its processor, with a chat template.
        batch: sequences per forward pass.
        max_new_tokens: longest answer in tokens.
        kept: what the model's tower makes of images, bf16 [n, d] by SHA-256, where that was kept.

    Attributes:
        log: where answers are kept as they come, if anywhere; set before each benchmark.
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
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.tokeniser = Tokeniser(processor)
        self.batch, self.max_new_tokens = batch, max_new_tokens
        self.decoder, self.head = decoder(model), output_head(model)
        if model.generation_config.eos_token_id is None:
            model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        self.ends = torch.tensor(sorted(end_tokens(model.generation_config.eos_token_id)), device=model.device)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else int(self.ends[0])
        self.image = image_token_id(model)
        self.encoder = ImageEncoder(model, processor, kept or {})
        self.log: AnswerLog | None = None
        self.known: dict[str, Answer] = {}
        self.world = this_world()
        self._session: Session | None = None

    def render(self, messages: list[dict]) -> str:
        """A conversation in the chat template's own text, with the opening of the answer; for people and logs."""
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    @torch.inference_mode()
    def answer(
        self, questions: Sequence[Question], advance: Callable[[int], None] = lambda steps: None
    ) -> list[Answer]:
        """Answer every question, in order; `advance(n)` is called whenever n more are done."""
        prompts = self._tokens(questions)
        alike = [(self._longest(question), bool(question.images)) for question in questions]  # may share a batch
        order = self._order(questions, prompts, alike)
        name = self._name(questions) if self.log else ""
        kept = self.log.read(name) if self.log else {}
        kept |= {i: self.known[q.key] for i, q in enumerate(questions) if q.key in self.known} if self.known else {}
        answers = self.world.agreed(kept)
        advance(len(answers))

        def ask(rows: list[int]) -> list[Answer]:
            found = self._answer([questions[i] for i in rows], [prompts[i] for i in rows], alike[rows[0]][0])
            if self.log:
                self.log.add(name, rows, found)
            advance(len(rows) * self.world.size)
            return found

        def before(batches: list[list[int]]) -> None:
            self.encoder.ahead([[questions[i] for i in rows] for rows in batches])

        answers |= self._together(self._batches(order, alike), ask, answers, before)
        return [answers[i] for i in range(len(questions))]

    def _answer(self, questions: Sequence[Question], prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """One batch, from its questions and their prompts' tokens."""
        seen = self.encoder(questions)
        return self._generate([Prompt(*each) for each in zip(prompts, seen, strict=True)], new_tokens)

    def _tokens(self, questions: Sequence[Question]) -> list[list[int]]:
        """Token ids of every prompt, as training has them, visual tokens included."""
        sizes = [self.encoder.sizes(question) for question in questions]
        for question in questions:
            places = sum(part.type == "image" for message in question.prompt for part in message.content)
            if places != len(question.images):
                raise Unaskable(
                    f"question {question.id}: its prompt has {places} places for {len(question.images)} images",
                    question.id,
                    f"makes a prompt with {places} places for {len(question.images)} images",
                )
        laid = [(question.prompt, tuple(own)) for question, own in zip(questions, sizes, strict=True)]
        apart = list(dict.fromkeys(laid))  # the same is asked of many images
        written = dict(zip(apart, self.tokeniser.prompts(apart), strict=True))
        prompts = [written[each] for each in laid]
        for question, ids, own in zip(questions, prompts, sizes, strict=True):
            if ids.count(self.image) != sum(self.tokeniser.visual_tokens(*size) for size in own):
                reason = "spells the model's image token, which its tokenizer of whole words takes for an image"
                raise Unaskable(f"question {question.id} {reason}; leave it out", question.id, reason)
        return prompts

    def _order(
        self, questions: Sequence[Question], prompts: Sequence[Sequence[int]], alike: Sequence[Any]
    ) -> list[int]:
        """Numbers of the questions: those alike together, about the same images together, then by length."""
        groups: dict[Any, list[int]] = {}
        for i, question in enumerate(questions):
            groups.setdefault((alike[i], question.digests or i), []).append(i)
        length = {i: len(prompt) for i, prompt in enumerate(prompts)}
        ordered = sorted(groups.values(), key=lambda rows: (alike[rows[0]], max(length[i] for i in rows), rows[0]))
        return [i for rows in ordered for i in sorted(rows, key=lambda i: (length[i], i))]

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
        self,
        batches: list[list[int]],
        work: Callable[[list[int]], list],
        done: Mapping[int, Any],
        before: Callable[[list[list[int]]], None] = lambda batches: None,
    ) -> dict[int, Any]:
        """What `work` makes of each batch, by number; batches that are done are left out, others shared.

        `before` is told what this process will work at.
        """
        mine, failed = {}, None
        try:
            dealt = list(self.world.dealt([rows for rows in batches if any(i not in done for i in rows)]))
            before(dealt)
            for rows in dealt:
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

    def _generate(self, prompts: list[Prompt], new_tokens: int) -> list[Answer]:
        """Greedy decoding of one batch."""
        asked = len(prompts)
        session = self._room(asked, max(len(prompt.ids) for prompt in prompts) + new_tokens)
        prompts = prompts + prompts[-1:] * (session.batch - asked)
        logp = read(session, prompts).log_softmax(-1)  # [rows, vocab]
        entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1)
        tokens, logprob = [], torch.zeros_like(session.logprob)
        alive = torch.ones_like(logprob, dtype=torch.bool)
        every = CHECK_EVERY.get(session.device.type, 1)
        for step, chosen in enumerate(follow(session, new_tokens)):
            logprob += torch.where(alive, session.logprob, 0.0)
            tokens.append(torch.where(alive, chosen, self.pad))
            alive &= ~torch.isin(chosen, self.ends)
            if (step + 1) % every == 0 and not alive.any():
                break
        return self._answers(torch.stack(tokens, 1)[:asked], logprob[:asked], entropy[:asked])

    def _room(self, rows: int, length: int) -> Session:
        """A session for at least `rows` sequences of `length` tokens; on a GPU, where making one takes long, kept."""
        if self.model.device.type != "cuda":
            return Session(self.model, rows, length, scored=True)
        kept = self._session
        if kept is None or kept.batch < rows or not length <= kept.length <= 2 * length:
            self._session = None  # its memory goes before the next takes its own
            del kept
            length = -(-length // SLOTS) * SLOTS
            self._session = kept = Session(self.model, rows, length, compile=False, scored=True)
        return kept

    def _answers(self, tokens: torch.Tensor, logprob: torch.Tensor, entropy: torch.Tensor) -> list[Answer]:
        texts = self.tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)
        values = zip(texts, logprob.tolist(), entropy.tolist(), strict=True)
        return [Answer(text.strip(), *numbers) for text, *numbers in values]

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For (context, continuation) token ids: log-probability (nats) of the continuation,
        and whether it is greedy.
        """
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
