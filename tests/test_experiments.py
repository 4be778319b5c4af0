"""experiments/: sweeps that are killed, reports of known numbers, landscapes of known shapes."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, finish, load, rows_of, run_here, start

import smac_offline_to_online as smac

sys.path.insert(0, str(ROOT / "experiments"))

import identity
import landscape
import report
import sweep

with mock.patch.dict(os.environ, DISPLAY=":0"):  # or it would choose how this process renders
    import video

BASELINES = ("td3_bc", "iql", "cal_ql")

# A script with the run folder of ours: it counts to --online-steps in tenths of a second, saves
# itself when asked to stop, goes on with --resume, needs its --init-from, and fails for the seed 13
# as long as the file `broken` is there.
FAKE = """
import argparse, json, os, signal, sys, time
from pathlib import Path
p = argparse.ArgumentParser()
for name in "dataset seed online-algorithm init-from runs-dir online-steps resume".split():
    p.add_argument("--" + name)
args = p.parse_args()
if args.init_from and not Path(args.init_from).exists():
    sys.exit("no checkpoint")
folder = Path(args.resume or f"{args.runs_dir}/x__fake__{args.seed}__20260101-{time.time_ns()}")
if not args.resume:
    folder.mkdir()
    (folder / "last.pt").write_text(json.dumps([0, vars(args)]))
step, flags = json.loads((folder / "last.pt").read_text())
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
with open(folder / "starts", "a") as f:
    about = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]
    print(os.getpid(), step, *about, file=f)
if flags["seed"] == "13" and Path("broken").exists():
    sys.exit("unlucky")
while step < int(flags["online_steps"] or 0):
    if asked:
        (folder / "last.pt").write_text(json.dumps([step, flags]))
        sys.exit(130)
    time.sleep(0.1)
    step += 1
