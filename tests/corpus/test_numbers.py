"""How vectors are stored: as sentence-transformers quantizes them, and so that they can be computed with again."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.util import quantize_embeddings

from embedding.config import OutputDtype
from embedding.corpus.numbers import loaded, stored, stored_type
from embedding.corpus.shard import shard_table

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


@pytest.mark.parametrize("dtype", ["float32", "float16", "binary", "ubinary"])
def test_no_rows(dtype: OutputDtype) -> None:
    values = stored(np.empty((0, 12), np.float32), dtype)
    assert values.shape == (0, stored_type(dtype, 12).list_size)
    assert loaded(values).dtype == np.float32


def test_whole_numbers_are_not_copied() -> None:
    vectors_RD = np.ones((2, 3), np.float32)
    assert stored(vectors_RD, "float32") is vectors_RD
    assert loaded(vectors_RD) is vectors_RD
    assert loaded(stored(vectors_RD * np.float32(0.3), "float16")).tolist() == np.float16(vectors_RD * np.float32(0.3)).tolist()
