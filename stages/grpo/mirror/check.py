"""check: every byte of a mirror against its manifests, and those against the run: `grpo verify --mirror`."""

from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

from grpo.artifacts import MANIFEST, ActiveRun, Manifest, check_recorded
from grpo.console import printable, stdout_console
from grpo.errors import CorruptError, InputError, UsageError
from grpo.mirror import layout
from grpo.mirror.driver import mirrored
from grpo.mirror.layout import Place
from grpo.mirror.restore import Source
from grpo.mirror.upload import committed


@dataclass
class MirrorReport:
    """What was read, what is damaged, and where the mirror is not what the run is."""

    address: str
    files: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    again: list[Place] = field(default_factory=list)
    """Damaged outputs that can be copied once more: the run has them."""
    behind: list[str] = field(default_factory=list)
    """Outputs of the run that are not there as they are here: the next command copies them."""
    beyond: list[str] = field(default_factory=list)
    """Outputs there that the run has not."""

    @property
    def exit_code(self) -> int:
        """0, or 6 where something is damaged."""
        return CorruptError.exit_code if self.damaged else 0

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        values = {key: value for key, value in self.__dict__.items() if key != "again"}
        return {**values, "exit": self.exit_code}


def examine(run: ActiveRun) -> MirrorReport:
    """Read all of a run's mirror. Raises UsageError (exit 2) where it has none, or nothing is there."""
    mirror = run.config.artifacts.mirror
    if mirror is None:
        raise UsageError("verify --mirror: artifacts.mirror is null; set it to the mirror's address")
    source = Source(f"{mirror}/{run.path.name}")
    report, places = MirrorReport(source.address), layout.in_order(source.held.manifests)
    with run.console.progress("verify --mirror", len(places), "outputs") as advance:
        for place in places:
            run.console.stop_requested()
            _look_at(run, source, place, report)
            advance(1)
    for name, key in source.held.sources.items():
        if sha256(source.note(key)).hexdigest() != name[:64]:
            way = "remove it, and the next command copies it"
            report.damaged.append(f"{source.address}/{key}: content changed since it was kept; {way}")
    here = committed(run)
    report.behind += [layout.text_of(place) for place in here if place not in source.held.manifests]
    report.beyond = [layout.text_of(place) for place in places if place not in here]
    return report


def _look_at(run: ActiveRun, source: Source, place: Place, report: MirrorReport) -> None:
    own = run.folder(*place) / MANIFEST
    try:
        manifest, content = source.manifest(place)
        if own.exists() and own.read_bytes() != content:
            report.behind.append(layout.text_of(place))
        _check_files(source, place, manifest, report)
    except (CorruptError, InputError) as error:
        report.damaged.append(str(error))
        report.again += [place] * own.exists()


def copy_again(run: ActiveRun, report: MirrorReport) -> None:
    """Replace the damaged copies of what is whole here. Raises as mirrored()."""
    with run.console.signals(), run.lock(run.console), mirrored(run, removed_too=False, again=report.again):
        pass


def _check_files(source: Source, place: Place, manifest: Manifest, report: MirrorReport) -> None:
    base = layout.files_folder(place, manifest.fingerprint)
    for record in manifest.files:
        key = layout.file_key(base, record)
        digest, num_bytes = sha256(), 0
        try:
            for piece in source.store.read(f"{source.name}/{key}", record.bytes):
                digest.update(piece)
                num_bytes += len(piece)
        except FileNotFoundError:
            raise CorruptError(f"{source.address}/{key}: missing, though its manifest lists it") from None
        check_recorded(record, (num_bytes, digest.hexdigest()), f"{source.address}/{key}")
        report.files += 1
        report.bytes += num_bytes


def print_mirror(report: MirrorReport, discarded: bool) -> None:
    """The report as a person reads it. discarded: damaged copies have been replaced already."""
    say = partial(stdout_console().print, markup=False, highlight=False, soft_wrap=True)
    for text in report.damaged:
        say(printable(f"damaged  {text}"))
    for kind, texts in (("behind", report.behind), ("beyond", report.beyond)):
        for text in texts:
            say(f"{kind}   {text}")
    size = f"{report.files:,} files ({report.bytes / 2**20:,.1f} MiB) read"
    say(f"mirror {report.address}: {size}; {len(report.damaged)} damaged, {len(report.behind)} behind")
    if report.again:
        first = "replaced" if discarded else "`grpo verify --mirror --discard` replaces them"
        say(f"damaged copies of outputs that are whole here: {first}")