(folder / "offline.pt").touch()
rows = ["step,phase,episode,return,length,normalized", "9,final,0,1,1,40", "9,final,1,1,1,60", ""]
(folder / "evaluations.csv").write_text("\\n".join(rows))
(folder / "curve.png").touch()
"""


def run_main(module, monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
    module.main()


# ---- sweep
@pytest.fixture
def place(tmp_path):
    """A folder with the fake script in it."""
    (tmp_path / "fake.py").write_text(FAKE)
    return tmp_path


def start_sweep(place, text, *flags) -> subprocess.Popen:
    if text:
        head = f"runs_dir = 'out'\nscript = '{place / 'fake.py'}'\n"
        (place / "grid.toml").write_text(head + text)
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), "grid.toml", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=place, **pipes)


def run_sweep(place, text, *flags) -> tuple[int, str]:
    process = start_sweep(place, text, *flags)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def status(place) -> dict[str, str]:
    return {row["run"]: row["status"] for row in rows_of(place / "out" / "status.csv")}


def starts(place) -> list[list[str]]:
    lines = []
    for path in sorted(place.rglob("starts")):
        lines += [line.split() for line in path.read_text().splitlines()]
    return lines


SWEEPS = {
    "ablations": 11 * 3,
    "default": 10,
    "dataset-size": 2 * 36,
    "door": 3 + 3,
    "handover": 3 + 24,
    "paper-table-1": 96 + 384,
    "smoke": 2,
    "transfer-adroit": 4 + 32,
    "transfer-embedded": 12 + 48,
    "transfer-walker2d": 12 + 48,
    "walker2d": 3,
}


def jobs_of(name) -> list[sweep.Job]:
    return sweep.expand(sweep.Args(file=ROOT / "experiments" / "sweeps" / f"{name}.toml"))


def test_every_sweep_file_is_counted():
    files = (ROOT / "experiments" / "sweeps").glob("*.toml")
    assert sorted(path.stem for path in files) == sorted(SWEEPS)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_file_has_its_runs_and_only_flags_that_exist(name):
    jobs = jobs_of(name)
    assert len(jobs) == SWEEPS[name] == len({job.folder for job in jobs})
    assert all(len(str(job.folder)) < 100 for job in jobs)
    commands = {}  # one for each script and set of flags, whatever the seed and dataset
    for job in jobs:
        flags = {k: v for k, v in job.flags.items() if k not in ("seed", "dataset")}
        commands[job.script, str(flags)] = flags
    for (script, _), flags in commands.items():
        module = importlib.import_module(Path(script).stem)
        smac.tyro.cli(module.Args, args=sweep.words(flags))
        assert flags.get("preset", "auto") in ("auto", *module.PRESETS)


def test_the_transfer_table_starts_every_online_run_from_its_own_pretraining():
    online = [job for job in jobs_of("paper-table-1") if job.table == "online"]
    pairs = set()
    for job in online:
        assert job.script == "smac_offline_to_online.py"
        assert job.parent.flags["online-steps"] == 0
        for flag in ("seed", "dataset"):
            assert job.flags[flag] == job.parent.flags[flag]
        command = sweep.command(job)
        source = command[command.index("--init-from") + 1]
        assert source == f"{job.parent.folder}/RUN/offline.pt"
        pairs.add((source, job.flags["online-algorithm"]))
    assert len(pairs) == 4 * 6 * 4 * 4


def test_words_on_the_command_line():
    flags = {"kappa": 0.1, "track": True, "score-return": False, "critic-hidden": [8, 16]}
    words = ["--kappa", "0.1", "--track", "--no-score-return", "--critic-hidden", "8", "16"]
    assert sweep.words(flags) == words
    grid = sweep.read_grid(("seed=0,1", "critic_hidden=8 8,16 16", "score-return=false"))
    hidden = [["8", "8"], ["16", "16"]]
    assert grid == {"seed": ["0", "1"], "critic-hidden": hidden, "score-return": [False]}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("seed = [0, 1", "cannot be read as a TOML file"),
        ("[a]\nscript = 'no_such.py'", "no such file"),
        ("[a]\nseed = [1, 1]", "would share"),
        ("[a]\ninit-from = '{b}/offline.pt'\n[b]", "move that table above it"),
        ("[a]\n[b]\ninit-from = '{a}/offline.pt'\nseed = 1", "leave it out there"),
        ("seed = 1", "has no table"),
    ],
)
def test_a_sweep_file_with_a_mistake_is_one_sentence(place, text, sentence):
    (place / "grid.toml").write_text(text)
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        sweep.expand(sweep.Args(file=place / "grid.toml"))


def test_a_run_that_fails_costs_only_those_that_start_from_it(place):
    (place / "broken").touch()
    text = "dataset = 'x'\n[a]\nseed = [0, 13]\n[b]\ninit-from = '{a}/offline.pt'"
    code, output = run_sweep(place, text, "--jobs", "2", "--gpus", "3", "4")
    assert code == 1, output
    states = {"a/seed=0": "finished", "a/seed=13": "failed"}
    assert status(place) == states | {"b/seed=0": "finished", "b/seed=13": "blocked"}
    assert "unlucky" in (place / "out" / "a" / "seed=13" / "log.txt").read_text()
    results = [row["normalized"] for row in rows_of(place / "out" / "status.csv")]
    assert results == ["50.0", "", "50.0", ""]
    assert {line[2] for line in starts(place)} == {"3", "4"}
    assert {line[3] for line in starts(place)} == {"1"}

    (place / "broken").unlink()
    before = len(starts(place))
    code, output = run_sweep(place, "", "--jobs", "2")
    assert code == 0 and set(status(place).values()) == {"finished"}, output
    assert len(starts(place)) == before + 2  # the failed one, and the one that waited for it

    changed = (place / "grid.toml").read_text().replace("'x'", "'y'")
    (place / "grid.toml").write_text(changed)
    code, output = run_sweep(place, "")
    assert code == 1 and "runs with other flags" in output


def test_ctrl_c_lets_the_runs_save_and_the_same_command_goes_on(place):
    text = "dataset = 'x'\nonline-steps = 15\n[a]\nseed = [0, 1]"
    process = start_sweep(place, text, "--jobs", "1")
    wait_for(lambda: starts(place))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130 and "to go on: python" in output
    assert list(status(place).values()) == ["stopped", "waiting"]
    (run,) = place.rglob("last.pt")
    saved = json.loads(run.read_text())[0]
    assert 0 < saved < 15

    code, output = run_sweep(place, "", "--jobs", "2")
    assert code == 0 and set(status(place).values()) == {"finished"}, output
    assert [line[1] for line in starts(place)].count(str(saved)) == 1
    assert len(list(place.rglob("last.pt"))) == 2


def test_a_run_that_outlives_its_killed_sweep_is_not_started_twice(place):
    process = start_sweep(place, "dataset = 'x'\nonline-steps = 20\n[a]\nseed = 0")
    wait_for(lambda: starts(place))
    process.kill()
    process.communicate()
    os.kill(int(starts(place)[0][0]), 0)  # it goes on
    code, output = run_sweep(place, "")
    assert code == 0 and "another process runs it" in output
    assert len(starts(place)) == 1 and list(status(place).values()) == ["finished"]


def test_the_smoke_sweep_with_the_real_script(tmp_path):
    """The online run starts from the checkpoint of the pretraining."""
    file = ROOT / "experiments" / "sweeps" / "smoke.toml"
    grid = ["--grid", "device=cpu", "score-steps=20", "offline-steps=20"]
    command = [ROOT / "experiments" / "sweep.py", file, "--runs-dir", tmp_path, *grid]
    code, out, error = finish(start(*command))
    assert code == 0, out + error
    assert [row["status"] for row in rows_of(tmp_path / "status.csv")] == ["finished", "finished"]
    (first,) = tmp_path.glob("pretrain/run/*/offline.pt")
    (second,) = tmp_path.glob("online/run/*/config.json")
    assert json.loads(second.read_text())["init_from"] == str(first)


# ---- report
def write_run(folder, algorithm, online, seed, curves, final=50.0, old=True, **flags) -> Path:
    """A run folder with these curves, {phase: {step: mean}}, two episodes around each mean; in the
    layout of version 0.1, or of today."""
    task = flags.pop("task", "hopper-embedded")
    path = folder / f"{task}__{algorithm}__{seed}__20260101-00000{seed}"
    path.mkdir(parents=True)
    config = dict(seed=seed, algorithm=algorithm, init_from=None, offline_steps=10)
    config |= dict(online_steps=60, warmup_steps=10, kappa=1.0, runs_dir=str(folder))
    if online:
        config["online_algorithm"] = online
    if old:
        config["task"] = task
    else:
        config |= dict(dataset=f"data/{task}.hdf5", task=dict(env_id="Hopper-v5"))
    (path / "config.json").write_text(json.dumps(config | flags))
    lines = [f"step,phase,episode,return,length,{'score' if old else 'normalized'}\n"]
    for phase, curve in (curves | {"final": {99: final}}).items():
        for step, mean in curve.items():
            lines += [f"{step},{phase},0,0,1,{mean - 1}\n", f"{step},{phase},1,0,1,{mean + 1}\n"]
    (path / "evaluations.csv").write_text("".join(lines))
    lines = ["step,phase,name,value\n", "5,offline,q,3\n"]
    for step in (5, 10):
        for kind in ("data", "policy", "uniform"):
            lines.append(f"{step},offline,cosine_{kind},{step / 100}\n")
    (path / "metrics.csv").write_text("".join(lines))
    return path


def make_report(monkeypatch, out, *words) -> dict[tuple, dict]:
    """The rows of groups.csv by (task, offline, online, variant)."""
    run_main(report, monkeypatch, *words, "--out", out)
    keys = ("task", "offline", "online", "variant")
    return {tuple(row[key] for key in keys): row for row in rows_of(out / "groups.csv")}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Two tasks. Best of Hopper: 90. Regrets there: SMAC 30+10+40+0 and 40+20+10+10 (mean 80), IQL
    110 and 150 (mean 130), from IQL's checkpoint to TD3 100. Walker: 30 for SMAC, 10 for IQL."""
    folder = tmp_path_factory.mktemp("numbers")
    # the early part ends at 10 + 0.2 (60 - 10) = 20
    for seed, algorithm, offline, online in [
        (0, "smac", {0: 0, 10: 61}, {0: 60, 20: 80, 40: 50, 60: 90}),
        (1, "smac", {0: 0, 10: 50}, {0: 50, 20: 70, 40: 80, 60: 80}),
        (0, "iql", {0: 2, 10: 62}, {0: 60, 20: 30, 40: 80, 60: 80}),
        (1, "iql", {0: 2, 10: 50}, {0: 50, 20: 40, 40: 60, 60: 60}),
    ]:
        write_run(folder / "a", algorithm, "sac", seed, dict(offline=offline, online=online))
    source = write_run(folder / "pretrain", "iql", "none", 2, dict(offline={0: 2, 10: 66}))
    init = dict(init_from=str(source / "offline.pt"))
    flat = dict(online={0: 65, 20: 65, 40: 65, 60: 65})
    write_run(folder / "online", "smac", "td3", 2, flat, **init)
    walker = dict(task="walker2d-medium-v2", old=False)
    write_run(folder / "a", "smac", "sac", 2, dict(online={0: 20, 60: 30}), **walker)
    write_run(folder / "a", "iql", "sac", 3, dict(online={0: 30, 60: 40}), **walker)
    unfinished = write_run(folder / "d", "iql", "sac", 4, dict(online={0: 99, 60: 99}))
    text = (unfinished / "evaluations.csv").read_text()
    (unfinished / "evaluations.csv").write_text(text[: text.index("99,final")])
    return folder


