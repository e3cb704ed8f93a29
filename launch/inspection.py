"""What `scgpt data inspect` says, in words."""
from typing import Any

from scgpt.counted import counted

Facts = dict[str, Any]
_SHOWN = 60   # letters of a name or a value


def describe_facts(facts: Facts) -> str:
    """A corpus, or an atlas."""
    return "\n".join(_corpus(facts) if facts["kind"] == "corpus" else _source(facts))


def describe_seen(facts: Facts) -> str:
    """The answer to --was-seen."""
    return "\n".join(_group_seen(facts) if facts["kind"] == "group" else _file_seen(facts))


def _corpus(facts: Facts) -> list[str]:
    vocab = facts["vocab"]
    lines = [(f"a corpus of {facts['created_by']}: {facts['expression_kind']}, vocabulary {vocab['name']} of "
              f"{vocab['tokens']:,} tokens")]
    for name, split in facts["splits"].items():
        groups = "" if split["groups"] is None else f", {counted(split['groups'], 'group')}"
        lines.append(f"{name}: {counted(split['cells'], 'cell')}, {counted(split['tokens'], 'gene value')}, "
                     f"{counted(split['parts'], 'part')} ({split['form']}, {split['bytes'] / 1e6:,.1f} MB{groups})")
    for source in facts["sources"]:
        filtered = "".join(f", {cells:,} {reason}" for reason, cells in source["filtered"].items())
        lines.append(f"source {source['name']} ({source['file']}): {source['cells_written']:,} of "
                     f"{counted(source['cells_in'], 'cell')}{filtered}; {source['genes_mapped']:,} of "
                     f"{counted(source['genes'], 'gene')}")
    lines += [f"left out: {source['name']}: {source['reason']}" for source in facts["quarantined"]]
    if facts["duplicates"] is not None:
        lines.append(describe_duplicates(facts["duplicates"]))
    return lines + [f"{name}: {_values(column)}" for name, column in facts["columns"].items()]


def describe_duplicates(found: Facts) -> str:
    """Equal cells, and whether they are in the corpus."""
    if not found["equal"]:
        return "no two cells are equal"
    if found["removed"]:
        return counted(found["equal"], "cell that equals an earlier one is left out",
                       "cells that equal an earlier one are left out")
    return (f"{counted(found['equal'], 'cell equals', 'cells equal')} an earlier one, "
            f"{counted(found['across_splits'], 'cell')} of valid one of train: cells.remove_duplicates leaves them out")


def _values(column: Facts) -> str:
    if "unreadable" in column:
        return f"cannot be read: {column['unreadable']}"
    if column["values"] is None:
        return "more values than could be counted"
    if not column["values"]:
        return "no value"
    without = f"; {counted(column['missing'], 'cell')} without" if column["missing"] else ""
    if "range" in column:
        low, high = column["range"]
        return f"{low:.6g} to {high:.6g}{without}"
    commonest = ", ".join(f"{_short(value)} {cells:,}" for value, cells in column["commonest"].items())
    more = f" and {column['values'] - len(column['commonest']):,} more" if column["values"] > len(
        column["commonest"]) else ""
    return f"{commonest}{more}{without}"


def _short(text: str) -> str:
    """In one line, whatever an atlas holds."""
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _source(facts: Facts) -> list[str]:
    lines = [(f"{facts['name']}: {facts['kind']}, {counted(facts['cells'], 'cell')}, "
              f"{counted(facts['genes'], 'gene')}, "
              f"{facts['bytes'] / 1e6:,.1f} MB")]
    for layer, matrix in facts["matrices"].items():
        used = " (would be used)" if layer == facts["layer"] else ""
        told = (f"cannot be read: {matrix['unreadable']}" if "unreadable" in matrix else
                f"{matrix['looks_like']}; {counted(matrix['values'], 'stored value')} of "
                f"{counted(matrix['genes'], 'gene')}")
        lines.append(f"matrix {layer}{used}: {told}")
    for column, genes in facts["gene_columns"].items():
        examples = ", ".join(map(_short, genes["examples"]))
        lines.append(f"genes in {column}: {genes['style']} such as {examples}; {genes['mapped']:,} in the vocabulary "
                     f"({genes['overlap']:.1%}, {genes['renamed']:,} under another name)")
    for column, values in facts["obs"].items():
        kind = f" ({values['type']})" if "type" in values else ""
        lines.append(f"obs {_short(column)}{kind}: {_values(values)}")
    if facts["obs_cells"] < facts["cells"]:
        lines.append(f"(obs of the first {counted(facts['obs_cells'], 'cell')})")
    lines += facts["remarks"]
    return [*lines, "a build would take it" if facts["refused"] is None else
            f"a build would refuse it: {facts['refused']}"]


def _group_seen(facts: Facts) -> list[str]:
    asked = facts["asked"]
    if facts["left_out"]:
        return [f"no: the source '{asked}' was left out: {facts['left_out'][0]}"]
    if not facts["seen"]:
        return [f"no: no cell has '{asked}' in {', '.join(facts['columns'])}"]
    return [f"yes: '{asked}' is a {column}: " + ", ".join(
        f"{split} {counted(cells, 'cell')}" if cells is not None else split for split, cells in splits.items())
            for column, splits in facts["cells"].items()]


def _cells_seen(facts: Facts) -> str:
    of_file = f"({facts['cells_in_file']:,} in the file, {facts['layer']})"
    if not facts["compared"]:
        return f"cells: cannot be told, 0 compared {of_file}: each has too few genes of the corpus's vocabulary"
    splits = ": " + ", ".join(f"{name} {cells:,}" for name, cells in facts["splits"].items())
    answer = f"{'yes' if facts['seen'] else 'no'}, {facts['found']:,} of {facts['compared']:,} compared"
    return f"cells: {answer} {of_file} are in the corpus, {facts['share']:.1%}{splits if facts['found'] else ''}"


def _file_seen(facts: Facts) -> list[str]:
    lines = [_cells_seen(facts)]
    if facts["same_file"] is not None:
        lines.append(f"the file is the source '{facts['same_file']}'")
    for column, groups in facts["groups"].items():
        held = groups["in_corpus"]
        named = "; ".join(f"{value} (" + ", ".join(f"{split} {cells:,}" for split, cells in splits.items()) + ")"
                          for value, splits in list(held.items())[:5])
        lines.append(f"{column}: {len(held):,} of {groups['values']:,} are names in the corpus" + (
            f": {named}" if held else ""))
    return lines
