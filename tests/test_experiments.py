"""experiments/: sweeps that are killed, reports from known numbers, landscapes with known shapes."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, load, parse, rows_of

import smac_offline_to_online as smac

sys.path.insert(0, str(ROOT / "experiments"))

import identity
import landscape
import report
import sweep

# A script with the run folder of ours: it counts to --online-steps in tenths of a second, saves itself when asked to
# stop, goes on with --resume, needs its --init-from, and fails for the seed 13 as long as the file `broken` is there.
FAKE = """
import argparse, json, os, signal, sys, time
from pathlib import Path
p = argparse.ArgumentParser()
for name in ("task", "seed", "online-algorithm", "init-from", "runs-dir", "online-steps", "resume"):
    p.add_argument("--" + name)
args = p.parse_args()
if args.init_from and not Path(args.init_from).exists():
    sys.exit("no checkpoint")
folder = Path(args.resume or f"{args.runs_dir}/{args.task}__fake__{args.seed}__20260101-{time.time_ns() % 10**6:06}")
if not args.resume:
    folder.mkdir()
    (folder / "last.pt").write_text(json.dumps([0, vars(args)]))
step, flags = json.loads((folder / "last.pt").read_text())
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
with open(folder / "starts", "a") as f:
    print(os.getpid(), step, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], file=f)
if flags["seed"] == "13" and Path("broken").exists():
    sys.exit("unlucky")
while step < int(flags["online_steps"] or 0):
    if asked:
        (folder / "last.pt").write_text(json.dumps([step, flags]))
        sys.exit(130)
    time.sleep(0.1)
    step += 1
