"""An Iceberg table with a delete file, as engines that merge on reading write it; pyiceberg reads such tables and writes none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestWriterV2,
    write_manifest_list,
)
from pyiceberg.table import Table
from pyiceberg.typedef import Record

SNAPSHOT = 4242
POSITION_FIELDS = {"file_path": (pa.string(), "2147483546"), "pos": (pa.int64(), "2147483545")}


class _DeletesWriter(ManifestWriterV2):
    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


def delete_first_row(table: Table, content: DataFileContent = DataFileContent.POSITION_DELETES) -> str:
    """Delete the first row of a data file by a delete file of its own; the metadata file of the new snapshot."""
    [target, *_] = [task.file.file_path for task in table.scan().plan_files()]
    place = table.location()
    deletes = f"{place}/data/deletes.parquet"
    schema = pa.schema([pa.field(name, kind, False, {"PARQUET:field_id": number}) for name, (kind, number) in POSITION_FIELDS.items()])
    pq.write_table(pa.table([[target], [0]], schema=schema), deletes.removeprefix("file://"))
    file = DataFile.from_args(
        content=content,
        file_path=deletes,
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=1,
        file_size_in_bytes=Path(deletes.removeprefix("file://")).stat().st_size,
        equality_ids=[1] if content is DataFileContent.EQUALITY_DELETES else None,
    )
    entry = ManifestEntry.from_args(status=ManifestEntryStatus.ADDED, snapshot_id=SNAPSHOT, data_file=file)
    with _DeletesWriter(table.spec(), table.schema(), table.io.new_output(f"{place}/metadata/m.avro"), SNAPSHOT, "null") as writer:
        writer.add(entry)
        manifest = writer.to_manifest_file()
    return _commit(table, manifest)


def _commit(table: Table, manifest: Any) -> str:
    before = table.current_snapshot()
    assert before is not None
    listed, number = f"{table.location()}/metadata/snap-{SNAPSHOT}.avro", (before.sequence_number or 0) + 1
    with write_manifest_list(2, table.io.new_output(listed), SNAPSHOT, before.snapshot_id, number, "null") as writer:
        writer.add_manifests([manifest, *before.manifests(table.io)])
    newest = Path(table.metadata_location.removeprefix("file://"))
    metadata = json.loads(newest.read_text())
    snapshot = {**metadata["snapshots"][-1], "snapshot-id": SNAPSHOT, "sequence-number": number, "manifest-list": listed}
    metadata["snapshots"].append(snapshot | {"parent-snapshot-id": before.snapshot_id})
    metadata |= {"current-snapshot-id": SNAPSHOT, "last-sequence-number": number}
    metadata["refs"]["main"]["snapshot-id"] = SNAPSHOT
    made = newest.with_name(f"{int(newest.name.partition('-')[0]) + 1:05}-deleted.metadata.json")
    made.write_text(json.dumps(metadata))
    return f"file://{made}"
