"""A run that was interrupted, however it was, ends exactly as one that was not."""

import os
import re
import shlex
import shutil
import signal
import time

import pytest
from helpers import SCRIPT, TINY, finish, load, only_run, rows_of, run_here, same, start

import smac_offline_to_online as smac

# The script, with `hook(call)` before every call of the phase's update.
HOOKED = """
import os, resource, shutil, signal
import smac_offline_to_online as smac
calls = 0
def with_hook(f):
    def g(*x):
        global calls
        hook(calls := calls + 1)
        return f(*x)
    return g
def hook(call):
    {hook}
{update} = with_hook({update})
smac.main()
"""
UPDATES = dict(score="smac.diffusion_loss", offline="smac.Updates.offline", online="smac.Updates.online")


def outcome(folder) -> dict:
    """All that a run leaves and that does not tell the time."""
    state = load(folder / "last.pt")
    for key in ("args", "seconds", "sizes"):
        state.pop(key, None)
    metrics = [tuple(row.values()) for row in rows_of(folder / "metrics.csv") if "seconds" not in row["name"]]
    tables = {name: rows_of(folder / f"{name}.csv") for name in ("evaluations", "episodes")}
    return dict(state=state, metrics=metrics, **tables)


def assert_same_outcome(folder, reference):
    ours, theirs = outcome(folder), outcome(reference)
    assert ours["evaluations"] == theirs["evaluations"] and ours["episodes"] == theirs["episodes"]
    assert ours["metrics"] == theirs["metrics"]
    assert [k for k, v in theirs["state"].items() if not same(ours["state"].get(k), v)] == []
    assert ours["state"].keys() == theirs["state"].keys()


def flags(dataset, runs):
    return [*TINY, "--dataset", dataset, "--runs-dir", runs]


def test_the_comparison_holds_whole_runs(reference):
    """The tests below would pass on empty files as well."""
    found = outcome(reference)
    assert {"agent", "score_model", "critic", "policy", "model", "replay", "env", "rng"} <= found["state"].keys()
    assert found["state"]["position"] == dict(score=50, offline=50, online=80)
    assert {phase for _, phase, _, _ in found["metrics"]} == {"score", "offline", "online"} and found["episodes"]
    assert [(r["step"], r["phase"]) for r in found["evaluations"][::2]] == [
        *[(str(step), "offline") for step in (0, 25, 50)],
        *[(str(step), "online") for step in (0, 25, 50, 75)],
        ("180", "final"),
    ]


@pytest.mark.parametrize("phase, call", [("score", 34), ("offline", 37), ("online", 44)])
def test_killed_and_resumed_equals_uninterrupted(dataset, reference, tmp_path, phase, call):
    """Some steps after a checkpoint, when rows have been written that the checkpoint does not know."""
    hook = f"if call == {call}: os.kill(os.getpid(), signal.SIGKILL)"
    code, _, err = finish(start("-c", HOOKED.format(update=UPDATES[phase], hook=hook), *flags(dataset, tmp_path)))
    assert code == -signal.SIGKILL, err
    folder = only_run(tmp_path)
    written = int(rows_of(folder / "metrics.csv")[-1]["step"])
    assert load(folder / "last.pt")["position"].get(phase, 0) < written
    assert run_here("--resume", folder) == folder
    assert_same_outcome(folder, reference)


