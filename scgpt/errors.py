"""What went wrong, where, and what to do: every failure a user can mend is one of these.

Exit codes of every command: 0 done, 1 failed, 2 bad usage or configuration, 75 interrupted: the same command continues.
"""
import errno

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 75


class ScgptError(Exception):
    """A failure told in one sentence.

    Args:
        what: what is wrong, with the offending value.
        where: file, row range, key or cell where it was found; None where `what` says it.
        fix: what the user should do next.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.what} ({self.where})"
        text = text if self.fix is None else f"{text}; {self.fix}"
        return " ".join(text.splitlines())   # of a name with line breaks in it

    def __reduce__(self) -> tuple[object, ...]:
        """Keep all three parts across process borders (Ray pickles exceptions)."""
        return _rebuild, (type(self), self.what, self.where, self.fix)


class ConfigError(ScgptError):
    """The command line or a configuration is wrong: nothing was started."""

    exit_code = EXIT_USAGE


class SourceError(ScgptError):
    """An input atlas cannot be read, or is not what it claims to be."""


class DataError(ScgptError):
    """A corpus, a shard or a batch breaks its format or its invariants."""


class CheckpointError(ScgptError):
    """A checkpoint or a release is missing, torn or does not fit."""


def _rebuild(cls: type[ScgptError], what: str, where: str | None, fix: str | None) -> ScgptError:
    return cls(what, where=where, fix=fix)


_EXTRAS = {"torch": "model", "deepspeed": "train", "wandb": "train", "ray": "data", "anndata": "data", "h5py": "data",
           "hdf5plugin": "data", "scipy": "data", "datasets": "data", "tiledbsoma": "census", "fsspec": "data",
           "zarr": "zarr", "s3fs": "remote", "aiohttp": "remote", "matplotlib": "all"}


def explain(error: BaseException) -> ScgptError | None:
    """The sentence for what a user can mend, whoever raised it; None for what must be a fault of the program."""
    if isinstance(error, ScgptError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return _explain_missing(error)
    if isinstance(error, OSError):
        return _explain_os(error)
    if (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error)):   # torch's: a class of its own on GPUs, only words on CPUs
        return ScgptError(f"the memory is used up: {(str(error).splitlines() or ['no more can be had'])[0]}",
                          fix="make the model, batch.micro_batch_size or objective.context_length smaller")
    return None


def _explain_missing(error: ModuleNotFoundError) -> ConfigError | None:
    """For a package that an extra of ours brings."""
    module = (error.name or "").split(".")[0]
    if module not in _EXTRAS:
        return None
    return ConfigError(f"this needs the package '{module}', which is not installed",
                       fix=f"in a clone, install it with: pip install '.[{_EXTRAS[module]}]'")


def _explain_os(error: OSError) -> ScgptError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ScgptError(error.strerror or str(error) or type(error).__name__,
                      where=None if error.filename is None else str(error.filename),
                      fix="make room, then give the same command again: what is finished is kept" if full else
                          "check the path, its permissions and the disk")
