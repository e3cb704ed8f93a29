"""What the message of an Arrow record batch says of its buffers: where to find a column without reading the rest.

pyarrow reads a message whole or not at all; this reads the few fields of its FlatBuffer that a part needs.
"""
import struct
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

Codec = Literal["lz4", "zstd"]


def field(metadata: Buffer, table: int, number: int) -> int:
    """The place of a field of a FlatBuffer's table; 0 where it has its default."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", metadata, vtable)[0]:
        return 0
    place = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0]
    return table + place if place else 0


def follow(metadata: Buffer, place: int) -> int:
    """Where the reference at a place leads."""
    return int(place + struct.unpack_from("<I", metadata, place)[0])


def read_metadata(metadata: memoryview) -> tuple[int, Codec | None, NDArray[np.int64]]:
    """Rows, codec (None: uncompressed) and (buffers, 2) int64 offset and bytes in the body.

    Raises ValueError, IndexError or struct.error where the bytes are no record batch's message.
    """
    message = follow(metadata, 0)
    if metadata[field(metadata, message, 1)] != 3:
        raise ValueError("not a record batch")
    batch = follow(metadata, field(metadata, message, 2))
    n_cells = struct.unpack_from("<q", metadata, field(metadata, batch, 0))[0] if field(metadata, batch, 0) else 0
    buffers = follow(metadata, field(metadata, batch, 2))
    count = struct.unpack_from("<I", metadata, buffers)[0]
    codec: Codec | None = None
    if field(metadata, batch, 3):
        compression = follow(metadata, field(metadata, batch, 3))
        codec = "zstd" if field(metadata, compression, 0) and metadata[field(metadata, compression, 0)] == 1 else "lz4"
    return n_cells, codec, np.frombuffer(metadata, np.int64, 2 * count, buffers + 4).reshape(-1, 2)
