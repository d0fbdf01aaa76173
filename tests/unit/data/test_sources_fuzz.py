"""The fuzzer of conversation files and images, for a few cases (tests/fuzz/conversations.py runs as long as asked)."""

import pytest

from fuzz import conversations
from grace.demo.processor import build_processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged tags
def test_no_broken_file_ends_in_a_traceback(processor):
    ends = [conversations.check(number, processor) for number in range(1000, 1025)]
    assert {"result", "sentence"} == set(ends)
