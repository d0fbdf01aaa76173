"""`grace export`: the codes of a packed folder in the other formats of the field, each checked as it is written."""

import shutil
from pathlib import Path

import torch

from grace.errors import GraceError
from grace.files import MANIFEST, contents_hash, whole_folder
from grace.progress import progress
from grace.quant import awq_gemm, gptq_format
from grace.quant.card import ABOUT, write_card
from grace.quant.checkpoint import Checkpoint, copy_companions, copy_config, write_checkpoint
from grace.quant.packed import PackedModel

LAYOUTS = {"awq": awq_gemm, "gptq": gptq_format}
FORMATS = (*LAYOUTS, "gguf")


def _write_layout(model: PackedModel, folder: Path, layout) -> None:
    """Write an AWQ or GPTQ checkpoint and hold every layer read back from it against the codes."""
    settings = layout.config(model)
    origin, specs = {}, [model.tensors.spec(key) for key in model.kept]
    for key in model.linears:
        for spec in layout.specs(model, key):
            origin[spec.name] = key
            specs.append(spec)

    def produce(name: str) -> torch.Tensor:
        advance(note=name)
        return layout.tensor(model, origin[name], name.rpartition(".")[2]) if name in origin else model.tensors[name]

    with progress("exporting", len(specs)) as advance:
        write_checkpoint(folder, specs, produce)
    copy_config(model.folder, folder, dtype="float16", quantization_config=settings)
    written = Checkpoint.of_folder(folder)
    for key in model.linears:
        parts = {spec.name.rpartition(".")[2]: written[spec.name] for spec in layout.specs(model, key)}
        if not all(
            torch.equal(ours, theirs) for ours, theirs in zip(model[key], layout.read(parts, model), strict=True)
        ):
            raise GraceError(f"{folder}: {key} reads back with other codes or scales; export it again")


def _write_pair(model: PackedModel, folder: Path) -> None:
    """The language model and, beside it, its vision side: llama.cpp opens both. Refusals come before any writing."""
    try:
        from grace.quant import gguf_q4, gguf_vision
        from grace.quant.gguf_vocabulary import Vocabulary
    except ModuleNotFoundError:
        raise GraceError("the gguf package is not installed; `pip install gguf`") from None
    gguf_q4.check(model)
    gguf_vision.check(model)
    vocabulary = Vocabulary.of_folder(model.folder)
    gguf_q4.write_gguf(model, vocabulary, folder / "model-Q4_0.gguf")
    gguf_vision.write_vision(model, folder / "mmproj-BF16.gguf")


def export(packed: Path, format: str, out: Path) -> None:
    """Write the codes of a packed folder as another format.

    Args:
        packed: a compressed-tensors folder that `grace pack` made.
        format: "awq" (GEMM layout), "gptq" or "gguf" (Q4_0).
        out: the folder to make; for gguf it holds model-Q4_0.gguf and mmproj-BF16.gguf, the vision side.

    Raises:
        GraceError: the folder is not packed, or the format cannot hold its codes or scales exactly.
    """
    if format not in FORMATS:
        raise GraceError(f"--format {format}: not a format that codes are exported to; use {', '.join(FORMATS)}")
    model = PackedModel.open(packed)
    source = contents_hash(packed / MANIFEST) if (packed / MANIFEST).is_file() else None
    with whole_folder(out, source=source, format=format) as folder:
        if format == "gguf":
            _write_pair(model, folder)
        else:
            _write_layout(model, folder, LAYOUTS[format])
            copy_companions(packed, folder)
        if (packed / ABOUT).is_file():  # folders packed by earlier versions lack it
            shutil.copyfile(packed / ABOUT, folder / ABOUT)
            write_card(folder)
