"""For torchrun: gradients of a model in every way of sharding, beside those of the whole one; JSON from the first."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import make_llava

from grace.distributed import Sharding, join_world, keep_gathered, shard, whole
from grace.models import decoder


def gradients(model, micro_batches: list[torch.Tensor], kept: bool = False) -> list[torch.Tensor]:
    for left, ids in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
        keep_gathered(model, kept and left > 0)
        model.model(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
    return [whole(p.grad) for p in decoder(model).layers.parameters()]


def main() -> None:
    world = join_world()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 60, (1, 12), generator=generator) for _ in range(2 * world.size)]
    expected = gradients(make_llava(layers=3), ids)
    found = []
    for way in (Sharding("layer"), Sharding("pass"), Sharding("step"), Sharding("step", False, 2)):
        model = make_llava(layers=3)
        shard(model, world, way)
        own = gradients(model, ids[world.rank :: world.size], way.gathered == "step")
        layers = list(decoder(model).layers)
        states = [layer._get_fsdp_state() for layer in layers]
        found.append({
            "way": repr(way),
            "apart": max(float((a - b).norm() / b.norm()) for a, b in zip(own, expected, strict=True)),
            "roots": sum(bool(state._is_root) for state in states),
            "streams": len({id(state._comm_ctx) for state in states}),
            "sharded": all(len(p.to_local()) < len(p) for layer in layers for p in layer.parameters()),
        })  # fmt: skip
    if world.first:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


main()
