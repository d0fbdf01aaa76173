"""Rows of conversations laid end to end: every token once, nothing cut, and the layers' own answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grace.data import Batch
from grace.data.packed import packed_row
from grace.data.packing import OFFSETS_STEP, fill_rows, pack_row
from grace.models import forward_inputs
from grace.models.packed_attention import PACKED, use_packed_attention

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=20)


def batch_of(lengths: list[int], first: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids that are all different, and their mask."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.arange(first, first + sum(lengths))
    return ids, mask


@given(LENGTHS, st.integers(16, 128))
def test_rows_hold_every_conversation_once_and_no_more_than_fits(lengths, capacity):
    rows = fill_rows(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[index] for index in row) <= capacity
    assert rows == fill_rows(lengths, capacity)


@given(LENGTHS, st.integers(16, 128))
def test_a_row_is_the_batch_without_its_padding(lengths, capacity):
    ids, mask = batch_of(lengths)
    row = pack_row(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), 1, capacity)
    total, room = sum(lengths), row.input_ids.shape[1]
    assert room % capacity == 0 and room - capacity < total <= room == row.offsets[-1]
    assert (row.offsets.diff() <= row.longest).all() and row.longest < 2 * max(lengths)
    assert torch.equal(row.input_ids[0, :total], ids[mask.bool()]) and (row.input_ids[0, total:] == 1).all()
    assert torch.equal(row.position_ids[0, row.starts], torch.zeros_like(row.starts))
    assert (len(row.offsets) - 1) % OFFSETS_STEP == 0
    assert torch.equal(row.offsets[: len(lengths)].long(), row.starts) and (row.offsets.diff() >= 0).all()


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_positions_of_three_axes_and_images_go_along(kind):
    """The decoder's output for padded conversations with images of two sizes, and for the same in one row."""
    import transformers as tr

    text = dict(vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8)  # fmt: skip
    ids = dict(image_token_id=4, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7)
    if kind == "qwen2_vl":
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        vision = dict(embed_dim=32, depth=2, num_heads=2, hidden_size=32, patch_size=14, mlp_ratio=2)
        model = tr.Qwen2VLForConditionalGeneration(tr.Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
        width = 3 * 2 * 14 * 14
    else:
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
        vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=16,
                      num_position_embeddings=16, deepstack_visual_indexes=[0, 1])  # fmt: skip
        model = tr.Qwen3VLForConditionalGeneration(tr.Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
        width = 3 * 2 * 16 * 16
    torch.manual_seed(0)
    model.eval().requires_grad_(False)
    grids = torch.tensor([[1, 2, 4], [1, 4, 4]])
    counts = (grids.prod(1) // 4).tolist()
    said = [[8, 6, *[4] * counts[0], 7, 9, 10], [11, 12, 13], [6, *[4] * counts[1], 7, 14, 15, 16]]
    lengths = [len(one) for one in said]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for one in said for token in one])
    pixels = {"pixel_values": torch.randn(int(grids.prod(1).sum()), width), "image_grid_thw": grids}
    batch = Batch(ids, mask, ids, pixels, [], [])
    expected = model.model(**forward_inputs(model, ids, mask, pixels), use_cache=False).last_hidden_state
    batch.packed = packed_row(model, batch, 32)
    assert batch.packed.position_ids.dim() == 3
    use_packed_attention(model)
    assert model.config.text_config._attn_implementation == PACKED
    assert model.config.vision_config._attn_implementation != PACKED
    found = model.model(**forward_inputs(model, ids, mask, pixels, batch.packed), use_cache=False).last_hidden_state
    rows, columns = mask.nonzero(as_tuple=True)
    torch.testing.assert_close(found[batch.place(rows, columns)], expected[rows, columns], atol=2e-5, rtol=1e-4)
