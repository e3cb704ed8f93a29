"""The time that a plan tells: of a sample that is built for real, from sources that a few rows can be read of."""
import tempfile
from pathlib import Path

import pytest
from scipy import sparse

from data_pipeline import estimate as module
from data_pipeline.estimate import estimate
from data_pipeline.plan import make_plan
from scgpt.errors import SourceError
from tests.data_pipeline.atlases import config_of, random_counts, write_h5ad


def test_it_scales_a_sample_of_the_largest_source_and_leaves_nothing(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(module, "_SAMPLE_VALUES", 1000)
    small, large = (write_h5ad(tmp_path / f"{name}.h5ad", random_counts(1, cells, 60))
                    for name, cells in (("small", 50), ("large", 500)))
    plan = make_plan(config_of(small, large, cells={"remove_duplicates": True}))
    found = estimate(plan)
    assert found is not None
    assert found.source == "large"
    assert 900 < found.values <= 1000
    assert found.cells < 100
    assert found.core_s > 0
    assert found.wall_s == found.core_s / found.cores
    assert not list((tmp_path / "t").iterdir())


def test_no_source_is_read_whole_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", sparse.csc_matrix(random_counts(1, 50, 60)))
    monkeypatch.setattr("data_pipeline.sources.anndata_files.select_rows", None)   # it gathers rows in one scan
    assert estimate(make_plan(config_of(path))) is None


def test_a_sample_that_cannot_be_built_is_no_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(config_of(write_h5ad(tmp_path / "a.h5ad", random_counts(1, 50, 60))))
    for error in (SourceError("damaged"), OSError(28, "No space left on device")):
        def fail(*arguments: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(module, "tokenize_to_run", fail)
        assert estimate(plan) is None
