"""Greedy decoding in batches over a static cache, the same for bf16 and packed models, on a CPU or a GPU.

Everything that a step reads and writes has a fixed place (cache, token, position), so that on a CUDA device the step
is captured once in a graph and replayed; on a CPU the very same function runs as it is. On CUDA, decoders that
`llama_step` knows take its fused step; the others run transformers' own layers, compiled.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from grace.errors import GraceError
from grace.families import family_of
from grace.families.files import end_tokens
from grace.infer.cache import make_cache
from grace.models import decoder, output_head

CHECK_EVERY = {"cpu": 1, "cuda": 8}  # steps between looks at whether all rows are done: a look stalls a GPU


class Session:
    """A model with room for `batch` sequences of `length` tokens, prompt and answer together.

    Args:
        model: from `load_for_inference`.
        batch: sequences decoded together.
        length: slots of the static cache per sequence.
        fused: whether to take the hand-fused step; None takes it on CUDA where the decoder is known to it.
        compile: on CUDA and without the fused step, whether to compile the step before capturing it.
        cache_bits: 16 keeps keys and values in the model's dtype; 8 as int8 codes, which the fused step alone reads.
        scored: whether each step also writes its tokens' log-probabilities.
        unmeasured: whether the fused step may take kernels that no GPU has run yet, to check and to time them.

    Attributes:
        logprob: fp32 [batch], the log-probability of the last token (nats), where `scored`.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        fused: bool | None = None,
        compile: bool = True,
        cache_bits: int = 16,
        scored: bool = False,
        unmeasured: bool = False,
    ) -> None:
        self.model, self.family, self.batch, self.length = model, family_of(model), batch, length
        self.decoder, self.head = decoder(model), output_head(model)
        self.embed = model.get_input_embeddings()
        self.device, self.dtype = self.embed.weight.device, self.embed.weight.dtype
        self.ends = end_tokens(model.generation_config.eos_token_id)
        fused = takes_fused_step(model) if fused is None else fused
        if cache_bits != 16 and (cache_bits != 8 or not fused):
            raise GraceError(
                f"a cache of {cache_bits} bits: keys and values are kept in 16 bits, or, on a CUDA GPU and for "
                f"the decoders of LLaVA, Qwen2-VL and Qwen3-VL, in 8; use 16"
            )
        self.cache_bits = cache_bits
        with self._memory():
            self.cache = make_cache(model.config, batch, length, cache_bits, self.dtype, self.device)
        place = {"device": self.device, "dtype": torch.int64}
        self.slots = torch.arange(length, **place)
        self.token = torch.zeros(batch, 1, **place)
        self.position = torch.zeros(batch, **place)
        self.slot = torch.zeros((), **place)  # where the next key and value go
        self.first = torch.zeros(batch, **place)  # the first slot that is not padding
        self.logprob = torch.zeros(batch, device=self.device)
        self.scored = scored
        self.filled = 0  # what `slot` says, known without asking the device
        self.graph, step = None, self._step
        if fused:
            from grace.infer import llama_step  # here, because it imports triton

            self._step = step = llama_step.LlamaStep(
                self.decoder, self.embed, self.head, self.cache, self.token, self.position, self.slot, self.first,
                self.logprob if scored else None, unmeasured,
            )  # fmt: skip
        elif compile and self.device.type == "cuda":
            step = torch.compile(self._step, dynamic=False)
        if self.device.type == "cuda":
            with self._memory():
                self.graph = self._capture(step)

    def prefill(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Read the prompts; return the first token of every answer, int64 [batch].

        Args:
            inputs: what the processor returns (left-padded `input_ids` and `attention_mask` [batch, tokens],
                `pixel_values`, for Qwen also `image_grid_thw` and `mm_token_type_ids`).
        """
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        mask = inputs.pop("attention_mask").bool()
        batch, tokens = mask.shape
        if batch != self.batch or tokens >= self.length:
            raise GraceError(
                f"a session for {self.batch} sequences of {self.length} tokens got {batch} prompts of {tokens} tokens; "
                f"make a larger session"
            )
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise GraceError("prompts padded on the right; pad them on the left (the tokenizer's `padding_side`)")
        self._reset()
        positions = self.family.positions(self.model, inputs["input_ids"], mask.long(), inputs)
        self.first.copy_(mask.long().argmax(1))
        slots = self.slots[:tokens] if self.cache_bits == 8 else self.slots  # 8 bits: a prompt sees itself, exactly
        seen = self.slots[:tokens].unsqueeze(1) >= slots  # [tokens, slots]: causal
        seen = seen & (slots >= self.first.unsqueeze(1)).unsqueeze(1) | (self.slots[:tokens].unsqueeze(1) == slots)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        with self._memory():
            output = self.model(
                **inputs,
                attention_mask=seen.unsqueeze(1),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.token.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        self.position.copy_(positions.amax(dim=(0, 2) if positions.dim() == 3 else 1) + 1)
        self.slot.fill_(tokens)
        self.filled = tokens
        return self.token[:, 0].clone()

    def step(self) -> torch.Tensor:
        """Decode one more token of every sequence, int64 [batch]."""
        if self.filled >= self.length:
            raise GraceError(f"all {self.length} slots of the session are full; make a larger session")
        self.filled += 1
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.token[:, 0].clone()

    def _step(self) -> None:
        seen = (self.slots >= self.first.unsqueeze(1)) & (self.slots <= self.slot)  # [batch, length]
        position = self.position.unsqueeze(1)
        if _has_grid_positions(self.model):
            position = position.expand(3, -1, -1)  # time, height and width agree on every token after the prompt
        hidden = self.decoder(
            inputs_embeds=self.embed(self.token),
            attention_mask=seen[:, None, None, :],
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        logits = self.head(hidden[:, -1])
        if self.scored:
            self.logprob.copy_(best_logprob(logits))
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        self.slot.add_(1)

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Say what to do where the GPU has no memory left."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            raise GraceError(
                f"no memory left on {self.device} for {self.batch} sequences of {self.length} tokens; "
                f"decode fewer at once, or use a packed model"
            ) from error

    def _reset(self) -> None:
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.zero_()  # old keys need no erasing: the mask hides what a prompt has not written
        self.slot.zero_()
        self.first.zero_()

    def _capture(self, step) -> torch.cuda.CUDAGraph:
        """Warm up (compile, tune, allocate) on a side stream, then capture one step."""
        with torch.inference_mode():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._reset()
                    step()
            torch.cuda.current_stream().wait_stream(side)
            self._reset()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            return graph


@torch.inference_mode()
def stream(
    session: Session, inputs: Mapping[str, torch.Tensor], new_tokens: int, stop: bool = True
) -> Iterator[torch.Tensor]:
    """Yield int64 [batch] tokens, one per sequence, until every sequence has ended or `new_tokens` are out.

    A sequence that has ended goes on with its end token. `stop=False` never ends early, for timing.
    """
    if inputs["input_ids"].shape[1] + new_tokens > session.length:
        raise GraceError(
            f"{inputs['input_ids'].shape[1]} prompt tokens and {new_tokens} new ones do not fit a session of "
            f"{session.length}; make a larger session"
        )
    token = session.prefill(inputs)
    ends = torch.tensor(session.ends, device=session.device, dtype=torch.int64)
    done = torch.zeros_like(token, dtype=torch.bool)
    every = CHECK_EVERY.get(session.device.type, 1)
    for index in range(new_tokens):
        if index:
            token = session.step()
        if stop and len(ends):
            token = torch.where(done, ends[0], token)
            done |= torch.isin(token, ends)
        yield token
        if stop and (index + 1) % every == 0 and bool(done.all()):
            return


def generate(model: nn.Module, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
    """Answer left-padded prompts greedily; int64 [batch, at most new_tokens], ended rows filled with the end token."""
    batch, tokens = inputs["input_ids"].shape
    session = Session(model, batch, tokens + new_tokens)
    return torch.stack(list(stream(session, inputs, new_tokens)), dim=1)


def takes_fused_step(model: Any) -> bool:
    """Whether a `Session` of this model, on its device, takes the hand-fused step: it alone reads an 8-bit cache."""
    if model.get_input_embeddings().weight.device.type != "cuda":
        return False
    from grace.infer import llama_step  # here, because it imports triton

    return llama_step.knows(decoder(model))


def best_logprob(logits: torch.Tensor) -> torch.Tensor:
    """Log-probability (nats) of the most likely token: fp32 [batch] from logits [batch, vocab]."""
    logits = logits.float()
    return logits.amax(-1) - logits.logsumexp(-1)


def _has_grid_positions(model: Any) -> bool:
    """Whether positions have time, height and width, as in Qwen2-VL and Qwen3-VL."""
    return hasattr(model.model, "get_rope_index")
