"""Reads the records of an offline W&B run file.

The file is a 7-byte header followed by 32 KiB blocks of records in LevelDB's log format: each
chunk has a CRC32 over its type and data, a length and a type (whole, first, middle, last).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE_HEADER = struct.Struct("<4sHB")
_CHUNK_HEADER = struct.Struct("<IHB")
_BLOCK = 32 * 1024
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records(path: Path) -> Iterator[bytes]:
    """Yield the payload of each record; raise ValueError for a damaged file."""
    data = path.read_bytes()
    if _FILE_HEADER.unpack_from(data) != (b":W&B", 0xBEE1, 0):
        raise ValueError(f"{path} is not a W&B run file")
    position, parts = _FILE_HEADER.size, []
    while position < len(data):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _CHUNK_HEADER.size:
            position += left_in_block
            continue
        crc, length, kind = _CHUNK_HEADER.unpack_from(data, position)
        position += _CHUNK_HEADER.size
        chunk = data[position : position + length]
        position += length
        if zlib.crc32(bytes([kind]) + chunk) != crc:
            raise ValueError(f"{path} has a damaged record")
        parts = [chunk] if kind in (_WHOLE, _FIRST) else [*parts, chunk]
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)


def history(path: Path) -> list[dict[str, Any]]:
    """Return every logged row of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for payload in records(path):
        record = Record.FromString(payload)
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                target = row
                for key in outer:
                    target = target.setdefault(key, {})
                target[last] = json.loads(item.value_json)
            rows.append(row)
    return rows


def config(path: Path) -> dict[str, Any]:
    """Return the configuration of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, Any] = {}
    for payload in records(path):
        record = Record.FromString(payload)
        updates = []
        if record.WhichOneof("record_type") == "run":
            updates = [*record.run.config.update]
        if record.WhichOneof("record_type") == "config":
            updates = [*record.config.update]
        found |= {".".join(u.nested_key) or u.key: json.loads(u.value_json) for u in updates}
    return found


def metrics(path: Path) -> dict[str, dict[str, Any]]:
    """Return the definitions made by `define_metric`, by name."""
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import Record

    defined = {}
    for payload in records(path):
        record = Record.FromString(payload)
        if record.WhichOneof("record_type") == "metric":
            metric = MessageToDict(record.metric, preserving_proto_field_name=True)
            defined[metric.get("name", metric.get("glob_name"))] = metric
    return defined