def test_the_numbers_of_a_report_by_hand(numbers, tmp_path, monkeypatch):
    """Of run folders in the old layout and in today's."""
    rows = make_report(monkeypatch, tmp_path, numbers)
    ours, iql = (rows["hopper-embedded", name, "SAC", ""] for name in ("SMAC", "IQL"))
    names = ("hand-over", "worst early", "last", "best", "gap", "final")
    assert [float(ours[name]) for name in names] == [55, 55, 85, 85, 15, 50]
    assert [float(iql[name]) for name in names] == [55, 35, 70, 70, 12.5, 50]
    assert [float(ours[f"hand-over {end}"]) for end in ("low", "high")] == [50, 60]
    assert ours["each hand-over"] == "60 / 50"
    to_td3 = rows["hopper-embedded", "IQL", "TD3", ""]
    assert [float(row["regret"]) for row in (ours, iql, to_td3)] == [80, 130, 100]
    assert [float(row["normalised"]) for row in (ours, iql, to_td3)] == [0, 1, 0.4]
    pairs = {(row["offline"], row["online"]): row for row in rows_of(tmp_path / "transfer.csv")}
    for offline in ("SMAC", "IQL"):
        assert float(pairs[offline, "SAC"]["normalised regret"]) == 0.5
    assert float(pairs["SMAC", "SAC"]["paper"]) == 0.031
    assert pairs["IQL", "TD3"]["datasets"] == "1"
    text = (tmp_path / "report.md").read_text()
    assert "| SMAC | 0.500 (0.031) | – |" in text and "curve_walker2d-medium-v2.png" in text
    assert (tmp_path / "identity.png").exists()


def test_a_report_has_the_numbers_that_the_script_prints(dataset, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, *TINY, "--eval-every", 10]
    flags += ["--online-steps", 130]
    run_here(smac, *flags, "--policy-average-rate", 0.1, "--policy-lr", 0.01)
    out = capsys.readouterr().out
    make_report(monkeypatch, tmp_path / "out", tmp_path)
    (row,) = rows_of(tmp_path / "out" / "each.csv")
    for theirs, name in {
        "at the hand-over": "hand-over",
        "worst early": "worst early",
        "collected early": "collected early",
        "last": "last",
        "best": "best",
        "mean gap to the best": "gap",
        "final, new episodes": "final",
    }.items():
        printed = re.search(rf"^ +{theirs} +(-?[\d.]+)$", out, re.MULTILINE)
        assert abs(float(printed[1]) - float(row[name])) <= 0.0501, name
    assert float(row["gap"]) > 0 and row["task"] == "hopper"


