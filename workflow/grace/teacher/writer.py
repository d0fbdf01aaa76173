"""`grace cache write`: one shard of the cache, which is one pass of the teacher over its share of the conversations."""

import hashlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from grace import __version__
from grace.config.job_parameters import CacheRun, read_run
from grace.data import Example, load_prepared
from grace.data.batches import image_runs
from grace.data.packed import prepare_packed
from grace.data.prepared import Chosen
from grace.distill.gated_dkd import entropy_gate
from grace.errors import GraceError
from grace.families import check_family
from grace.models import head_weight, image_token_id, load_model, load_processor, output_head, vocabulary
from grace.progress import progress
from grace.teacher.formats import encode_int8
from grace.teacher.forward import Seen, check_examples, check_sight, see
from grace.teacher.identity import run_pins
from grace.teacher.manifest import read_sidecar
from grace.teacher.sampled import SampledRecord, encode_sampled, entry_counts
from grace.teacher.shard import ShardBuilder, damage, shard_name, shard_range, write_shard

LOGITS_AT_ONCE = 2**26  # elements of the [tokens, vocab] logits held at a time
MOST_AUDITED = 1024  # records of a cache: of 8 MB each with states 5,120 wide


def write(run: Path, teacher: Path, data: Path, out: Path, shard: int | None = None) -> None:
    """Write the shard `shard` of a cache, or every shard, unless it is there and whole.

    A shard counts as whole when its file has the checksum in its sidecar and the sidecar's pins are this run's.

    Args:
        run: a frozen `CacheRun`.
        teacher: the teacher's model folder.
        data: the data folder.
        out: the cache's folder, shared by the jobs of all shards.
        shard: from 0; None writes all that are missing or damaged, in order.
    """
    parameters = read_run(run, CacheRun)
    pins = run_pins(parameters, teacher, data)
    shards = parameters.cache.shards
    wanted = range(shards) if shard is None else [shard]
    examples = load_prepared(data)
    # Captions only teach a model made from scratch to see; nobody distils from them.
    asked = np.flatnonzero(~examples.captions)
    slices = {number: shard_range(len(asked), number, shards) for number in wanted}
    missing = [number for number in wanted if not _is_whole(out, shard_name(number, shards), pins)]
    for number in sorted(set(wanted) - set(missing)):
        print(f"{out / shard_name(number, shards)}.safetensors: already whole", file=sys.stderr)
    if not missing:
        return
    check_family(teacher, parameters.family)
    processor = load_processor(data / "processor")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(teacher, getattr(torch, parameters.compute_dtype), device)
    head, size = output_head(model), vocabulary(processor)
    if head.bias is not None:
        raise GraceError(f"{teacher}: its vocabulary projection has a bias, which a cache does not hold")
    if parameters.cache.format == "sampled":
        entry_counts(size)
    if parameters.cache.pass_tokens is not None:
        prepare_packed(model, 0.0, torch.device(device))
    for number in missing:
        part = Chosen(examples, asked[slices[number].start : slices[number].stop])
        check_examples(part, model, size)
        check_sight(model, processor, part, parameters.cache.pass_tokens)
        tensors = record(model, processor, part, parameters, f"teacher cache {number + 1}/{shards}", out)
        write_shard(
            out,
            shard_name(number, shards),
            tensors,
            pins=pins,
            conversations=len(asked),
            first=slices[number].start,
            last=slices[number].stop,
            vocabulary=size,
            width=head.weight.shape[1],
            libraries=libraries(),
        )


def libraries() -> dict[str, str]:
    """Versions of what the teacher's numbers depend on."""
    found = {name: version(name) for name in ("safetensors", "tokenizers", "torch", "transformers")}
    return {"grace-pipeline": __version__, **found}


def _is_whole(out: Path, name: str, pins: dict) -> bool:
    sidecar = read_sidecar(out, name)
    return sidecar is not None and sidecar["pins"] == pins and damage(out, sidecar) is None


