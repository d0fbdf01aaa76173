"""A data set in LLaVA's own format (such as mix665k) as an experiment's data folder."""

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grace.config.schema import LlavaData
from grace.data.conversations import SCHEMA, Conversation, as_row, asked_and_answered
from grace.data.images import EncodedImage
from grace.data.prepared import prepare_examples
from grace.errors import GraceError
from grace.files import whole_folder
from grace.progress import progress

ROWS_PER_GROUP = 4096
ROW = SCHEMA.append(pa.field("sources", pa.list_(pa.string())))


def _turns(entry: dict, where: str) -> list[tuple[str, str]]:
    """LLaVA's alternating human and gpt messages as question-answer pairs, without the image's placeholder."""
    said = entry.get("conversations")
    if not said or len(said) % 2 or any(m["from"] != ("human", "gpt")[i % 2] for i, m in enumerate(said)):
        raise GraceError(f"{where}: `conversations` must alternate human and gpt and end with gpt; mend or drop it")
    values = [message["value"].replace("<image>", "").strip() for message in said]
    return list(zip(values[::2], values[1::2], strict=True))


def prepare_llava(data: LlavaData, processor: Path, benchmarks: Path | None, out: Path) -> None:
    """Write `out` (train.parquet, processor/, benchmarks/) from a conversation file and its images.

    Images stay where they are; the Parquet file holds their path and SHA-256. Conversations without an image are
    left out and counted in the manifest. `benchmarks` is a folder of Parquet files in this project's format.
    """
    source = Path(data.conversations)
    try:
        entries = json.loads(source.read_text())
    except FileNotFoundError:
        raise GraceError(f"{source}: no such file; set data.conversations to LLaVA's JSON file") from None
    except json.JSONDecodeError as error:
        raise GraceError(f"{source}: not valid JSON ({error}); download it again") from error
    shown = [entry for entry in entries if entry.get("image")][: data.limit]
    from grace.models import load_processor

    with whole_folder(out, data=data.model_dump(), without_image=len(entries) - len(shown)) as folder:
        with (
            pq.ParquetWriter(folder / "train.parquet", ROW) as table,
            progress("reading conversations", len(shown)) as advance,
        ):
            for start in range(0, len(shown), ROWS_PER_GROUP):
                rows = []
                for entry in shown[start : start + ROWS_PER_GROUP]:
                    path = (Path(data.images) / entry["image"]).resolve()
                    if not path.is_file():
                        raise GraceError(
                            f"{path}: no such image; set data.images to the folder that {source} names them from"
                        )
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    turns = _turns(entry, f"{source}: conversation {entry.get('id')}")
                    image = EncodedImage(str(entry["id"]), None, str(path), digest)
                    read = Conversation(str(entry["id"]), (image,), asked_and_answered(turns))
                    rows.append(as_row(read, sources=[entry["image"]]))
                    advance()
                table.write_table(pa.Table.from_pylist(rows, schema=ROW))
        shutil.copytree(
            processor, folder / "processor", ignore=shutil.ignore_patterns("*.safetensors*", "manifest.json")
        )
        prepare_examples(folder, load_processor(folder / "processor"), tower=None)
        if benchmarks is not None:
            shutil.copytree(benchmarks, folder / "benchmarks")
