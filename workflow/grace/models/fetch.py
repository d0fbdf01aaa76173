"""`grace fetch`: a pretrained model, from a folder or the hub, as a model folder of the experiment."""

import os
import shutil
from pathlib import Path

from grace.errors import GraceError
from grace.files import whole_folder

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def _link_or_copy(source: str, target: str) -> None:
    """Share the bytes of a local model where the file system allows it: nobody writes to a model folder."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def fetch(model: str, out: Path, revision: str | None = None) -> None:
    """Bring `model` (a local folder or a hub id, at `revision`) to `out` with a manifest of its files."""
    with whole_folder(out, pretrained=model, revision=revision) as folder:
        if Path(model).is_dir():
            shutil.copytree(model, folder, copy_function=_link_or_copy, dirs_exist_ok=True)
        else:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

            try:
                snapshot_download(model, revision=revision, local_dir=folder, allow_patterns=PATTERNS)
            except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise GraceError(f"{model}: neither a local folder nor to be had from the hub ({reason})") from error
            shutil.rmtree(folder / ".cache", ignore_errors=True)
        if not any(folder.glob("*.safetensors")):
            raise GraceError(f"{model}: holds no *.safetensors; name a model in the transformers format")