def test_sigterm_saves_and_the_printed_command_goes_on(dataset, reference, tmp_path):
    process, deadline = start(SCRIPT, *flags(dataset, tmp_path)), time.monotonic() + 120
    while not any(len(p.read_text().splitlines()) > 1 for p in tmp_path.glob("*/metrics.csv")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGTERM and "Traceback" not in err
    command = shlex.split(re.search("To go on: python (.*)", err)[1])
    code, _, err = finish(start(*command))
    assert code == 0, err
    assert_same_outcome(only_run(tmp_path), reference)


class Killed(BaseException):
    """Nobody catches this."""


def die():
    raise Killed


def interrupt(monkeypatch, phase, call, action):
    owner, name = (smac.Updates, phase) if phase != "score" else (smac, "diffusion_loss")
    update, calls = getattr(owner, name), []

    def hooked(*x):
        calls.append(0)
        if len(calls) == call:
            action()
        return update(*x)

    monkeypatch.setattr(owner, name, hooked)


@pytest.mark.parametrize("phase, call", [("score", 13), ("offline", 50), ("online", 21)])
def test_sigint_saves_at_once_and_resumes(dataset, reference, tmp_path, monkeypatch, phase, call):
    with monkeypatch.context() as patch:
        interrupt(patch, phase, call, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(smac.BadInput) as stop:
            run_here(*flags(dataset, tmp_path))
    folder = only_run(tmp_path)
    assert stop.value.code == 130 and f"--resume {folder}" in str(stop.value)
    saved = load(folder / "last.pt")
    assert saved["position"][phase] == call + 30 * (phase == "online")  # not one step lost
    assert len(saved["replay"]["rows"]) == saved["replay"]["added"] == saved["position"].get("online", 0)
    run_here("--resume", folder)
    assert_same_outcome(folder, reference)


def test_a_second_signal_ends_the_process_without_waiting(dataset, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGTERM)

    interrupt(monkeypatch, "score", 3, twice)
    with pytest.raises(SystemExit) as end:
        run_here(*flags(dataset, tmp_path))
    assert end.value.code == 143 and not isinstance(end.value, smac.BadInput)


def test_killed_while_a_checkpoint_is_written_leaves_the_one_before(dataset, reference, tmp_path, monkeypatch):
    replace, names = os.replace, []

    def killed_at_fourth(source, target):
        names.append(target)
        if len(names) == 4:  # score 20, 40, 50, then offline 20
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_fourth)
        with pytest.raises(Killed):
            run_here(*flags(dataset, tmp_path))
    folder = only_run(tmp_path)
    assert load(folder / "last.pt")["position"] == dict(score=50)
    run_here("--resume", folder)
    assert_same_outcome(folder, reference)


def test_resumed_twice_and_after_its_end(dataset, reference, tmp_path, monkeypatch):
    folder = tmp_path
    for phase, call in (("offline", 25), ("offline", 12), ("online", 41)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            interrupt(patch, phase, call, die)
            run_here(*(flags(dataset, tmp_path) if folder is tmp_path else ["--resume", folder]))
        folder = only_run(tmp_path)
    run_here("--resume", folder)
    assert_same_outcome(folder, reference)
    run_here("--resume", folder)  # nothing left but the final evaluation
    assert_same_outcome(folder, reference)


def test_a_learning_rate_given_with_resume_counts_and_online_its_share(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, "offline", 37, die)
        run_here(*flags(dataset, tmp_path))
    run_here("--resume", only_run(tmp_path), "--critic-lr", 1e-5, "--online-lr-scale", 0.5)
    for name, scale in (("offline.pt", 1.0), ("last.pt", 0.5)):
        state = load(only_run(tmp_path) / name)
        rates = {k: [g["lr"].item() for g in state[k]["param_groups"]] for k in ("critic", "policy", "temperature")}
        assert rates["critic"] == pytest.approx([scale * 1e-5] * 2)
        assert rates["policy"] == pytest.approx([scale * state["args"]["policy_lr"]] * 2)
        assert rates["temperature"] == pytest.approx([state["args"]["temperature_lr"]])


@pytest.mark.parametrize("start", ["scratch", "offline.pt"])
def test_other_starts_resume_as_well(dataset, reference, tmp_path, monkeypatch, start):
    """Even when the checkpoint that the run started from is gone."""
    path = tmp_path / "offline.pt"
    ends = []
    for runs, interrupted in ((tmp_path / "a", False), (tmp_path / "b", True)):
        shutil.copy(reference / "offline.pt", path)
        begin = ["--init-from", path] if start == "offline.pt" else ["--offline-steps", 0, "--offline-fraction", 0]
        if not interrupted:
            run_here(*flags(dataset, runs), *begin)
        else:
            with monkeypatch.context() as patch, pytest.raises(Killed):
                interrupt(patch, "online", 23, die)
                run_here(*flags(dataset, runs), *begin)
            path.unlink()
            run_here("--resume", only_run(runs))
        ends.append(only_run(runs))
    assert load(ends[0] / "last.pt")["position"] == dict(online=80)
    assert_same_outcome(*reversed(ends))


def test_a_full_disk_costs_rows_but_neither_the_run_nor_the_checkpoint(dataset, reference, tmp_path):
    """Files cannot grow from offline step 31 until the first online update."""
    hook = f"""
    if call == 31:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    if call == 51:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shutil.copytree(next(smac.Path({str(tmp_path / "runs")!r}).iterdir()), {str(tmp_path / "while_full")!r})
    """
    code = HOOKED.format(update="smac.Updates.offline", hook=hook) + "\n"
    code = code.replace("smac.main()", "smac.Updates.online = with_hook(smac.Updates.online)\nsmac.main()")
    code, _, err = finish(start("-c", code, *flags(dataset, tmp_path / "runs")))
    assert code == 0, err
    assert "last.pt cannot be written" in err and "metrics.csv cannot be written" in err
    assert load(tmp_path / "while_full" / "last.pt")["position"] == dict(score=50, offline=20)
    ours, theirs = outcome(only_run(tmp_path / "runs")), outcome(reference)
    assert same(ours["state"], theirs["state"])
    assert set(ours["metrics"]) >= {row for row in theirs["metrics"] if row[1] == "online"}
    lost = [row for row in theirs["evaluations"] if row not in ours["evaluations"]]
    assert lost == theirs["evaluations"][4:10]  # offline 50, online 0 and 25
