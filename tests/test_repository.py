"""The files agree with each other, and stay as short as they are."""

import ast
import csv
import dataclasses
import gzip
import importlib
import re
import shlex
import sys
import tomllib

import counts
import pytest
import shared_blocks
import torch
from helpers import ROOT, SCRIPT, commands, load, rows_of, run_here
from shared_blocks import SCRIPTS, halves

import smac_offline_to_online as smac

# Of counts.py. Lower a number where a script has become shorter; where one stands in the way of a
# reader, the reader wins.
CEILINGS = {
    "smac_offline_to_online.py": dict(lines=1351, shared=593, network=199, tokens=13, dense=49),
    "cal_ql.py": dict(lines=1069, shared=593, network=162, tokens=13, dense=35),
    "iql.py": dict(lines=993, shared=593, network=161, tokens=13, dense=35),
    "td3_bc.py": dict(lines=968, shared=593, network=161, tokens=13, dense=35),
}
# Above the banner, what has one name in several scripts is one thing, word for word, but for:
OWN = {"Args", "Agent", "Policy", "Critics", "main"}

PAGES = sorted(p for folder in (".", "docs", "data") for p in (ROOT / folder).glob("*.md"))
NOTES = sorted((ROOT / "docs" / "notes").glob("*.md"))
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)


def page_name(path):
    return str(path.relative_to(ROOT))


# ---- scripts
def test_there_are_four_scripts():
    assert {script.name for script in SCRIPTS} == set(CEILINGS)


@each_script
def test_a_script_is_no_longer_or_denser_than_it_may_be(script):
    found = counts.counts(script)
    assert {k: found[k] for k, most in CEILINGS[script.name].items() if found[k] > most} == {}


@each_script
def test_a_line_holds_one_statement_and_100_columns(script):
    text = script.read_text()
    assert max(map(len, text.splitlines())) <= 100
    starts = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    assert {line for line in starts if starts.count(line) > 1} == set()


def test_counts_count(tmp_path):
    text = '"""Doc."""\n# note\nx = [i for i in "ab"]\ny = x if x else {} | {}\n'
    text += "def f(a: str | None, b: None | int): pass\n\n\nclass N(nn.Module): ...\n"
    (tmp_path / "a.py").write_text(text + f"{counts.BANNER} ==\nz |= x\n")
    found = counts.counts(tmp_path / "a.py")
    assert found == dict(lines=10, shared=2, network=8, tokens=9.8, dense=4)


@each_script
def test_the_shared_part_is_the_same_in_all_scripts(script):
    """If not: python tests/shared_blocks.py"""
    assert halves(script)[1] == halves(SCRIPT)[1]


def definitions(script) -> dict[str, str]:
    """{name: text} of the functions and classes above the banner."""
    text = halves(script)[0]
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


@each_script
def test_what_has_one_name_above_the_banner_is_one_thing(script):
    ours = definitions(script)
    for other in SCRIPTS:
        theirs = definitions(other)
        for name in ours.keys() & theirs.keys() - OWN:
            assert ours[name] == theirs[name], f"{name}: {script.name} and {other.name} differ"


def flag_blocks(script) -> tuple[list[str], list[str]]:
    """The lines of Args from dataset to seed, but init_from, and from "# run" on."""
    lines = definitions(script)["Args"].splitlines()
    seed = next(i for i, line in enumerate(lines) if line.startswith("    seed:"))
    run = lines.index("    # run")
    first = [line for line in lines[: seed + 1] if not line.startswith("    init_from:")]
    return first, lines[run:]


@each_script
def test_flags_of_every_script_begin_and_end_alike(script):
    assert flag_blocks(script) == flag_blocks(SCRIPT)


