"""The directory of a build: what may be in it, what of it is finished, and who may continue it.

    DIR/.lock              held by a living build; stays, holds nothing
    DIR/.build/plan.json   the hash of the plan, and the times of modification of its sources
    DIR/.build/records/    one JSON file a finished task: its result, and the files it made with bytes and crc32
    DIR/.build/runs/       the sorted cells of each block
    DIR/.build/train/ ...  finished shards, until the commit moves them to DIR/train/ ... (train.zarr/ likewise)
    DIR/.build/merged/     of the Zarr form: the merged shards that its stores are made of

A record is written after the files it names. It counts when it carries the hash of the plan and its files are whole: a
CRC tells what a disk did to a file, at a tenth of the cost of the sha256 that the manifest gives to what stays.
"""
import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.cells import SPLITS
from data_pipeline.plan import Plan
from scgpt import files
from scgpt.data import Manifest
from scgpt.data.manifest import MANIFEST, VOCAB
from scgpt.data.schema import FORMAT
from scgpt.errors import ConfigError, ScgptError

BUILD, LOCK, RUN = ".build", ".lock", "run.json"
_READ_BYTES = 1 << 20
STORES = tuple(f"{split}.zarr" for split in SPLITS)
_OURS = {BUILD, LOCK, RUN, MANIFEST, VOCAB, "report.html", "report.json", *SPLITS, *STORES}

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BuildDir:
    """Where a build keeps its work, for one plan."""

    out: Path
    plan_sha256: str

    @property
    def path(self) -> Path:
        """DIR/.build."""
        return self.out / BUILD

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.path / "runs"

    @property
    def merged(self) -> Path:
        """The folder of the merged shards of the Zarr form."""
        return self.path / "merged"

    def shards(self, split: str) -> Path:
        """The folder of a split's finished shards, before the commit."""
        return self.path / split

    def read_record(self, task: str) -> Record | None:
        """The result of a finished task whose files are whole; None: it must be done (again)."""
        try:
            record = json.loads((self.path / "records" / f"{task}.json").read_bytes())
        except (FileNotFoundError, ValueError):   # ValueError: torn by a disk that lost power
            return None
        if record["plan"] != self.plan_sha256 or not all(self._is_whole(entry) for entry in record["files"]):
            return None
        result: Record = record["result"]
        return result

    def write_record(self, task: str, result: Record, made: Sequence[Path]) -> Record:
        """Say that a task is done, and which files below DIR/.build it made."""
        entries = [{"file": path.relative_to(self.path).as_posix(), "bytes": path.stat().st_size,
                    "crc32": _crc32(path)} for path in made]
        files.write_json(self.path / "records" / f"{task}.json",
                         {"plan": self.plan_sha256, "files": entries, "result": result})
        return result

    def remove_temporaries(self) -> None:
        """Remove what killed attempts left, in all folders."""
        for left in list(self.path.rglob(f"{files.TEMPORARY_PREFIX}*")):
            files.remove(left)

    def _is_whole(self, entry: Record) -> bool:
        path = self.path / entry["file"]
        return path.is_file() and path.stat().st_size == entry["bytes"] and _crc32(path) == entry.get("crc32")


def _crc32(path: Path) -> int:
    from isal import isal_zlib

    value = 0
    with path.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            value = isal_zlib.crc32(piece, value)
    return value


@contextmanager
def claim(out: Path, plan: Plan, *, fresh: bool) -> Iterator[BuildDir]:
    """Take a directory for a plan: make it or continue it, locked against other builds while the block runs.

    Leaves nothing behind when the block raises before any task has finished and nothing was there before.

    Raises DataError when another build holds it; ConfigError when it cannot be made or written, or holds anything but
    the work of this very plan (with `fresh`, what other builds have left is removed first; never what no build made).
    """
    build, existed = BuildDir(out, plan.sha256), out.exists()
    for source in plan.sources:
        if not source.path.is_remote and source.path.path.resolve() in out.resolve().parents:
            raise ConfigError(f"the directory lies within the source '{source.name}', which would change",
                              where=str(out), fix="give an --out beside it")
    with ExitStack() as held:
        try:
            if existed and not (out / LOCK).exists():
                _check_content(build, plan, fresh=fresh)   # before a lock is left in a directory that is not ours
            out.mkdir(parents=True, exist_ok=True)
            _lock(out, held, fresh=fresh)
            _check_content(build, plan, fresh=fresh)
            if fresh:
                _clear(build)
            _prepare(build, plan)
        except OSError as error:
            raise ConfigError(f"the directory cannot be used: {error.strerror}", where=str(out),
                              fix="give an --out that can be written") from error
        try:
            yield build
        except BaseException:
            if not any((build.path / "records").glob("*.json")):
                files.remove(build.path)
                if not existed and {path.name for path in out.iterdir()} <= {LOCK}:
                    files.remove(out)
            raise