def test_methods_have_the_names_that_people_use(tmp_path, monkeypatch):
    curves = dict(offline={0: 2, 10: 62}, online={0: 60, 20: 30, 60: 80})
    write_run(tmp_path, "smac", "td3+bc", 0, curves, old=False)
    write_run(tmp_path, "cal_ql", None, 1, curves, old=False, calibrate=True)
    write_run(tmp_path, "cal_ql", None, 2, curves, old=False, calibrate=False)
    write_run(tmp_path, "smac", "awr", 3, curves, old=False, offline_steps=0)
    pretraining = dict(offline=curves["offline"])
    write_run(tmp_path, "td3_bc", None, 4, pretraining, old=False, online_steps=0)
    elsewhere = "/b/hopper__iql__5__20260101-000005b/offline.pt"
    write_run(tmp_path, "smac", "sac", 5, curves, old=False, init_from=elsewhere)
    elsewhere = elsewhere.replace("iql", "cql")
    write_run(tmp_path, "smac", "td3", 6, curves, old=False, init_from=elsewhere)
    given = dict(init_from="data/hopper-offline.pt", init_algorithm="smac")
    write_run(tmp_path, "smac", "sac", 7, curves, old=False, **given)
    assert {run.key[1:3] for run in report.read_runs((tmp_path,))} == {
        ("SMAC", "TD3+BC"),
        ("Cal-QL", "its own"),
        ("CQL", "its own"),
        ("none", "AWR"),
        ("TD3+BC", "none"),
        ("IQL", "SAC"),
        ("CQL", "TD3"),
        ("SMAC", "SAC"),
    }


def test_runs_that_differ_in_more_than_the_seed_are_named(tmp_path, monkeypatch, capsys):
    curves = dict(online={0: 60, 60: 80})
    write_run(tmp_path / "a", "smac", "sac", 0, curves, commit="one")
    write_run(tmp_path / "b", "smac", "sac", 0, curves, commit="two", kappa=0.5)
    write_run(tmp_path / "c", "iql", "sac", 0, curves)
    write_run(tmp_path / "d", "iql", "sac", 1, curves)
    make_report(monkeypatch, tmp_path / "out", tmp_path)
    text = (tmp_path / "out" / "report.md").read_text()
    (line,) = [line for line in text.splitlines() if "see --by" in line]
    assert "SMAC to SAC" in line and "kappa, commit, seed 0 2 times" in line
    assert "see --by" in capsys.readouterr().err


def test_a_cut_off_file_costs_its_own_run_alone(tmp_path, monkeypatch, capsys):
    curves = dict(online={0: 60, 60: 80})
    write_run(tmp_path, "smac", "sac", 0, curves)
    with open(write_run(tmp_path, "smac", "sac", 1, curves) / "evaluations.csv", "a") as f:
        f.write("99,final,2,0,")
    (write_run(tmp_path, "smac", "sac", 2, curves) / "config.json").write_text('{"task": "hop')
    rows = make_report(monkeypatch, tmp_path / "out", tmp_path)
    assert [row["seeds"] for row in rows.values()] == ["1"]
    err = capsys.readouterr().err
    assert "__1__" in err and "__2__" in err and "2 unfinished of 3" in err


def test_a_run_from_a_checkpoint_has_the_offline_phase_of_the_other(numbers):
    (child,) = [run for run in report.read_runs((numbers,)) if run.config["init_from"]]
    assert child.offline == "IQL" and child.curve("offline") == {0: 2, 10: 66}
    assert report.read_cosines(child, "offline")["data"] == {5: 0.05, 10: 0.1}
    rows = [("cosine_collected", 5, "0.5"), ("collected", 6, "93"), ("online_kappa", 6, "1")]
    for name, step, value in rows:
        child.metrics.append(dict(phase="online", step=step, name=name, value=value))
    assert report.read_cosines(child, "online")["collected"] == {5: 0.5}
    (alone,) = report.read_runs((numbers / "online",))
    assert alone.offline == "IQL" and alone.curve("offline") == {}


def test_variants(tmp_path, monkeypatch):
    usual = dict(tau=0.01, kappa=1.0)
    for i, flags in enumerate([{}, {}, dict(kappa=0.0), dict(tau=0.1, kappa=0.0), {}]):
        curves = dict(online={0: 10.0 * i, 60: 90})
        write_run(tmp_path / str(i), "smac", "sac", i, curves, **(usual | flags))
    for by, names in {
        "all": ["default", "kappa=0.0", "kappa=0.0, tau=0.1"],
        "kappa": ["kappa=0.0", "kappa=1.0"],
        "tau": ["tau=0.01", "tau=0.1"],
    }.items():
        runs = report.read_runs((tmp_path,))
        report.name_variants(runs, (by,))
        assert sorted({run.variant for run in runs}) == names
    groups = make_report(monkeypatch, tmp_path / "out", tmp_path, "--by", "kappa")
    seeds = {key[3]: row["seeds"] for key, row in groups.items()}
    assert seeds == {"kappa=0.0": "2", "kappa=1.0": "3"}