(folder / "offline.pt").touch()
rows = ["step,phase,episode,return,length,score", "9,final,0,1,1,40", "9,final,1,1,1,60", ""]
(folder / "evaluations.csv").write_text("\\n".join(rows))
"""


# ---- sweep
@pytest.fixture
def place(tmp_path):
    """A folder with the fake script in it."""
    (tmp_path / "fake.py").write_text(FAKE)
    return tmp_path


def start_sweep(place, text, *flags) -> subprocess.Popen:
    if text:
        (place / "grid.toml").write_text(f"runs_dir = 'out'\nscript = '{place / 'fake.py'}'\n{text}")
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), "grid.toml", *flags]
    return subprocess.Popen(command, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_sweep(place, text, *flags) -> tuple[int, str]:
    process = start_sweep(place, text, *flags)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def status(place) -> dict[str, str]:
    return {row["run"].split("/")[-1]: row["status"] for row in rows_of(place / "out" / "status.csv")}


def starts(place) -> list[list[str]]:
    return [line.split() for p in sorted(place.rglob("starts")) for line in p.read_text().splitlines()]


def jobs_of(path, monkeypatch, tmp_path) -> list:
    for name in ("smac_offline_to_online", "td3_bc", "iql", "cal_ql"):  # a sweep file may be ahead of the scripts
        (tmp_path / f"{name}.py").touch()
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    return sweep.expand(*sweep.read_groups(sweep.Args(file=path)))


SWEEPS = {
    "ablations": 11 * 3,
    "default": 5,
    "dataset-size": 2 * 36,
    "door": 3 + 3,
    "paper-table-1": 96 + 384,
    "smoke": 2,
    "transfer-adroit": 8 + 32,
    "transfer-embedded": 12 + 48,
    "transfer-walker2d": 12 + 48,
    "walker2d": 3,
}


def test_every_sweep_file_is_counted():
    assert sorted(p.stem for p in (ROOT / "experiments" / "sweeps").glob("*.toml")) == sorted(SWEEPS)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_file_has_its_runs_and_only_flags_that_exist(name, monkeypatch, tmp_path):
    jobs = jobs_of(ROOT / "experiments" / "sweeps" / f"{name}.toml", monkeypatch, tmp_path)
    assert len(jobs) == SWEEPS[name] == len({job.folder for job in jobs})
    seen = set()
    for job in jobs:
        flags = {k: v for k, v in job.flags.items() if k not in ("seed", "dataset")}
        if job.script == "smac_offline_to_online.py" and str(flags) not in seen:
            seen.add(str(flags))
            parse(*sweep.words(flags))


def test_the_transfer_table_starts_every_online_run_from_its_own_pretraining(monkeypatch, tmp_path):
    jobs = jobs_of(ROOT / "experiments" / "sweeps" / "paper-table-1.toml", monkeypatch, tmp_path)
    online = [job for job in jobs if job.group == "online"]
    pairs = {(j.parent.script, j.flags["task"], j.flags["seed"], j.flags["online-algorithm"]) for j in online}
    assert len(pairs) == 4 * 6 * 4 * 4 and {j.script for j in online} == {"smac_offline_to_online.py"}
    for job in online:
        assert (job.parent.flags["task"], job.parent.flags["seed"]) == (job.flags["task"], job.flags["seed"])
        assert job.parent.flags["online-steps"] == 0
        command = sweep.command(job)
        assert command[command.index("--init-from") + 1] == f"{job.parent.folder}/RUN/offline.pt"


def test_words_on_the_command_line():
    assert sweep.words({"kappa": 0.1, "track": True, "score-return": False, "critic-hidden": [8, 16]}) == (
        ["--kappa", "0.1", "--track", "--no-score-return", "--critic-hidden", "8", "16"]
    )
    grid = sweep.read_grid(("seed=0,1", "critic-hidden=8 8,16 16", "score-return=false"))
    assert grid == {"seed": ["0", "1"], "critic-hidden": [["8", "8"], ["16", "16"]], "score-return": [False]}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("seed = [0, 1", "cannot be read as a TOML file"),
        ("[a]\nscript = 'no_such.py'", "no such file"),
        ("[a]\nseed = [1, 1]", "would share"),
        ("[a]\ninit-from = '{b}/offline.pt'\n[b]", "no such group stands above"),
        ("[a]\n[b]\ninit-from = '{a}/offline.pt'\nseed = 1", "leave it out there"),
        ("seed = 1", "No runs"),
    ],
)
def test_a_sweep_file_with_a_mistake_is_one_sentence(place, text, sentence):
    code, output = run_sweep(place, text)
    assert code == 2 and sentence in output and len(output.splitlines()) == 1


def test_a_run_that_fails_costs_only_those_that_start_from_it(place):
    (place / "broken").touch()
    text = "task = 'x'\n[a]\nseed = [0, 13, 2]\n[b]\ninit-from = '{a}/offline.pt'"
    code, output = run_sweep(place, text, "--jobs", "2", "--gpus", "3", "4")
    states = list(status(place).values())
    assert code == 1 and states == ["finished", "failed", "finished", "finished", "blocked", "finished"], output
    failed = next(row for row in rows_of(place / "out" / "status.csv") if row["status"] == "failed")
    assert failed["exit_code"] == "1" and "unlucky" in (place / failed["log"]).read_text()
    assert {row["score"] for row in rows_of(place / "out" / "status.csv")} == {"50.0", ""}
    assert {line[2] for line in starts(place)} == {"3", "4"} and {line[3] for line in starts(place)} == {"1"}

    (place / "broken").unlink()
    before = len(starts(place))
    code, output = run_sweep(place, "", "--jobs", "2")
    assert code == 0 and set(status(place).values()) == {"finished"}, output
    assert len(starts(place)) == before + 2  # the failed one and the one that waited for it; no other again


def test_ctrl_c_lets_the_runs_save_and_the_same_command_goes_on(place):
    process = start_sweep(place, "task = 'x'\nonline-steps = 25\n[a]\nseed = [0, 1]", "--jobs", "1")
    wait_for(lambda: starts(place))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130 and "To go on: python" in output
    assert list(status(place).values()) == ["stopped", "waiting"]
    (run,) = place.rglob("last.pt")
    saved = json.loads(run.read_text())[0]
    assert 0 < saved < 25

    code, output = run_sweep(place, "", "--jobs", "2")
    assert code == 0 and set(status(place).values()) == {"finished"}, output
    assert [line[1] for line in starts(place)].count(str(saved)) == 1 and len(list(place.rglob("last.pt"))) == 2


def test_a_run_that_outlives_its_killed_sweep_is_not_started_twice(place):
    process = start_sweep(place, "task = 'x'\nonline-steps = 30\n[a]\nseed = 0")
    wait_for(lambda: starts(place))
    process.kill()
    process.communicate()
    os.kill(int(starts(place)[0][0]), 0)  # it goes on
    code, output = run_sweep(place, "")
    assert code == 0 and "another process runs it" in output
    assert len(starts(place)) == 1 and list(status(place).values()) == ["finished"]


def test_without_ray_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as e:
        sweep.Ray(sweep.Args(ray_address="auto"))
    assert e.value.code == 2 and "pip install ray" in capsys.readouterr().err


def test_ray_runs_the_same_jobs(place):
    pytest.importorskip("ray")
    (place / "broken").touch()
    text = "task = 'x'\n[a]\nseed = [0, 13]\n[b]\ninit-from = '{a}/offline.pt'"
    code, output = run_sweep(place, text, "--ray-address", "local", "--jobs", "2")
    assert code == 1 and list(status(place).values()) == ["finished", "failed", "finished", "blocked"], output


def test_the_smoke_sweep_with_the_real_scripts_cut_once(tmp_path):
    """It stops in the pretraining and goes on; the online run starts from the checkpoint of the resumed one."""
    file = ROOT / "experiments" / "sweeps" / "smoke.toml"
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), str(file), "--runs-dir", str(tmp_path)]
    command += ["--jobs", "1", "--grid", "checkpoint-every=25", "eval-every=1000", "device=cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.rglob("last.pt")))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    position = load(next(tmp_path.rglob("last.pt")))["position"]
    assert process.returncode == 130 and position.get("offline", 0) < 200

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["status"] for row in rows_of(tmp_path / "status.csv")] == ["finished", "finished"]
    first, second = (next((tmp_path / group).glob("*/*/config.json")) for group in ("pretrain", "online"))
    config = json.loads(second.read_text())
    assert config["init_from"] == str(first.parent / "offline.pt") and config["online_algorithm"] == "sac"
    assert len(list(tmp_path.rglob("config.json"))) == 2  # the cut run was resumed, not made anew


# ---- report
def write_run(folder, algorithm, online, seed, curves, final=50.0, **flags) -> Path:
    """A run folder with these curves, {phase: {step: score}}, two episodes around each score."""
    path = folder / f"{flags.get('task', 'hopper-embedded')}__{algorithm}__{seed}__20260101-00000{seed}"
    path.mkdir(parents=True)
    config = dict(task="hopper-embedded", seed=seed, algorithm=algorithm, online_algorithm=online, init_from=None)
    config |= dict(offline_steps=10, online_steps=60, warmup_steps=10, kappa=1.0, runs_dir=str(folder)) | flags
    (path / "config.json").write_text(json.dumps(config))
    rows = [(t, phase, x) for phase, curve in (curves | {"final": {99: final}}).items() for t, x in curve.items()]
    lines = [f"{t},{phase},{i},0,1,{x + (2 * i - 1)}\n" for t, phase, x in rows for i in (0, 1)]
    (path / "evaluations.csv").write_text("step,phase,episode,return,length,score\n" + "".join(lines))
    cosines = [f"{t},offline,cosine_{k},{t / 100}\n" for t in (5, 10) for k in ("data", "policy", "uniform")]
    (path / "metrics.csv").write_text("step,phase,name,value\n5,offline,q,3\n" + "".join(cosines))
    return path


def make_report(out, *words) -> dict[tuple, dict]:
    """The rows of groups.csv by (task, offline, online, variant)."""
    with mock.patch.object(sys, "argv", ["report.py", *map(str, words), "--out", str(out)]):
        report.main()
    return {tuple(row[k] for k in ("task", "offline", "online", "variant")): row for row in rows_of(out / "groups.csv")}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Two tasks. Best score of Hopper: 90. Regrets there: smac 30+10+0+20 and 40+20+10+10 (mean 70), iql 110 + 150 /
    2 = 130, from iql's checkpoint to td3 100. Walker: 30 for smac, 10 for iql."""
    folder = tmp_path_factory.mktemp("numbers")
    # the early part ends at 10 + 0.2 (60 - 10) = 20
    write_run(folder / "a", "smac", "sac", 0, dict(offline={0: 0, 10: 61}, online={0: 60, 20: 80, 40: 90, 60: 70}))
    write_run(folder / "a", "smac", "sac", 1, dict(offline={0: 0, 10: 50}, online={0: 50, 20: 70, 40: 80, 60: 80}))
    write_run(folder / "b", "iql", "sac", 0, dict(offline={0: 2, 10: 62}, online={0: 60, 20: 30, 40: 80, 60: 80}))
    write_run(folder / "b", "iql", "sac", 1, dict(offline={0: 2, 10: 50}, online={0: 50, 20: 40, 40: 60, 60: 60}))
    source = write_run(folder / "c" / "pretrain", "iql", "none", 2, dict(offline={0: 2, 10: 66}))
    init = dict(init_from=str(source / "offline.pt"))
    write_run(folder / "c" / "online", "smac", "td3", 2, dict(online={0: 65, 20: 65, 40: 65, 60: 65}), **init)
    walker = dict(task="walker2d-medium-v2")
    write_run(folder / "a", "smac", "sac", 2, dict(online={0: 20, 60: 30}), **walker)
    write_run(folder / "b", "iql", "sac", 3, dict(online={0: 30, 60: 40}), **walker)
    unfinished = write_run(folder / "d", "iql", "sac", 4, dict(online={0: 99, 60: 99}))
    text = (unfinished / "evaluations.csv").read_text()
    (unfinished / "evaluations.csv").write_text(text[: text.index("99,final")])
    return folder


