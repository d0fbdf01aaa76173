"""How far each cache format moves the batch loss, with a real language model's head and its own roundings as students.

    python tests/benchmarks/cache_formats.py --model FOLDER [--gguf FILE] --text README.md docs/*.md --out formats.json

The teacher is a causal language model of transformers, in fp32 on the CPU; records are windows of the given text, all
of them audited. Students are the same model with its decoder rounded to 4 and to 8 bits: one some way off its teacher
and one close to it. What is measured, and its standard error, is `grace.teacher.audit`, as in every run.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace.bench.machine import describe
from grace.distill.gated_dkd import entropy_gate
from grace.files import file_entry, read_json
from grace.quant.grid import best_scales, dequantize, quantize
from grace.teacher.audit import audit
from grace.teacher.finalize import _write_audit
from grace.teacher.formats import encode_int8
from grace.teacher.index import INDEX_FILE, write_index
from grace.teacher.reader import AUDIT_FILE, HEAD_FILE, TeacherCache
from grace.teacher.sampled import encode_sampled
from grace.teacher.shard import ShardBuilder, shard_name, write_shard

FORMATS, TEMPERATURE, GROUP = ("hidden", "hidden-int8", "sampled"), 2.0, 64


@torch.inference_mode()
def states_of(model, windows: torch.Tensor) -> list[torch.Tensor]:
    """The last hidden states [tokens, d] of each window, at the positions that have a next token."""
    return [model.model(window[None]).last_hidden_state[0, :-1].float() for window in windows]


@torch.no_grad()
def rounded(model, bits: int) -> None:
    """Round the decoder's linears in place."""
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            scales = best_scales(module.weight, bits, GROUP)
            module.weight.copy_(dequantize(quantize(module.weight, scales, bits), scales))


def write_cache(
    folder: Path, form: str, keys: list[str], states: list[torch.Tensor], labels: list[torch.Tensor], head: torch.Tensor
) -> TeacherCache:
    """A cache of these records in one format, every record audited."""
    builder = ShardBuilder(keys, [len(part) for part in labels])
    for index, (state, asked) in enumerate(zip(states, labels, strict=True)):
        logits = state @ head.T
        if form == "sampled":
            uniforms = torch.rand(len(asked), dtype=torch.float64, generator=torch.Generator().manual_seed(index))
            tensors = encode_sampled(logits, asked, TEMPERATURE, uniforms).tensors()
        elif form == "hidden-int8":
            tensors = dict(zip(("hidden.codes", "hidden.scales"), encode_int8(state), strict=True))
        else:
            tensors = {"hidden": state.bfloat16()}
        builder.put(index, **({"gates": entropy_gate(logits)} | tensors))
        builder.put_grams(index, [keys[index]], [torch.eye(2)])
        builder.put_audit(index, asked, state, [torch.eye(2)])
    name = shard_name(0, 1)
    write_shard(folder, name, builder.finished(), pins={})
    entry = read_json(folder / f"{name}.json")
    save_file({"weight": head}, folder / HEAD_FILE)
    _write_audit(folder, [entry])
    write_index(folder, [entry])
    files = {name: file_entry(folder / name) for name in (HEAD_FILE, AUDIT_FILE, INDEX_FILE)}
    return TeacherCache(folder, dict(
        format=form, vocabulary=len(head), width=head.shape[1], temperature=TEMPERATURE if form == "sampled" else None,
        records=len(keys), supervised_tokens=sum(map(len, labels)), shards=[entry], files=files,
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--gguf", help="its GGUF file, where it is one")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files to take records from")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=33, help="of each record; all but the first are supervised")
    arguments = parser.parse_args()
    more = {"gguf_file": arguments.gguf} if arguments.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **more)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, **more).eval()
    ids = torch.tensor(tokenizer("\n".join(path.read_text() for path in arguments.text))["input_ids"])
    step = len(ids) // arguments.records
    windows = torch.stack([ids[i * step :][: arguments.tokens] for i in range(arguments.records)])
    keys = [hashlib.sha256(window.numpy().tobytes()).hexdigest() for window in windows]
    labels = [window[1:] for window in windows]
    head = model.get_output_embeddings().weight.detach().float().clone()
    states = states_of(model, windows)
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    students = {}
    for bits in (4, 8):
        model.load_state_dict(original)
        rounded(model, bits)
        logits = {key: state @ head.T for key, state in zip(keys, states_of(model, windows), strict=True)}
        students[f"INT{bits}"] = lambda record, logits=logits: logits[record.key]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for form in FORMATS:
            cache = write_cache(Path(scratch) / form, form, keys, states, labels, head)
            found[form] = audit(cache, students, TEMPERATURE)["gated_dkd"]
            print(form, json.dumps(found[form], indent=2), flush=True)
    about = {"model": arguments.model.name, "vocabulary": len(head), "records": arguments.records,
             "supervised_tokens": sum(map(len, labels)), **describe(torch.device("cpu"))}  # fmt: skip
    arguments.out.write_text(json.dumps({"formats": found, "about": about}, indent=2) + "\n")


if __name__ == "__main__":
    main()
