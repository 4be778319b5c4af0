"""Wrong input is answered in one line, before anything is made; what goes wrong later says what is left."""

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import SCRIPT, TINY, finish, load, only_run, parse, run_here, start, write_hdf5

import smac_offline_to_online as smac

N = 12
GOOD = dict(
    observations=np.zeros((N, 11)), actions=np.zeros((N, 3)), rewards=np.zeros(N), terminals=np.arange(N) % 4 == 3
)


def with_value(name, row, value):
    column = GOOD[name].astype(float).copy()
    column[row] = value
    return {name: column}


def refused(runs, *flags) -> str:
    """The message of a run that ends before it makes its folder."""
    with pytest.raises(smac.BadInput) as problem:
        run_here(*TINY, "--runs-dir", runs, *flags)
    assert not runs.exists()
    assert "\n" not in str(problem.value)
    return str(problem.value)


# ---- in a process: the exit code and the one line
@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--task", "hoper-medium-v2"], ["hoper-medium-v2", "hopper-medium-v2", "door-binary-v0"]),
        (["--dataset", "nowhere/a.hdf5"], ["nowhere/a.hdf5", "no such file"]),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_code_2(tmp_path, flags, parts):
    code, _, err = finish(start(SCRIPT, "--runs-dir", tmp_path / "runs", *TINY, *flags))
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and line.startswith("error: ") and "Traceback" not in err
    assert all(part in line for part in parts)
    assert not (tmp_path / "runs").exists()


