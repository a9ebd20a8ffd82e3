"""What is said of a sample of vectors: healthy ones pass, collapsed ones of every kind do not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from embedding.run.report.vectors import collapse, study

RNG = np.random.default_rng(7)
ROWS, DIM = 300, 64


def healthy() -> npt.NDArray[np.float64]:
    return RNG.normal(size=(ROWS, DIM))


def narrow() -> npt.NDArray[np.float64]:
    """As E5's: cosines about 0.8, yet all dimensions in use."""
    return np.asarray(RNG.normal(size=(ROWS, DIM)) / np.sqrt(DIM) + 2.0 * np.eye(DIM)[0])


def findings(vectors: npt.NDArray[np.float64], repeats: int = 0) -> list[str]:
    return collapse(study(vectors.astype(np.float32)), scanned=len(vectors), repeats=repeats)


@pytest.mark.parametrize(
    "vectors", [healthy(), narrow(), 30 * healthy(), healthy()[:, :2]], ids=["any", "narrow", "long", "two dimensions"]
)
def test_healthy_vectors_pass(vectors: npt.NDArray[np.float64]) -> None:
    assert findings(vectors) == []


def test_collapsed_vectors_are_told() -> None:
    [alike] = findings(healthy() + 100)
    assert "their cosine is 1.0" in alike
    in_three = RNG.normal(size=(ROWS, 2)) @ RNG.normal(size=(2, DIM))
    [flat] = findings(in_three)
    assert "use only 2.0 of 64 dimensions" in flat
    [repeated] = findings(healthy(), repeats=9)
    assert repeated.startswith("9 of 300 rows examined have exactly the same vector")
    assert findings(healthy(), repeats=3) == []
    one_zero = healthy()
    one_zero[5] = 0
    assert findings(one_zero) == ["1 of 300 sampled vectors have length 0."]


def test_few_vectors_or_one_are_no_collapse() -> None:
    assert findings(healthy()[:40] + 100) == []
    for few in (np.ones((1, 8)), np.ones((5, 8)), np.zeros((3, 8))):
        facts = study(few.astype(np.float32))
        assert (facts.distinct, facts.neighbours, facts.mean_cosine) == (1, [], 0.0)


def test_neighbours_and_cosines_are_those_of_a_plain_search() -> None:
    vectors = healthy().astype(np.float32)
    vectors[10] = vectors[3]
    facts = study(vectors)
    assert (facts.rows, facts.distinct) == (ROWS, ROWS - 1)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = units @ units.T
    others = np.delete(np.arange(ROWS), 10)
    for found in facts.neighbours:
        expected = [row for row in others[np.argsort(-cosines[found.row][others])] if row != found.row][:3]
        assert [row for row, _ in found.nearest] == expected
        assert [cosine for _, cosine in found.nearest] == pytest.approx(cosines[found.row][expected])
    pairs = cosines[np.ix_(others, others)][np.triu_indices(ROWS - 1, 1)]
    assert facts.mean_cosine == pytest.approx(pairs.mean(), abs=1e-6)
    np.testing.assert_allclose(np.sort(facts.cosines), np.sort(pairs), atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_the_plane_shows_as_much_as_a_plane_can(shape: tuple[int, int]) -> None:
    vectors = RNG.normal(size=shape) * np.linspace(3, 0.1, shape[1])
    facts = study(vectors.astype(np.float32))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    singular = np.linalg.svd(units - units.mean(axis=0), compute_uv=False)
    assert facts.plane_share == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum(), rel=1e-4)
    assert (facts.plane_R2**2).sum(axis=0) == pytest.approx(singular[:2] ** 2, rel=1e-4)
    assert facts.plane_R2.tobytes() == study(vectors.astype(np.float32)).plane_R2.tobytes()