def test_the_numbers_of_a_report_by_hand(numbers, tmp_path):
    rows = make_report(tmp_path, numbers)
    smac_, iql = (rows["hopper-embedded", name, "sac", ""] for name in ("smac", "iql"))
    assert [float(smac_[k]) for k in ("transfer", "early", "last", "best", "final")] == [55, 20, 75, 85, 50]
    assert [float(iql[k]) for k in ("transfer", "early", "last", "best")] == [55, -20, 70, 70]
    assert (float(smac_["transfer_low"]), float(smac_["transfer_high"])) == (50, 60) and smac_["transfers"] == "60 / 50"
    regret = {key: float(row["regret"]) for key, row in rows.items() if key[0] == "hopper-embedded"}
    assert regret == {
        ("hopper-embedded", "smac", "sac", ""): 70,
        ("hopper-embedded", "iql", "sac", ""): 130,
        ("hopper-embedded", "iql", "td3", ""): 100,
    }
    assert [float(row["normalised"]) for row in (smac_, iql)] == [0, 1]
    assert float(rows["hopper-embedded", "iql", "td3", ""]["normalised"]) == 0.5
    table = {(r["offline"], r["online"]): r for r in rows_of(tmp_path / "transfer.csv")}
    assert float(table["smac", "sac"]["normalised_regret"]) == 0.5 == float(table["iql", "sac"]["normalised_regret"])
    assert table["smac", "sac"]["paper"] == "0.031" and table["iql", "td3"]["environments"] == "1"
    text = (tmp_path / "report.md").read_text()
    assert "| smac | 0.500 (0.031) | – |" in text and "curve_walker2d-medium-v2.png" in text
    assert (tmp_path / "identity_hopper-embedded.png").exists()


def test_a_baselines_own_runs_are_read_and_a_pretraining_is_no_online_run(tmp_path):
    """td3_bc, iql and cal_ql have no flag for the online algorithm; sweeps pretrain with --online-steps 0."""
    for seed, steps in ((0, 60), (1, 0)):
        curves = dict(offline={0: 2, 10: 62}) | (dict(online={0: 60, 20: 30, 60: 80}) if steps else {})
        folder = write_run(tmp_path / "runs", "iql", "sac", seed, curves, online_steps=steps)
        config = json.loads((folder / "config.json").read_text())
        del config["online_algorithm"]
        (folder / "config.json").write_text(json.dumps(config))
        write_run(tmp_path / "runs", "smac", "sac", seed, curves, online_steps=steps)
    rows = make_report(tmp_path / "out", tmp_path / "runs")
    assert {key[1:3]: row["seeds"] for key, row in rows.items()} == {
        ("iql", "iql"): "1",
        ("iql", "none"): "1",
        ("smac", "sac"): "1",
        ("smac", "none"): "1",
    }


def test_runs_that_differ_in_more_than_the_seed_are_named(tmp_path, capsys):
    curves = dict(online={0: 60, 60: 80})
    write_run(tmp_path / "a", "smac", "sac", 0, curves, git_commit="one")
    write_run(tmp_path / "b", "smac", "sac", 0, curves, git_commit="two", kappa=0.5)
    write_run(tmp_path / "c", "iql", "sac", 0, curves)
    write_run(tmp_path / "d", "iql", "sac", 1, curves)
    make_report(tmp_path / "out", *(tmp_path / k for k in "abcd"))
    (line,) = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "not only" in line]
    assert "smac to sac" in line and "git_commit, kappa, seed 0 2 times" in line
    assert "not only seeds differ" in capsys.readouterr().err


