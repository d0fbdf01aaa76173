"""Conversations laid end to end in rows of a fixed length, so that no padding between them is computed.

A row of `capacity` tokens holds whole conversations and then one run of padding, which attends to itself alone. Its
length and the length of its table of offsets are the same for every row, so that compiled layers see one shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

OFFSETS_STEP = 32  # the table of offsets is padded with empty sequences to a multiple


@dataclass
class PackedRow:
    """One forward pass.

    Attributes:
        input_ids: int64 [1, capacity].
        position_ids: int64 [1, capacity], or [3, 1, capacity] where positions have three axes.
        offsets: int32 [sequences + 1], where each sequence begins, the padding's and empty ones included; then the end.
        starts: int64 [conversations], where each conversation begins.
        longest: no sequence is longer; a power of two, so that rows have few values of it.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor
    longest: int

    def pin_memory(self) -> "PackedRow":
        """The same row in page-locked memory."""
        return PackedRow(
            self.input_ids.pin_memory(),
            self.position_ids.pin_memory(),
            self.offsets.pin_memory(),
            self.starts.pin_memory(),
            self.longest,
        )


def pack_row(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, pad: int, capacity: int
) -> PackedRow:
    """Lay a right-padded batch end to end.

    Args:
        input_ids, attention_mask: int64 [batch, tokens].
        position_ids: int64 [batch, tokens] or [3, batch, tokens].
        pad: the id that fills the row; not a visual token.
        capacity: of the row; where the batch holds more tokens, a multiple of it.
    """
    kept = attention_mask.bool()
    lengths = kept.sum(1)
    total = int(lengths.sum())
    room = -(-total // capacity) * capacity
    rest = room - total
    ids = torch.cat([input_ids[kept], input_ids.new_full((rest,), pad)])[None]
    axes = position_ids.dim() - 2
    filler = torch.arange(rest).expand(*position_ids.shape[:axes], rest)
    positions = torch.cat([position_ids[..., kept], filler], dim=-1).unsqueeze(-2)
    longest = 1 << (int(lengths.max()) - 1).bit_length()
    ends = [*lengths.cumsum(0).tolist(), *range(total + longest, room, longest), *([room] if rest else [])]
    ends += [room] * (-len(ends) % OFFSETS_STEP)
    offsets = torch.tensor([0, *ends], dtype=torch.int32)
    return PackedRow(ids, positions, offsets, lengths.cumsum(0) - lengths, longest)


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of conversations that share a row: the longest first, each into the first row with room.

    A conversation longer than `capacity` has a row of its own. Indices in a row and rows among each other are in the
    order of the conversations, so that equal batches are cut equally.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((row for row, left in enumerate(room) if left >= lengths[index]), None)
        if at is None:
            rows.append([index])
            room.append(capacity - lengths[index])
        else:
            rows[at].append(index)
            room[at] -= lengths[index]
    return sorted(sorted(row) for row in rows)
