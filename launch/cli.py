"""`scgpt`: parse, import what the command needs, call one function, print its answer.

Nothing heavy is imported before a command runs, so `scgpt --help` answers at once. Logs go to stderr, the answer to
stdout; `--json` makes it one JSON object on the last line. Exit codes: see scgpt/errors.py.
"""
import argparse
import json
import logging
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from launch.summaries import corpus_summary, describe_corpus, describe_plan, plan_summary
from scgpt.counted import counted
from scgpt.errors import EXIT_DONE, ConfigError, ScgptError
from scgpt.process import begin_program, exit_code, print_answer, run_program
from scgpt.stderr import LastingStderr, say
from scgpt.words import count, path, seed, size


@dataclass(frozen=True)
class Answer:
    """What a command found: a text for people, a value for programs, the exit code."""

    text: str
    value: dict[str, Any] = field(default_factory=dict)
    exit_code: int = EXIT_DONE


Command = Callable[[argparse.Namespace], Answer]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    begin_program()
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    _take_overrides(parser, args, rest)
    logging.basicConfig(stream=LastingStderr(), format="%(message)s")   # warnings: fsspec tells of each block it reads
    logging.getLogger("scgpt").setLevel(logging.INFO)
    return exit_code(lambda: _answer(args), debug=args.debug)


def _answer(args: argparse.Namespace) -> int:
    """Run the command and print what it found; its exit code, or that of an answer which cannot be written."""
    answer: Answer = args.run(args)
    try:
        print_answer(json.dumps(answer.value, allow_nan=False) if args.json else answer.text)
    except ScgptError as unwritten:
        say(f"error: {unwritten}")
        return answer.exit_code or unwritten.exit_code
    return answer.exit_code


def _take_overrides(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: Sequence[str]) -> None:
    """argparse stops collecting `key=value` at the first flag: those that follow come back unparsed."""
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]


# ---- commands: each parses, imports, calls one function, answers ----


def data_plan(args: argparse.Namespace) -> Answer:
    """Print what a build would do."""
    from data_pipeline.config import CorpusConfig
    from data_pipeline.estimate import estimate
    from data_pipeline.plan import make_plan
    from scgpt.config import load_config

    plan = make_plan(load_config(CorpusConfig, args.config, args.overrides, kind="corpus"))
    time = estimate(plan)
    return Answer(describe_plan(plan, time), plan_summary(plan, time))


def data_build(args: argparse.Namespace) -> Answer:
    """Build a corpus, or continue one."""
    from data_pipeline.config import CorpusConfig
    from data_pipeline.execute import build
    from scgpt.config import load_config

    config = load_config(CorpusConfig, args.config, args.overrides, kind="corpus")
    result = build(config, args.out, ray_address=args.ray_address, fresh=args.fresh)
    value = corpus_summary(result.manifest) | {
        "corpus": str(args.out), "seconds": result.seconds, "workers": result.workers}
    done_by = f"; built by {result.workers}" if result.workers else "; it was complete"
    return Answer(f"{args.out}: {describe_corpus(value)}{done_by}", value)


def data_verify(args: argparse.Namespace) -> Answer:
    """Check every file of a corpus."""
    from scgpt.data import verify_corpus

    value = corpus_summary(verify_corpus(args.corpus, deep=args.deep)) | {"corpus": str(args.corpus), "verified": True}
    return Answer(f"{args.corpus}: whole. {describe_corpus(value)}", value)


def data_inspect(args: argparse.Namespace) -> Answer:
    """Say what is in a corpus, or in an atlas, or whether cells were seen."""
    from data_pipeline.inspection import inspect
    from data_pipeline.provenance import was_seen
    from launch.inspection import describe_facts, describe_seen
    from scgpt.vocab import GeneVocab

    if args.was_seen is not None:
        seen = was_seen(args.target, args.was_seen, sample=args.sample, gene_table=args.gene_table)
        return Answer(describe_seen(seen), seen)
    facts = inspect(args.target, GeneVocab.named(args.vocab), gene_table=args.gene_table)
    return Answer(describe_facts(facts), facts)


def data_peek(args: argparse.Namespace) -> Answer:
    """Show what a global batch is."""
    from launch.summaries import describe_peek
    from pretrain.config import TrainConfig
    from pretrain.peek import peek
    from scgpt.config import load_config

    config = load_config(TrainConfig, args.config, args.overrides, kind="pretrain")
    found = peek(config, args.step, world_size=args.world_size)
    return Answer(describe_peek(found), found.to_json())


