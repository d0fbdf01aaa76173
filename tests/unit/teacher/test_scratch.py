"""What is too large for memory lies in nameless files, and a shard has the same bytes either way."""

import pytest
import torch

from grace.distill import confidence_gate
from grace.distill.relational_cka import gram_matrix
from grace.teacher import scratch
from grace.teacher.shard import ShardBuilder, shard_name, write_shard


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(scratch, "IN_MEMORY", 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32, torch.int64])
def test_a_tensor_in_a_file_is_filled_like_one_in_memory(tmp_path, small, dtype):
    values = torch.arange(120).view(40, 3).to(dtype)
    filled, grown = scratch.empty((40, 3), dtype, tmp_path), scratch.Growing(tmp_path)
    for start in (20, 0, 30, 10):
        filled[start : start + 10] = values[start : start + 10]
    for part in values.split(7):
        grown.append(part)
    assert torch.equal(filled, values) and torch.equal(grown.finished(), values)
    assert filled.dtype == grown.finished().dtype == dtype
    assert not list(tmp_path.iterdir())  # they have no name


def test_a_disk_without_room_is_an_error_and_no_signal(tmp_path, small, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        scratch.empty((40, 3), torch.float32, tmp_path)


def built(folder):
    generator = torch.Generator().manual_seed(0)
    counts = [3, 1, 4]
    builder = ShardBuilder([f"{number:064x}" for number in range(3)], counts, folder)
    for record in (2, 0, 1):
        hidden = torch.randn(counts[record], 16, generator=generator)
        builder.put(record, hidden=hidden.bfloat16(), gates=confidence_gate(hidden))
        builder.put_grams(record, [f"{record}"], [gram_matrix(torch.randn(9, 8, generator=generator))])
    return builder.finished()


def test_a_shard_has_the_same_bytes_however_it_was_collected(tmp_path, monkeypatch):
    found = []
    for name, room in (("memory", 2**26), ("files", 8)):
        monkeypatch.setattr(scratch, "IN_MEMORY", room)
        write_shard(tmp_path / name, shard_name(0, 1), built(tmp_path / name), pins={})
        found.append((tmp_path / name / f"{shard_name(0, 1)}.safetensors").read_bytes())
    assert found[0] == found[1]
