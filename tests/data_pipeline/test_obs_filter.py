import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.obs_filter import ObsFilter
from scgpt.errors import ConfigError

OBS = {"disease": pa.array(["normal", "flu", None, "normal"]).dictionary_encode(),
       "n_genes": pa.array([100, 200, 300, None]), "share": pa.array([0.1, 0.2, None, 0.4]),
       "is_primary_data": pa.array([True, False, True, None]), "flag": pa.array(["True", "False", "true", None]),
       "cell type": pa.array(["a", "b", "a", "b"])}


def kept(text: str) -> list[bool]:
    return ObsFilter.parse(text).keep(OBS, where="test").tolist()


@pytest.mark.parametrize(("text", "expected"), [
    ('disease == "normal"', [True, False, False, True]),
    ('disease != "normal"', [False, True, True, False]),
    ('"normal" == disease', [True, False, False, True]),
    ("n_genes >= 200", [False, True, True, False]),
    ("200 > n_genes", [True, False, False, False]),
    ("100 < n_genes <= 300", [False, True, True, False]),
    ("share > -1", [True, True, False, True]),
    ("is_primary_data", [True, False, True, False]),
    ("not is_primary_data", [False, True, False, True]),
    ("flag == True", [True, False, True, False]),
    ('disease in ["flu", "cold"]', [False, True, False, False]),
    ('disease not in ("flu",)', [True, False, True, True]),
    ('obs["cell type"] == "a" and n_genes < 200', [True, False, False, False]),
    ('obs["cell type"] == "a" or n_genes == 200', [True, True, True, False]),
])
def test_expressions_keep_the_cells_they_say(text: str, expected: list[bool]) -> None:
    assert kept(text) == expected


@pytest.mark.parametrize("text", [
    "__import__('os').system('true')", "disease.upper() == 'X'", "lambda: 1", "[c for c in disease]",
    "disease == other",
       "1 == 1", "disease is None", "disease in 'normal'", "n_genes + 1 > 2", "disease ==", "", "disease == None",
    "f'{disease}' == 'x'", "(x := 3)", "disease[0] == 'n'", "n_genes > -'1'", "not " * 5000 + "is_primary_data",
    "1", "disease == 'a' if is_primary_data else 'b'", "\0"])
def test_anything_but_comparisons_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        ObsFilter.parse(text)


def test_unknown_column_names_the_source_and_what_it_has() -> None:
    with pytest.raises(ConfigError, match="'diseas'.*lung.h5ad.*did you mean 'disease'.*n_genes"):
        ObsFilter.parse('diseas == "x"').keep(OBS, where="lung.h5ad")


@pytest.mark.parametrize("text", ['n_genes == "100"', "disease > 3", "is_primary_data == 1", "n_genes"])
def test_comparing_different_types_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="which holds"):
        kept(text)


@given(st.lists(st.sampled_from(["a", "b", "c"]) | st.none(), min_size=1), st.sampled_from(["a", "b", "x"]))
def test_categories_text_and_pandas_agree(words: list[str | None], value: str) -> None:
    plain = pa.array(words, pa.string())
    expected = (pd.Series(words, dtype=object) == value).to_numpy()
    for column in (plain, plain.dictionary_encode()):
        for text, want in (('x == "{}"', expected), ('x != "{}"', ~expected), ('x in ["{}"]', expected)):
            assert np.array_equal(ObsFilter.parse(text.format(value)).keep({"x": column}, where=""), want)