def test_one_methods_figure_shows_what_is_collected_and_the_cosine_there(tmp_path, monkeypatch):
    for seed, kappa, returns in [(0, 0.0, (50, 30, 10)), (1, 0.0, (50, 20, 60)), (0, 1.0, (70,))]:
        flags = dict(online_kappa=kappa)
        online = dict(online={0: 90, 20: 80, 40: 70})
        path = write_run(tmp_path / f"{seed}-{kappa}", "smac", "sac", seed, online, **flags)
        with open(path / "metrics.csv", "a") as f:
            for step, value in zip((15, 30, 35), returns):
                f.write(f"{step},online,collected,{value}\n")
            f.write(f"40,online,cosine_collected,{kappa - 0.5}\n")
    with mock.patch.object(report.plt, "close"):
        run_main(report, monkeypatch, tmp_path, "--by", "online_kappa", "--out", tmp_path / "out")
    first = report.plt.figure(report.plt.get_fignums()[-2])  # the last is of all cosines
    lines = {}
    for axes in first.axes:
        for line in axes.lines:
            points = [(round(float(x)), round(float(y), 6)) for x, y in line.get_xydata()]
            lines.setdefault(axes.get_title(), []).append(points)
    titles = ["online SAC, evaluated", "online SAC, collected", "cosine at collected states"]
    assert list(lines) == titles
    assert lines["online SAC, evaluated"] == [[(0, 90), (20, 80), (40, 70)]] * 2
    # episodes that ended up to step 20, and up to 40, over both seeds
    assert lines["online SAC, collected"] == [[(20, 50), (40, 30)], [(20, 70)]]
    assert lines["cosine at collected states"][:2] == [[(40, -0.5)], [(40, 0.5)]]
    report.plt.close("all")


def test_datasets_of_one_environment_are_compared_by_dataset(tmp_path):
    for seed, task in enumerate(("hopper-every-4", "hopper-embedded")):
        write_run(tmp_path, "smac", "sac", seed, dict(online={0: 1, 60: 2}), old=False, task=task)
    assert {run.task for run in report.read_runs((tmp_path,))} == {
        "hopper-every-4",
        "hopper-embedded",
    }
    assert {run.task for run in report.read_runs((tmp_path,), ("dataset",))} == {"Hopper-v5"}


def test_the_bootstrap_of_two_seeds_reaches_from_one_to_the_other():
    mean, low, high = report.bootstrap(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert mean.tolist() == [2, 5] and low.tolist() == [1, 5] and high.tolist() == [3, 5]
    assert np.isnan(report.bootstrap(np.array([1.0]))[1])


def test_a_report_of_nothing_is_one_sentence(numbers, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: no finished run"):
        make_report(monkeypatch, tmp_path / "out", numbers / "d")
    with pytest.raises(SystemExit, match="error: --by kapa"):
        make_report(monkeypatch, tmp_path / "out", numbers / "a", "--by", "kapa")


# ---- tables
def files_in(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_report_of_tables_is_that_of_the_folders(numbers, tmp_path, monkeypatch, capsys):
    """To the last byte, tables and pictures, twice; an unfinished run is packed all the same."""
    tables = tmp_path / "tables"
    run_main(report, monkeypatch, numbers, "--collect", "--name", "tiny", "--out", tables)
    assert "9 runs" in capsys.readouterr().out
    make_report(monkeypatch, tmp_path / "folders", numbers, "--name", "tiny")
    expected = files_in(tmp_path / "folders")
    assert len(expected) == 4 + 2 + 1  # tables, curves, identity
    packed = files_in(tables)
    for _ in range(2):
        run_main(report, monkeypatch, tables, "--figures", "tiny", "--identity-of", "tiny")
        assert files_in(tables / "report") == expected
        assert files_in(tables) == packed


def test_collecting_again_replaces_an_experiment_and_leaves_the_others(tmp_path, monkeypatch):
    curves, tables = dict(offline={0: 1.25, 10: 5}, online={0: 10 / 3, 60: 80}), tmp_path / "t"
    folders = {}
    for i, name in enumerate(("one", "two")):
        write_run(tmp_path / name / "a", "smac", "sac", i, curves, old=False, kappa=0.5)
        folders[name] = write_run(tmp_path / name / "b", "smac", "sac", 0, curves, old=False)
        words = (tmp_path / name, "--collect", "--name", name, "--out", tables)
        run_main(report, monkeypatch, *words)
    first = files_in(tables)
    assert sorted(first) == ["metrics.csv.gz", "one.csv.gz", "runs.csv", "two.csv.gz"]
    lines = rows_of(tables / "runs.csv")
    assert [line["experiment"] for line in lines] == ["one", "one", "two", "two"]
    assert {line["run"].split("/")[0] for line in lines} == {"a", "b"}
    assert lines[0]["offline"] == "SMAC" and lines[0]["online"] == "SAC"
    assert "kappa=0.5; " in lines[0]["flags"] and "kappa=1.0; " in lines[1]["flags"]
    assert "env_id=Hopper-v5" in lines[0]["flags"] and "runs_dir" not in lines[0]["flags"]

    rows = report.read_table(tables / "two.csv.gz")
    theirs = report.read_table(folders["two"] / "evaluations.csv")
    ours = [row for row in rows if row["run"].startswith("b/")]
    for name in ("phase", "step", "episode", "return", "length"):
        assert [row[name] for row in ours] == [row[name] for row in theirs]
    assert [row["score"] for row in ours] == [row["normalized"] for row in theirs]

    run_main(report, monkeypatch, *words)
    assert files_in(tables) == first
    shutil.rmtree(folders["two"])
    run_main(report, monkeypatch, *words, "--machine", "abacus")
    lines = rows_of(tables / "runs.csv")
    assert [line["machine"] for line in lines] == ["", "", "abacus"]
    metrics = report.read_table(tables / "metrics.csv.gz")
    assert {row["name"] for row in metrics} == {"cosine_data", "cosine_policy", "cosine_uniform"}
    assert {row["run"] for row in metrics} == {line["run"] for line in lines}


def test_runs_of_one_second_keep_their_own_names_and_parents(tmp_path, monkeypatch):
    for i, folder in enumerate(("kappa=1", "kappa=2")):
        source = write_run(tmp_path / folder, "iql", None, 0, dict(offline={0: 2, 10: 60 + i}))
        init = dict(init_from=str(source / "offline.pt"))
        write_run(tmp_path / f"td3,{folder}", "smac", "td3", 0, dict(online={0: 1, 60: i}), **init)
    words = (tmp_path, "--collect", "--name", "tiny", "--out", tmp_path / "tables")
    run_main(report, monkeypatch, *words)
    lines = [line for line in rows_of(tmp_path / "tables" / "runs.csv") if line["parent"]]
    assert (
        [line["run"][-1] for line in lines] == [line["parent"][-1] for line in lines] == ["0", "b"]
    )
    runs = [run for run in report.read_runs((tmp_path / "tables",)) if run.parent]
    assert [(run.curve("offline")[10], run.curve("online")[60]) for run in runs] == [
        (60, 0),
        (61, 1),
    ]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("a",), "needs a --name"),
        (("a", "--name", "../a"), "needs a --name"),
        (("empty", "--name", "a"), "no run there"),
        (("tables", "--name", "a"), "these are tables"),
    ],
)
def test_what_cannot_be_packed_is_one_sentence(words, sentence, tmp_path, monkeypatch):
    write_run(tmp_path / "a", "smac", "sac", 0, dict(online={0: 1, 60: 2}))
    (tmp_path / "empty").mkdir()
    tables = tmp_path / "tables"
    run_main(report, monkeypatch, tmp_path / "a", "--collect", "--name", "x", "--out", tables)
    folder, *more = words
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        run_main(report, monkeypatch, tmp_path / folder, "--collect", *more, "--out", tables)