def _lock(out: Path, held: ExitStack, *, fresh: bool) -> None:
    """Keep other builds out; a complete corpus that cannot be written needs no lock, for nothing is done to it."""
    try:
        held.enter_context(files.lock(out / LOCK, holder="another build", fix="wait for it, or give another --out"))
    except OSError as error:
        if fresh or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not (out / MANIFEST).exists():
            raise


def finished(build: BuildDir) -> bool:
    """Whether the corpus of this plan is complete; what an interrupted commit has left is tidied."""
    if not (build.out / MANIFEST).exists():
        return False
    files.remove(build.path)
    return True


def _check_content(build: BuildDir, plan: Plan, *, fresh: bool) -> None:
    """Raise ConfigError unless the directory is empty, or holds work of this plan, or (`fresh`) of any build."""
    found = {path.name for path in build.out.iterdir() if not path.name.startswith(files.TEMPORARY_PREFIX)} - {LOCK}
    foreign = sorted(found - _OURS if BUILD in found or _is_ours(build.out / MANIFEST) else found)
    if foreign:
        raise ConfigError(f"the directory holds something else: {', '.join(foreign[:5])}", where=str(build.out),
                          fix="give an empty or new --out")
    held = None if fresh else _plan_held(build.out, plan)
    if held is not None and held != build.plan_sha256:
        what = "a corpus" if MANIFEST in found else "an unfinished build"
        raise ConfigError(f"the directory holds {what} of another plan (its sources, settings or package version "
                          "differ)", where=str(build.out), fix="give another --out, or --fresh to replace it")


def _is_ours(manifest: Path) -> bool:
    """Whether it is the manifest of a corpus, damaged perhaps, and not what another program calls by this name."""
    return manifest.exists() and FORMAT.encode() in manifest.read_bytes()


def _clear(build: BuildDir) -> None:
    """Remove a corpus or an unfinished build; DIR/.build, by which it is known as one, goes last."""
    build.path.mkdir(exist_ok=True)
    files.remove(build.out / MANIFEST)   # first: from here on there is no corpus
    for name in sorted(_OURS - {LOCK, MANIFEST, BUILD}):
        files.remove(build.out / name)
    files.remove(build.path)


def _plan_held(out: Path, plan: Plan) -> str | None:
    """The plan that a directory belongs to: of the corpus in it, else of the unfinished build.

    A corpus that was converted since is of no plan: its `shards` are not those that its plan asked for.
    """
    if (out / MANIFEST).exists():
        try:
            manifest = Manifest.read(out)
            same = manifest.config["shards"] == plan.config.portable()["shards"]
            return manifest.plan_sha256 if same else ""
        except ScgptError as error:
            error.fix = "give another --out, or --fresh to replace it"
            raise
    try:
        return str(json.loads((out / BUILD / "plan.json").read_bytes())["plan"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _prepare(build: BuildDir, plan: Plan) -> None:
    """Lay out DIR/.build; take back what an interrupted commit had moved; start anew when a source was touched."""
    if (build.out / MANIFEST).exists():
        return
    files.remove_temporaries(build.out)
    content = {"plan": plan.sha256, "states": [source.state for source in plan.sources]}
    try:
        untouched = json.loads((build.path / "plan.json").read_bytes()) == content
    except (FileNotFoundError, ValueError):
        untouched = False
    if not untouched:
        files.remove(build.path)
        for name in (VOCAB, RUN, *SPLITS, *STORES):
            files.remove(build.out / name)
    for folder in ("records", "runs"):
        (build.path / folder).mkdir(parents=True, exist_ok=True)
    for name in (*SPLITS, *STORES):
        if (build.out / name).is_dir():
            files.remove(build.path / name)
            (build.out / name).rename(build.path / name)
    for split in SPLITS:
        build.shards(split).mkdir(exist_ok=True)
    build.remove_temporaries()
    if not untouched:
        files.write_json(build.path / "plan.json", content)
