"""The page of a corpus: the numbers of report.json as one HTML file that needs nothing else and runs no script.

Every number of the page carries its place in report.json (`data-from`, a JSON pointer), so that the two can be held
against each other. A policy in the page forbids scripts and requests, whatever a source may be called.
"""
import math
from collections.abc import Callable, Sequence
from importlib.resources import files as package_files
from typing import Any

import yaml

from data_pipeline.charts import bar, histogram
from data_pipeline.markup import Html, join, tag
from scgpt.counted import counted

Report = dict[str, Any]        # plain values, as report.json holds them
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_GREYS = 5                     # that the style sheet has for reasons
_FILES_SHOWN = 12              # files shown at once; more are folded
_REASONS = {"filter": "not matched by the filter", "no_genes": "no gene of the vocabulary",
            "min_genes": "fewer genes than min_genes", "max_genes": "more genes than max_genes",
            "min_counts": "fewer counts than min_counts", "max_counts": "more counts than max_counts",
            "max_value": "a value above max_value",
            "max_mito_fraction": "mitochondrial share above max_mito_fraction",
            "duplicate": "a copy of a cell that is kept"}

_STYLES = {"symbol": "symbols", "ensembl": "Ensembl ids"}


def page(report: Report) -> str:
    """The whole page; the same numbers give the same bytes."""
    style = (package_files("data_pipeline") / "report.css").read_text(encoding="utf-8")
    head = tag("head", Html('<meta charset="utf-8">'),
               Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
               Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
               Html('<link rel="icon" href="data:,">'),
               tag("title", f"{report['corpus']['name']}: corpus report"), tag("style", Html(style)))
    sections = (_header, _came_in, _genes, _distributions, _known, _splits, _files, _configuration)
    body = tag("body", tag("main", *(section(report) for section in sections)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


# ---- numbers ----


def _size(value: float) -> str:
    unit = min(int(math.log10(max(value, 1)) // 3), 4)
    return f"{value:,.0f} B" if unit == 0 else f"{value / 1000**unit:,.1f} {'kMGT'[unit - 1]}B"


FORMATS: dict[str, Callable[[float], str]] = {
    "integer": "{:,.0f}".format, "decimal": "{:,.1f}".format, "share": "{:.1%}".format, "size": _size}


def _number(report: Report, *place: str | int, form: str = "integer") -> Html:
    """A number of the report as text, with where it stands there."""
    value: Any = report
    for key in place:
        value = value[key]
    pointer = "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in place)
    return tag("span", "none" if value is None else FORMATS[form](value), data_from=pointer, data_form=form)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = (0,)) -> Html:
    """A table whose columns are numbers, but for those in `text`."""
    kinds = [None if place in text else "number" for place in range(len(titles))]
    head = tag("tr", *(tag("th", title, class_=kind, scope="col") for title, kind in zip(titles, kinds, strict=True)))
    body = (tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex="0")


def _section(title: str, *content: str) -> Html:
    return tag("section", tag("h2", title), *content)


def _note(*content: str) -> Html:
    return tag("p", *content, class_="note")


# ---- sections ----


def _header(report: Report) -> Html:
    corpus = report["corpus"]
    figures = [
        ("cells kept", "cells_kept", "integer", [_number(report, "totals", "kept_share", form="share"), " of ",
                                                 _number(report, "totals", "cells_in")]),
        ("cells filtered", "cells_filtered", "integer", []),
        ("gene values", "gene_values", "integer", [_number(report, "genes_per_cell", "mean", form="decimal"),
                                                   " a cell"]),
        ("sources", "sources", "integer", []),
        ("on disk", "bytes", "size", [_number(report, "totals", "files"), " files"])]
    listed = (tag("div", tag("dt", label), tag("dd", _number(report, "totals", key, form=form), tag("small", *below)))
              for label, key, form, below in figures)
    lead = tag("p", _kind(report).capitalize(), " over the ", _number(report, "vocab", "tokens"),
               f" tokens of {report['vocab']['name']}, written by {corpus['created_by']} with seed {corpus['seed']}.",
               class_="lead")
    return tag("header", tag("p", "scGPT corpus", class_="over"), tag("h1", corpus["name"]), lead,
               tag("dl", *listed, class_="figures"))


def _came_in(report: Report) -> Html:
    reasons = [entry["reason"] for entry in report["filtered"]]
    tone = {reason: f"gone-{place % _GREYS + 1}" for place, reason in enumerate(reasons)}
    legend = [tag("li", tag("span", class_="key"), "kept ", _number(report, "totals", "cells_kept"))]
    legend += [tag("li", tag("span", class_=f"key {tone[reason]}"), f"{_REASONS.get(reason, reason)} ",
                   _number(report, "filtered", place, "cells")) for place, reason in enumerate(reasons)]
    rows = []
    for place, source in enumerate(report["sources"]):
        at = ("sources", place)
        gone = {reason: source["filtered"][reason] for reason in reasons if source["filtered"].get(reason)}
        parts = [(source["cells_kept"], ""), *((cells, tone[reason]) for reason, cells in gone.items())]
        kept = join(["; ", _number(report, *at, "mean_genes", form="decimal"), " genes and ",
                     _number(report, *at, "mean_counts", form="decimal"), f" {_kind(report)} a kept cell"])
        left_out = join(join([f"; {_REASONS.get(reason, reason)}: ", _number(report, *at, "filtered", reason)])
                        for reason in gone)
        rows.append(tag(
            "li",
            tag("div", tag("span", source["name"], class_="name"),
                tag("span", _number(report, *at, "cells_kept"), " of ", _number(report, *at, "cells_in"), " cells, ",
                    _number(report, *at, "kept_share", form="share")), class_="head"),
            bar(parts, source["cells_in"], f"{source['cells_kept']:,} of {counted(source['cells_in'], 'cell')} kept"),
            tag("div", f"{source['file']}, ", _number(report, *at, "bytes", form="size"),
                kept if source["cells_kept"] else "", left_out, class_="detail")))
    return _section("What came in, and what was kept",
                    _note("A cell that fails several limits counts under the first."),
                    tag("ul", *legend, class_="legend"), tag("ul", *rows, class_="rows"), _duplicates(report),
                    *_quarantined(report))


def _quarantined(report: Report) -> list[Html]:
    """The sources that could not be read, and why; nothing where all could."""
    rows = (tag("li", tag("div", tag("span", entry["name"], class_="name"), class_="head"),
                tag("div", f"{entry['file']}: {entry['reason']}", class_="detail")) for entry in report["quarantined"])
    return [tag("h3", "Sources that could not be read"), _note("No cell of these is in the corpus."),
            tag("ul", *rows, class_="rows")] if report["quarantined"] else []


def _duplicates(report: Report) -> Html:
    """How many cells are in twice; nothing where nobody looked."""
    found = report["duplicates"]
    if found is None:
        return join([])
    return tag("p", "Of ", _number(report, "duplicates", "compared"), " cells with enough genes to tell, ",
               _number(report, "duplicates", "equal"), " equal an earlier one gene by gene; ",
               "they are left out." if found["removed"] else "they are in.",
               *([] if found["removed"] else [" ", _number(report, "duplicates", "across_splits"),
                                              " cells of valid are in train too."]), class_="note")


def _genes(report: Report) -> Html:
    form = "integer" if report["corpus"]["expression_kind"] == "counts" else "decimal"
    rows = []
    for place, source in enumerate(report["sources"]):
        at, genes = ("sources", place, "genes"), source["genes"]
        rows.append(tag(
            "li",
            tag("div", tag("span", source["name"], class_="name"),
                tag("span", _number(report, *at, "n_mapped"), " of ", _number(report, *at, "n_genes"), " genes, ",
                    _number(report, *at, "overlap", form="share")), class_="head"),
            bar([(genes["n_mapped"], "")], genes["n_genes"], f"{genes['overlap']:.1%} of the genes have a token"),
            tag("div", f"{_STYLES.get(genes['style'], genes['style'])} in {genes['column']}; ",
                _number(report, *at, "n_renamed"), " found under another symbol, ",
                _number(report, *at, "n_merged"), " summed into another, ",
                _number(report, *at, "n_unmapped"), " without a token that held ",
                _number(report, *at, "unmapped_sum", form=form), f" {_kind(report)}", class_="detail")))
    named = []
    for place, entry in enumerate(report["unmapped"]["top"]):
        sources = " sources · " if entry["sources"] > 1 else " source · "
        named.append(tag("li", tag("span", entry["gene"]),
                         tag("span", _number(report, "unmapped", "top", place, "sources"), sources,
                             _number(report, "unmapped", "top", place, "cells"), " cells", class_="detail")))
    unmapped = [tag("h3", "Commonest genes without a token"),
                _note("Of ", _number(report, "unmapped", "names"), " names: those that most sources measure, then "
                      "those of sources with most cells. All are listed in manifest.json."),
                tag("ul", *named, class_="genes")] if report["unmapped"]["names"] else []
    return _section("Genes in the vocabulary", tag("ul", *rows, class_="rows"), *unmapped)


def _distributions(report: Report) -> Html:
    counts = report["counts_per_cell"]
    if not counts["cells"]:
        return _section("Cells", _note("There are none."))
    sampled = (_note("Of all cells.") if counts["every"] == 1 else
               _note("Of ", _number(report, "counts_per_cell", "cells"), " of ",
                     _number(report, "counts_per_cell", "of_cells"), " cells: one in every ",
                     _number(report, "counts_per_cell", "every"), "."))
    above = _note("Of all cells. ", _number(report, "genes_per_cell", "above_context"), " cells (",
                  _number(report, "genes_per_cell", "above_context_share", form="share"), ") have more than ",
                  _number(report, "genes_per_cell", "context_genes"),
                  " genes, as many as a context of 1,200 tokens holds: of those an epoch sees a sample.")
    genes = _histogram(report, "genes_per_cell", "Genes per cell", above)
    sums = _histogram(report, "counts_per_cell", f"{_kind(report).capitalize()} per cell", sampled)
    return _section("Cells", tag("div", genes, sums, class_="pair"))


def _histogram(report: Report, key: str, title: str, note: Html) -> Html:
    spread = report[key]
    quantiles = _table(["min", "5%", "25%", "median", "75%", "95%", "max", "mean"], [
        [_number(report, key, name, form="decimal" if name == "mean" else "integer")
         for name in ("min", "p5", "p25", "median", "p75", "p95", "max", "mean")]], text=())
    plot = histogram(spread["histogram"]["edges"], spread["histogram"]["cells"], mark=spread["median"],
                     label=f"{title}: a histogram, median {spread['median']:,.0f}")
    return tag("figure", tag("h3", title), plot, quantiles, tag("figcaption", note))


def _known(report: Report) -> Html:
    cells = max(report["totals"]["cells_kept"], 1)

    def line(label: str, at: Sequence[str | int], count: int, kind: str | None = None) -> Html:
        share = f"--share:{100 * count / cells:.2f}%"
        return tag("li", tag("span", label, class_="label", style=share),
                   tag("span", _number(report, *at), class_="number"),
                   tag("span", f"{count / cells:.1%}", class_="number detail"), class_=kind)

    blocks = []
    for name, column in report["columns"].items():
        at = ("columns", name)
        lines = [line(entry["value"], (*at, "top", place, "cells"), entry["cells"])
                 for place, entry in enumerate(column["top"])]
        if column["other_values"]:
            lines.append(line(counted(column["other_values"], "other"), (*at, "other_cells"), column["other_cells"],
                              "rest"))
        if column["missing"]:
            lines.append(line("not given", (*at, "missing"), column["missing"], "rest"))
        blocks.append(tag("div", tag("h3", name.replace("_", " ").capitalize(), " ",
                                     tag("span", _number(report, *at, "values"), class_="detail")),
                          tag("ul", *lines, class_="values")))
    many = report["columns_of_many_values"]
    return _section("What is known of the cells",
                    tag("div", *blocks, class_="columns") if blocks or many else _note("No column was kept."),
                    _note(f"Not counted, of too many different values: {', '.join(many)}.") if many else "")


def _splits(report: Report) -> Html:
    rows = [[name, _number(report, "splits", name, "cells"),
             f"{split['cells'] / max(report['totals']['cells_kept'], 1):.1%}",
             _number(report, "splits", name, "gene_values"), _number(report, "splits", name, "bytes", form="size"),
             *(_number(report, "groups", group, "splits", name) for group in report["groups"])]
            for name, split in report["splits"].items()]
    shared = [_note(f"{group}s in more than one split: ".capitalize(), _number(report, "groups", group, "shared"))
              for group in report["groups"]]
    by = report["config"].get("splits", {}).get("by", "cell")
    forms = sorted({split["form"] + ("" if split["compression"] == "none" else f", {split['compression']}")
                    for split in report["splits"].values()})
    return _section("Splits", _note(f"Held out by {by}. Stored as {' and '.join(forms)}."),
                    _table(["split", "cells", "share", "gene values", "on disk", *(f"{group}s" for group in
                                                                                 report["groups"])], rows), *shared)


def _files(report: Report) -> Html:
    rows = [[tag("code", entry["file"]), _number(report, "files", place, "bytes"), tag("code", entry["sha256"])]
            for place, entry in enumerate(report["files"])]
    table = _table(["file", "bytes", "sha256"], rows, text=(0, 2))
    folded = table if len(rows) <= _FILES_SHOWN else tag("details", tag("summary", counted(len(rows), "file")), table)
    inputs = _table(["source", "bytes", "sha256 or ETag"], [
        [entry["file"], _number(report, "sources", place, "bytes"), tag("code", entry["sha256"] or entry["etag"])]
        for place, entry in enumerate(report["sources"])], text=(0, 2))
    identity = _table(["", "sha256"], [[name, tag("code", value)] for name, value in (
        ("corpus", report["corpus"]["manifest_sha256"]), ("plan", report["corpus"]["plan_sha256"]),
        ("vocabulary", report["vocab"]["sha256"]))], text=(0, 1))
    return _section("Files and checksums", _note("scgpt data verify holds every file against these."), identity, folded,
                    tag("h3", "Sources as they were read"), inputs)


def _configuration(report: Report) -> Html:
    return _section("Configuration", tag("pre", tag("code", yaml.safe_dump(report["config"], sort_keys=False,
                                                                           allow_unicode=True)), tabindex="0"))


def _kind(report: Report) -> str:
    """What the values are, in words."""
    kind: str = report["corpus"]["expression_kind"]
    return kind.replace("_", " ") if kind.endswith("counts") else f"{kind} values"
