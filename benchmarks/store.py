"""How fast the store reads from S3: pyarrow's client, which it uses for tables and large files, beside s3fs, which it used.

    python benchmarks/store.py [--megabytes 200] [--files 64] [--rounds 5] [--json FILE]
        [--out benchmarks/results/store.md]

The server is that of the tests (moto, in a process of its own on this machine), or with CATID2_TEST_S3=1 the one that the
AWS_… variables of the environment point at. The ways take turns, and medians are compared; MB/s are of the bytes in S3.
    s3fs      `cat_file`, `get_file`, and tables through `FSSpecHandler`
    pyarrow   `S3FileSystem`, its file opened and read to its end, or a table by its path
    store     what `Store` does today
The last line printed is one JSON object.
"""

import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from harness import finish, in_turns, machine, medians, parser_of, rounded, table

from catid2_ray.artifacts.s3 import arrow_client
from catid2_ray.artifacts.store import Store

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.s3_server import new_bucket, s3_server  # noqa: E402

RECORDS, ROWS, WIDTH = 50, 5000, 64


def cases(store: Store, folder: Path, files: int) -> dict[str, tuple[int, dict]]:
    """What is read → (bytes in S3, way → what to call); writes the objects first."""
    fs, arrow = store.fs, arrow_client(store.fs, store.root.split("/")[0])
    handler, target = pafs.PyFileSystem(pafs.FSSpecHandler(fs)), folder / "copy"
    parts, record, big = [f"parts/part-{i:05d}.parquet" for i in range(files)], "record.json", "big"
    vectors = np.random.default_rng(0).random(ROWS * WIDTH, dtype=np.float32)
    rows = pa.table({"id": [f"p{i}" for i in range(ROWS)], "v": pa.FixedSizeListArray.from_arrays(vectors, WIDTH)})
    for name in parts:
        store.write_table(name, rows)
    store.write(record, b"x" * 1000)

    def whole(name):
        with arrow.open_input_file(store.path(name)) as source:
            return source.read_buffer()

    def streamed(opened):
        while opened.read(1 << 16):
            pass

    def buffered():
        with (
            arrow.open_input_file(store.path(big)) as source,
            pa.PythonFile(io.BufferedReader(source, 8 << 20)) as file,
        ):
            streamed(file)

    def stored_stream():
        with store.open_stream(big) as source:
            streamed(source)

    def tables(read):
        return lambda: [read(name) for name in parts]

    def groups(filesystem):
        return tables(lambda name: pq.ParquetFile(store.path(name), filesystem=filesystem).read_row_groups([0]))

    def from_path(filesystem, columns=None):
        return tables(lambda name: pq.read_table(store.path(name), filesystem=filesystem, columns=columns))

    one = ["id"]
    in_parts = sum(store.sizes("parts").values())
    return {
        f"{RECORDS} records of 1 kB": (
            RECORDS * 1000,
            {
                "s3fs": lambda: [fs.cat_file(store.path(record)) for _ in range(RECORDS)],
                "pyarrow": lambda: [whole(record) for _ in range(RECORDS)],
                "store": lambda: [store.read(record) for _ in range(RECORDS)],
            },
        ),
        "one object into memory": (
            store.size(big),
            {
                "s3fs": lambda: fs.cat_file(store.path(big)),
                "pyarrow": lambda: whole(big),
                "store": lambda: store.read(big),
            },
        ),
        "one object to disk": (
            store.size(big),
            {
                "s3fs": lambda: fs.get_file(store.path(big), str(target)),
                "pyarrow": lambda: target.write_bytes(whole(big)),
                "store": lambda: store.download(big, target),
            },
        ),
        "one object as a stream": (
            store.size(big),
            {
                "s3fs": lambda: streamed(handler.open_input_file(store.path(big))),
                "pyarrow": buffered,
                "store": stored_stream,
            },
        ),
        f"{files} tables": (
            in_parts,
            {"s3fs": from_path(handler), "pyarrow": from_path(arrow), "store": tables(store.read_table)},
        ),
        f"{files} tables, one column of two": (
            in_parts,
            {
                "s3fs": from_path(handler, one),
                "pyarrow": from_path(arrow, one),
                "store": tables(lambda name: store.read_table(name, columns=one)),
            },
        ),
        f"{files} row groups": (
            in_parts,
            {
                "s3fs": groups(handler),
                "pyarrow": groups(arrow),
                "store": tables(lambda name: store.parquet_file(name).read_row_groups([0])),
            },
        ),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--files", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server", default="moto", help="what the server is called in the results")
    options = parser.parse_args()
    with s3_server() as environment, tempfile.TemporaryDirectory() as folder:
        os.environ.update(environment)
        store = Store(f"{new_bucket(environment)}/benchmark")
        store.write("big", os.urandom(1 << 20) * options.megabytes)
        results = {}
        for what, (size, ways) in cases(store, Path(folder), options.files).items():
            in_turns(ways, turns=1)  # which does not count
            results[what] = {"megabytes": size / 1e6, **medians(in_turns(ways, turns=options.rounds))}
            print(what, results[what], flush=True)
        store.delete_folder("")
    names = ["read", "MB", "s3fs, s", "pyarrow, s", "store, s", "store, MB/s", "s3fs ÷ store"]
    rows = [
        [what, r["megabytes"], r["s3fs"], r["pyarrow"], r["store"], r["megabytes"] / r["store"], r["s3fs"] / r["store"]]
        for what, r in results.items()
    ]
    text = (
        f"# Reading from S3\n\nWritten by `benchmarks/store.py`: server {options.server} on the same machine, {options.rounds} "
        f"rounds, medians. Machine: {machine()}.\n\n{table(names, rows)}"
    )
    figures = rounded({"server": options.server, "results": results, "machine": machine()})
    finish(figures, lambda _: text, options)


if __name__ == "__main__":
    main()
