"""What every sentence has in common, whoever writes it."""

import pickle

import pytest

from grace.errors import GraceError, panics_as_errors


def test_a_long_word_stands_with_its_beginning_and_its_end():
    said = str(GraceError(f"config.json: model_type is 'x{'a' * 5000}y'; this pipeline knows llava"))
    assert said.startswith("config.json: model_type is 'xaaa") and said.endswith("aaay'; this pipeline knows llava")
    assert len(said) < 400 and "a…a" in said


def test_what_a_sentence_names_is_whole():
    path = "/".join(["folder-of-somebody"] * 15)
    error = GraceError(f"{path}: no such file\n{path}: no such file")
    assert str(error) == f"{path}: no such file\n{path}: no such file"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_panic_becomes_an_error_and_an_interrupt_stays_one():
    class PanicException(BaseException):
        pass

    with pytest.raises(RuntimeError, match="out of range"), panics_as_errors():
        raise PanicException("range end index 5 out of range")
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt
