"""What went wrong, where, and what to do: every failure a user can mend is one of these."""


class ScgptError(Exception):
    """A failure told in one sentence.

    Args:
        what: what is wrong, with the offending value.
        where: file, row range, key or cell where it was found; None where `what` says it.
        fix: what the user should do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.what} ({self.where})"
        return text if self.fix is None else f"{text}; {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        """Keep all three parts across process borders (Ray pickles exceptions)."""
        return _rebuild, (type(self), self.what, self.where, self.fix)


class ConfigError(ScgptError):
    """The command line or a configuration is wrong: nothing was started."""

    exit_code = 2


class SourceError(ScgptError):
    """An input atlas cannot be read, or is not what it claims to be."""


class DataError(ScgptError):
    """A corpus, a shard or a batch breaks its format or its invariants."""


class CheckpointError(ScgptError):
    """A checkpoint or a release is missing, torn or does not fit."""


def _rebuild(cls: type[ScgptError], what: str, where: str | None, fix: str | None) -> ScgptError:
    return cls(what, where=where, fix=fix)


_EXTRAS = {"torch": "model", "deepspeed": "train", "wandb": "train", "ray": "data", "anndata": "data", "h5py": "data",
           "hdf5plugin": "data", "scipy": "data", "datasets": "data", "matplotlib": "all"}


def missing_package(error: ModuleNotFoundError) -> "ConfigError | None":
    """The sentence for a package that an extra of ours brings and that is not installed; None for any other module."""
    module = (error.name or "").split(".")[0]
    if module not in _EXTRAS:
        return None
    return ConfigError(f"this needs the package '{module}', which is not installed",
                       fix=f"in a clone, install it with: pip install '.[{_EXTRAS[module]}]'")