def test_a_cut_off_file_costs_its_own_run_alone(tmp_path, capsys):
    curves = dict(online={0: 60, 60: 80})
    write_run(tmp_path, "smac", "sac", 0, curves)
    for seed, name, text in ((1, "evaluations.csv", "99,final,2,0,"), (2, "config.json", "")):
        torn = write_run(tmp_path, "smac", "sac", seed, curves) / name
        torn.write_text(torn.read_text() + text if text else '{"task": "hop')
    rows = make_report(tmp_path / "out", tmp_path)
    assert [row["seeds"] for row in rows.values()] == ["1"]
    assert "__1__" in (err := capsys.readouterr().err) and "__2__" in err and "2 unfinished of 3" in err


@pytest.mark.parametrize(
    "value, kept",
    [
        ("/a/b/c/d/e.pt", "c/d/e.pt"),
        ("--init-from=/a/b/c/d/e.pt", "--init-from=c/d/e.pt"),
        ("/a/b/c/seed=0/e.pt", "c/seed=0/e.pt"),  # as sweep.py names folders
        (["x", "/a/b/c/d"], ["x", "b/c/d"]),
        ("runs/a", "runs/a"),
        ("/home/me/smac/iql.py", "iql.py"),
        (
            [{"command": ["/home/me/smac/iql.py", "--resume", "/a/b/c/d"]}],
            [{"command": ["iql.py", "--resume", "b/c/d"]}],
        ),
        (3, 3),
    ],
)
def test_what_is_kept_names_no_machines_folders(value, kept):
    assert report.short(value) == kept


