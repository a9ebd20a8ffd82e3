"""What is measured before the first run of an output: a sample of its corpus, and what one worker makes of it. Knows no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from embedding.corpus.plan import SourceLayout, Unit, make_unit
from embedding.corpus.reader import Columns
from embedding.errors import CorpusError
from embedding.model.measure import Measured, budgets_from, measure
from embedding.model.spec import LongTexts
from embedding.run.models import model_folder
from embedding.run.sample import CHARS_PER_TOKEN, OnSample, SampleJob, embeddable_texts, read_in_time

if TYPE_CHECKING:
    from embedding.model.embedder import Embedder

_PLACES = 32
_SAMPLE_ROWS = {"cpu": 2_048, "cuda": 16_384}
"""A GPU is done with them in a moment, and its batches are larger."""
_PLACE_BYTES = 2**20
"""Of a file, at one place: long texts make a smaller sample."""
_SAMPLE_CHARS = 2**23
"""Two million tokens, more than any batch holds, take the slower tokenizer seven seconds."""


@dataclass(frozen=True, kw_only=True)
class ProbeJob(SampleJob):
    """What is measured, and how."""

    batch_tokens: int | None
    """The user's, where only the pace is asked for."""
    share: float
    """Part of a GPU that is the worker's own."""


@dataclass(frozen=True)
class Findings:
    """What was found."""

    device: str
    sample_rows: int
    row_bytes: float
    """Text, copied columns and vector of a row, on average."""
    pace: Measured


class Probe(OnSample[ProbeJob, Findings]):
    """Measures how large batches should be, and how fast they go."""

    def find(self) -> Findings:
        """Read the sample, load the model, measure.

        Raises:
            EmbeddingJobError: the sample has no text, or the model cannot be loaded.
        """
        from embedding.model.embedder import Embedder  # not for the driver, which needs only what is found
        from embedding.model.memory import DeviceMemory

        job = self._job
        texts, row_bytes = _read(job.sample, job.columns, head_chars=CHARS_PER_TOKEN * job.model.max_tokens)
        embedder = Embedder(job.model, device=job.device, threads=job.threads, folder=model_folder(job.model))
        budgets = budgets_from(job.model.max_tokens) if job.batch_tokens is None else [job.batch_tokens]
        pieces = _pieces(embedder, texts, job.long_text)
        pace = measure(embedder, DeviceMemory(job.device, job.share), pieces, budgets)
        share = len(texts) / len(pieces)
        vector_bytes = 4 * embedder.dim / (share if job.long_text.how == "chunk" else 1)
        rows_pace = replace(pace, rows_per_second=pace.rows_per_second * share)
        return Findings(embedder.description["device"], len(texts), row_bytes + vector_bytes, rows_pace)


def _pieces(embedder: Embedder, texts: Sequence[str], long: LongTexts) -> Sequence[str]:
    """What is encoded of the texts.

    Raises:
        CorpusError: nothing is.
    """
    if long.how == "truncate":
        return texts
    found = embedder.windows(long)(texts)
    places = zip(found.texts_P.tolist(), found.starts_P.tolist(), found.ends_P.tolist(), strict=True)
    if pieces := [texts[text][start:end] for text, start, end in places]:
        return pieces
    raise CorpusError("no text of the sample would be embedded")


def sample_units(layouts: Sequence[SourceLayout], device: str, limit_rows: int | None) -> list[Unit]:
    """Some rows at the beginning of row groups that are spread evenly over the corpus; a row group's beginning is read without the rest."""
    groups = list(_row_groups(layouts, limit_rows))
    places = min(_PLACES, len(groups))
    units = []
    for layout, first_row, rows in (groups[len(groups) * place // places] for place in range(places)):
        fitting = _PLACE_BYTES * layout.num_rows // max(1, layout.source.size)
        wanted = min(rows, max(1, fitting), -(-_SAMPLE_ROWS[device] // places))
        units.append(make_unit(layout.source, first_row, wanted, "sample", near=layout.mark_before(first_row)))
    return units


def _row_groups(layouts: Sequence[SourceLayout], limit_rows: int | None) -> Iterator[tuple[SourceLayout, int, int]]:
    """(file, first row, rows) of each row group, empty ones left out, as far as `limit_rows` goes."""
    remaining = sum(layout.num_rows for layout in layouts) if limit_rows is None else limit_rows
    for layout in layouts:
        for first_row, rows in zip(accumulate(layout.row_groups, initial=0), layout.row_groups, strict=False):
            if min(rows, remaining):
                yield layout, first_row, min(rows, remaining)
                remaining -= min(rows, remaining)


def _read(sample: Sequence[Unit], columns: Columns, head_chars: int) -> tuple[list[str], float]:
    """(the texts, bytes of a row as read on average); places that cannot be read are left out here, their units will say why.

    Of texts that the model reads no further than `head_chars` there are fewer.

    Raises:
        CorpusError: no text was found.
    """
    found, _ = read_in_time(sample, columns)
    texts = [text for rows in found.values() for text in embeddable_texts(rows).to_pylist()]
    if not any(texts):
        raise CorpusError("no text of the sample could be read")
    sizes = np.minimum([len(text) for text in texts], head_chars)
    enough = 1 + int(np.searchsorted(np.cumsum(sizes), _SAMPLE_CHARS))
    return texts[:enough], sum(rows.text.nbytes + rows.copied.nbytes for rows in found.values()) / len(texts)
