"""pack: data for the page: one compressed block of text that no content can break out of.

A block is base64 of gzip of: the length of a JSON document (4 bytes, little-endian), the document, then its
columns, each starting at a multiple of 8 bytes. data.js reads it. Base64 has no character that ends a
script element, so what a model wrote never stands in the page as itself.
"""

import base64
import gzip
import json
from typing import Any

import numpy as np

_LEVEL = 5  # 9 is three times slower and 2 % smaller
_DTYPES = {"uint8", "uint16", "uint32", "int32", "float32"}


def pack(document: Any, columns: dict[str, np.ndarray] | None = None) -> str:
    """A block of a JSON document and its columns (name -> one-dimensional array)."""
    arrays = {name: np.ascontiguousarray(array) for name, array in (columns or {}).items()}
    assert all(str(array.dtype) in _DTYPES for array in arrays.values())
    places, offset = {}, 0
    for name, array in arrays.items():
        places[name] = {"type": str(array.dtype), "offset": offset, "length": len(array)}
        offset += _padded(array.nbytes)
    head = json.dumps({"document": document, "columns": places}, allow_nan=False).encode()
    head = head.ljust(_padded(len(head) + 4) - 4)
    parts = [len(head).to_bytes(4, "little"), head]
    for array in arrays.values():
        parts.append(array.tobytes().ljust(_padded(array.nbytes), b"\0"))
    return pack_bytes(b"".join(parts))


def pack_bytes(content: bytes) -> str:
    """Base64 of gzip of `content`; the same content gives the same text."""
    return base64.b64encode(gzip.compress(content, _LEVEL, mtime=0)).decode("ascii")


def _padded(size: int) -> int:
    return (size + 7) // 8 * 8
