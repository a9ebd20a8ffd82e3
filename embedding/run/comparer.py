"""What a precision makes of a corpus: a sample of it, embedded in that precision and in float32. Knows no Ray."""

# Shape suffixes: P pieces of texts.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from embedding.corpus.vectors import VectorColumns
from embedding.names import Precision
from embedding.run.calibrator import CalibrationJob, sample_texts
from embedding.run.models import model_folder
from embedding.run.pieces import submit_pieces
from embedding.run.sample import OnSample

if TYPE_CHECKING:
    from embedding.model.embedder import EmbeddedTexts

LEAST_COSINE: Final = 0.999
"""Of every vector of the sample with that of the same text in fp32, for products of 8 bits to be worth having."""
_TEXTS: Final = {"cpu": 300, "cuda": 2_000}
"""A CPU needs some minutes for more, in fp8."""


@dataclass(frozen=True)
class Fidelity:
    """How near a precision stays to float32."""

    vectors: int
    """That were compared; 0 where no text of the sample would be embedded."""
    least_cosine: float
    median_cosine: float


class Comparer(OnSample[CalibrationJob, Fidelity]):
    """Compares the vectors of the job's precision with those of float32."""

    def find(self) -> Fidelity:
        """Read the sample, embed it twice as a worker does, and compare the vectors of each column.

        Raises:
            ModelError: the model cannot be loaded, or the device does not have the precision.
            EmbeddingJobError: no place of the sample can be read as asked.
        """
        from embedding.model.parity import cosines  # and with it torch: not for the driver, which needs only what is found

        texts = sample_texts(self._job)[: _TEXTS[self._job.device]]
        found, exact = (self._embedded(precision, texts) for precision in (self._job.model.precision, "fp32"))
        both_P = found.finite_R & exact.finite_R
        if not both_P.any():
            return Fidelity(0, 1.0, 1.0)
        columns = VectorColumns(self._job.model.columns)
        one, other = (columns.parts(each.vectors_RD[both_P]) for each in (found, exact))
        kept = np.concatenate([cosines(one[name], other[name]) for name in one])
        return Fidelity(int(both_P.sum()), float(kept.min()), float(np.median(kept)))

    def _embedded(self, precision: Precision, texts: Sequence[str]) -> EmbeddedTexts:
        from embedding.model.embedder import Embedder  # as above

        job = self._job
        model = replace(job.model, precision=precision)
        embedder = Embedder(model, device=job.device, threads=job.threads, folder=model_folder(model))
        return submit_pieces(embedder, embedder.windows(job.long_text)(texts), job.batch_tokens)()
