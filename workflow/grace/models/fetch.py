"""`grace fetch`: a pretrained model, from a folder or the hub, as a model folder of the experiment."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from grace.config.pretrained import PATTERNS, source_files, source_hashes
from grace.errors import GraceError, reason
from grace.families.files import INDEX, end_tokens, own_code, read_config, read_generation, read_weight_map
from grace.files import whole_folder, write_json
from grace.hashes import known_hashes


def fetch(model: str, out: Path, revision: str | None = None, expected: Mapping[str, str] | None = None) -> None:
    """Bring `model` (a local folder or a hub id, at `revision`) to `out` with a manifest of its files.

    Args:
        model, out, revision: from where to where.
        expected: SHA-256 by name of what a local folder must hold (`source_hashes`); None: whatever it holds.

    Raises:
        GraceError: not to be had, incomplete, changed while it was copied, or a model that runs code of its own.
    """
    with whole_folder(out, pretrained=model, revision=revision) as folder:
        if Path(model).is_dir():
            _copy(Path(model), folder, expected)
        else:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

            try:
                snapshot_download(model, revision=revision, local_dir=folder, allow_patterns=PATTERNS)
            except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
                said = f"{model}: neither a local folder nor to be had from the hub ({reason(error)})"
                raise GraceError(said) from error
            shutil.rmtree(folder / ".cache", ignore_errors=True)
        try:
            _check(model, folder)
            _end_where_training_ends(folder)
        except GraceError as error:  # by the name that the user knows, not that of the copy
            raise GraceError(str(error).replace(str(folder), model)) from None


def _copy(model: Path, folder: Path, expected: Mapping[str, str] | None) -> None:
    """Copies, not hard links: an edit of the user's folder must not reach into the experiment's."""
    before = source_hashes(model)
    if expected is not None and before != expected:
        raise GraceError(
            f"{model}: its files changed since the run began; run Snakemake again to fetch them as they are now"
        )
    for name, path in source_files(model):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    copied = known_hashes(folder / name for name in before)
    changed = [name for name, digest in before.items() if copied[folder / name] != digest]
    if changed:
        raise GraceError(f"{model}: {', '.join(changed)} changed while it was copied; run again when it is at rest")


def _check(model: str, folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise GraceError(f"{model}: holds no *.safetensors; name a model in the transformers format")
    if (parts := read_weight_map(folder)) is not None:
        missing = sorted({name for name in parts.values() if not (folder / name).is_file()})
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise GraceError(f"{model}: {INDEX} names {shown}, which are not there; download it again")
    if file := own_code(folder):
        raise GraceError(
            f"{model}: {file.name} asks for code of its own (auto_map), which is never run; use a model that "
            "transformers knows"
        )


def _end_where_training_ends(folder: Path) -> None:
    """Let generation stop at the token that ends an answer in training, where generation_config.json names others
    alone.

    A student would write it and go on. What the file names stays, but for ids that no row of the head stands for.
    """
    from grace.models.load import load_processor
    from grace.models.template import Template

    config, about = read_config(folder), read_generation(folder)
    text = config.get("text_config") or config
    ends = end_tokens(about.get("eos_token_id", text.get("eos_token_id", config.get("eos_token_id"))))
    try:
        end = Template(load_processor(folder)).end
    except GraceError:  # `prepare` says what is wrong with its processor
        return
    if end is not None and end not in ends:
        rows = text.get("vocab_size") or config.get("vocab_size") or 0
        kept = {**about, "eos_token_id": [*(e for e in ends if e < rows), end]}
        write_json(folder / "generation_config.json", kept)
