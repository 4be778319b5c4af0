"""A run that was interrupted, however it was, ends exactly as one that was not."""

import json
import os
import re
import shlex
import shutil
import signal
import time

import pytest
import torch
from helpers import SCRIPT, TINY, finish, load, only_run, parse, rows_of, run_here, same, start

import smac_offline_to_online as smac

UPDATES = dict(
    score=(smac.ScoreModel, "loss"),
    offline=(smac.Agent, "offline_update"),
    online=(smac.Agent, "online_update"),
)
# Some steps after a checkpoint, when rows have been written that the checkpoint does not know.
KILLS = dict(score=34, offline=37, online=44)
# A process for each phase, killed at a call of its update; one that forks, so that one imports.
KILLED = """
import os, signal, sys
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else CUDA starts here, and not in the children
from torch.utils.tensorboard import SummaryWriter
import smac_offline_to_online as smac
def kill_at(call, owner, name):
    update, calls = getattr(owner, name), []
    def hooked(*inputs, **flags):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*inputs, **flags)
    setattr(owner, name, hooked)
runs, children = sys.argv.pop(1), []
for phase, call, owner, name in KILLS:
    children.append(os.fork())
    if children[-1] == 0:
        sys.argv += ["--runs-dir", f"{runs}/{phase}"]
        kill_at(call, getattr(smac, owner), name)
        smac.main()
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def outcome(folder) -> dict:
    """All that a run leaves and that does not tell the time."""
    state = load(folder / "last.pt")
    for key in ("args", "seconds", "metrics.csv", "evaluations.csv"):
        state.pop(key)
    rows = [tuple(row.values()) for row in rows_of(folder / "metrics.csv")]
    metrics = [row for row in rows if row[2] != "seconds"]
    return dict(state, metrics=metrics, evaluations=rows_of(folder / "evaluations.csv"))


def assert_same_outcome(folder, reference):
    ours, theirs = outcome(folder), outcome(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name, x in theirs.items() if not same(ours[name], x)] == []


def flags(dataset, runs):
    return [*TINY, "--dataset", dataset, "--runs-dir", runs]


def test_the_comparison_holds_whole_runs(reference):
    """The tests below would pass on empty files as well."""
    found = outcome(reference)
    parts = {"agent", "critic", "policy", "temperature", "alpha_net", "model", "fit", "replay"}
    assert parts | {"env", "rng", "metrics", "evaluations"} <= found.keys()
    assert found["done"] == dict(score=50, offline=50, online=80)
    assert {row[1] for row in found["metrics"]} == {"score", "offline", "online"}


def test_sigterm_saves_and_the_printed_command_goes_on(dataset, reference, tmp_path):
    process, deadline = start(SCRIPT, *flags(dataset, tmp_path)), time.monotonic() + 120
    while not any(len(p.read_text().splitlines()) > 1 for p in tmp_path.glob("*/metrics.csv")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 128 + signal.SIGTERM and "Traceback" not in err
    script, *words = shlex.split(re.search("to go on: python (.*)", out)[1])
    assert script == str(SCRIPT) and words == ["--resume", str(only_run(tmp_path))]
    run_here(smac, *words)
    assert_same_outcome(only_run(tmp_path), reference)


@pytest.fixture(scope="module")
def killed(dataset, tmp_path_factory):
    runs = tmp_path_factory.mktemp("killed")
    kills = [(p, call, UPDATES[p][0].__name__, UPDATES[p][1]) for p, call in KILLS.items()]
    code = KILLED.replace("KILLS", repr(kills))
    code, out, err = finish(start("-c", code, runs, *TINY, "--dataset", dataset))
    assert code == 0 and out.splitlines()[-1] == str([-signal.SIGKILL] * 3), err
    return runs


@pytest.mark.parametrize("phase", KILLS)
def test_killed_and_resumed_equals_uninterrupted(killed, reference, phase):
    folder = only_run(killed / phase)
    written = rows_of(folder / "metrics.csv")[-1]
    assert written["phase"] == phase
    assert load(folder / "last.pt")["done"].get(phase, 0) < int(written["step"])
    assert run_here(smac, "--resume", folder) == folder
    assert_same_outcome(folder, reference)


class Killed(BaseException):
    """Nobody catches this."""


def die():
    raise Killed


def interrupt(monkeypatch, phase, call, action):
    """Lets `action` happen before the phase's update is called the `call`-th time."""
    owner, name = UPDATES[phase]
    update, calls = getattr(owner, name), []

    def hooked(*inputs, **flags):
        calls.append(0)
        if len(calls) == call:
            action()
        return update(*inputs, **flags)

    monkeypatch.setattr(owner, name, hooked)


