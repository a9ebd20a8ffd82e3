"""What a sample of vectors looks like: a flat picture, lengths, cosines, neighbours, and whether the vectors have collapsed."""

# Shape suffixes: R rows, U rows with distinct vectors, D dimensions.
# ruff: noqa: N815

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NEIGHBOURS = 3
ANCHORS = 5
COSINE_ROWS = 1000
"""Rows of which every pair's cosine is taken."""
_ENOUGH_ROWS = 50
"""Distinct vectors below which nothing is said about collapse: few texts of one kind may well be alike."""
_ALIKE = 0.9
_FLAT = 0.05
_REPEATED = 0.01


@dataclass(frozen=True)
class Neighbours:
    """A row of the sample and the rows nearest to it, by row number, with their cosines."""

    row: int
    nearest: list[tuple[int, float]]


@dataclass(frozen=True)
class VectorFacts:
    """What R sampled vectors say about the output."""

    rows: int
    distinct: int
    dimensions: int
    norms_R: Floats
    cosines: Floats
    """Of pairs of rows with distinct vectors."""
    nearest_U: Floats
    """Cosine of each distinct vector and the one nearest to it."""
    mean_cosine: float
    """Over all pairs of distinct vectors."""
    effective_dimensions: float
    plane_R2: Floats
    """The rows on their first two principal axes."""
    plane_share: float
    """Share of the variance that the plane shows."""
    neighbours: list[Neighbours]
    rounding: float = 0.0
    """How far from what it was a vector may be, for the numbers that it is stored in."""

    @property
    def unit_length(self) -> bool:
        """Whether the vectors are normalized."""
        return bool(np.all(np.abs(self.norms_R - 1) < max(1e-3, self.rounding)))


def study(vectors_RD: npt.NDArray[np.float32], rounding: float = 0.0) -> VectorFacts:
    """The facts of R >= 1 vectors; the same for the same vectors."""
    norms = np.linalg.norm(vectors_RD.astype(np.float64), axis=1)
    units_RD = vectors_RD / np.maximum(norms, 1e-30)[:, None]
    _, first = np.unique(np.ascontiguousarray(vectors_RD).view(np.uint32), axis=0, return_index=True)
    distinct = np.sort(first)
    units_UD = units_RD[distinct]
    cosines_UU = units_UD @ units_UD.T
    above = np.triu_indices(min(COSINE_ROWS, len(distinct)), k=1)
    np.fill_diagonal(cosines_UU, -np.inf)
    mean = units_UD.mean(axis=0)
    variances, plane = _principal(units_UD - mean, units_RD - mean)
    total = variances.sum()
    return VectorFacts(
        rows=len(vectors_RD),
        distinct=len(distinct),
        dimensions=vectors_RD.shape[1],
        norms_R=norms,
        cosines=cosines_UU[above].astype(np.float64),
        nearest_U=cosines_UU.max(axis=1).astype(np.float64) if len(distinct) > 1 else np.empty(0),
        mean_cosine=_mean_cosine(units_UD),
        effective_dimensions=_effective_rank(variances),
        plane_R2=plane,
        plane_share=float(variances[:2].sum() / total) if total > 0 else 0.0,
        neighbours=_neighbours(distinct, cosines_UU),
        rounding=rounding,
    )


def collapse(facts: VectorFacts, *, scanned: int, repeats: int) -> list[str]:
    """What is wrong with the vectors as a whole, one sentence each; nothing for healthy ones.

    `repeats` of `scanned` rows have the very vector of a row with other tokens.

    Complete collapse: E5, the narrowest family in wide use, puts its cosines between 0.7 and 1.0 (FAQ of its model card), so that an
    average above 0.9 is no healthy model's. Dimensional collapse (Jing et al. 2022, arXiv:2110.09348): the effective rank (Roy and
    Vetterli 2007; RankMe, Garrido et al. 2023, found it to go with an embedding's quality) is below a twentieth of what the sample could
    span; all-MiniLM-L6-v2 reaches three quarters on the demo's docstrings.
    """
    found = []
    if scanned and repeats > max(1.0, _REPEATED * scanned):
        found.append(f"{repeats:,} of {scanned:,} rows examined have exactly the same vector as a row with a different text.")
    if (zeros := int((facts.norms_R < 1e-6).sum())) > 0:
        found.append(f"{zeros:,} of {facts.rows:,} sampled vectors have length 0.")
    if facts.distinct < _ENOUGH_ROWS:
        return found
    if facts.mean_cosine > _ALIKE:
        found.append(f"Any two vectors are nearly the same: their cosine is {facts.mean_cosine:.3f} on average (healthy: below {_ALIKE}).")
    possible = min(facts.dimensions, facts.distinct - 1)
    if facts.effective_dimensions < _FLAT * possible:
        used = f"{facts.effective_dimensions:.1f} of {possible}"
        found.append(f"Effectively, the vectors use only {used} dimensions that they could span (healthy: more than {_FLAT:.0%}).")
    return found


def _mean_cosine(units_UD: npt.NDArray[np.float32]) -> float:
    """Over all pairs, from the length of the sum: |sum|^2 is U plus twice the sum over pairs."""
    rows = len(units_UD)
    if rows < 2:
        return 0.0
    total = units_UD.sum(axis=0, dtype=np.float64)
    return float((total @ total - (units_UD.astype(np.float64) ** 2).sum()) / (rows * (rows - 1)))


def _principal(centred_UD: npt.NDArray[np.float32], shown_RD: npt.NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Variances along the principal axes, largest first, and `shown_RD` on the first two; the largest entry of an axis is positive."""
    centred = centred_UD.astype(np.float64)
    if centred.shape[0] < centred.shape[1]:  # the smaller of the two Gram matrices has the same spectrum
        values, left = np.linalg.eigh(centred @ centred.T)
        axes = centred.T @ left[:, ::-1][:, :2]
        axes /= np.maximum(np.linalg.norm(axes, axis=0), 1e-30)
    else:
        values, right = np.linalg.eigh(centred.T @ centred)
        axes = right[:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    plane = np.zeros((len(shown_RD), 2))
    plane[:, : axes.shape[1]] = shown_RD @ axes
    return np.maximum(values[::-1], 0.0), plane


def _effective_rank(variances: Floats) -> float:
    """Exponential of the entropy of the singular values' shares."""
    singular = np.sqrt(variances)
    if singular.sum() <= 1e-9:
        return 0.0
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _neighbours(distinct: npt.NDArray[np.int64], cosines_UU: npt.NDArray[np.float32]) -> list[Neighbours]:
    """A few rows, spread over the sample, with the nearest others; rows with the same vector count once."""
    if len(distinct) < 2:
        return []
    anchors = np.unique(np.linspace(0, len(distinct) - 1, ANCHORS + 2).astype(int)[1:-1])
    found = []
    for anchor in anchors:
        nearest = np.argsort(-cosines_UU[anchor], kind="stable")[: min(NEIGHBOURS, len(distinct) - 1)]
        found.append(Neighbours(int(distinct[anchor]), [(int(distinct[other]), float(cosines_UU[anchor, other])) for other in nearest]))
    return found