def report(args: argparse.Namespace) -> Answer:
    """Draw the page of a corpus."""
    from data_pipeline.report import write_report

    page, value = write_report(args.corpus, args.out)
    totals = value["totals"]
    return Answer(f"{page}: {totals['cells_kept']:,} of {counted(totals['cells_in'], 'cell')} kept from "
                  f"{counted(totals['sources'], 'source')}", {
                      "report": str(page), "numbers": str(page.with_suffix(".json")), **totals})


def data_convert(args: argparse.Namespace) -> Answer:
    """Write a corpus in another form or compression."""
    from scgpt.config import config_of
    from scgpt.data.convert import ConvertConfig, convert

    manifest = convert(args.corpus, args.out, config_of(ConvertConfig, args.overrides))
    split = next(iter(manifest.splits.values()))
    compression, n_bytes = split.compression or "none", sum(
        file.bytes for one in manifest.splits.values() for file in one.files())
    value = corpus_summary(manifest) | {"corpus": str(args.out), "source": args.corpus, "form": split.form,
                                        "compression": compression, "bytes": n_bytes}
    return Answer(f"{args.out}: {split.form}, compression {compression}, {n_bytes / 1e6:,.1f} MB. "
                  f"{describe_corpus(value)}", value)


def train(args: argparse.Namespace) -> Answer:
    """Train in this process: one rank."""
    from pretrain.config import TrainConfig
    from pretrain.deepspeed_json import describe_json
    from pretrain.loop import train as train_run
    from pretrain.metrics import METRICS, last_row
    from scgpt.config import load_config

    config = load_config(TrainConfig, args.config, args.overrides, kind="pretrain")
    if args.print_deepspeed_config:
        text = describe_json(config, 1)
        return Answer(text, json.loads(text))
    if args.out is None:
        raise ConfigError("there is no run directory", where="command line", fix="give --out RUN")
    code = train_run(config, args.out, profile=args.profile)
    return Answer(str(args.out), {"run": str(args.out), "last": last_row(args.out / METRICS)}, code)


def export(args: argparse.Namespace) -> Answer:
    """Checkpoint to release."""
    from pretrain.export import export as export_release

    release = export_release(args.run_dir, args.out, step=args.step, dtype=args.dtype, naming=args.naming,
                             max_shard_size=args.max_shard_size)
    return Answer(f"{release}: a release of {args.run_dir}", {"release": str(release), "run": str(args.run_dir)})


def import_published(args: argparse.Namespace) -> Answer:
    """Published folder to release."""
    from pretrain.published import import_published as import_folder

    facts = import_folder(args.folder, args.out)
    return Answer(f"{args.out}: {facts['parameters']:,} parameters, {facts['tokens']:,} tokens; begin with it: "
                  f"model.init_from={args.out}", {"release": str(args.out), **facts})


def verify(args: argparse.Namespace) -> Answer:
    """Check every file of a release and what it computes."""
    from pretrain.export import verify as verify_release

    value = verify_release(args.release)
    return Answer(f"{args.release}: whole, and computes what it recorded", {"release": str(args.release), **value})


def embed(args: argparse.Namespace) -> Answer:
    """Embed the cells of a file."""
    from launch.embed import embed_file

    result = embed_file(args.release, args.source, args.out, seed=args.seed, device=args.device)
    return Answer(f"{result.out}: {counted(result.n_cells, 'cell')} in obsm['X_scGPT'], {result.d_model} numbers each; "
                  f"{result.n_genes_mapped:,} of {result.n_genes:,} genes are in the vocabulary", result.to_json())


def vocab_build(args: argparse.Namespace) -> Answer:
    """Make a vocabulary of the genes of atlases."""
    from data_pipeline.vocabulary import build_vocab, publish_vocab, sources_of
    from launch.summaries import describe_vocab, vocab_summary

    built = build_vocab(sources_of(args.sources, gene_column=args.gene_column), species=args.species,
                        min_sources=args.min_sources)
    publish_vocab(built.vocab, args.out)
    value = vocab_summary(built) | {"vocab": str(args.out)}
    return Answer(f"{args.out}: {describe_vocab(value)}", value)


def config_show(args: argparse.Namespace) -> Answer:
    """Print what a configuration resolves to."""
    from scgpt.config import load_config

    config = load_config(_config_class(args.kind), args.config, args.overrides, kind=args.kind)
    return Answer(config.to_yaml().rstrip(), config.model_dump(mode="json"))


