import errno
import os
from pathlib import Path

import pytest

from scgpt import files
from scgpt.errors import EXIT_FAILED, EXIT_USAGE, ConfigError, explain


def test_a_full_disk_is_told_with_the_path_and_what_to_do(tmp_path: Path):
    with pytest.raises(OSError, match="No space left") as caught, files.publish(tmp_path / "release"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error = explain(caught.value)
    assert error is not None
    assert error.exit_code == EXIT_FAILED
    assert str(error) == (f"No space left on device ({tmp_path / 'release'}); make room, then give the same command "
                          "again: what is finished is kept")


def test_the_temporary_name_is_never_shown(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught:
        files.write_bytes(tmp_path / "missing" / "a", b"")
    assert str(explain(caught.value)) == (f"No such file or directory ({tmp_path / 'missing' / 'a'}); check the path, "
                                          "its permissions and the disk")


def test_a_sentence_without_a_number_is_kept_beside_the_path(tmp_path: Path):
    with pytest.raises(OSError, match="file write failed") as caught, files.publish(tmp_path / "a"):
        raise OSError("file write failed: errno = 28")   # as HDF5 does
    assert str(explain(caught.value)) == (f"file write failed: errno = 28 ({tmp_path / 'a'}); check the path, "
                                          "its permissions and the disk")


def test_another_file_s_error_keeps_its_own_name(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught, files.publish(tmp_path / "a"):
        (tmp_path / "source").read_bytes()
    assert explain(caught.value).where == str(tmp_path / "source")


@pytest.mark.parametrize("error", [
    MemoryError(), MemoryError("Unable to allocate 9 TiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."),
])
def test_memory_that_is_used_up_says_what_to_make_smaller(error: Exception):
    assert str(explain(error)).startswith("the memory is used up: ")
    assert "micro_batch_size" in explain(error).fix


def test_a_package_that_is_missing_names_its_extra():
    error = explain(ModuleNotFoundError("No module named 'ray._private'", name="ray._private"))
    assert error.exit_code == EXIT_USAGE
    assert "'ray'" in error.what
    assert "[data]" in error.fix


def test_a_name_with_line_breaks_leaves_it_one_line():
    error = ConfigError("a\nb is wrong", where="/x/y\r\nz", fix="rename it")
    assert str(error) == "a b is wrong (/x/y z); rename it"


def test_a_fault_of_the_program_is_not_explained_away():
    known = ConfigError("wrong")
    assert explain(known) is known
    assert explain(ModuleNotFoundError("No module named 'typo'", name="typo")) is None
    assert explain(RuntimeError("assertion")) is None