RESULTS = ROOT / "docs" / "results"


def test_the_results_are_few_files_with_short_paths():
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert len(files) <= 40
    assert [path for path in files if len(str(path.relative_to(ROOT))) > 80] == []


def test_the_results_tables_are_those_of_the_packed_runs(tmp_path, monkeypatch):
    """Every experiment in runs.csv has its table, and the report in docs/ is the one of today."""
    run_main(report, monkeypatch, RESULTS, "--out", tmp_path, "--figures", "none")
    for name in ("report.md", "groups.csv", "each.csv", "transfer.csv"):
        text = (tmp_path / name).read_text()
        kept = (RESULTS / "report" / name).read_text()
        kept = re.sub(r"!\[[^]]*\]\([^)]*\)\n\n?", "", kept)
        # another version of numpy may round the tables' last digit differently
        number = r"-?\d+\.\d+"
        assert re.sub(number, "", text).rstrip() == re.sub(number, "", kept).rstrip(), name
        found, expected = (np.array(re.findall(number, t), float) for t in (text, kept))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4, err_msg=name)


# ---- landscape
def changed(path: Path, new: Path, change) -> Path:
    """A copy of a checkpoint after change(dictionary)."""
    saved = load(path)
    change(saved)
    torch.save(saved, new)
    return new


def move_bias(saved, step=1.0):
    saved["agent"]["policy_average.head.bias"] += step


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Checkpoints of the other scripts with the tiny networks, as they save them."""
    folder, paths = tmp_path_factory.mktemp("foreign"), {}
    for name in BASELINES:
        script = importlib.import_module(name)
        sizes = dict(num_critics=3, critic_hidden=(16, 16), policy_hidden=(16, 16))
        args = script.Args(**sizes)
        agent = script.Agent(11, 3, args)
        for p in agent.parameters():
            p.data.add_(0.1 * torch.randn(p.shape))
        paths[name] = folder / f"{name}.pt"
        saved = dict(format="smac-checkpoint-2", algorithm=script.ALGORITHM, args=vars(args))
        torch.save(saved | dict(agent=agent.state_dict(), done={}), paths[name])
        paths[f"{name} agent"] = agent
    return paths


def test_a_vector_holds_the_deterministic_policy(reference):
    """SMAC's is the averaged one: moving the other moves nothing."""
    saved, s = load(reference / "last.pt"), torch.randn(5, 11)
    agent = smac.Agent(11, 3, smac.Args(**saved["args"]))
    agent.load_state_dict(saved["agent"])
    agent.policy.head.bias.data.add_(1)
    (point,) = landscape.read_points([reference / "last.pt"])
    policy = landscape.build(point.vector, point.hidden, 11, 3)
    assert torch.equal(policy.mode(s), agent.policy_average.mode(s))
    assert not torch.equal(policy.mode(s), agent.policy.mode(s))


@pytest.mark.parametrize("name", BASELINES)
def test_the_policies_of_the_other_scripts_are_read(name, foreign):
    s = torch.randn(5, 11)
    policy = landscape.read_policy(load(foreign[name]))
    torch.testing.assert_close(policy.mode(s), foreign[f"{name} agent"].policy.mode(s))
    assert policy.mode(s).std() > 0.01


def test_the_line_from_a_checkpoint_to_itself_is_flat(reference, tmp_path, monkeypatch, capsys):
    last = reference / "last.pt"
    flags = ["--points", 3, "--episodes", 3, "--jobs", 1, "--out", tmp_path]
    run_main(landscape, monkeypatch, "line", last, last, *flags)
    text = capsys.readouterr().out
    assert "deepest valley 0.0 points below the chord [0.0, 0.0]" in text
    assert "monotone (largest way back 0.0 points" in text
    rows = rows_of(tmp_path / "points.csv")
    assert len(rows) == 9 and len({(row["episode"], row["normalized"]) for row in rows}) == 3
    saved = load(last)
    envs = [smac.TaskEnv(smac.Task(**saved["task"])) for _ in range(3)]
    seeds = [smac.episode_seed(0, smac.FINAL, i) for i in range(3)]
    smac.rollout(landscape.read_policy(saved), envs, seeds)
    assert [float(row["return"]) for row in rows[:3]] == [sum(env.rewards) for env in envs]

    with pytest.raises(SystemExit, match="holds another landscape"):
        moved = changed(last, tmp_path / "moved.pt", move_bias)
        run_main(landscape, monkeypatch, "line", moved, last, *flags)