def config_list(args: argparse.Namespace) -> Answer:
    """Print the configurations that ship."""
    from scgpt.config import CONFIG_KINDS, shipped_configs

    names = {kind: list(shipped_configs(kind)) for kind in CONFIG_KINDS}
    return Answer("\n".join(f"{kind + ':':10} {' '.join(names[kind])}" for kind in CONFIG_KINDS), dict(names))


def _config_class(kind: str) -> type[Any]:
    if kind == "corpus":
        from data_pipeline.config import CorpusConfig
        return CorpusConfig
    from pretrain.config import TrainConfig
    return TrainConfig


# ---- the parser ----


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    root = argparse.ArgumentParser(
        prog="scgpt", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_example("scgpt data build demo --out corpus",
                             "scgpt train demo data.corpus=corpus --out run",
                             "scgpt export run --out release") + "\n\nPretrain scGPT: atlases, corpus, run, release.",
        epilog="exit codes: 0 done, 1 failed, 2 bad usage or configuration, 75 interrupted, the same command continues")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    data = commands.add_parser("data", help="plan, build and check a corpus")
    data_commands = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add = _adder(commands, shared)
    _add_data_commands(_adder(data_commands, shared))

    cmd = add("train", train, "train in one process", "scgpt train demo data.corpus=corpus --out run")
    _config(cmd)
    _out(cmd, "run directory; an interrupted run is continued", required=False)
    cmd.add_argument("--print-deepspeed-config", action="store_true", help="print what DeepSpeed is given, and stop")
    cmd.add_argument("--profile", action="store_true", help="trace a few steps into RUN/profile, for ui.perfetto.dev")
    cmd = add("export", export, "checkpoint to release", "scgpt export run --out release --step best")
    cmd.add_argument("run_dir", metavar="RUN", type=Path)
    _out(cmd, "folder of the release")
    cmd.add_argument("--step", default="best", metavar="best|latest|N", help="which checkpoint (default: best)")
    cmd.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                     help="of the weights (default: float32)")
    cmd.add_argument("--naming", choices=("flash", "torch"), default="flash",
                     help="of attention weights: Wqkv or in_proj (default: flash, which stock scGPT reads either way)")
    cmd.add_argument("--max-shard-size", type=size, metavar="S",
                     help="split model.safetensors into files of S at most, such as 5GB, with an index")
    cmd = add("import", import_published, "published scGPT folder to a release, which a training may begin with",
              "scgpt import scGPT_human --out init")
    cmd.add_argument("folder", metavar="DIR", type=Path, help="with args.json, vocab.json and best_model.pt")
    _out(cmd, "new folder of the release")
    cmd = add("verify", verify, "check a release: checksums, and what it computes", "scgpt verify release")
    cmd.add_argument("release", metavar="RELEASE", type=Path)
    cmd = add("embed", embed, "embed the cells of an h5ad file", "scgpt embed release cells.h5ad --out embedded.h5ad")
    cmd.add_argument("release", metavar="RELEASE", type=Path)
    cmd.add_argument("source", metavar="FILE.h5ad", type=Path)
    _out(cmd, "the file with obsm['X_scGPT'] added; replaced if there")
    cmd.add_argument("--seed", type=seed, default=0, help="of the sampled genes and tied bins (default: 0)")
    cmd.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    cmd = add("report", report, "draw a corpus: what came in, what was kept and why, what the cells are",
              "scgpt report corpus --out corpus.html")
    cmd.add_argument("corpus", metavar="CORPUS", help="its folder, or a URL such as s3://bucket/corpus")
    _out(cmd, "the page; its numbers go beside it as .json (default: report.html in the corpus)", required=False)
    _add_vocab_command(_adder(commands.add_parser("vocab", help="make a vocabulary").add_subparsers(
        title="commands", required=True, metavar="COMMAND"), shared))
    config = commands.add_parser("config", help="what ships, and what a configuration resolves to")
    add = _adder(config.add_subparsers(title="commands", required=True, metavar="COMMAND"), shared)
    cmd = add("show", config_show, "print a resolved configuration", "scgpt config show base data.corpus=corpus")
    _config(cmd)
    cmd.add_argument("--kind", choices=("corpus", "pretrain"), default="pretrain",
                     help="where a name is looked up (pretrain)")
    add("list", config_list, "names of the configurations that ship", "scgpt config list")
    return root