@torch.inference_mode()
def record(
    model: nn.Module, processor, examples: Sequence[Example], run: CacheRun, title: str, scratch: Path | None = None
) -> dict[str, torch.Tensor]:
    """Run the teacher over `examples` and return the tensors of their shard; equal records are kept once.

    What is large lies in nameless files below `scratch`, if given.
    """
    examples = Chosen(examples, np.array(list({e.key: number for number, e in enumerate(examples)}.values()), int))
    builder = ShardBuilder([e.key for e in examples], [e.supervised_tokens() for e in examples], scratch)
    most = max(1, MOST_AUDITED // run.cache.shards)
    audited = audited_records([e.key for e in examples], run.cache.audit, most)
    weight, image = head_weight(model, vocabulary(processor)).float(), image_token_id(model)
    with progress(title, len(examples)) as advance:
        for index, seen in see(model, processor, examples, run.cache.pass_tokens):
            example = examples[index]
            tensors = _encode(seen, example, weight, run)
            builder.put(index, **{name: tensor.cpu() for name, tensor in tensors.items()})
            matrices = seen.grams()
            if not all(torch.isfinite(matrix).all() for matrix in matrices):
                raise GraceError(
                    f"conversation {example.id}: the teacher's states are NaN or infinite; check the teacher"
                )
            builder.put_grams(index, image_identities(example, image), matrices)
            if index in audited:
                builder.put_audit(index, seen.labels, seen.states, matrices)
            advance(1)
    return builder.finished()


def audited_records(keys: Sequence[str], share: float, most: int = 2**31) -> set[int]:
    """Indices of the records kept in full precision: `share` of them, at least one unless `share` is 0, and at most
    `most`.

    Keys are hashes, so the smallest are a random sample, and the same one whenever a shard is written again.
    """
    count = min(most, -int(-share * len(keys) // 1))
    return set(sorted(range(len(keys)), key=keys.__getitem__)[:count])


def image_identities(example: Example, image: int) -> list[str]:
    """Per image; conversations that share one share that image's states, for attention is causal."""
    shown = (example.input_ids == image).nonzero().flatten()
    ends = torch.tensor(image_runs(example.input_ids, image), dtype=torch.int64).cumsum(0)
    found = []
    for number, end in enumerate(ends.tolist(), 1):
        prefix = example.input_ids[: int(shown[end - 1]) + 1].to(torch.int32).numpy().tobytes()
        images = b"".join(bytes.fromhex(i.sha256) for i in example.images[:number])
        found.append(hashlib.sha256(prefix + images).hexdigest())
    return found


def _encode(seen: Seen, example: Example, weight: torch.Tensor, run: CacheRun) -> dict[str, torch.Tensor]:
    """The per-token tensors of one record, in the run's format; `weight` is the head's, fp32 [vocab, d].

    Logits are made in fp32: a teacher in bf16 rounds its own, by more than separates a student close to it.
    """
    rows = max(1, LOGITS_AT_ONCE // len(weight))
    chunks = seen.states.split(rows)

    def logits(states: torch.Tensor) -> torch.Tensor:
        values = states.float() @ weight.T
        if not torch.isfinite(values).all():
            raise GraceError(f"conversation {example.id}: the teacher's logits are NaN or infinite; check the teacher")
        return values

    if run.cache.format == "sampled":
        generator = torch.Generator().manual_seed((int(example.key[:15], 16) + run.seed) % 2**63)
        uniforms = torch.rand(len(seen.states), dtype=torch.float64, generator=generator)
        parts = zip(chunks, seen.labels.split(rows), uniforms.split(rows), strict=True)
        records = [encode_sampled(logits(chunk), labels, run.temperature, u) for chunk, labels, u in parts]
        return SampledRecord.cat(records).tensors()
    gates = {"gates": torch.cat([entropy_gate(logits(chunk)) for chunk in chunks])}
    if run.cache.format == "hidden-int8":
        codes, scales = encode_int8(seen.states)
        return {**gates, "hidden.codes": codes, "hidden.scales": scales}
    return {**gates, "hidden": seen.states.to(torch.bfloat16)}