def test_a_landscape_goes_on_where_it_was_cut(reference, tmp_path, monkeypatch):
    """And in two processes it finds what it finds in one."""
    words = ["line", reference, "--points", 4, "--beyond", 0.4, "--episodes", 2, "--out", tmp_path]
    run_main(landscape, monkeypatch, *words, "--jobs", 1)
    table = tmp_path / "points.csv"
    lines = table.read_text().splitlines(keepends=True)
    points = [line.split(",")[0] for line in lines[1::2]]
    assert points == "-0.333333 0 0.333333 0.666667 1 1.33333".split()
    cut = "".join(lines[:10]) + lines[10][:7]  # within the second episode of a point
    table.write_text(cut)
    calls, roll_out = [], landscape.roll_out
    monkeypatch.setattr(landscape, "roll_out", lambda *w: calls.append(w[0]) or roll_out(*w))
    run_main(landscape, monkeypatch, *words, "--jobs", 1)
    assert calls == [("1",), ("1.33333",)]
    assert set(table.read_text().splitlines(keepends=True)) == set(lines)

    table.write_text(cut)
    monkeypatch.setattr(landscape, "roll_out", roll_out)
    run_main(landscape, monkeypatch, *words, "--jobs", 2)
    assert set(table.read_text().splitlines(keepends=True)) == set(lines)


def test_the_corners_of_a_plane_are_its_checkpoints(reference, tmp_path, monkeypatch):
    c = changed(reference / "last.pt", tmp_path / "c.pt", move_bias)
    words = ["--points", 2, "--low", 0, "--high", 1, "--episodes", 2, "--jobs", 1]
    words += ["--out", tmp_path / "plane"]
    run_main(landscape, monkeypatch, "plane", reference, reference, c, *words)
    assert (tmp_path / "plane" / "plane.png").exists()
    rows = rows_of(tmp_path / "plane" / "points.csv")
    returns = {(row["x"], row["y"], row["episode"]): float(row["return"]) for row in rows}
    assert len(returns) == 8 and len(set(returns.values())) > 4
    corners = {("0", "0"): reference / "offline.pt", ("1", "0"): reference / "last.pt"}
    for key, path in (corners | {("0", "1"): c}).items():
        (point,) = landscape.read_points([path])
        for episode, total, *_ in landscape.roll_out((), point.vector, point, 0, range(2)):
            assert total == returns[*key, str(episode)]


def test_a_path_through_kept_checkpoints(reference, tmp_path, monkeypatch, capsys):
    for name, step in {
        "offline-0": 0,
        "offline-30": 30,
        "online-40": 40,
        "online-100": 100,
    }.items():
        changed(reference / "last.pt", tmp_path / f"{name}.pt", lambda s, x=step: move_bias(s, x))
    flags = ["--episodes", 2, "--jobs", 1, "--out", tmp_path / "out"]
    run_main(landscape, monkeypatch, "path", tmp_path, *flags)
    names = [row["checkpoint"].split("/")[-1] for row in rows_of(tmp_path / "out" / "points.csv")]
    assert names[::2] == ["offline-0.pt", "offline-30.pt", "online-40.pt", "online-100.pt"]
    length = f"{3**0.5 * 100:.1f}"
    assert f"{length} long, {length} from end to end" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="--keep-every"):
        run_main(landscape, monkeypatch, "path", reference)


def test_principal_components_keep_the_distances_of_points_on_a_plane():
    flat = np.random.default_rng(0).normal(size=(6, 2)) * [5, 1]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0][:2]
    xy, (first, second) = landscape.embed(flat @ turn + 3)
    distances = np.linalg.norm(flat - flat[0], axis=1)
    assert np.allclose(np.linalg.norm(xy - xy[0], axis=1), distances)
    shares = [int(label.split("(")[1].split()[0]) for label in (first, second)]
    assert sum(shares) in (99, 100, 101) and shares[0] > shares[1]


def test_the_verdict_finds_a_valley_of_known_depth():
    t = np.linspace(0, 1, 11)
    curve = 40 + 40 * t  # the chord
    curve[6] -= 30
    noise = np.random.default_rng(0).normal(size=20)  # of the starts, the same at every point
    verdict = landscape.judge(t, curve[:, None] + noise, 5)
    assert verdict["where"] == t[6] and verdict["monotone"] == "not monotone"
    assert abs(verdict["depth"] - 30) < 1e-9 and abs(verdict["setback"] - 26) < 1e-9
    assert np.allclose(verdict["depth_interval"], 30)
    assert landscape.judge(t, (40 + 40 * t)[:, None] + noise, 5)["monotone"] == "monotone"
    falling = landscape.judge(
        t, (80 - 40 * t**3)[:, None] + noise, 5
    )  # above its chord all the way
    assert falling["monotone"] == "monotone" and falling["setback"] == 0
    assert abs(falling["depth"]) < 1e-9
    rough = np.random.default_rng(0).normal(size=(11, 4)) * 20 + 50
    verdict = landscape.judge(t, rough, 5)
    low, high = verdict["depth_interval"]
    assert low < verdict["depth"] < high