@each_script
def test_a_scripts_dependencies_are_in_requirements_txt(script):
    comment = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(), re.M | re.S)[1]
    needs = tomllib.loads(re.sub("^# ?", "", comment, flags=re.M))["dependencies"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {line.strip() for line in lines if line.strip() and line[0] not in "#-"}
    prepare_needs = {line for line in listed if line.startswith("minari")}
    assert set(needs) == listed - prepare_needs


def test_minaris_hub_can_be_reached_after_the_installation():
    assert "minari[hf]>=0.5.3" in (ROOT / "requirements.txt").read_text().splitlines()
    importlib.import_module("huggingface_hub")  # what minari asks for before it loads


def test_copies_are_rewritten_from_one_script(tmp_path, monkeypatch):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(f"a = 1\n{shared_blocks.BANNER} ==\nnew\n")
    other.write_text(f"b = 2\n{shared_blocks.BANNER} ==\nold\n")
    monkeypatch.setattr(shared_blocks, "ROOT", tmp_path)
    monkeypatch.setattr(shared_blocks, "SCRIPTS", [one, other])
    monkeypatch.setattr(sys, "argv", ["shared_blocks.py", "one.py"])
    shared_blocks.main()
    assert other.read_text() == f"b = 2\n{shared_blocks.BANNER} ==\nnew\n"


# ---- pages
def known_flags(script) -> set[str]:
    names = re.findall(r"^    (\w+): ", script.read_text(), re.M)  # experiments have several Args
    if script in SCRIPTS:
        module = importlib.import_module(script.stem)
        names = [field.name for field in dataclasses.fields(module.Args)]
    return {f"--{name.replace('_', '-')}" for name in names} | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_pages_commands_exist(page):
    found = commands(page)
    assert found or page.name != "README.md"
    for command in found:
        script, *words = shlex.split(command, comments=True)
        assert (ROOT / script).is_file(), command
        given = {re.sub("^--no-", "--", word.split("=")[0]) for word in words if word[:2] == "--"}
        assert given <= known_flags(ROOT / script) | set(words) & {"--no-deps"}, command
        for word in words:
            if re.match(r"(data|docs|experiments|tests)/.*\.(toml|py|hdf5)$", word):
                assert (ROOT / word).exists() or word in made_by(found), command


def made_by(found) -> set[str]:
    """Files that the page's commands write."""
    words = [shlex.split(command, comments=True) for command in found]
    return {after for line in words for word, after in zip(line, line[1:]) if word == "--out"}


@pytest.mark.parametrize("page", PAGES + NOTES, ids=page_name)
def test_links_between_files_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_no_file_names_a_folder_of_some_machine():
    files = [*ROOT.glob("*"), *ROOT.glob("experiments/**/*"), *ROOT.glob("tests/*")]
    files += [*PAGES, *NOTES, *ROOT.glob("data/*.py")]
    for path in files:
        if path.suffix in (".py", ".md", ".toml", ".txt", ".cff"):
            found = re.findall(r"(?<![\w.])/(?:home|root|work|Users|mnt)/\w+", path.read_text())
            assert found == [], path


def test_the_page_on_checkpoints_names_what_is_in_them(reference):
    text, state = (ROOT / "docs" / "checkpoint.md").read_text(), load(reference / "last.pt")
    assert [key for key in state if f"`{key}`" not in text] == []
    known = set(re.findall(r"`([a-z_]+)[.`]", text))
    assert {key.split(".")[0] for key in state["agent"]} - known == set()


def test_the_checkpoint_to_look_at_hands_over(tmp_path):
    """data/hopper-offline.pt, which the README names second."""
    path = ROOT / "data" / "hopper-offline.pt"
    assert path.stat().st_size < 4_000_000
    flags = ["--online-steps", 12, "--warmup-steps", 10, "--eval-every", 10, "--eval-episodes", 1]
    flags += ["--final-episodes", 1, "--device", "cpu", "--runs-dir", tmp_path]
    folder = run_here(smac, "--init-from", path, *flags)
    rows = [row for row in rows_of(folder / "evaluations.csv") if row["phase"] == "online"]
    assert float(rows[0]["normalized"]) > 85
    assert load(folder / "last.pt")["args"]["online_kappa"] == "auto"


def test_the_snippets_of_docs_copy_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "copy.md").read_text()
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(snippet, names)  # as a reader would, one after another
    saved = load(ROOT / "data" / "hopper-offline.pt")
    agent = smac.Agent(11, 3, smac.Args(**saved["args"]))
    agent.load_state_dict(saved["agent"])
    s = torch.randn(11)
    torch.testing.assert_close(names["act"](s), agent.policy_average.mode(s[None])[0])
    assert names["metrics"]["sm_loss"].isfinite()


TABLES = sorted(p for p in (ROOT / "docs" / "results").glob("*.csv*"))


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.name)
def test_a_table_has_one_value_a_column(path):
    """A comma in a name would shift a row."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="") as f:
        rows = csv.reader(f)
        n = len(next(rows))
        assert [row for row in rows if len(row) != n] == []