def test_runs_are_not_collected_into_their_own_folder(tmp_path):
    write_run(tmp_path, "smac", "sac", 0, dict(online={0: 60, 60: 80}))
    with pytest.raises(SystemExit):
        make_report(tmp_path / "out", tmp_path, "--collect", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_report_of_what_was_collected_is_the_same_to_the_last_byte(numbers, tmp_path):
    long = next(numbers.glob("a/*smac__0__*")) / "metrics.csv"
    long.write_text(long.read_text() + "".join(f"{t},online,q,1\n" for t in range(10_000)))
    make_report(tmp_path / "first", numbers, "--collect", tmp_path / "kept")
    make_report(tmp_path / "second", tmp_path / "kept")
    tables = ["groups.csv", "report.md", "runs.csv", "transfer.csv"]
    assert sorted(p.name for p in (tmp_path / "first").iterdir() if p.suffix != ".png") == tables
    for name in tables:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    kept = [p for p in (tmp_path / "kept").rglob("*") if p.is_file()]
    assert {p.name for p in kept} == {"config.json", "evaluations.csv", "metrics.csv", "metrics.csv.gz"}
    assert not any("__4__" in str(p) for p in kept)  # not finished
    assert not any(str(numbers) in p.read_text() for p in kept if p.suffix != ".gz")
    (packed,) = (p for p in kept if p.suffix == ".gz")
    assert gzip.decompress(packed.read_bytes()) == long.read_bytes() and packed.stat().st_size < long.stat().st_size / 5


def test_a_run_from_a_checkpoint_has_the_offline_phase_of_the_other(numbers):
    (child,) = (run for run in report.read_runs((numbers,)) if run.config["init_from"])
    assert child.offline == "iql" and child.curve("offline") == {0: 2, 10: 66}
    assert report.read_cosines(child, "offline")["data"] == {5: 0.05, 10: 0.1}
    (alone,) = report.read_runs((numbers / "c" / "online",))  # the other one is not there: its name tells what it was
    assert alone.offline == "iql" and alone.curve("offline") == {}


def test_variants(tmp_path):
    for i, flags in enumerate([dict(), dict(), dict(kappa=0.0), dict(tau=0.1, kappa=0.0), dict()]):
        write_run(tmp_path / str(i), "smac", "sac", i, dict(online={0: 10.0 * i, 60: 90}), **(dict(tau=0.01) | flags))
    for by, names in {
        "all": ["default", "kappa=0.0", "kappa=0.0, tau=0.1"],
        "kappa": ["kappa=0.0", "kappa=1.0"],
        "tau": ["tau=0.01", "tau=0.1"],
    }.items():
        runs = report.read_runs((tmp_path,))
        report.name_variants(runs, (by,))
        assert sorted({run.variant for run in runs}) == names
    groups = make_report(tmp_path / "out", tmp_path, "--by", "kappa")
    assert {key[3]: row["seeds"] for key, row in groups.items()} == {"kappa=0.0": "2", "kappa=1.0": "3"}


def test_the_bootstrap_of_two_seeds_reaches_from_one_to_the_other():
    mean, low, high = report.bootstrap(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert mean.tolist() == [2, 5] and low.tolist() == [1, 5] and high.tolist() == [3, 5]
    assert np.isnan(report.bootstrap(np.array([1.0]))[1])


@pytest.mark.parametrize("words, sentence", [(["{}"], "no run folder"), (["{}/a", "--by", "kapa"], "no flag of these")])
def test_a_report_of_nothing_is_one_sentence(words, sentence, tmp_path, capsys):
    if len(words) > 1:
        write_run(tmp_path / "a", "smac", "sac", 0, dict(online={0: 1, 60: 2}))
    with pytest.raises(SystemExit) as e:
        make_report(tmp_path / "out", *(word.format(tmp_path) for word in words))
    message = capsys.readouterr().err
    assert e.value.code == 2 and sentence in message and len(message.splitlines()) == 1


# ---- landscape
def landscape_main(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["landscape.py", *map(str, words)])
    landscape.main()


def changed(path: Path, new: Path, change) -> Path:
    """A copy of a checkpoint after change(dictionary)."""
    saved = load(path)
    change(saved)
    torch.save(saved, new)
    return new


def iql_shaped(saved):
    """A deviation of its own beside a head of means only, as IQL's policy, and no average."""
    agent = {k: v for k, v in saved["agent"].items() if not k.startswith("policy")}
    agent |= {k.replace("_average", ""): v for k, v in saved["agent"].items() if k.startswith("policy_average")}
    for part in ("weight", "bias"):
        agent[f"policy.head.{part}"] = agent[f"policy.head.{part}"][:3].clone()
    agent["policy.log_std"] = torch.zeros(3)
    saved["args"]["algorithm"], saved["agent"] = "iql", agent


def test_a_vector_holds_the_deterministic_policy(reference, tmp_path):
    saved, point = load(reference / "last.pt"), landscape.read_point(reference / "last.pt")
    policy = smac.Policy(11, 3, (16, 16))
    prefix = "policy_average."
    policy.load_state_dict({k.removeprefix(prefix): v for k, v in saved["agent"].items() if k.startswith(prefix)})
    s = torch.randn(5, 11)
    assert point.sizes == (11, 16, 16, 3)
    assert torch.equal(landscape.build(point.vector, point.sizes).mode(s), policy.mode(s))
    other = landscape.read_point(changed(reference / "last.pt", tmp_path / "iql.pt", iql_shaped))
    assert np.array_equal(point.vector, other.vector) and other.name.startswith("iql")


def test_smacs_averaged_policy_counts(reference, tmp_path):
    def move(part):
        return lambda saved: saved["agent"][f"{part}.head.bias"].add_(1)

    start = landscape.read_point(reference / "last.pt").vector
    single = landscape.read_point(changed(reference / "last.pt", tmp_path / "single.pt", move("policy"))).vector
    averaged = landscape.read_point(
        changed(reference / "last.pt", tmp_path / "average.pt", move("policy_average"))
    ).vector
    assert np.array_equal(start, single) and np.count_nonzero(averaged != start) == 3  # the mean head's bias


def test_the_line_from_a_checkpoint_to_itself_is_flat(reference, tmp_path, monkeypatch, capsys):
    last, flags = reference / "last.pt", ["--points", 4, "--episodes", 3, "--jobs", 1, "--out", tmp_path]
    landscape_main(monkeypatch, "line", last, last, *flags)
    assert "deepest valley 0.0 points below the chord [0.0, 0.0]" in (text := capsys.readouterr().out)
    assert "monotone (largest way back 0.0 points" in text
    rows = rows_of(tmp_path / "points.csv")
    assert len(rows) == 12 and len({(r["episode"], r["score"]) for r in rows}) == 3
    seeds = [smac.episode_seed(0, smac.FINAL, i) for i in range(3)]
    policy = landscape.build(landscape.read_point(last).vector, (11, 16, 16, 3))
    task = smac.TASKS["hopper-embedded"]
    direct = [total for total, *_ in smac.evaluate(policy, [smac.TaskEnv(task) for _ in seeds], seeds)]
    assert [float(r["return"]) for r in rows[:3]] == direct

    with pytest.raises(SystemExit, match="holds another landscape"):
        landscape_main(monkeypatch, "line", reference / "offline.pt", last, *flags)


def test_a_landscape_goes_on_where_it_was_cut(reference, tmp_path, monkeypatch):
    words = ["line", reference, "--points", 4, "--beyond", 0.4, "--episodes", 2, "--jobs", 1, "--out", tmp_path]
    landscape_main(monkeypatch, *words)
    whole = (tmp_path / "points.csv").read_text()
    assert [
        line.split(",")[0] for line in whole.splitlines()[1::2]
    ] == "-0.333333 0 0.333333 0.666667 1 1.33333".split()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "points.csv").write_text("".join(lines[:8]) + lines[8][:7])  # within the second episode of a point
    calls, roll_out = [], landscape.roll_out
    monkeypatch.setattr(landscape, "roll_out", lambda *words: calls.append(words[0]) or roll_out(*words))
    landscape_main(monkeypatch, *words)
    assert calls == [("0.666667",), ("1",), ("1.33333",)]
    assert sorted(set((tmp_path / "points.csv").read_text().splitlines())) == sorted(whole.splitlines())


def test_workers_find_what_one_process_finds(reference, tmp_path, monkeypatch):
    words = ["line", reference, "--points", 2, "--episodes", 6]
    landscape_main(monkeypatch, *words, "--jobs", 1, "--out", tmp_path / "1")
    script = [sys.executable, ROOT / "experiments" / "landscape.py", *words, "--jobs", 2, "--out", tmp_path / "2"]
    done = subprocess.run([str(word) for word in script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "offline.pt is taken" in done.stdout and "last.pt is taken" in done.stdout
    one, two = (sorted((tmp_path / jobs / "points.csv").read_text().splitlines()) for jobs in "12")
    assert one == two and len(one) == 13


def test_the_corners_of_a_plane_are_its_checkpoints(reference, tmp_path, monkeypatch):
    def turn(saved):
        saved["agent"]["policy_average.head.bias"] += 0.5

    c = changed(reference / "last.pt", tmp_path / "c.pt", turn)
    words = ["--points", 2, "--low", 0, "--high", 1, "--episodes", 2, "--jobs", 1]
    landscape_main(monkeypatch, "plane", reference, reference, c, *words, "--out", tmp_path / "plane")
    rows = {(r["x"], r["y"], r["episode"]): r["return"] for r in rows_of(tmp_path / "plane" / "points.csv")}
    assert len(rows) == 8 and (tmp_path / "plane" / "plane.png").exists()
    for key, path in {("0", "0"): reference / "offline.pt", ("1", "0"): reference / "last.pt", ("0", "1"): c}.items():
        for row in landscape.roll_out((), (path,), (), 0, range(2)):
            assert str(row[1]) == rows[*key, str(row[0])]


def test_a_path_through_periodic_checkpoints(reference, tmp_path, monkeypatch, capsys):
    for phase, step in [("offline", 0), ("offline", 30), ("online", 40), ("online", 100)]:

        def move(saved, step=step):
            saved["agent"]["policy_average.head.bias"] += step
            saved["position"]["online"] = 1

        changed(reference / "last.pt", tmp_path / f"{phase}-{step}.pt", move)
    words = ["path", tmp_path, "--pca", "--episodes", 2, "--jobs", 1, "--out", tmp_path / "out"]
    landscape_main(monkeypatch, *words)
    names = [r["checkpoint"].split("/")[-1] for r in rows_of(tmp_path / "out" / "points.csv")][::2]
    assert names == ["offline-0.pt", "offline-30.pt", "online-40.pt", "online-100.pt"]
    assert f"{3**0.5 * 100:.1f} long, {3**0.5 * 100:.1f} from end to end" in capsys.readouterr().out

    monkeypatch.setattr(landscape.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        landscape_main(monkeypatch, "path", tmp_path)
    with pytest.raises(SystemExit, match="--keep-every"):
        landscape_main(monkeypatch, "path", reference, "--pca")


def test_principal_components_keep_the_distances_of_points_on_a_plane():
    flat = np.random.default_rng(0).normal(size=(6, 2)) * [5, 1]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0][:2]
    xy, (first, second) = landscape.embed(flat @ turn + 3, pca=True)
    assert np.allclose(np.linalg.norm(xy - xy[0], axis=1), np.linalg.norm(flat - flat[0], axis=1))
    shares = [int(label.split("(")[1].split()[0]) for label in (first, second)]
    assert sum(shares) in (99, 100, 101) and shares[0] > shares[1]


def test_the_verdict_finds_a_valley_of_known_depth():
    t = np.linspace(0, 1, 11)
    curve = 40 + 40 * t  # the chord
    curve[6] -= 30
    noise = np.random.default_rng(0).normal(size=20)  # of the starts, which are the same at every point
    verdict = landscape.judge(t, curve[:, None] + noise, 5)
    assert verdict["where"] == t[6] and abs(verdict["depth"] - 30) < 1e-9 and abs(verdict["setback"] - 26) < 1e-9
    assert np.allclose(verdict["depth_interval"], 30) and verdict["monotone"] == "not monotone"
    assert landscape.judge(t, (40 + 40 * t)[:, None] + noise, 5)["monotone"] == "monotone"
    falling = landscape.judge(t, (80 - 40 * t**3)[:, None] + noise, 5)  # above its chord all the way, and downwards
    assert falling["monotone"] == "monotone" and falling["setback"] == 0 and abs(falling["depth"]) < 1e-9
    rough = np.random.default_rng(0).normal(size=(11, 4)) * 20 + 50
    low, high = landscape.judge(t, rough, 5)["depth_interval"]
    assert low < landscape.judge(t, rough, 5)["depth"] < high


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda saved: saved["args"].update(task="walker2d-medium-v2"), "one task is needed"),
        (lambda saved: saved["agent"].update({"policy_average.trunk.2.bias": torch.zeros(9)}), "differ in shape"),
        (lambda saved: saved["args"].update(task="chess"), "which this version does not have"),
        (lambda saved: saved.update(agent={}), "holds no policy"),
        (lambda saved: saved.update(format="other"), "not a checkpoint"),
    ],
)
def test_checkpoints_that_do_not_go_together_are_one_sentence(change, sentence, reference, tmp_path, monkeypatch):
    other = changed(reference / "last.pt", tmp_path / "other.pt", change)
    with pytest.raises(SystemExit, match=sentence) as e:
        landscape_main(monkeypatch, "line", reference / "last.pt", other, "--out", tmp_path / "out")
    assert e.value.code == 2 and not (tmp_path / "out").exists()


