"""Decoding side by side: teacher, bf16 student and packed student, in one run and through one runner.

Every model answers the same question about the same image; rounds go over the models in turn. On a GPU, a packed
model is measured twice: with keys and values in 16 bits, as bf16 models have them, and in 8. What is reported:

- cache: bits of keys and values;
- prefill_ms: median time from the processor's output to the first token, vision tower included;
- tokens_per_second: batch size over the median time of one decoding step, all steps after the first token;
- weight_mib: parameters and buffers of the whole model;
- peak_mib: the weights and the most that anything else holds at once (cache, activations), by the GPU's allocator on
  CUDA and by adding up live tensors on a CPU.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from grace.bench import machine
from grace.bench.memory import peak_bytes, weight_bytes
from grace.infer.decode import Session, stream, takes_fused_step
from grace.infer.load import load_for_inference, packed_bits
from grace.infer.prompt import build_prompts
from grace.models import load_processor, model_folder
from grace.progress import progress

QUESTION = "what is shown in the image"
IMAGE = 336  # side in pixels, LLaVA-1.5's; the processor resizes it to what the model takes
MIB = 2**20


def bench_decode(
    folders: Sequence[Path], batches: Sequence[int], new_tokens: int, repeats: int, device: torch.device, seed: int = 0
) -> list[dict[str, Any]]:
    """Measure every folder at every batch size; return the rows of decode.csv.

    All models are held in memory together, which keeps the rounds interleaved.
    """
    runs = [_Run(model, bits) for model in (_Model(folder, device) for folder in folders) for bits in model.caches]
    noise = np.random.default_rng(seed).integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    table = []
    with progress("decoding benchmark", len(batches) * len(runs) * (repeats + 1)) as advance:
        for batch in batches:
            for run in runs:
                run.prepare(image, batch, new_tokens)
                advance(note=f"{run.model.name}, batch {batch}")
            for _ in range(repeats):
                for run in runs:
                    run.measure(new_tokens)
                    advance(note=f"{run.model.name}, batch {batch}")
            table += [run.row(batch, new_tokens) for run in runs]
    return table


class _Model:
    """One folder in the benchmark, loaded."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.name, self.device = model_name(folder), device
        bits = packed_bits(model_folder(folder), folder)
        self.precision = f"int{bits}" if bits == 4 else "bf16"
        self.network = load_for_inference(folder, dtype=torch.bfloat16, device=str(device))
        self.processor = load_processor(folder)
        self.weights = weight_bytes(self.network)
        self.caches = (16, 8) if bits == 4 and takes_fused_step(self.network) else (16,)


class _Run:
    """A model with one kind of cache: the session of the current batch size and its measurements."""

    def __init__(self, model: _Model, cache_bits: int) -> None:
        self.model, self.cache_bits, self.device = model, cache_bits, model.device

    def prepare(self, image: Image.Image, batch: int, new_tokens: int) -> None:
        """Make the session of one batch size, warm it up, and account for its memory."""
        self.session: Session | None = None  # frees the last batch size's cache first
        self.prefill, self.step = [], []
        self.inputs = build_prompts(self.model.processor, [(image, QUESTION)] * batch)
        length = self.inputs["input_ids"].shape[1] + new_tokens

        def work() -> None:
            self.session = Session(self.model.network, batch, length, cache_bits=self.cache_bits)
            for _ in stream(self.session, self.inputs, 3, stop=False):
                pass

        self.peak = self.model.weights + peak_bytes(work, self.device)

    @torch.inference_mode()
    def measure(self, new_tokens: int) -> None:
        """One prefill and `new_tokens` - 1 steps."""
        session = self.session
        assert session is not None, "prepare makes the session"
        start = self._now()
        session.prefill(self.inputs)
        first = self._now()
        for _ in range(new_tokens - 1):
            session.step()
        self.prefill.append(first - start)
        self.step.append((self._now() - first) / max(new_tokens - 1, 1))

    def row(self, batch: int, new_tokens: int) -> dict[str, Any]:
        step = statistics.median(self.step)
        return {
            "model": self.model.name,
            "precision": self.model.precision,
            "device": machine.device_name(self.device),
            "batch": batch,
            "cache": self.cache_bits,
            "prompt_tokens": self.inputs["input_ids"].shape[1],
            "new_tokens": new_tokens,
            "prefill_ms": statistics.median(self.prefill) * 1e3,
            "tokens_per_second": batch / step if new_tokens > 1 else float("nan"),
            "weight_mib": self.model.weights / MIB,
            "peak_mib": self.peak / MIB,
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def model_name(folder: Path) -> str:
    """`.../students/grace/int4/seed0/packed` -> `grace/int4/seed0`; `.../teacher/model` -> `teacher`."""
    parts = Path(folder).resolve().parts
    if "students" in parts:
        after = parts[len(parts) - parts[::-1].index("students") :]
        return "/".join(after[:-1]) or after[-1]
    last = parts[-1]
    return parts[-2] if last in ("model", "packed") and len(parts) > 1 else last
