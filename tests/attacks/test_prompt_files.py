"""Files of prompts of a few hundred bytes that stand for gigabytes, or claim what they do not hold."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LIMIT = 4 * 2**30  # bytes of address space; what reads beside torch takes 1 GiB
CHILD = """
import resource, sys
from pathlib import Path
from grpo.config import PromptsConfig
from grpo.errors import GrpoError
from grpo.prompts import memory
from grpo.prompts.rows import normalised
resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
memory.MEMORY_BYTES = 2**29
for name in sys.argv[1:]:
    try:
        print(name, 0, sum(1 for _ in normalised(PromptsConfig(source=name), Path())))
    except GrpoError as error:
        print(name, error.exit_code, str(error).replace("\\n", "<newline>"))
"""


def same(value: str, rows: int) -> pa.Table:
    return pa.table(
        {"prompt": pa.DictionaryArray.from_arrays(pa.nulls(rows, pa.int32()).fill_null(0), [value])}
    )


def footer(names: list[str], rows: int, depth: int = 0) -> bytes:
    """A Parquet file without row groups: columns of text, and one below `depth` groups; in compact Thrift."""

    def number(value: int) -> bytes:
        value, found = (value << 1) ^ (value >> 63), b""
        while value > 127:
            value, found = value >> 7, found + bytes([value & 127 | 128])
        return found + bytes([value])

    def element(name: str, children: int = 0) -> bytes:
        kind = b"" if children else b"\x15" + number(6)
        text = bytes([len(name)]) + name.encode()
        own = (b"\x25" if kind else b"\x35") + number(1) + b"\x18" + text
        return kind + own + (b"\x15" + number(children) if children else b"\x25" + number(0)) + b"\0"

    def list_of(parts: list[bytes]) -> bytes:
        size, count = len(parts), b""
        while size > 127:
            size, count = size >> 7, count + bytes([size & 127 | 128])
        return b"\xfc" + count + bytes([size]) + b"".join(parts)

    parts = [element("schema", len(names) + (depth > 0)), *map(element, names)]
    parts += [element("g", 1)] * depth + [element("leaf")] * (depth > 0)
    content = b"\x15\x02\x19" + list_of(parts) + b"\x16" + number(rows) + b"\x19\x0c\0"
    return b"PAR1" + content + struct.pack("<I", len(content)) + b"PAR1"


def write(table: pa.Table) -> Callable[[Path], object]:
    return lambda path: pq.write_table(table, path, compression="zstd")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "dictionary": (write(same("x" * 2**23, 400)), "takes more than 0.5 GiB of memory to read"),
    "long": (write(pa.table({"prompt": ["x" * 2 * 10**7]})), "has 20,000,000 characters; 16,777,216 are"),
    "messages": (
        write(pa.table({"messages": [[{"role": "user", "content": "x" * 10**7}] * 2]})),
        "has 20,000,000 characters",
    ),
    "claims": (lambda path: path.write_bytes(footer(["prompt"], 2**62)), f"has {2**62} rows, and holds 0"),
    "negative": (lambda path: path.write_bytes(footer(["prompt"], -5)), "has -5 rows, and holds 0"),
    "deep": (lambda path: path.write_bytes(footer(["prompt"], 0, 10**5)), "cannot be read as Parquet"),
    "wide": (
        write(pa.table({"prompt": ["1+1="], **{f"c{number}": [1] for number in range(10_000)}})),
        "has 10,001 columns; 10,000 are the most",
    ),
    "cut": (lambda path: path.write_bytes(b"PAR1" + b"x" * 9 + b"\xff" * 4 + b"PAR1"), "cannot be read as"),
}


def test_each_is_one_line_in_little_memory(tmp_path: Path) -> None:
    for name, (make, _) in FILES.items():
        make(tmp_path / f"{name}.parquet")
    write(same("1+1=", 5000))(tmp_path / "sound.parquet")
    names = [path.name for path in sorted(tmp_path.glob("*.parquet"))]
    assert all((tmp_path / name).stat().st_size < 2**23 for name in names)
    done = subprocess.run(
        [sys.executable, "-c", CHILD.replace("LIMIT, LIMIT", f"{LIMIT}, {LIMIT}"), *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    answers = {line.split(" ", 1)[0].removesuffix(".parquet"): line for line in done.stdout.splitlines()}
    assert answers.keys() == {*FILES, "sound"}, done.stderr
    assert answers.pop("sound") == "sound.parquet 0 5000", done.stderr
    for name, (_, part) in FILES.items():
        assert answers[name].startswith(f"{name}.parquet 3 "), answers[name]
        assert part in answers[name]
        assert "<newline>" not in answers[name]
