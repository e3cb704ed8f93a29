"""Build a corpus: plan, claim the directory, run the passes on threads or on Ray, commit."""
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.build_dir import BuildDir, claim, finished
from data_pipeline.commit import commit, refuse_mended
from data_pipeline.config import CorpusConfig
from data_pipeline.estimate import estimate
from data_pipeline.passes import carry_out, timed
from data_pipeline.plan import Plan, make_plan
from data_pipeline.progress import Progress
from data_pipeline.ray_workers import has_started, ray_workers
from data_pipeline.workers import Threads, Workers, disk_errors
from scgpt.data import Manifest, verify_corpus
from scgpt.errors import ConfigError, DataError

# Starting Ray costs some 10 s of CPU; what threads lose to the interpreter's lock is less than that below this much
# work of one core.
_RAY_PAYS_S = 60.0
_VALUE_S = 4e-8, 1e-6   # of one core for a stored value, from the plainest source to the slowest: a sample tells more


@dataclass(frozen=True, slots=True)
class BuildResult:
    """A finished corpus, who did the work, and how long the stages took: plan, tokenise, duplicates, merge, commit."""

    manifest: Manifest
    seconds: Mapping[str, float]   # empty where the corpus was complete already
    workers: str = ""              # likewise


def build(config: CorpusConfig, out: Path, *, ray_address: str | None = None, fresh: bool = False,
          progress: Progress | None = None) -> BuildResult:
    """Make the corpus of `config` in the directory `out`, or finish it; a complete one is checked and left alone.

    Args:
        config: what goes into the corpus, and who does the work.
        out: its directory; every node of the cluster must see it.
        ray_address: a Ray cluster to join, "local" for one that starts and ends with the build; None: RAY_ADDRESS, else
            as `config.workers` says.
        fresh: replace what another build has left in `out`.
        progress: where to tell how far it is.

    Raises ScgptError: see make_plan and claim; SourceError when a source turns out to be damaged.
    """
    out = out.absolute()   # workers have working directories of their own
    progress = progress or Progress()
    seconds: dict[str, float] = {}
    with timed(seconds, "plan"):
        plan = make_plan(config)
    with claim(out, plan, fresh=fresh) as directory:
        if finished(directory):
            manifest = _verified(out)
            refuse_mended(plan, manifest)
            return BuildResult(manifest, {})
        with _workers(plan, directory, ray_address) as workers, progress:
            results = carry_out(directory, plan, workers, progress, seconds)
        with timed(seconds, "commit"), disk_errors(out):
            manifest = commit(directory, plan, results, timing={
                "workers": str(workers), "seconds": {name: round(value, 3) for name, value in seconds.items()}})
    return BuildResult(manifest, seconds, str(workers))


def _verified(out: Path) -> Manifest:
    try:
        return verify_corpus(out)
    except DataError as error:
        error.fix = "restore the file, or build the corpus again with --fresh"
        raise


def _workers(plan: Plan, directory: BuildDir, ray_address: str | None) -> AbstractContextManager[Workers]:
    """Those that the address or the configuration names, else threads where Ray's start would not be earned back."""
    wish = plan.config.workers
    if wish == "threads" and ray_address is not None:
        raise ConfigError("threads of this process shall do the work, and a Ray cluster too", where=ray_address,
                          fix="leave out --ray-address, or workers: threads")
    address = ray_address or os.environ.get("RAY_ADDRESS")
    if wish == "threads" or (wish == "auto" and address is None and not has_started() and not ray_pays(plan)):
        return nullcontext(Threads(directory.out))
    return ray_workers(address, directory)


def ray_pays(plan: Plan) -> bool:
    """Whether a plan is so much work that it is done sooner on a Ray that has to be started for it."""
    least, most = (plan.n_values * seconds for seconds in _VALUE_S)
    if most < _RAY_PAYS_S or least > _RAY_PAYS_S:
        return least > _RAY_PAYS_S
    judged = estimate(plan)
    return judged is None or judged.core_s > _RAY_PAYS_S
