"""Chat templates of folders that ship write the token that begins a text themselves.

transformers lets the tokenizer add it; servers that render a chat (vLLM) tokenise what the template wrote and add none.
A SentencePiece tokenizer puts a space before the first word, and, by its age, behind a control token too or not: the
template gets what makes the very tokens of training.
"""

from pathlib import Path

from tokenizers import Tokenizer

from grace.errors import GraceError, panics_as_errors, reason
from grace.families.files import read_object

_TEXT = "A chat"
BOS_FORMS = {"": "{{ bos_token }}", " ": "{{ bos_token + ' ' }}"}
"""What a template begins with, by what the tokenizer wants between BOS and the first word."""


def write_bos(folder: Path) -> None:
    """Let `chat_template.jinja` begin with BOS where the tokenizer adds one and the template does not write it."""
    template, rules = folder / "chat_template.jinja", folder / "tokenizer.json"
    settings = folder / "tokenizer_config.json"
    if not (template.is_file() and rules.is_file() and settings.is_file()):
        return
    source, bos = template.read_text(encoding="utf-8", errors="replace"), read_object(settings).get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    try:
        with panics_as_errors():
            tokenizer = Tokenizer.from_file(str(rules))
    except Exception as error:  # tokenizers raises no kind of its own
        raise GraceError(f"{rules}: not a readable tokenizer ({reason(error)}); fetch the model again") from error
    wanted = tokenizer.encode(_TEXT).ids
    if not isinstance(bos, str) or "bos_token" in source or bos in source or wanted[:1] != [tokenizer.token_to_id(bos)]:
        return
    for written, bos_form in BOS_FORMS.items():
        if tokenizer.encode(f"{bos}{written}{_TEXT}", add_special_tokens=False).ids == wanted:
            template.write_text(bos_form + source)
            return


def without_bos(source: str) -> str:
    """A template for a reader that adds BOS by itself."""
    for bos_form in BOS_FORMS.values():
        source = source.removeprefix(bos_form)
    return source
