"""The report holds what the corpus holds, the page what the report holds; and a browser draws it in peace."""
import html
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import report as report_module
from data_pipeline.report import measure, write_report
from data_pipeline.report_page import FORMATS, page
from launch import cli
from scgpt.data import TokenDataset, verify_corpus
from scgpt.data.convert import ConvertConfig, convert
from scgpt.errors import ConfigError, DataError
from tests import chromium
from tests.data_pipeline.atlases import BLOOD, CHR21, build_here, config_of, random_counts, write_h5ad

EVIL = '<script>alert("x")</script> & <b>'
NUMBER = re.compile(r'<span data-from="([^"]*)" data-form="(\w+)">([^<]*)</span>')


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real cells, and a source with a hostile name, hostile genes and hostile annotations."""
    folder = tmp_path_factory.mktemp("report")
    obs = {"cell_type": [EVIL, "a&b"] * 60, "donor": [f"d{i % 7}" for i in range(120)], "n": range(120)}
    genes = [f"<i>gene{i}</i>" for i in range(50)] + ["CD3D", "INS", "GCG", "KRT19", "VWF", "SELT"]
    evil = write_h5ad(folder / "evil.h5ad", random_counts(1, 120, len(genes), 0.5), genes, obs=obs)
    config = config_of(
        BLOOD, CHR21, {"path": str(evil), "name": EVIL, "filter": "n < 100"}, cells={"min_genes": 2},
        genes={"min_gene_overlap": 0.05}, splits={"valid": 0.2}, shards={"max_bytes": 1 << 18})
    build_here(config, folder / "corpus")
    return folder / "corpus"


def at(report: Any, pointer: str) -> Any:
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        report = report[int(key) if isinstance(report, list) else key]
    return report


def numbers_of(text: str) -> list[tuple[str, str, str]]:
    return [(html.unescape(pointer), form, html.unescape(shown)) for pointer, form, shown in NUMBER.findall(text)]


def test_the_numbers_are_those_of_every_cell(corpus: Path) -> None:
    report = measure(corpus)
    splits = [TokenDataset.open(corpus, name) for name in ("train", "valid")]
    lengths = np.concatenate([split.lengths for split in splits])
    sums = np.concatenate([[split[i]["expressions"].sum() for i in range(len(split))] for split in splits])
    for key, values in (("genes_per_cell", lengths), ("counts_per_cell", sums)):
        found = report[key]
        assert found["cells"] == len(values) == report["totals"]["cells_kept"]
        assert found["mean"] == pytest.approx(values.mean())
        for name, share in (("p5", 5), ("p25", 25), ("median", 50), ("p75", 75), ("p95", 95), ("min", 0), ("max", 100)):
            assert found[name] == np.percentile(values, share, method="inverted_cdf")
        edges = found["histogram"]["edges"]
        assert found["histogram"]["cells"] == np.histogram(values, edges)[0].tolist()
        assert sum(found["histogram"]["cells"]) == len(values)
    assert report["genes_per_cell"]["above_context"] == (lengths > 1199).sum()


@given(st.lists(st.one_of(st.integers(1, 70_000).map(float), st.floats(1e-6, 1e9)), min_size=1, max_size=60))
def test_a_spread_is_that_of_the_values_one_by_one(values: list[float]) -> None:
    found = report_module.spread(*np.unique(values, return_counts=True))
    edges = np.array(found["histogram"]["edges"])
    assert (np.diff(edges) > 0).all()
    assert sum(found["histogram"]["cells"]) == len(values)
    assert found["histogram"]["cells"] == np.histogram(values, edges)[0].tolist()
    assert [found["min"], found["median"], found["p95"], found["max"]] == [
        np.percentile(values, share, method="inverted_cdf") for share in (0, 50, 95, 100)]


def test_every_cell_is_accounted_for(corpus: Path) -> None:
    report = measure(corpus)
    for source in report["sources"]:
        assert source["cells_in"] == source["cells_kept"] + sum(source["filtered"].values())
    assert report["totals"]["cells_in"] == sum(source["cells_in"] for source in report["sources"])
    assert report["totals"]["cells_filtered"] == sum(entry["cells"] for entry in report["filtered"])
    assert report["sources"][2]["filtered"] == {"filter": 20, **{reason: cells for reason, cells in
                                                                  report["sources"][2]["filtered"].items()
                                                                  if reason != "filter"}}
    for column in report["columns"].values():
        named = sum(entry["cells"] for entry in column["top"])
        assert named + column["other_cells"] + column["missing"] == report["totals"]["cells_kept"]
    assert report["totals"]["bytes"] == sum(path.stat().st_size for folder in ("train", "valid")
                                            for path in (corpus / folder).iterdir())


def test_columns_are_counted_over_both_splits(corpus: Path) -> None:
    found: Counter[str] = Counter()
    donors = {}
    for name in ("train", "valid"):
        obs = TokenDataset.open(corpus, name).obs(["cell_type", "donor"]).to_pylist()
        found.update(row["cell_type"] for row in obs if row["cell_type"] is not None)
        donors[name] = {row["donor"] for row in obs} - {None}
    report = measure(corpus)
    assert {entry["value"]: entry["cells"] for entry in report["columns"]["cell_type"]["top"]}.items() <= found.items()
    assert report["columns"]["cell_type"]["values"] == len(found)
    assert report["groups"]["donor"] == {"splits": {name: len(values) for name, values in donors.items()},
                                         "shared": len(donors["train"] & donors["valid"])}


def test_unmapped_genes_are_ranked_by_sources_then_cells(corpus: Path) -> None:
    unmapped = measure(corpus)["unmapped"]
    assert unmapped["top"][0] == {"gene": "SELT", "sources": 2, "cells": 820}
    ranks = [(-entry["sources"], -entry["cells"], entry["gene"]) for entry in unmapped["top"]]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("form", ["arrow", pytest.param("zarr", marks=pytest.mark.slow)])
def test_any_form_anywhere_gives_the_same_numbers_of_cells(corpus: Path, tmp_path: Path, form: str) -> None:
    convert(corpus, tmp_path / "other", ConvertConfig(form=form, compression="zstd" if form == "arrow" else "none"))
    expected, found = measure(corpus), measure(tmp_path / "other")
    for report in (expected, found):
        for key in ("files", "bytes"):
            report["totals"].pop(key)
    for key in ("totals", "sources", "genes_per_cell", "counts_per_cell", "columns", "groups", "unmapped", "filtered"):
        assert found[key] == expected[key]
    assert {split["form"] for split in found["splits"].values()} == {form}
    drawn = measure(tmp_path / "other")
    assert all(text == FORMATS[kind](at(drawn, pointer)) for pointer, kind, text in numbers_of(page(drawn)))
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path / "other"), f"/reports/{form}", recursive=True)
    url = f"memory://reports/{form}"
    assert {**measure(url), "corpus": None} == {**measure(tmp_path / "other"), "corpus": None}
    assert measure(url)["corpus"]["name"] == form
    with pytest.raises(ConfigError, match="--out FILE.html"):
        write_report(url)
    assert write_report(url, tmp_path / "remote.html")[0].exists()


def test_a_sample_is_every_kth_cell_of_the_corpus(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "SAMPLE_CELLS", 100)
    monkeypatch.setattr(report_module, "_FETCH_VALUES", 1000)
    counts = measure(corpus)["counts_per_cell"]
    splits = [TokenDataset.open(corpus, name) for name in ("train", "valid")]
    sums = np.concatenate([[split[i]["expressions"].sum() for i in range(len(split))] for split in splits])
    every = -(-len(sums) // 100)
    assert (counts["every"], counts["of_cells"], counts["cells"]) == (every, len(sums), len(sums[::every]))
    assert counts["mean"] == pytest.approx(sums[::every].mean())
    assert f'one in every <span data-from="/counts_per_cell/every" data-form="integer">{every}</span>.' in page(
        measure(corpus))


def test_the_page_shows_the_numbers_of_the_report(corpus: Path) -> None:
    report = measure(corpus)
    shown = numbers_of(page(report))
    assert len(shown) > 100
    for pointer, form, text in shown:
        assert text == FORMATS[form](at(report, pointer))
    assert {"/totals/cells_kept", "/sources/2/filtered/filter", "/genes_per_cell/median", "/columns/donor/values",
            "/splits/valid/cells", "/unmapped/top/0/cells", "/groups/donor/shared"} <= {entry[0] for entry in shown}


def test_whatever_a_source_is_called_is_text(corpus: Path) -> None:
    text = page(measure(corpus))
    assert html.escape(EVIL, quote=False) in text
    assert "<script" not in text
    assert "<i>gene" not in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)


def test_the_same_corpus_gives_the_same_bytes_and_stays_whole(corpus: Path, tmp_path: Path) -> None:
    first, report = write_report(corpus)
    again, _ = write_report(corpus, tmp_path / "again.html")
    assert (first.name, again.name) == ("report.html", "again.html")
    assert first.read_bytes() == again.read_bytes()
    assert first.with_suffix(".json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert json.loads(first.with_suffix(".json").read_text()) == report
    assert str(corpus.parent) not in first.read_text()
    verify_corpus(corpus)


@pytest.mark.parametrize("removed", [True, False])
def test_what_could_not_be_read_and_what_is_in_twice_are_told(tmp_path: Path, removed: bool) -> None:
    counts = random_counts(4, 40, 80, 0.6)
    paths = [write_h5ad(tmp_path / f"{name}.h5ad", counts) for name in ("one", "two")]
    config = config_of(*paths, tmp_path / "no" / "third.h5ad", on_error="skip", cells={"remove_duplicates": removed},
                       splits={"valid": 0.3})
    build_here(config, tmp_path / "corpus")
    report = measure(tmp_path / "corpus")
    assert [(entry["name"], entry["file"]) for entry in report["quarantined"]] == [("third", "third.h5ad")]
    assert report["duplicates"]["equal"] == 40
    assert report["duplicates"]["removed"] == removed
    assert report["totals"]["cells_kept"] == (40 if removed else 80)
    text = page(report)
    assert "Sources that could not be read" in text
    assert html.escape(report["quarantined"][0]["reason"], quote=False) in text
    assert ("they are left out." in text, "cells of valid are in train too." in text) == (removed, not removed)
    assert ("a copy of a cell that is kept" in text) == removed
    assert all(shown == FORMATS[form](at(report, pointer)) for pointer, form, shown in numbers_of(text))


def test_values_that_are_no_counts_are_told_as_what_they_are(tmp_path: Path) -> None:
    matrix = random_counts(2, 30, 40, 0.4)
    matrix.data = np.log1p(matrix.data)
    build_here(config_of(write_h5ad(tmp_path / "log.h5ad", matrix), cells={"expression_kind": "log1p"}, columns=[]),
               tmp_path / "corpus")
    report = measure(tmp_path / "corpus")
    assert sum(report["counts_per_cell"]["histogram"]["cells"]) == report["totals"]["cells_kept"]
    assert "log1p values per cell" in page(report).lower()
    assert "No column was kept." in page(report)


def test_a_column_of_too_many_values_is_named_and_not_counted(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "MAX_VALUES", 8)
    report = measure(corpus)
    assert report["columns_of_many_values"] == ["donor", "cell_type"]
    assert set(report["columns"]) == {"dataset", "tissue", "assay"}
    assert "of too many different values: donor, cell_type." in page(report)


def test_a_cell_of_one_gene_is_a_histogram_too(tmp_path: Path) -> None:
    matrix = random_counts(3, 1, 1, 1.0)
    build_here(config_of(write_h5ad(tmp_path / "one.h5ad", matrix)), tmp_path / "corpus")
    report = measure(tmp_path / "corpus")
    assert report["genes_per_cell"]["histogram"] == {"edges": [1.0, 2.0], "cells": [1]}
    assert page(report)


def test_the_command_answers_with_where_it_is(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(corpus), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert Path(answer["report"]).exists()
    assert json.loads(Path(answer["numbers"]).read_text())["totals"]["cells_kept"] == answer["cells_kept"]
    for nowhere in (tmp_path, tmp_path / "nowhere"):
        assert cli.main(["report", str(nowhere)]) == 1
        assert "not a corpus" in capsys.readouterr().err


def test_a_page_is_refused_where_its_numbers_would_overwrite_it(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be called"):
        write_report(corpus, tmp_path / "page.json")


def test_another_file_is_never_overwritten_by_the_numbers(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    with pytest.raises(ConfigError, match="is none of a report"):
        write_report(corpus, tmp_path / "package.html")
    assert (tmp_path / "package.json").read_text() == '{"name": "mine"}'
    assert not (tmp_path / "package.html").exists()
    write_report(corpus, tmp_path / "page.html")
    write_report(corpus, tmp_path / "page.html")


def test_a_folder_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a corpus"):
        measure(tmp_path)


# ---- in a browser ----

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SHOWN = "[...document.querySelectorAll('[data-from]')].map(e => [e.dataset.from, e.dataset.form, e.textContent])"
CONTRAST = """(() => { const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 :
  ((v + 0.055) / 1.055) ** 2.4);
  const l = c => { const [r, g, b] = rgb(c); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const paper = l(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll('p, td, th, dd, dt, span, h1, h2, h3, figcaption, code')]
    .filter(e => e.textContent.trim() && !e.closest('svg, pre')).map(e => { const ink = l(getComputedStyle(e).color);
      return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05) })) })()"""


@pytest.mark.system
@pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium here (Debian: apt-get install chromium)")
def test_a_browser_draws_it_without_errors_requests_or_overflow(corpus: Path, tmp_path: Path) -> None:
    path, report = write_report(corpus, tmp_path / "page.html")
    with chromium.browser() as tab:
        for width, scheme, media in ((1400, "light", "screen"), (400, "light", "screen"), (1400, "dark", "screen"),
                                     (400, "dark", "screen"), (800, "light", "print")):
            tab.open(path.as_uri(), width=width, scheme=scheme, media=media)
            assert tab.evaluate("document.title") == "corpus: corpus report"
            assert tab.evaluate(OVERFLOW) == 0, (width, scheme, media)
            assert tab.evaluate(CONTRAST) >= 4.5, (scheme, media)
            requests = {event["request"]["url"] for event in tab.told("Network.requestWillBeSent")}
            assert {url for url in requests if not url.startswith("data:")} == {path.as_uri()}
            assert tab.told("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") == []
            assert tab.evaluate("document.scripts.length") == 0
            shown = tab.evaluate(SHOWN)
            assert len(shown) > 100
            assert [text for pointer, form, text in shown if text != FORMATS[form](at(report, pointer))] == []
            assert tab.evaluate("[...document.querySelectorAll('.plot svg')].every(e => e.getBBox().width > 50)")


@pytest.mark.system
@pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium here (Debian: apt-get install chromium)")
def test_a_browser_would_tell_of_what_the_page_must_not_do(tmp_path: Path) -> None:
    """The test above can fail: each of its questions is answered otherwise by a page that errs."""
    path = tmp_path / "bad.html"
    path.write_text('<img src="missing.png"><script>console.error("x"); missing()</script>'
                    '<div style="width: 3000px">wide</div>')
    with chromium.browser() as tab:
        tab.open(path.as_uri(), width=400)
        assert tab.evaluate(OVERFLOW) > 2000
        assert len(tab.told("Network.requestWillBeSent")) == 2
        assert tab.told("Runtime.consoleAPICalled")
        assert tab.told("Runtime.exceptionThrown")
