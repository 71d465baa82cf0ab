"""fetch: the tables of mirrored runs in a temporary folder, for `grpo sql`: those that a query names."""

import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.artifacts import CHECKPOINT, OUTPUTS, RUN_OUTPUTS, TABLES_OF, files
from grpo.artifacts.layout import iteration_folder
from grpo.mirror.layout import NOTES
from grpo.mirror.restore import Source, write_output

_TABLES = {table: output for output in (*RUN_OUTPUTS, *OUTPUTS) for table in TABLES_OF.get(output, (output,))}
_OF_MANIFESTS = {"manifests", "timings"}
_OF_ALL = {"samples", "iterations", "eval_samples", "evals", "query_table"}
_ALWAYS = {"prompts", "eval_prompts"}  # whose columns are the user's, so that each query looks at them


def outputs_of(query: str) -> Collection[str]:
    """Outputs whose rows a query may read: those of the tables that it names; all, where a view has them."""
    words = {word.lower() for word in re.findall(r"\w+", query)}
    if words & _OF_ALL or not words & (_TABLES.keys() | _OF_MANIFESTS):
        return set(_TABLES.values())
    return {_TABLES[word] for word in words & _TABLES.keys()} | _ALWAYS


@contextmanager
def fetched(names: Collection[str], query: str) -> Iterator[list[str]]:
    """The names with s3://... replaced by folders that last as long as the `with` block.

    Raises UsageError (exit 2) for no run, ResourceError (exit 7), CorruptError (exit 6) for a changed file.
    """
    wanted = outputs_of(query)
    with tempfile.TemporaryDirectory(prefix="grpo-mirror-") as scratch:
        here = []
        for number, name in enumerate(names):
            folder = Path(scratch, str(number))
            here.append(str(_fetch(name, folder, wanted)) if name.startswith("s3://") else name)
        yield here


def _fetch(address: str, folder: Path, wanted: Collection[str]) -> Path:
    source = Source(address)
    target = folder / source.name
    files.make_folder(target, sync=False)
    for name in NOTES:
        if name in source.held.notes:
            source.write(name, target / name)
    for place, (manifest, content) in source.manifests().items():
        output, iteration = place
        if output != CHECKPOINT:
            at = target if iteration is None else target / iteration_folder(iteration)
            write_output(source, place, manifest, content, at / output, with_files=output in wanted)
    return target
