"""The demo's vision tower: a small SigLIP encoder, trained once on what each cell of an image shows, and shipped.

Real vision-language models start from a pretrained tower; this is the demo's. It is transformers' `SiglipVisionModel`
(96 x 96 pixels, one token per 32 x 32 cell), so that models built on it load anywhere. It sees images composed of
the TRAIN split's sources alone. Linear heads on the features that LLaVA reads (the last layer's output, before the
closing norm) name each cell's object, colour, sharpness and place; they are thrown away after training.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from grace.demo.images import CELL, SIDE, Scene, Thing, degrade, draw_scene, generator, render
from grace.demo.sources import Sources, load_sources
from grace.demo.vocabulary import COLOURS, GARMENTS, KINDS
from grace.files import whole_file, whole_folder
from grace.progress import progress

SHIPPED = Path(__file__).parent / "data" / "tower"
CELLS = (SIDE // CELL) ** 2
TARGETS = {"kind": 1 + len(KINDS), "colour": 1 + len(COLOURS), "sharpness": 3, "cell": CELLS}
"""What the heads predict for each cell, and of how many classes; class 0 of the first three is an empty cell."""

IGNORED = -100
_BATCH, _PEAK_RATE, _WEIGHT_DECAY, _WARMUP = 64, 1.5e-3, 0.05, 300
_CHECKPOINT_EVERY = 500
_PLACE_STD = 3.0


def tower_config() -> SiglipVisionConfig:
    """The tower's shape: 1.6 million weights."""
    return SiglipVisionConfig(
        hidden_size=160,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=5,
        image_size=SIDE,
        patch_size=CELL,
        vision_use_head=False,
        hidden_act="gelu_pytorch_tanh",
    )


def cell_targets(scene: Scene) -> dict[str, np.ndarray]:
    """What each cell shows: `TARGETS` name -> int64 [9]. What an unreadable object is, is not asked."""
    targets = {name: np.zeros(CELLS, np.int64) for name in TARGETS}
    targets["cell"] = np.arange(CELLS)
    for thing in scene.things:
        targets["kind"][thing.cell] = 1 + thing.kind if thing.readable else IGNORED
        targets["colour"][thing.cell] = 1 + thing.colour
        targets["sharpness"][thing.cell] = 1 if thing.readable else 2
    return targets


def _draw(rng: np.random.Generator, sources: Sources) -> Scene:
    # Mostly packed grids of unrelated objects, which teach more per image; the rest as the questions' images are.
    if rng.random() < 0.3:
        return draw_scene(rng, str(rng.choice(["garments", "text", "degraded"])), sources)
    things = []
    for cell in np.flatnonzero(rng.random(CELLS) < 0.9):
        digit = rng.random() < 0.3
        kind = int(rng.integers(len(GARMENTS), len(KINDS)) if digit else rng.integers(len(GARMENTS)))
        things.append(
            Thing(kind, int(rng.integers(len(COLOURS))), int(cell), int(rng.integers(len(sources.crops[kind]))))
        )
    scene = Scene(tuple(things), noise=float(rng.uniform(2, 14)))
    return degrade(rng, scene) if rng.random() < 0.15 else scene


def _batch(
    seed: int, split: str, step: int, size: int, sources: Sources
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    # pixels float32 [size, 3, 96, 96] in [-1, 1]; targets int64 [size * 9]
    images, targets = [], []
    for index in range(step * size, (step + 1) * size):
        rng = generator(seed, split, "tower", index)
        scene = _draw(rng, sources)
        images.append(render(rng, scene, sources))
        targets.append(cell_targets(scene))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, {name: torch.from_numpy(np.concatenate([t[name] for t in targets])) for name in TARGETS}


class CellClassifier(nn.Module):
    """The tower with its throw-away heads."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(tower_config())
        # The residual stream carries the place's embedding to the output, as large there as what the cell shows.
        # With transformers' small one, decoders made from scratch hardly learned where things are.
        nn.init.normal_(self.tower.embeddings.position_embedding.weight, std=_PLACE_STD)
        width = self.tower.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in TARGETS.items()})

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each target, [batch * 9, classes], from pixels [batch, 3, 96, 96]."""
        features = self.tower(pixels, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
        return {name: head(features) for name, head in self.heads.items()}


def _loss(logits: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = {name: nn.functional.cross_entropy(logits[name], targets[name], ignore_index=IGNORED) for name in TARGETS}
    return parts["kind"] + 0.5 * parts["colour"] + 0.3 * parts["sharpness"] + 0.1 * parts["cell"]


@torch.no_grad()
def cell_accuracy(model: CellClassifier, split: str, seed: int, images: int = 640) -> dict[str, float]:
    """Share of cells named rightly on images of a split: garments, digits, empty cells, colours, sharpness."""
    model.eval()
    right: dict[str, list[torch.Tensor]] = {name: [] for name in ("garment", "digit", "empty", "colour", "sharpness")}
    for step in range(images // _BATCH):
        pixels, targets = _batch(seed, split, step, _BATCH, load_sources(split))
        guess = {name: logits.argmax(-1) for name, logits in model(pixels).items()}
        kind = targets["kind"]
        of_kind = {"garment": (kind > 0) & (kind <= len(GARMENTS)), "digit": kind > len(GARMENTS), "empty": kind == 0}
        for name, chosen in of_kind.items():
            right[name].append((guess["kind"] == kind)[chosen])
        for name in ("colour", "sharpness"):
            right[name].append((guess[name] == targets[name])[targets["colour"] > 0])
    model.train()
    return {name: round(torch.cat(parts).float().mean().item(), 4) for name, parts in right.items()}


def tower(out: Path, steps: int = 6000, seed: int = 0) -> dict[str, float]:
    """Train the tower and write it to `out` as a transformers folder in bf16; return its held-out accuracies.

    A killed run continues from its last checkpoint, kept beside `out` until the folder is written; images are a
    function of (seed, step), so that the result is the same.
    """
    torch.manual_seed(seed)
    model, sources = CellClassifier(), load_sources("train")
    optimiser = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY)
    checkpoint = out.with_name(f".{out.name}-{steps}-{seed}.checkpoint.pt")
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    with progress("vision tower", steps) as advance:
        advance(first)
        for step in range(first, steps):
            warm, done = min(1.0, (step + 1) / min(_WARMUP, steps)), step / steps
            for group in optimiser.param_groups:
                group["lr"] = _PEAK_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            pixels, targets = _batch(seed, "train", step, _BATCH, sources)
            loss = _loss(model(pixels), targets)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if (step + 1) % _CHECKPOINT_EVERY == 0:
                with whole_file(checkpoint) as part:
                    torch.save(
                        {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}, part
                    )
            advance(1, f"loss {loss.item():.3f}")
    accuracy = cell_accuracy(model, "development", seed)
    with whole_folder(out, steps=steps, seed=seed, held_out_accuracy=accuracy) as folder:
        tower: Any = model.tower  # transformers' decorator hides the signature of `to`
        tower.to(torch.bfloat16).save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    return accuracy
