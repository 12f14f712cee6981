"""Cutting one order of rows into global batches, and these into the parts of ranks: pure functions."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.sharding import (
    Grid,
    carried_over,
    count_batches,
    global_batches,
    going_on,
    grid_of,
    of_another_rank,
    part_of,
    parts_of,
    parts_of_sequence,
)

ROWS = st.integers(0, 200)
SIZE = st.integers(1, 12)
RANKS = st.integers(1, 9)


def parts(rows: int, grid: Grid, position: int, ranks: int, drop_last: bool) -> list[list[list[int]]]:
    """Every rank's parts; of an order that can be indexed, and of one that is asked for row by row."""
    found = []
    for rank in range(ranks):
        more: dict[str, Any] = {"rank": rank, "ranks": ranks}
        at_once = list(parts_of_sequence(range(rows), grid, position, drop_last=drop_last, **more))
        following = iter(range(grid.begin_of(position), rows))
        batches = global_batches(following, grid, position, drop_last=drop_last)
        assert list(parts_of(batches, grid, **more)) == at_once
        found.append(at_once)
    return found


@given(ROWS, SIZE, RANKS, st.booleans(), st.data())
def test_the_parts_of_all_ranks_are_the_order_and_each_row_comes_once(
    rows: int, size: int, ranks: int, drop_last: bool, data: st.DataObject
) -> None:
    grid = Grid(size * ranks)
    count = count_batches(rows, grid.size, drop_last)
    position = data.draw(st.integers(0, count))
    of_ranks = parts(rows, grid, position, ranks, drop_last)
    assert {len(one) for one in of_ranks} == {count - position}
    order = []
    for batch in zip(*of_ranks, strict=True):
        sizes = [len(part) for part in batch]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
        order.append([row for part in batch for row in part])
    end = count * grid.size if drop_last else rows
    left = end - (count - 1) * grid.size
    if order and left < ranks:
        assert set(order.pop()) == set(range(end - left, end))
        end -= left
    assert [row for batch in order for row in batch] == list(range(position * grid.size, end))
    assert all(len(batch) == grid.size for batch in order[:-1])


@given(ROWS, st.sampled_from([(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]), st.booleans())
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(
    rows: int, of: tuple[int, int], drop_last: bool
) -> None:
    size, ranks = of
    found = parts(rows, Grid(size * ranks), 0, ranks, drop_last)
    together = [
        list(dict.fromkeys(row for part in batch for row in part)) for batch in zip(*found, strict=True)
    ]
    (whole,) = parts(rows, Grid(12), 0, 1, drop_last)
    assert together == whole


@given(st.integers(1, 200), st.integers(1, 30), st.integers(1, 30), st.data())
def test_with_another_size_the_epoch_goes_on_at_the_same_row(
    rows: int, old: int, new: int, data: st.DataObject
) -> None:
    before, grid = Grid(old), Grid(new)
    batch = data.draw(st.integers(0, count_batches(rows, old, False)))
    done, same = carried_over(before, batch, grid)
    position, after = going_on(grid, done, rows)
    (rest,) = parts(rows, after, position, 1, False)
    assert same and [row for one in rest for row in one] == list(range(min(done, rows), rows))
    assert position + len(rest) == count_batches(rows, new, False)
    for index, one in enumerate(rest[:-1]):
        assert one[-1] == (position + index + 1) * new - 1
    # And once more, from somewhere in the rest.
    further = data.draw(st.integers(position, position + len(rest)))
    again, _ = carried_over(after, further, before)
    position, last = going_on(before, again, rows)
    (rest,) = parts(rows, last, position, 1, False)
    assert [row for one in rest for row in one] == list(range(min(after.begin_of(further), rows), rows))


@given(st.integers(1, 200), RANKS, RANKS, st.data())
def test_items_that_are_not_taken_apart_come_once_for_any_number_of_ranks(
    items: int, old: int, new: int, data: st.DataObject
) -> None:
    before, grid = Grid(old, of_rows=False, unit_rows=None), Grid(new, of_rows=False, unit_rows=None)
    batch = data.draw(st.integers(0, items // old))
    done, same = carried_over(before, batch, grid)
    position, after = going_on(grid, done, items)
    found = parts(items, after, position, new, False)
    order = [one for batch in zip(*found, strict=True) for one in batch]
    left = (items - done) % new
    if left:
        assert set(order[-new:]) == set(range(items - left, items))
        order = order[:-new] + sorted(set(order[-new:]))
    assert same and order == list(range(done, items))
    assert position + len(found[0]) == count_batches(items, new, False)


def test_units_of_other_sizes() -> None:
    pairs, triples = Grid(4, of_rows=False, unit_rows=2), Grid(2, of_rows=False, unit_rows=3)
    assert carried_over(pairs, 3, Grid(5)) == (24, True)
    assert carried_over(pairs, 3, triples) == (8, True)
    assert carried_over(Grid(5), 2, triples) == (3, False)
    unknown = Grid(2, of_rows=False, unit_rows=None)
    assert carried_over(pairs, 3, unknown) == (12, True)
    assert carried_over(pairs, 3, Grid(5, unit_rows=None)) == (12, False)
    assert going_on(unknown, 7, None) == (3, Grid(2, of_rows=False, unit_rows=None, first=(3, 7)))


def test_a_part_where_there_are_fewer_rows_than_ranks() -> None:
    assert [part_of(3, rank, 5).start for rank in range(5)] == [0, 1, 2, 0, 1]
    assert [part_of(7, rank, 3) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 7)]


def test_a_grid_in_a_checkpoint() -> None:
    grid = Grid(12, first=(2, 30))
    assert grid_of({"grid": grid.state()}) == grid
    assert grid_of({"batch_size": 4}) == Grid(4)
    assert grid_of({"batch_size": None}) is None


def test_a_rank_that_there_was_not_has_no_state_of_a_loader() -> None:
    part = {"now": {"own": {}, "cut": 1}, "begin": {"own": {}, "loader": 2}, "loader": 3, "ahead": False}
    alone = {
        "now": {"own": {}, "of_another_rank": True}, "begin": {"own": {}}, "ahead": False,
        "of_another_rank": True,
    }  # fmt: skip
    assert of_another_rank(part) == alone
    several = {"now": {"parts": [part["now"]]}, "begin": {"parts": [part]}, "order": "seeded"}
    assert of_another_rank(several) == {
        "now": {"parts": [alone["now"]], "of_another_rank": True},
        "begin": {"parts": [alone]},
        "order": "seeded",
        "of_another_rank": True,
    }