def test_a_folder_without_the_checkpoint_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has no offline.pt"):
        landscape_main(monkeypatch, "line", tmp_path)


# ---- identity
def identity_main(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["identity.py", *map(str, words)])
    identity.main()


def test_a_critic_that_follows_a_score_has_cosine_one_with_it(reference):
    """And minus one with its opposite, on every kind of action."""
    saved, critic = load(reference / "last.pt"), smac.Critics(3, 11, 3, (16, 16), "tanh")
    critic.load_state_dict(identity.part(saved["agent"], "critic"))
    s, a = torch.randn(64, 11), 2 * torch.rand(64, 3) - 1
    for sign in (1, -1):
        model = mock.Mock(score=lambda s, b, sign=sign: sign * smac.action_gradient(critic, s, b).mean(0).detach())
        values = identity.cosines(reference / "last.pt", model, s, a, seed=0)
        assert values.keys() == {"data", "policy", "uniform"}
        assert all(abs(v - sign) < 1e-5 for v in values.values())


def test_identity_of_another_scripts_checkpoint(reference, tmp_path, monkeypatch, capsys):
    """IQL's policy is adopted as at the hand-over; what does not depend on the policy is SMAC's to the last digit."""
    other = changed(reference / "last.pt", tmp_path / "iql.pt", iql_shaped)
    dataset = load(reference / "last.pt")["args"]["dataset"]
    out = tmp_path / "identity.csv"
    words = ("--score", reference / "offline.pt", "--dataset", dataset, "--states", 50, "--out", out)
    identity_main(monkeypatch, reference / "last.pt", other, *words)
    rows = rows_of(out)
    assert [r["actions"] for r in rows] == 2 * ["data", "policy", "uniform"]
    assert [r["cosine"] for r in rows[:3:2]] == [r["cosine"] for r in rows[3::2]] and "iql.pt" in rows[3]["checkpoint"]
    assert str(other) in capsys.readouterr().out


def test_identity_without_a_fitted_score_is_one_sentence(reference, tmp_path, monkeypatch):
    def unfit(saved):
        saved["score_model"]["fitted"] = torch.tensor(False)

    score = changed(reference / "offline.pt", tmp_path / "unfitted.pt", unfit)
    with pytest.raises(SystemExit, match="holds no fitted score model"):
        identity_main(monkeypatch, reference / "last.pt", "--score", score)