def other_task(saved):
    saved["task"]["env_id"] = "Walker2d-v5"


def other_shape(saved):
    agent = smac.Agent(11, 3, smac.Args(policy_hidden=(9,)))
    saved["agent"], saved["args"]["policy_hidden"] = agent.state_dict(), (9,)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (other_task, "checkpoints of one task"),
        (other_shape, "differ in shape"),
        (lambda saved: saved.update(format="other"), "no checkpoint of these scripts"),
    ],
)
def test_checkpoints_that_do_not_go_together(change, sentence, reference, tmp_path, monkeypatch):
    other = changed(reference / "last.pt", tmp_path / "other.pt", change)
    words = ["line", reference / "last.pt", other, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        run_main(landscape, monkeypatch, *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_the_checkpoint_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has no offline.pt"):
        run_main(landscape, monkeypatch, "line", tmp_path)


# ---- identity
def test_a_critic_that_follows_a_score_has_cosine_one_with_it(reference):
    """And minus one with its opposite, on every kind of action."""
    saved = load(reference / "last.pt")
    agent = smac.Agent(11, 3, smac.Args(**saved["args"]))
    agent.load_state_dict(saved["agent"])
    s, a = torch.randn(64, 11), 2 * torch.rand(64, 3) - 1
    batch = smac.Batch(s, a, None, None, None, None)
    gradient = agent.critic.action_gradient
    for sign in (1, -1):

        class Score(torch.nn.Module):
            def score(self, s, a, sign=sign):
                return sign * gradient(s, a).mean(0).detach()

        agent.score_model = Score()
        values = identity.cosines(agent, batch, seed=0)
        assert values.keys() == {"data", "policy", "uniform"}
        assert all(abs(x - sign) < 1e-5 for x in values.values())


def test_identity_of_all_scripts_checkpoints(reference, foreign, dataset, tmp_path, monkeypatch):
    """The score is that of --score, the critics are each checkpoint's own."""
    out, score = tmp_path / "identity.csv", reference / "offline.pt"
    paths = [reference / "last.pt", *(foreign[name] for name in BASELINES)]
    words = [*paths, "--score", score, "--states", 50, "--out", out]
    run_main(identity, monkeypatch, *words)
    rows = rows_of(out)
    assert [row["actions"] for row in rows] == 4 * ["data", "policy", "uniform"]
    agent, saved = foreign["iql agent"], load(score)
    ours = smac.Agent(11, 3, smac.Args(**saved["args"] | dict(critic_activation="relu")))
    ours.load_state_dict(saved["agent"])
    ours.critic.load_state_dict(agent.critic.state_dict())
    replay = smac.dataset_replay(
        smac.load_dataset(str(dataset), 11, 3), smac.Task(**saved["task"]), torch.device("cpu")
    )
    order = torch.randperm(replay.n, generator=torch.Generator().manual_seed(0))
    batch = replay.unpack(replay.rows[order[:50]])
    cosine = float(ours.cosine(batch.s, batch.a).detach())
    assert abs(float(rows[6]["cosine"]) - cosine) < 1e-4 and "iql.pt" in rows[6]["checkpoint"]


def test_identity_without_a_fitted_score_is_one_sentence(reference, foreign, monkeypatch):
    with pytest.raises(SystemExit, match="error: .* has no fitted score model"):
        run_main(identity, monkeypatch, reference / "last.pt", "--score", foreign["iql"])


# ---- video
def test_a_film_of_an_episode(reference, tmp_path, monkeypatch, capsys):
    """It is as long as the episode, and in each picture the hopper, which is not gray, stands in
    the middle."""
    from PIL import Image

    out = tmp_path / "film.gif"
    monkeypatch.setenv("MUJOCO_GL", "egl")
    try:
        run_main(video, monkeypatch, reference / "last.pt", "--out", out)
    except SystemExit as refusal:
        pytest.skip(str(refusal))
    text = capsys.readouterr().out
    assert str(out) in text
    steps = int(re.search(r"normalized return -?[\d.]+, (\d+) steps", text)[1])
    film = Image.open(out)
    assert film.n_frames == -(-steps // 5)  # 125 steps a second, 25 pictures
    for frame in (0, film.n_frames - 1):
        film.seek(frame)
        middle = np.asarray(film.convert("RGB")).astype(int)[:, 160:320]
        reddish = middle[..., 0] - middle[..., 2] > 40
        assert reddish.sum() > 300


def test_the_camera_goes_with_the_robot(reference):
    task = smac.Task(**load(reference / "last.pt")["task"])
    env = smac.TaskEnv(task, render_mode="rgb_array")
    video.follow_robot(env)
    camera = env.unwrapped.model.camera(env.unwrapped.mujoco_renderer.camera_id)
    assert camera.mode == 2  # mjCAMLIGHT_TRACKCOM: moves with the robot's centre of mass


def test_an_environment_outside_mujoco_has_its_own_camera():
    env = gym.make("CartPole-v1")
    video.follow_robot(env)  # finds no robot, and nothing to complain of
    assert not hasattr(env.unwrapped, "model")


def test_a_film_of_another_kind_is_refused(reference, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"ends in .gif or .mp4"):
        run_main(video, monkeypatch, reference / "last.pt", "--out", tmp_path / "film.avi")
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install imageio-ffmpeg"):
        run_main(video, monkeypatch, reference / "last.pt", "--out", tmp_path / "film.mp4")
