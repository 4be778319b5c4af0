"""The files agree with each other."""

import dataclasses
import importlib
import itertools
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import shared_blocks
from helpers import ROOT, load
from shared_blocks import SCRIPTS, blocks

PAGES = sorted(p for folder in (".", "docs", "data", "experiments") for p in (ROOT / folder).glob("*.md"))


def dependencies(script):
    block = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(), re.MULTILINE | re.DOTALL)[1]
    return tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_scripts_dependencies_are_those_of_requirements_txt(script):
    listed = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert sorted(dependencies(script)["dependencies"]) == sorted(x for x in listed if x and x[0] not in "#-")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_does_not_grow(script):
    """A ceiling that is lowered whenever a script gets shorter; 800 lines is where it shall go."""
    assert len(script.read_text().splitlines()) <= 1300


def test_shared_blocks_are_identical_in_all_scripts():
    assert blocks(ROOT / "smac_offline_to_online.py")
    for one, other in itertools.combinations(SCRIPTS, 2):
        ours, theirs = blocks(one), blocks(other)
        for title in ours.keys() & theirs.keys():
            assert ours[title] == theirs[title], f"{title}: {one.name} and {other.name} differ"


def test_copies_are_rewritten_from_one_script(tmp_path, monkeypatch):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("# ==== shared: a\n1\n# ==== b\n2\n# ==== shared: c\n3\n")
    other.write_text("head\n# ==== shared: c\nold\n# ==== own\n4\n")
    monkeypatch.setattr(shared_blocks, "ROOT", tmp_path)
    monkeypatch.setattr(shared_blocks, "SCRIPTS", [one, other])
    monkeypatch.setattr(sys, "argv", ["shared_blocks.py", "one.py"])
    shared_blocks.main()
    assert other.read_text() == "head\n# ==== shared: c\n3\n# ==== own\n4\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_pages_commands_exist(page):
    text = page.read_text().replace("\\\n", " ")
    commands = re.findall(r"^\s*(?:\$ |`)?python (\S+\.py.*?)`?$", text, re.MULTILINE)
    assert commands or page.name != "README.md" or page.parent != ROOT
    for command in commands:
        script, *words = shlex.split(command, comments=True)
        assert (ROOT / script).is_file(), command
        if ROOT / script in SCRIPTS:
            groups = importlib.import_module(Path(script).stem).GROUPS.values()
            known = {f"--{f.name.replace('_', '-')}" for group in groups for f in dataclasses.fields(group)}
            given = {word.split("=")[0].replace("--no-", "--") for word in words if word.startswith("--")}
            assert given <= known | {"--help"}, command


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_page_on_checkpoints_names_what_is_in_them(reference):
    text = (ROOT / "docs" / "checkpoint.md").read_text()
    assert [key for key in load(reference / "last.pt") if f"`{key}`" not in text] == []
    parts = {".".join(key.split(".")[:2]) for key in load(reference / "last.pt")["agent"]}
    known = set(re.findall(r"`([a-z_]+(?:\.\w+)?)", text))
    assert [part for part in parts if part not in known and part.split(".")[0] + ".*" not in text] == []