# ---- datasets
@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(rewards=None, terminals=None), ["rewards, terminals missing"]),
        (with_value("observations", (5, 2), np.nan), ["observations", "row 5"]),
        (with_value("rewards", 7, np.inf), ["rewards", "row 7"]),
        (dict(next_observations=np.full((N, 11), np.nan)), ["next_observations", "row 0"]),
        (dict(observations=np.zeros((N, 17))), ["observations", "(12, 17)", "(12, 11)"]),
        (dict(actions=np.zeros((N, 6))), ["actions", "(12, 6)", "(12, 3)"]),
        (dict(rewards=np.zeros((N, 2))), ["rewards", "(12, 2)"]),
        (dict(rewards=np.zeros(N - 1)), ["rewards", "(11,)"]),
        (dict(rewards=np.zeros(()), observations=np.zeros(())), ["observations, rewards missing"]),
        (dict(rewards=np.array([b"a"] * N)), ["rewards", "numeric"]),
        (with_value("actions", (3, 1), -1.5), ["actions", "1.5"]),
        ({name: column[:0] for name, column in GOOD.items()}, ["empty"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_wrong_dataset_is_refused(tmp_path, changes, parts):
    path = write_hdf5(tmp_path / "a.hdf5", GOOD | changes)
    message = refused(tmp_path / "runs", "--dataset", path)
    assert str(path) in message
    assert all(part in message for part in parts), message


def test_a_truncated_file_is_refused(tmp_path, dataset):
    path = tmp_path / "a.hdf5"
    path.write_bytes(dataset.read_bytes()[:-1000])
    assert str(path) in refused(tmp_path / "runs", "--dataset", path)


def test_what_is_no_hdf5_file_is_refused(tmp_path):
    (tmp_path / "a.hdf5").write_text("no data")
    assert "a.hdf5" in refused(tmp_path / "runs", "--dataset", tmp_path / "a.hdf5")
    assert str(tmp_path) in refused(tmp_path / "runs", "--dataset", tmp_path)


def test_a_minari_dataset_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("minari.load_dataset", fails)
    message = refused(tmp_path / "runs", "--dataset", "minari:mujoco/hopper/expert-v0")
    assert "minari:mujoco/hopper/expert-v0" in message and "no route" in message


# ---- flags
@pytest.mark.parametrize(
    "flags",
    [
        ["--utd", 3],
        ["--utd", 0],
        ["--offline-fraction", 1.5],
        ["--eval-every", 0],
        ["--log-every", 0],
        ["--num-critics", 0],
        ["--seed", -1],
        ["--torch-threads", 0],
        ["--offline-steps", -1],
        ["--online-batch-size", 0],
        ["--policy-hidden"],
        ["--critic-hidden", 16, 0],
        ["--score-steps", 0],
        ["--save-replay", f"{__file__}/replay.hdf5"],
        ["--save-replay", Path(__file__).parent],
        ["--critic-lr", -1],
        ["--score-lr", "nan"],
        ["--gamma", 1.5],
        ["--tau", -0.1],
        ["--kappa", "inf"],
    ],
)
def test_impossible_numbers_are_refused(tmp_path, flags):
    assert flags[0] in refused(tmp_path / "runs", *flags)


def test_episodes_of_one_row_leave_nothing_to_learn_from(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", GOOD | dict(timeouts=np.ones(N), terminals=np.zeros(N)))
    assert "next state" in refused(tmp_path / "runs", "--dataset", path)


def test_a_runs_folder_that_cannot_be_made_is_refused(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", mock.Mock(side_effect=PermissionError("no permission")))
    with pytest.raises(smac.BadInput, match="no permission.*--runs-dir"):
        run_here(*TINY, "--dataset", dataset, "--runs-dir", tmp_path / "runs")


def test_a_file_in_place_of_the_runs_folder_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(smac.BadInput, match="no folder"):
        run_here(*TINY, "--runs-dir", tmp_path / "runs" / "below")


def test_a_resumed_run_that_lost_a_table_is_refused(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").unlink()
    with pytest.raises(smac.BadInput, match="lacks a file of the run"):
        run_here("--resume", tmp_path / "run")


def test_an_unknown_flag_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--no-such-flag")
    assert end.value.code == 2 and "no-such-flag" in "".join(capsys.readouterr())


# ---- checkpoints
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_what_is_no_checkpoint_is_refused(tmp_path, dataset, content):
    path = tmp_path / "offline.pt"
    if content is None:
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    for missing in (path, tmp_path / "nowhere.pt"):
        assert str(missing) in refused(tmp_path / "runs", "--dataset", dataset, "--init-from", missing)


def test_a_checkpoint_of_another_tasks_networks_is_refused(tmp_path, reference):
    shapes = dict(observations=np.zeros((N, 17)), actions=np.zeros((N, 6)))
    walker = write_hdf5(tmp_path / "walker.hdf5", GOOD | shapes)
    flags = ["--task", "walker2d-medium-v2", "--dataset", walker, "--init-from", reference / "offline.pt"]
    assert "offline.pt" in refused(tmp_path / "runs", *flags)


@pytest.mark.parametrize(
    "flags",
    [["--critic-hidden", 8, 8], ["--num-critics", 2], ["--optimizer", "adam"], ["--critic-activation", "relu"]],
)
def test_flags_that_contradict_the_checkpoint_are_refused(tmp_path, dataset, reference, flags):
    start = ["--dataset", dataset, "--init-from", reference / "offline.pt"]
    assert "offline.pt" in refused(tmp_path / "runs", *start, *flags)


def not_resumed(folder, *flags) -> str:
    before = sorted(p.name for p in folder.iterdir()) if folder.exists() else None
    with pytest.raises(smac.BadInput) as problem:
        run_here("--resume", folder, *flags)
    assert before == (sorted(p.name for p in folder.iterdir()) if folder.exists() else None)
    assert str(folder) in str(problem.value)
    return str(problem.value)


def test_only_a_run_folder_is_resumed(tmp_path):
    not_resumed(tmp_path)
    not_resumed(tmp_path / "nowhere")


def test_a_run_of_another_script_is_not_resumed(tmp_path, reference):
    folder = shutil.copytree(reference, tmp_path / "run")
    state = load(folder / "last.pt")
    state["args"]["algorithm"] = "iql"
    torch.save(state, folder / "last.pt")
    assert "iql" in not_resumed(folder)


def test_a_run_is_not_resumed_with_other_networks(tmp_path, reference):
    assert "last.pt" in not_resumed(shutil.copytree(reference, tmp_path / "run"), "--critic-hidden", 8, 8)


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--offline-steps", 60], "left that phase"),  # it would train offline on what the online phase has made
        (["--online-steps", 60], "has done 80"),
        (["--task", "hopper-medium-v2"], "leave out --task"),
        (["--init-from", "offline.pt"], "leave out --task and --init-from"),
    ],
)
def test_a_run_is_not_resumed_on_another_way(tmp_path, reference, flags, part):
    folder = shutil.copytree(reference, tmp_path / "run")
    with pytest.raises(smac.BadInput, match=part):
        run_here("--resume", folder, *flags)
    assert load(folder / "offline.pt")["position"] == dict(score=50, offline=50)


def test_a_video_that_cannot_be_drawn_is_refused_before_the_run(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(smac.importlib.util, "find_spec", lambda package: True)
    monkeypatch.setattr(smac.TaskEnv, "render", lambda self: 1 / 0)
    assert "--capture-video" in refused(tmp_path / "runs", "--dataset", dataset, "--capture-video")


def test_a_run_without_a_whole_checkpoint_is_not_resumed(tmp_path, reference):
    folder = shutil.copytree(reference, tmp_path / "run")
    (folder / "last.pt").write_bytes((reference / "last.pt").read_bytes()[:5000])
    assert "last.pt" in not_resumed(folder)
    (folder / "last.pt").unlink()
    assert "last.pt" in not_resumed(folder)


# ---- later
def finite(tree) -> bool:
    if isinstance(tree, torch.Tensor):
        return not tree.is_floating_point() or bool(tree.isfinite().all())
    return all(map(finite, tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()))


@pytest.mark.parametrize("phase, loss", [("score", "diffusion_loss"), ("offline", "td_loss")])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_good_state(tmp_path, dataset, monkeypatch, phase, loss):
    """Checkpoints are due between the first bad update and the first row of metrics that would show it."""
    good, calls = getattr(smac, loss), []
    monkeypatch.setattr(smac, loss, lambda *x: (calls.append(0), good(*x) * (np.nan if len(calls) > 12 else 1))[1])
    every = ["--log-every", 40, "--checkpoint-every", 5, "--eval-every", 1000]
    with pytest.raises(smac.BadInput) as stop:
        run_here(*TINY, *every, "--dataset", dataset, "--runs-dir", tmp_path)
    last = only_run(tmp_path) / "last.pt"
    assert stop.value.code == 1 and phase in str(stop.value) and str(last) in str(stop.value)
    assert finite(load(last)), "last.pt is called the last good state and holds NaN"
    assert load(last)["position"][phase] == 10


def test_an_absurd_learning_rate_stops_the_run(tmp_path, dataset):
    with pytest.raises(smac.BadInput, match="not finite"):
        run_here(*TINY, "--score-lr", 1e30, "--dataset", dataset, "--runs-dir", tmp_path)
