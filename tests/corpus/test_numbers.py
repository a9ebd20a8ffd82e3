"""How vectors are stored: as sentence-transformers quantizes them, and so that they can be computed with again."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.util import quantize_embeddings

from embedding.corpus.numbers import bounds, is_flat, lengths, loaded, outside, ranges_of, rounding, stored, stored_type
from embedding.corpus.shard import shard_table
from embedding.corpus.vectors import VectorColumns, as_json, side_by_side
from embedding.names import OutputDtype

NUMBERS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45])


@given(st.integers(1, 20).flatmap(lambda width: st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1, max_size=5)))
def test_bits_are_those_of_sentence_transformers(rows: list[list[float]]) -> None:
    vectors_RD = np.array(rows, np.float32)
    dtypes: tuple[Literal["binary", "ubinary"], ...] = ("binary", "ubinary")
    for dtype in dtypes:
        found, expected = stored(vectors_RD, dtype), quantize_embeddings(vectors_RD, dtype)
        assert isinstance(expected, np.ndarray)
        assert found.dtype == expected.dtype
        assert found.tolist() == expected.tolist()
        signs = loaded(found)[:, : vectors_RD.shape[1]]
        assert signs.tolist() == np.where(vectors_RD > 0, 1.0, -1.0).tolist()
        table = shard_table(pa.table({"id": range(len(rows))}), found, {})
        assert table.schema.field("embedding").type == stored_type(dtype, vectors_RD.shape[1])


def matrices(least: int = 1) -> st.SearchStrategy[list[list[float]]]:
    numbers = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 0.1, 1e-30])
    return st.integers(1, 9).flatmap(lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=least, max_size=6))


@given(matrices(2), st.data())
def test_steps_are_those_of_sentence_transformers(rows: list[list[float]], data: st.DataObject) -> None:
    """What is outside of the ranges too, which are those of some of the rows."""
    vectors_RD = np.array(rows, np.float32)
    ranges_2D = ranges_of(vectors_RD[: data.draw(st.integers(1, len(rows)))])
    found = stored(vectors_RD, "int8", ranges_2D)
    with np.errstate(over="ignore"):
        expected = quantize_embeddings(vectors_RD, "int8", ranges=ranges_2D)
    assert isinstance(expected, np.ndarray)
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()
    lows_RD, highs_RD = bounds(found, ranges_2D)
    slack_D = np.spacing(np.abs(ranges_2D).max(axis=0)) * 4  # float32 sums, on both ways
    assert (lows_RD - slack_D <= vectors_RD).all()
    assert (vectors_RD <= highs_RD + slack_D).all()


def test_a_number_far_outside_of_a_narrow_range_is_in_its_last_step() -> None:
    ranges_2D = np.array([[0.0, -1e-38], [1e-38, 1e-38]], np.float32)
    assert stored(np.array([[1.0, -1.0]], np.float32), "int8", ranges_2D).tolist() == [[127, -128]]


def test_what_is_outside_of_the_ranges_is_counted() -> None:
    vectors_RD = np.array([[-0.1, 0.5], [1.0, 2.1], [0.0, 2.0], [7.0, -7.0]], np.float32)
    assert outside(vectors_RD, np.array([[0.0, 0.0], [1.0, 2.0]], np.float32)) == 4
    columns = VectorColumns((2, 1), "int8", {"embedding": [[0.0, 0.0], [1.0, 2.0]], "embedding_1": [[0.0], [0.5]]})
    assert columns.clipped(np.concatenate([vectors_RD, vectors_RD[:, :1]], axis=1)) == 7
    assert VectorColumns((2, 1)).clipped(np.ones((4, 3), np.float32)) == 0


@given(matrices())
def test_steps_are_read_as_what_they_were(rows: list[list[float]]) -> None:
    """No further off than half a step; a dimension in which all are the same comes back as it was."""
    vectors_RD = np.array(rows, np.float32)
    ranges_2D = ranges_of(vectors_RD)
    assert not is_flat(ranges_2D).any()
    steps_D = (ranges_2D[1] - ranges_2D[0]) / 255
    back_RD = loaded(stored(vectors_RD, "int8", ranges_2D), ranges_2D)
    slack_D = np.spacing(np.abs(ranges_2D).max(axis=0)) * 4
    assert (np.abs(back_RD - vectors_RD) <= steps_D * 0.5001 + slack_D).all()
    same_D = (vectors_RD == vectors_RD[0]).all(axis=0)
    assert (np.abs(back_RD - vectors_RD)[:, same_D] <= (steps_D * 0.001 + slack_D)[same_D]).all()
    assert np.array_equal(np.array(as_json(ranges_2D), np.float32), ranges_2D)


def test_what_is_outside_of_its_range_is_clipped() -> None:
    ranges_2D = np.array([[-1, 0], [1, 255]], np.float32)
    found = stored(np.array([[-7, 1e9], [7, -1e9], [0, 128]], np.float32), "int8", ranges_2D)
    assert found.tolist() == [[-128, 127], [127, -128], [-1, 0]]
    assert loaded(found, ranges_2D)[2].tolist() == [0, 128.5]
    lows, highs = bounds(found, ranges_2D)
    assert (lows[0, 0], highs[0, 1], lows[2, 1], highs[2, 1]) == (-np.inf, np.inf, 128, 129)


def test_a_dimension_that_never_changes_has_a_range_too() -> None:
    ranges_2D = ranges_of(np.array([[0, -1, 5, 0.25], [0, 1, 9, 0.25]], np.float32))
    assert ranges_2D.tolist() == [[-1.5, -1, 5, -1.25], [1.5, 1, 9, 1.75]]  # 3 wide, as the others are in the middle
    assert ranges_of(np.array([[0, 100]], np.float32)).tolist() == [[-0.5, 99.21875], [0.5, 100.78125]]
    assert is_flat(np.array([[0, 1, 2, 1], [0, 1 + 2e-7, 1, 2]], np.float32)).tolist() == [True, True, True, False]


def test_lengths_that_steps_leave_open() -> None:
    """From -1 to 1 in 255 steps; the first and the last have no end."""
    ranges_2D = np.array([[-1, -1], [1, 1]], np.float32)
    values = np.array([[-1, -1], [127, -1], [126, -128]], np.int8)
    least, greatest = lengths(values, ranges_2D)
    assert least.tolist() == pytest.approx([0, 1, np.hypot(253 / 255, 253 / 255)], rel=1e-6)
    assert greatest.tolist() == pytest.approx([np.hypot(1, 1) / 255, np.inf, np.inf], rel=1e-4)
    assert rounding(ranges_2D) == pytest.approx(np.hypot(1, 1) / 255, rel=1e-6)
    assert [norms.tolist() for norms in lengths(np.array([[3, 4]], np.float32))] == [[5], [5]]


@pytest.mark.parametrize(
    ("calibration", "fault"),
    [
        ({"embedding": [[0, 0, 0], [1, 1, 1]], "embedding_2": [[0, 0], [1, 1]]}, None),
        ({"embedding": [[0, 0, 0], [1, 1, 1]]}, "it has ranges for embedding, not for embedding, embedding_2"),
        ({}, "it has ranges for no column, not for embedding, embedding_2"),
        (
            {"embedding": [[0, 0, 0], [1, 1, 1]], "embedding_2": [[0], [1]]},
            r"its ranges for embedding_2 have the shape \(2, 1\), not \(2, 2\)",
        ),
        ({"embedding": [[0, 0, 0], [1, np.nan, 1]], "embedding_2": [[0, 0], [1, 1]]}, "contain a number that is not finite"),
        ({"embedding": [[0, 0, 0], [1, 1, 1]], "embedding_2": [[0, -3e38], [1, 3e38]]}, "not finite or too large"),
        ({"embedding": [[0, 2, 0], [1, 1, 1]], "embedding_2": [[0, 0], [1, 1]]}, "the range of dimension 1 of embedding is 2 to 1"),
    ],
)
def test_ranges_that_do_not_fit(calibration: dict[str, list[list[float]]], fault: str | None) -> None:
    found = VectorColumns((3, 2), "int8").fault(calibration)
    assert (found is None) if fault is None else re.search(fault, found or "")


def test_columns_lie_side_by_side() -> None:
    columns = VectorColumns((3, 2, 1), "float16")
    assert columns.names == ("embedding", "embedding_2", "embedding_1")
    assert side_by_side(columns.dimensions) == [slice(0, 3), slice(3, 5), slice(5, 6)]
    assert {name: part.tolist() for name, part in columns.stored(np.arange(6, dtype=np.float32)[None]).items()} == {
        "embedding": [[0, 1, 2]],
        "embedding_2": [[3, 4]],
        "embedding_1": [[5]],
    }
    assert columns.row_bytes == 12
    assert VectorColumns((20, 9), "binary").row_bytes == 5


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary", "ubinary"])
def test_no_rows(dtype: OutputDtype) -> None:
    ranges = np.array([[-1] * 12, [1] * 12], np.float32) if dtype == "int8" else None
    values = stored(np.empty((0, 12), np.float32), dtype, ranges)
    assert values.shape == (0, stored_type(dtype, 12).list_size)
    assert loaded(values, ranges).dtype == np.float32


def test_whole_numbers_are_not_copied() -> None:
    vectors_RD = np.ones((2, 3), np.float32)
    assert stored(vectors_RD, "float32") is vectors_RD
    assert loaded(vectors_RD) is vectors_RD
    assert loaded(stored(vectors_RD * np.float32(0.3), "float16")).tolist() == np.float16(vectors_RD * np.float32(0.3)).tolist()
