"""Wrong input is answered in one sentence before a folder is made; what goes wrong later says what
is left. What --resume refuses is in test_resume.py."""

import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, hopper_file, load, only_run, parse, prepared_file, run_here

import cal_ql
import iql
import smac_offline_to_online as smac
import td3_bc

N = 8
WALKER = dict(
    observations=np.zeros((N, 17), np.float32),
    actions=np.zeros((N, 6), np.float32),
    rewards=np.zeros(N, np.float32),
    terminals=np.arange(N) == N - 1,
    ends=np.arange(N) == N - 1,
    returns=np.zeros(N, np.float32),
)


@pytest.fixture(scope="module")
def bad(dataset, reference, tmp_path_factory):
    """A folder of what people give by mistake."""
    folder = tmp_path_factory.mktemp("bad")
    prepared_file(folder / "raw.hdf5", WALKER, format=None)
    prepared_file(folder / "old.hdf5", WALKER, format="smac-dataset-0")
    prepared_file(folder / "sizes.hdf5", WALKER)
    walker = dict(env_id="Walker2d-v5", return_0=1.629008, return_100=4592.3)
    prepared_file(folder / "walker.hdf5", WALKER, **walker)
    prepared_file(folder / "gone.hdf5", WALKER, env_id="NoSuchRobot-v0")
    prepared_file(folder / "kwargs.hdf5", WALKER, env_kwargs='{"no_such": 1}')
    prepared_file(folder / "module.hdf5", WALKER, env_id="no_such_module:Robot-v0")
    prepared_file(folder / "empty.hdf5", {name: x[:0] for name, x in WALKER.items()})
    (folder / "truncated.hdf5").write_bytes(dataset.read_bytes()[:-1000])
    (folder / "text.hdf5").write_text("no data")
    (folder / "text.pt").write_text("no checkpoint")
    (folder / "truncated.pt").write_bytes((reference / "offline.pt").read_bytes()[:5000])
    torch.save(dict(weights=torch.zeros(3)), folder / "foreign.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    state = load(reference / "offline.pt")
    torch.save(state | dict(format="smac-checkpoint-1"), folder / "old.pt")
    torch.save(state | dict(algorithm="iql"), folder / "iql.pt")
    return folder


CASES = [
    # dataset
    ("--dataset hoper-embeded", "no dataset hoper-embeded; data/ has hopper-embedded; prepare.py"),
    ("--dataset walker2d-medium-v2", "no dataset; prepare.py walker2d-medium-v2 makes it, if"),
    ("--dataset {bad}/nowhere.hdf5", "no dataset; nowhere.hdf5"),
    ("--dataset {bad}", "no dataset"),
    ("--dataset {bad}/raw.hdf5", "raw.hdf5 is not a prepared file; prepare.py {bad}/raw.hdf5"),
    ("--dataset {bad}/old.hdf5", "old.hdf5 is not a prepared file"),
    ("--dataset {bad}/text.hdf5", "text.hdf5 is not a whole HDF5 file"),
    ("--dataset {bad}/truncated.hdf5", "truncated.hdf5 is not a whole HDF5 file"),
    ("--dataset {bad}/empty.hdf5", "empty.hdf5 only describes an environment; --offline-steps 0"),
    ("--dataset {bad}/sizes.hdf5", "sizes.hdf5 does not fit its environment"),
    ("--dataset {bad}/gone.hdf5", "environment, NoSuchRobot-v0, cannot be made"),
    ("--dataset {bad}/kwargs.hdf5", "environment, Hopper-v5, cannot be made; no_such"),
    ("--dataset {bad}/module.hdf5", "environment, no_such_module:Robot-v0, cannot be made"),
    # checkpoint
    ("--init-from {bad}/nowhere.pt", "there is no {bad}/nowhere.pt"),
    ("--init-from {bad}/text.pt", "text.pt; no checkpoint of these scripts"),
    ("--init-from {bad}/truncated.pt", "truncated.pt; damaged"),
    ("--init-from {bad}/foreign.pt", "foreign.pt; no checkpoint of these scripts"),
    ("--init-from {bad}/module.pt", "module.pt; no checkpoint of these scripts"),
    ("--init-from {bad}/old.pt", "old.pt; present version"),
    ("--init-from {bad}", "{bad} is a folder; offline.pt"),
    ("--init-from {reference}/offline.pt --dataset {bad}/walker.hdf5", "offline.pt do not fit"),
    (
        "--init-from {reference}/offline.pt --critic-hidden 8 8",
        "offline.pt do not fit; leave their flags out",
    ),
    ("--init-from {reference}/offline.pt --num-critics 2", "offline.pt do not fit"),
    ("--init-from {reference}/offline.pt --optimizer adam", "offline.pt do not fit"),
    ("--init-from {reference}/offline.pt --score-blocks 2", "offline.pt do not fit"),
    ("--init-from {bad}/iql.pt --dataset {dataset} --policy-hidden 8", "iql.pt do not fit"),
    ("--resume {bad}", "there is no {bad}/last.pt"),
    ("--resume {reference}/last.pt", "--resume takes a run's folder; last.pt is none"),
    # flags and machine
    ("--preset hopper", "no preset hopper; auto; paper; small; from-scratch"),
    ("--dataset {dataset} --eval-episodes 0", "--eval-episodes; have to be 1 or more"),
    ("--dataset {dataset} --final-episodes 0", "--final-episodes have to be 1 or more"),
    ("--dataset {dataset} --offline-cooldown 30", "--offline-cooldown is a share; from 0 to 1"),
    ("--dataset {dataset} --offline-cooldown -0.1", "--offline-cooldown is a share"),
    ("--dataset {dataset} --kappa -1", "--kappa; weights: 0 or more"),
    ("--dataset {dataset} --offline-fraction 50", "--offline-fraction is a share; from 0 to 1"),
    ("--dataset {dataset} --seed -1", "--seed; have to be 0 or more"),
    ("--dataset {dataset} --offline-steps -5", "numbers of steps have to be 0 or more"),
    ("--dataset {dataset} --threads 0", "--threads 1 or more"),
    ("--dataset {dataset} --online-batch-size 1", "a batch has 2 rows or more"),
    ("--dataset {dataset} --critic-hidden", "--critic-hidden; need sizes, such as 256 256"),
    ("--dataset {dataset} --runs-dir {dataset}", "no run folder can be made in --runs-dir"),
    ("--dataset {dataset} --online-kappa -0.1", "--online-kappa are weights: 0 or more"),
    ("--dataset {dataset} --score-steps 0", "nothing fits a score; --score-steps; --kappa 0"),
    (
        "--offline-steps 0 --online-kappa 1",
        "no dataset to fit a score to; --online-kappa has to be 0",
    ),
    ("--dataset {dataset} --score-steps 0 --kappa 0 --online-kappa 1", "--online-kappa 0"),
    ("--dataset {dataset} --device tpu", "--device tpu cannot be used here; --device cpu"),
    ("--dataset {dataset} --device cuda:99", "--device cuda:99 cannot be used; --device cpu"),
    ("--dataset {dataset} --compile", "--compile needs a C++ compiler"),
    ("--dataset {dataset} --track", "--track; wandb"),
]


@pytest.mark.parametrize("command, words", CASES, ids=lambda x: x)
def test_a_wrong_input_is_answered_in_a_sentence(
    command, words, bad, dataset, reference, tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(sys.modules, "wandb", None)  # cannot be imported
    places = dict(bad=bad, dataset=dataset, reference=reference)
    runs = tmp_path / "runs"
    flags = ["--device", "cpu", "--online-steps", 20, "--runs-dir", runs]
    if "--init-from" not in command:
        flags = [*TINY, *flags]
    if "--resume" in command:
        flags = []
    with pytest.raises(SystemExit) as problem:
        run_here(smac, *flags, *command.format(**places).split())
    sentence = str(problem.value)
    assert sentence.startswith("error: ") and "\n" not in sentence and not runs.exists()
    for part in words.format(**places).split("; "):
        assert part in sentence


@pytest.mark.parametrize("script", (cal_ql, iql, td3_bc), ids=lambda m: m.__name__)
def test_another_scripts_checkpoint_is_one_sentence(script, reference, dataset, tmp_path):
    flags = ["--device", "cpu", "--runs-dir", tmp_path, "--dataset", dataset]
    with pytest.raises(SystemExit) as problem:
        run_here(script, *flags, "--init-from", reference / "offline.pt")
    sentence = str(problem.value)
    assert "offline.pt is a checkpoint of smac: smac_offline_to_online.py takes" in sentence


def test_an_unknown_flag_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--no-such-flag")
    assert end.value.code == 2 and "no-such-flag" in "".join(capsys.readouterr())


def test_near_names_are_of_files_that_are_there(tmp_path, monkeypatch):
    """Beside the script, wherever it is called from."""
    monkeypatch.chdir(tmp_path)
    assert smac.find_dataset("hopper-embedded") == ROOT / "data" / "hopper-embedded.hdf5"
    own = hopper_file(tmp_path / "hopper-embedded", 1)  # a path goes before a name
    assert smac.find_dataset("hopper-embedded").resolve() == own


# ---- later
def is_finite(tree) -> bool:
    if isinstance(tree, torch.Tensor):
        return not tree.is_floating_point() or bool(tree.isfinite().all())
    if isinstance(tree, dict):
        tree = list(tree.values())
    return not isinstance(tree, (list, tuple)) or all(map(is_finite, tree))


@pytest.mark.parametrize("phase", ["score", "offline", "online"])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_good_state(
    tmp_path, dataset, monkeypatch, phase
):
    """It turns up soon after a checkpoint, and is logged before the next."""
    monkeypatch.chdir(tmp_path)  # mujoco writes of wild actions to its log
    calls = []

    def broken(f):
        def g(*inputs, **flags):
            calls.append(0)
            return f(*inputs, **flags) * (np.nan if len(calls) > 22 else 1)

        return g

    owner, name = smac.Agent, "td_target"
    if phase == "score":
        owner, name = smac.ScoreModel, "loss"
    steps = {"score": [], "offline": [], "online": ["--offline-steps", 1, "--warmup-steps", 0]}
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    with pytest.raises(SystemExit) as stop:
        flags = ["--dataset", dataset, "--runs-dir", tmp_path / "runs", "--score-steps", 30]
        run_here(smac, *TINY, *flags, *steps[phase])
    last = only_run(tmp_path / "runs") / "last.pt"
    sentence = str(stop.value)
    assert f"is not finite at {phase} step 25" in sentence and str(last.parent) in sentence
    assert load(last)["done"][phase] == 20 and is_finite(load(last))


def test_an_absurd_learning_rate_stops_the_run(tmp_path, dataset):
    with pytest.raises(SystemExit, match="loss is not finite at score step"):
        run_here(smac, *TINY, "--score-lr", 1e30, "--dataset", dataset, "--runs-dir", tmp_path)


def test_no_checkpoint_holds_what_is_not_finite(tmp_path, dataset):
    """Also where one is due before the next row of metrics."""
    seldom = ["--log-every", 40, "--checkpoint-every", 5, "--score-lr", 1e30]
    with pytest.raises(SystemExit, match="score_model.* is not finite at score step"):
        run_here(smac, *TINY, *seldom, "--dataset", dataset, "--runs-dir", tmp_path)
    assert not (only_run(tmp_path) / "last.pt").exists()
