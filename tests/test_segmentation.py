"""How a batch is cut into steps: index arithmetic, checked on random batches."""

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from modeling_armt.segmentation_armt import OutputColumns, RealTokens, Step, plan_steps


@st.composite
def plans(draw, cached: bool | None = None):
    """Arguments of plan_steps."""
    rows, segment_size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    counts = draw(st.lists(st.integers(0, 40), min_size=rows, max_size=rows))
    is_cached = draw(st.booleans()) if cached is None else cached
    opened = (
        draw(st.lists(st.integers(0, segment_size - 1), min_size=rows, max_size=rows)) if is_cached else [0] * rows
    )
    num_mem_tokens = draw(st.integers(1, 4))
    fits = segment_size + num_mem_tokens
    max_columns = draw(st.none() | st.integers(fits, 3 * fits))
    return counts, opened, segment_size, num_mem_tokens, is_cached, max_columns


@st.composite
def masks(draw):
    """A `(B, T)` mask of at least one column, rows without any real token included."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 25))
    bits = draw(st.lists(st.integers(0, 1), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(bits).view(rows, columns)


@st.composite
def batches(draw):
    """A mask, and the steps of a call that reads it."""
    mask = draw(masks())
    tokens = RealTokens(*mask.shape, mask)
    segment_size, cached = draw(st.integers(1, 9)), draw(st.booleans())
    opened = [draw(st.integers(0, segment_size - 1)) if cached else 0 for _ in range(len(mask))]
    return mask, tokens, list(plan_steps(tokens.counts, opened, segment_size, 2, cached))


def real_columns(mask: torch.Tensor) -> list[list[int]]:
    return [[column for column, bit in enumerate(row) if bit] for row in mask.tolist()]


@examples(60)
@given(plans())
def test_every_token_is_taken_once_and_in_order(plan):
    counts, *_ = plan
    next_token = [0] * len(counts)
    for step in plan_steps(*plan):
        assert step.start == next_token
        next_token = [a + b for a, b in zip(next_token, step.taken, strict=True)]
    assert next_token == counts


@examples(60)
@given(plans())
def test_every_step_takes_something(plan):
    assert all(max(step.taken) > 0 for step in plan_steps(*plan))


@examples(60)
@given(plans())
def test_open_segments_never_exceed_the_segment_size(plan):
    segment_size = plan[2]
    for step in plan_steps(*plan):
        assert all(min(o, segment_size - o - t) >= 0 for o, t in zip(step.opened, step.taken, strict=True))


@examples(60)
@given(plans(cached=True))
def test_with_a_cache_steps_go_on_where_the_last_one_ended(plan):
    _, opened, *_ = plan
    for step in plan_steps(*plan):
        assert step.opened == opened
        opened = step.open_after


@examples(60)
@given(plans(cached=True))
def test_with_a_cache_a_segment_closes_exactly_when_it_is_full(plan):
    counts, opened, segment_size, *_ = plan
    steps = list(plan_steps(*plan))
    for step in steps:
        for taken, before, closes in zip(step.taken, step.opened, step.closes, strict=True):
            assert closes == (taken > 0 and before + taken == segment_size)
    for row, (count, before) in enumerate(zip(counts, opened, strict=True)):
        assert sum(step.closes[row] for step in steps) == (before + count) // segment_size
        assert (steps[-1].open_after[row] if steps else before) == (before + count) % segment_size


@examples(60)
@given(plans(cached=False))
def test_without_a_cache_nothing_is_written_that_nobody_reads(plan):
    counts, _, segment_size, *_ = plan
    steps = list(plan_steps(*plan))
    for row, count in enumerate(counts):
        closed = [step.closes[row] for step in steps if step.taken[row]]
        assert closed == [True] * (len(closed) - 1) + [False] * bool(closed)
        assert len(closed) == -(-count // segment_size)


@examples(60)
@given(plans())
def test_a_step_fits_into_what_the_backbone_can_hold(plan):
    """Open segments are padded to the longest one, and new tokens and memory tokens come behind all of them."""
    *_, num_mem_tokens, _, max_columns = plan
    for step in plan_steps(*plan):
        if max_columns is not None:
            assert max(step.opened) + step.width <= max_columns


@examples(60)
@given(plans())
def test_a_step_is_as_wide_as_its_widest_row(plan):
    num_mem_tokens = plan[3]
    for step in plan_steps(*plan):
        assert step.width == max(
            t + (num_mem_tokens if c else 0) for t, c in zip(step.taken, step.closes, strict=True)
        )


@examples(60)
@given(masks())
def test_real_tokens_are_found_where_the_mask_says(mask):
    tokens, expected = RealTokens(*mask.shape, mask), real_columns(mask)
    assert tokens.counts == [len(row) for row in expected]
    columns = torch.arange(mask.shape[1]).expand(mask.shape) if tokens.columns is None else tokens.columns
    assert [row[:n] for row, n in zip(columns.tolist(), tokens.counts, strict=True)] == expected


@examples(60)
@given(masks())
def test_the_rank_of_a_column_is_that_of_the_last_real_token_so_far(mask):
    tokens = RealTokens(*mask.shape, mask)
    if mask.all():
        assert tokens.rank is None
    else:
        assert tokens.rank.tolist() == [[sum(row[: i + 1]) - 1 for i in range(len(row))] for row in mask.tolist()]


@examples(60)
@given(batches())
def test_packing_takes_real_tokens_only(batch):
    mask, tokens, steps = batch
    names = torch.arange(mask.numel()).view(mask.shape)
    taken = [[] for _ in mask]
    for step in steps:
        packed = tokens.pack(names, step, fill=-1)
        assert packed.shape == (len(mask), max(step.taken))
        for row, count in enumerate(step.taken):
            taken[row] += packed[row, :count].tolist()
    assert taken == [row[bits.bool()].tolist() for row, bits in zip(names, mask, strict=True)]


@examples(60)
@given(batches())
def test_packing_embeddings_is_packing_ids(batch):
    mask, tokens, steps = batch
    names = torch.arange(mask.numel()).view(mask.shape)
    for step in steps:
        embedded = tokens.pack(names[..., None].expand(*mask.shape, 3).float(), step)
        for row, count in enumerate(step.taken):
            assert (embedded[row, :count] == tokens.pack(names, step)[row, :count, None]).all()


@examples(60)
@given(masks())
def test_the_label_of_a_token_is_the_next_real_one(mask):
    labels = torch.arange(mask.numel()).view(mask.shape)
    targets = RealTokens(*mask.shape, mask).next_of(labels).tolist()
    for row, (bits, names) in enumerate(zip(mask, labels, strict=True)):
        expected = names[bits.bool()].tolist()[1:]
        assert targets[row] == expected + [-100] * (mask.shape[1] - len(expected))


@examples(60)
@given(batches(), st.data())
def test_results_return_to_the_columns_of_their_tokens(batch, data):
    """Each column gets what its last real token at or before it got, columns before the first one get `before`."""
    mask, tokens, steps = batch
    first = data.draw(st.integers(0, mask.shape[1] - 1))
    last = data.draw(st.integers(first + 1, mask.shape[1]))
    columns = OutputColumns(tokens, first, last)
    names = torch.arange(mask.numel()).view(*mask.shape, 1).float()
    for step in steps:
        width = step.width  # results cover memory tokens and filler too
        packed = torch.nn.functional.pad(tokens.pack(names, step), (0, 0, 0, width - max(step.taken)), value=-1)
        columns.add(step, (packed,))
    before = torch.full((len(mask), 1), -7.0)
    if not steps:  # nothing but padding in the whole call
        return
    (result,) = columns.collect(before)
    expected = names.clone()
    for row, bits in enumerate(mask.tolist()):
        for column, bit in enumerate(bits):
            if not bit:
                expected[row, column] = expected[row, column - 1] if column else -7.0
    assert torch.equal(result, expected[:, first:last])


def test_steps_without_wanted_columns_are_not_kept():
    tokens = RealTokens(1, 12)
    columns = OutputColumns(tokens, 11, 12)
    wanted = [columns.wants(step) for step in plan_steps([12], [0], 4, 2, cached=False)]
    assert wanted == [False, False, True]


@pytest.mark.parametrize(
    ("rows", "uniform"),
    [
        ({"start": [0, 0], "taken": [3, 3], "opened": [1, 1], "closes": [False, False]}, True),
        ({"start": [0, 2], "taken": [3, 3], "opened": [1, 1], "closes": [False, False]}, False),
        ({"start": [0, 0], "taken": [3, 2], "opened": [1, 1], "closes": [False, False]}, False),
        ({"start": [0, 0], "taken": [3, 3], "opened": [1, 0], "closes": [False, False]}, False),
        ({"start": [0, 0], "taken": [3, 3], "opened": [1, 1], "closes": [False, True]}, False),
    ],
)
def test_a_step_is_uniform_if_all_rows_do_the_same(rows: dict, uniform: bool):
    assert Step(**rows, num_mem_tokens=2).is_uniform == uniform