@pytest.mark.parametrize("phase, call", [("score", 13), ("offline", 50), ("online", 21)])
def test_ctrl_c_saves_at_once(dataset, reference, tmp_path, monkeypatch, capsys, phase, call):
    with monkeypatch.context() as patch:
        interrupt(patch, phase, call, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as stop:
            run_here(smac, *flags(dataset, tmp_path))
    folder = only_run(tmp_path)
    saved = load(folder / "last.pt")
    assert stop.value.code == 130
    assert saved["done"][phase] == call + 30 * (phase == "online")  # not one step lost
    assert len(saved["replay"]["rows"]) == saved["done"].get("online", 0)
    run_here(smac, "--resume", folder)
    assert_same_outcome(folder, reference)


def test_a_second_signal_ends_the_run_without_waiting(dataset, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    interrupt(monkeypatch, "score", 3, twice)
    with pytest.raises(SystemExit) as end:
        run_here(smac, *flags(dataset, tmp_path))
    assert end.value.code == 143 and not (only_run(tmp_path) / "last.pt").exists()


def test_killed_while_a_checkpoint_is_written_leaves_the_one_before(
    dataset, reference, tmp_path, monkeypatch
):
    replace, names = os.replace, []

    def killed_at_fourth(source, target):
        names.append(target)
        if len(names) == 4:  # score 20, 40, 50, then offline 20
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed_at_fourth)
        run_here(smac, *flags(dataset, tmp_path))
    folder = only_run(tmp_path)
    assert load(folder / "last.pt")["done"] == dict(score=50)
    run_here(smac, "--resume", folder)
    assert_same_outcome(folder, reference)


def test_resumed_twice_and_after_its_end(dataset, reference, tmp_path, monkeypatch):
    command = flags(dataset, tmp_path)
    for phase, call in (("offline", 25), ("online", 31)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            interrupt(patch, phase, call, die)
            run_here(smac, *command)
        folder = only_run(tmp_path)
        command = ["--resume", folder]
    run_here(smac, *command)
    assert_same_outcome(folder, reference)
    run_here(smac, *command)  # nothing left but the final evaluation
    assert_same_outcome(folder, reference)


@pytest.mark.parametrize("begin", ["scratch", "1", "auto"])
def test_other_starts_resume_as_well(dataset, reference, tmp_path, monkeypatch, begin):
    """Even when the checkpoint that the run started from is gone."""
    path, folders = tmp_path / "offline.pt", []
    for runs in (tmp_path / "a", tmp_path / "b"):
        shutil.copy(reference / "offline.pt", path)
        command = [*flags(dataset, runs), "--online-kappa", begin, "--init-from", path]
        if begin == "scratch":
            command = [*flags(dataset, runs), "--offline-steps", 0]
        if not folders:
            folders.append(run_here(smac, *command))
            continue
        with monkeypatch.context() as patch, pytest.raises(Killed):
            interrupt(patch, "online", 43, die)
            run_here(smac, *command)
        path.unlink()
        folders.append(run_here(smac, "--resume", only_run(runs)))
    assert load(folders[0] / "last.pt")["done"] == dict(online=80)
    assert_same_outcome(*folders)
    names = [row["name"] for row in rows_of(folders[1] / "metrics.csv") if row["step"] == "80"]
    assert ("online_kappa" in names) == (begin == "auto")


def test_more_online_steps_go_on_and_the_config_stays(reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "run")
    run_here(smac, "--resume", folder, "--online-steps", 90, "--eval-every", 5)
    saved = load(folder / "last.pt")
    assert saved["done"] == dict(score=50, offline=50, online=90)
    assert len(saved["replay"]["rows"]) == 90 and saved["args"]["online_steps"] == 90
    before, after = (json.loads((p / "config.json").read_text()) for p in (reference, folder))
    assert before == after
    rows = [row["step"] for row in rows_of(folder / "evaluations.csv") if row["phase"] != "offline"]
    assert rows[::2] == ["0", "25", "50", "75", "85", "90", "90"]


def test_tensorboard_keeps_what_was_written_at_the_step_that_a_resume_starts_from(
    reference, tmp_path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = shutil.copytree(reference, tmp_path / "run")
    run_here(smac, "--resume", folder, "--online-steps", 100, "--eval-every", 20)
    run_here(smac, "--resume", folder, "--online-steps", 120)
    events = EventAccumulator(str(folder))
    events.Reload()
    steps = [event.step for event in events.Scalars("online/normalized_return")]
    assert steps == [0, 25, 50, 75, 100, 120]
    steps = [event.step for event in events.Scalars("online/td_loss")]
    assert steps[-5:] == [100, 105, 110, 115, 120]


def test_resume_gives_the_runs_own_flags(reference):
    args, task = parse("--resume", reference, "--log-every", 7)
    saved = load(reference / "last.pt")
    expected = smac.Args(**saved["args"])
    expected.resume, expected.log_every = str(reference), 7
    assert args == expected and task == smac.Task(**saved["task"])


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--seed", 3], "cannot change seed, which was 0"),
        (["--critic-lr", 1e-5], "cannot change critic_lr"),
        (["--critic-hidden", 8, 8], "cannot change critic_hidden"),
        (["--dataset", "hopper-embedded"], "cannot change dataset"),
        (["--online-algorithm", "td3"], "cannot change online_algorithm"),
        (["--init-from", "offline.pt"], "cannot change init_from"),
        (["--online-steps", 60], "the run has done 80"),
        (
            ["--offline-steps", 60],
            "cannot change offline_steps",
        ),  # with what the online phase has made
    ],
)
def test_what_a_resumed_run_cannot_change(reference, changes, words):
    before = {p.name: p.read_bytes() for p in reference.iterdir()}
    with pytest.raises(SystemExit) as refusal:
        run_here(smac, "--resume", reference, *changes)
    assert str(refusal.value).startswith("error: ") and words in str(refusal.value)
    assert before == {p.name: p.read_bytes() for p in reference.iterdir()}


def test_the_phase_that_is_on_and_later_ones_may_become_longer(reference, tmp_path):
    state = load(reference / "last.pt")
    torch.save(state | dict(done=dict(score=50, offline=20)), tmp_path / "last.pt")
    args, _ = parse("--resume", tmp_path, "--offline-steps", 60, "--online-steps", 90)
    assert (args.offline_steps, args.online_steps) == (60, 90)
    assert parse("--resume", tmp_path, "--offline-steps", 20)[0].offline_steps == 20
    for flags in (["--score-steps", 60], ["--offline-steps", 19]):
        with pytest.raises(SystemExit, match="^error: "):
            parse("--resume", tmp_path, *flags)


def test_a_run_from_scratch_cannot_get_a_pretraining(dataset, tmp_path):
    few = ["--offline-steps", 0, "--online-steps", 5, "--warmup-steps", 5]
    folder = run_here(smac, *flags(dataset, tmp_path), *few)
    with pytest.raises(SystemExit, match="error: "):
        run_here(smac, "--resume", folder, "--offline-steps", 50)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_a_run_that_was_stopped_ends_like_one_that_was_not(dataset, tmp_path):
    """With recorded updates: their random numbers go on where they were."""
    gpu = ["--device", "cuda", "--cuda-graphs"]
    whole = run_here(smac, *flags(dataset, tmp_path / "a"), *gpu)
    half = run_here(smac, *flags(dataset, tmp_path / "b"), *gpu, "--online-steps", 60)
    run_here(smac, "--resume", half, "--online-steps", 80)
    ends = load(whole / "last.pt"), load(half / "last.pt")
    whole, half = [(x["agent"], x["replay"], x["policy"]["state"], x["cuda_rng"]) for x in ends]
    torch.testing.assert_close(half, whole, rtol=1e-3, atol=1e-4)


def test_other_devices_and_threads_may_go_on(reference):
    more = ["--threads", 2, "--device", "cuda", "--compile", "--checkpoint-every", 9, "--track"]
    args, _ = parse("--resume", reference, *more, "--eval-episodes", 3, "--keep-every", 10)
    assert args.threads == 2 and args.device == "cuda" and args.compile


def test_a_run_of_another_script_is_not_resumed(reference, tmp_path):
    torch.save(load(reference / "last.pt") | dict(algorithm="iql"), tmp_path / "last.pt")
    with pytest.raises(SystemExit, match="is a run of iql: resume it with that script"):
        run_here(smac, "--resume", tmp_path)
