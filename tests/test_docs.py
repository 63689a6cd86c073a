"""What the pages say: commands and flags exist, links lead somewhere, tables made by scripts are
those of today.
"""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from commands import commands, flags
from dspark.cache.shared import peers
from stores import HIDDEN, write_store

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
    ),
    *sorted(DOCS.rglob("*.md")),
]
# Pages that say how to use what is there; entries of the log say how it was, and migrate.md has
# others' flags.
USERS = [
    page
    for page in PAGES
    if page.parent.name != "log" and page.name not in ("CHANGELOG.md", "migrate.md")
]
WIDTH = 100
README_WORDS = 700
# Flags of programs that pages rightly name and that are not ours.
FOREIGN = {
    "--nproc-per-node",
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--speculative-config",
    "--strict",
    "--fix",
    "--no-deps",
    "--version",
}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are prose, numbered: no code blocks, tables, headings, pictures or HTML
    comments.
    """
    fenced, item = False, False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not line.strip():
            pass
        else:
            item = bool(re.match(r" *([-*] |\d+\. )", line)) or (item and line.startswith(" "))
            indented = line.startswith("    ") and not item
            if not fenced and not indented and not line.startswith(("|", "#", "![", "<!--")):
                yield number, line


def blocks(text: str) -> Iterator[str]:
    """Commands of the code blocks, indented or fenced as bash: continued lines joined, comments cut
    off.
    """
    lines, fenced, item = [], "", False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = "" if fenced else line.strip().removeprefix("```") or "text"
            continue
        if line.strip():
            item = bool(re.match(r" *([-*] |\d+\. )", line)) or (item and line.startswith(" "))
        code = line.startswith("        ") if item else line.startswith("    ")
        if fenced in ("bash", "sh", "console") or (not fenced and code):
            lines.append(line.strip())
        else:
            lines.append("")
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    for line in joined.splitlines():
        for part in line.removeprefix("$ ").split("&&"):
            yield part.strip()


def inline(text: str) -> list[str]:
    """Inline code of the prose."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def parse(words: list[str]) -> None:
    """Parse a command line of ours as click does; run nothing."""
    known = commands()
    if words[0] == "torchrun":
        words = ["dspark-train", *words[words.index("dspark.train") + 1 :]]
    first = " ".join(words[:2])
    command, rest = (known[first], words[2:]) if first in known else (known[words[0]], words[1:])
    with contextlib.suppress(click.exceptions.Exit):  # --help
        command.make_context(words[0], list(rest))


@pytest.mark.parametrize("page", [*USERS, DOCS / "migrate.md"], ids=name)
def test_commands_parse(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in blocks(text):
        if line.startswith("Error:"):
            continue
        own = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)  # without variables of the environment
        words = (
            shlex.split(own, comments=True) if re.match(r"dspark-|torchrun|vllm|make ", own) else []
        )
        if not words:
            continue
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
        elif words[0] == "vllm":
            config = json.loads(words[words.index("--speculative-config") + 1])
            assert config["method"] in ("dspark", "dflash"), line
        elif "--verifier-name-or-path" in words:  # the example of an answer to a flag of others
            with pytest.raises(click.NoSuchOption):
                parse(words)
        else:
            try:
                parse(words)
            except click.ClickException as error:
                if "does not exist" not in error.message:  # a file of the example
                    pytest.fail(f"{line}\n{error.format_message()}")


@pytest.mark.parametrize("page", USERS, ids=name)
def test_flags_exist(page: Path) -> None:
    ours = {flag for command in commands().values() for flag in flags(command)} | FOREIGN
    theirs = {theirs for entry in peers.table().values() for theirs in entry["flags"]}
    for code in inline(page.read_text()):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code):
            assert flag in ours or flag in theirs, f"`{code}`: {flag} is not a flag"
        words = code.split()
        if words[0] in ("dspark-dump", "dspark-train", "dspark-tools") and len(words) > 1:
            # prose may name a command with one flag
            with contextlib.suppress(click.MissingParameter):
                parse(shlex.split(code))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_is_narrow(page: Path) -> None:
    wide = [
        f"{name(page)}:{number}: {len(line)} characters"
        for number, line in prose(page.read_text())
        if len(line) > WIDTH and not LINK.search(line)
    ]
    assert not wide, "\n".join(wide)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of ``page``, as forges and the site spell them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()) for head in heads)
    return {re.sub(r" ", "-", each) for each in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        at = (page.parent / path).resolve() if path else page
        assert at.exists(), f"{name(page)}: {target} is not there"
        if DOCS in page.parents:
            assert DOCS in at.parents, (
                f"{name(page)}: {target} leaves docs/, so the site cannot show it"
            )
        if anchor:
            assert anchor in anchors(at), f"{name(page)}: {at.name} has no heading #{anchor}"


def test_readme_takes_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


@pytest.mark.parametrize("script", ["migrate", "sizing", "targets"])
def test_tables_are_those_of_today(script: str) -> None:
    made = runpy.run_path(str(DOCS / "make" / f"{script}.py"))
    text = (DOCS / f"{script}.md").read_text()
    assert made["page"](text) == text, f"run: python docs/make/{script}.py"


def test_architecture_names_every_module(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(DOCS / "make" / "modules.py"))["main"]
    assert main() == 0, capsys.readouterr().out


def test_log_lists_every_entry() -> None:
    listed = set(LINK.findall((DOCS / "log" / "README.md").read_text()))
    entries = {path.name for path in (DOCS / "log").glob("*.md")} - {"README.md"}
    assert entries <= listed, entries - listed
    for entry in entries:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+\.md", entry), entry


def test_site_shows_every_page() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert f" {page.name}\n" in config, f"mkdocs.yml does not name {page.name}"


def test_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "hs.zarr", [24, 31])
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL):
        exec(compile(code, "docs/python.md", "exec"), scope)
    assert scope["stored"].shape[1:] == (HIDDEN,)  # type: ignore[attr-defined]
    assert len(scope["lengths"]) == 2  # type: ignore[arg-type]
