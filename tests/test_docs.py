"""What the pages say exists: links, commands, configurations."""
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import cli
from scgpt.config import shipped_configs
from tests.readme import blocks

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell_lines() -> list[str]:
    """Every `scgpt` command of a shell block, line continuations joined."""
    code = "\n".join(block.code for page in PAGES for block in blocks(page) if block.language == "bash")
    return [line for line in code.replace("\\\n", " ").splitlines() if line.startswith("scgpt ")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8"))
               if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            links = LINK.findall(page.read_text(encoding="utf-8"))
            ahead += [page.parent / link for link in links if "://" not in link]
    assert {*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")} <= reached


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_shell_blocks_are_shell(page: Path):
    for block in blocks(page):
        if block.language == "bash":
            subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)


def test_the_script_of_continuous_integration_is_shell():
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_pages_show_commands():
    assert len(shell_lines()) >= 5


@pytest.mark.parametrize("line", shell_lines())
def test_commands_of_the_pages_parse_and_name_what_ships(line: str):
    args, rest = cli.build_parser().parse_known_args(shlex.split(line)[1:])
    assert all("=" in word for word in rest)
    if "config" in args and not args.config.endswith(".yaml"):
        kind = "corpus" if args.run.__name__.startswith("data") else getattr(args, "kind", "pretrain")
        assert args.config in shipped_configs(kind)


def test_the_page_of_metrics_names_every_event_of_a_run_and_no_other():
    source = "".join(path.read_text() for path in (ROOT / "pretrain").glob("*.py"))
    page = (ROOT / "docs" / "metrics.md").read_text()
    told = page[page.index("## Events"):page.index("## Where a step's time goes")]
    assert {*re.findall(r"\.event\(\s*\"(\w+)\"", source)} == {*re.findall(r"`(\w+)`", told)} - {"key", "terms"}


def test_every_target_of_the_makefile_is_told_and_every_told_one_is_there():
    text = (ROOT / "Makefile").read_text()
    declared = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()) - {"help"}
    told = set(re.findall(r"make ([a-z][a-z-]*)  ", "\n".join(text.splitlines()[4:11])))
    assert told == declared
    pages = {target for page in PAGES for target in re.findall(r"`make ([a-z][a-z-]*)", page.read_text())}
    assert pages <= declared