def _add_data_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    cmd = add("plan", data_plan, "what a build would do; writes nothing", "scgpt data plan demo cells.min_genes=200")
    _config(cmd)
    cmd = add("build", data_build, "build a corpus", "scgpt data build demo --out corpus")
    _config(cmd)
    _out(cmd, "folder of the corpus; an interrupted build is continued")
    cmd.add_argument("--ray-address", metavar="A", help="join this Ray cluster; `local`: one that ends with the build")
    cmd.add_argument("--fresh", action="store_true", help="begin anew where an interrupted build of another plan lies")
    cmd = add("peek", data_peek, "what a step trains on: its cells, and a digest that no world size changes",
              "scgpt data peek demo data.corpus=corpus --step 7")
    _config(cmd)
    cmd.add_argument("--step", type=int, required=True, metavar="T", help="global batch, from 0")
    cmd.add_argument("--world-size", type=int, default=1, metavar="W", help="ranks that share it (default: 1)")
    cmd = add("verify", data_verify, "check every file of a corpus", "scgpt data verify corpus --deep")
    cmd.add_argument("corpus", metavar="CORPUS", help="its folder, or a URL such as s3://bucket/corpus")
    cmd.add_argument("--deep", action="store_true", help="check every cell's invariants too")
    cmd = add("inspect", data_inspect, "what is in a corpus, or in an atlas before it is built; was a cell seen",
              "scgpt data inspect corpus --was-seen cells.h5ad")
    cmd.add_argument("target", metavar="CORPUS_OR_SOURCE", help="a folder, a file or a URL")
    cmd.add_argument("--was-seen", metavar="FILE_OR_GROUP",
                     help="are these cells, or this donor, dataset or column=value, in the corpus, and in which split")
    cmd.add_argument("--sample", type=count, metavar="N", help="compare so many cells of the file (default: all)")
    cmd.add_argument("--vocab", default="scgpt-human", metavar="VOCAB",
                     help="which an atlas is held against: a name or a vocab.json (default: scgpt-human)")
    cmd.add_argument("--gene-table", metavar="FILE", help="what the gene ids of a table of lists stand for")
    cmd = add("convert", data_convert, "write a corpus in another form or compression: the same cells, in their order",
              "scgpt data convert corpus form=zarr compression=lz4 --out cold")
    cmd.add_argument("corpus", metavar="CORPUS", help="its folder, or a URL such as s3://bucket/corpus")
    cmd.add_argument("overrides", metavar="key=value", nargs="*", default=[],
                     help="form=arrow|zarr (default: as it is), compression=none|zstd|lz4 (default: none)")
    _out(cmd, "new folder of the result")


def _add_vocab_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    cmd = add("build", vocab_build, "a vocabulary of the genes that atlases name",
              "scgpt vocab build atlas/*.h5ad --out vocab.json")
    cmd.add_argument("sources", metavar="SOURCE", nargs="+",
                     help="an atlas, a glob, or the YAML file of a corpus, whose sources are taken")
    _out(cmd, "the vocabulary: token -> id as JSON; another one that lies there is not replaced")
    cmd.add_argument("--min-sources", type=count, default=1, metavar="N",
                     help="leave out genes that fewer sources name (default: 1)")
    cmd.add_argument("--species", choices=("auto", "human", "mouse", "other"), default="auto",
                     help="whose Ensembl ids become symbols; other: names are taken as they are (default: auto)")
    cmd.add_argument("--gene-column", default="auto", metavar="COLUMN",
                     help="index or a column of var (default: auto, where most names are known)")


def _adder(commands: Any, shared: argparse.ArgumentParser) -> Callable[..., argparse.ArgumentParser]:
    def add(name: str, run: Command, purpose: str, example: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, parents=[shared], help=purpose, formatter_class=argparse.RawDescriptionHelpFormatter,
            description=f"{_example(example)}\n\n{purpose[0].upper()}{purpose[1:]}.")
        parser.set_defaults(run=run)
        return parser
    return add


def _example(*lines: str) -> str:
    return "example:\n" + textwrap.indent("\n".join(lines), "  ")


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that ships")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings on top of it")


def _out(parser: argparse.ArgumentParser, purpose: str, *, required: bool = True) -> None:
    parser.add_argument("--out", required=required, type=path, metavar="PATH", help=purpose)


def program() -> NoReturn:
    """`scgpt`, as it is installed."""
    run_program(main)


if __name__ == "__main__":
    program()
