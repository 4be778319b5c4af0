"""Every command of the pages but docs/notes is run, in a copy of the repository, with few steps and
small networks. What it reads is made here: datasets, runs, the sources of data/prepare.py."""

import importlib.util
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from helpers import ROOT, commands, prepared_file, run_here
from shared_blocks import SCRIPTS
from test_prepare import awac_file, hdf5, robomimic_file

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NAMES = {script.name for script in SCRIPTS}

# No command takes more steps than these, or leaves them to a preset
STEPS = {"--score-steps": 3, "--offline-steps": 4, "--online-steps": 12, "--warmup-steps": 8}
NETWORKS = shlex.split("--num-critics 2 --critic-hidden 8 8 --policy-hidden 8 8")
SCORE = shlex.split("--score-hidden 8 --score-blocks 1 --score-condition-hidden 8")
LITTLE = shlex.split("--device cpu --eval-episodes 1 --final-episodes 1 --online-batch-size 16")
FEW = {
    "experiments/sweep.py": ["--dry-run"],
    "experiments/identity.py": ["--states", "20"],
    "experiments/landscape.py": ["--points", "2", "--episodes", "2", "--jobs", "1"],
    "experiments/speed.py": ["--only", "SMAC"],
    "experiments/peers.py": ["--steps", "5", "--eval-episodes", "1", "--final-episodes", "1"],
    "experiments/picture.py": ["--score-steps", "3", "--offline-steps", "3"],
}
SIZES = {"Hopper-v5": (11, 3), "Walker2d-v5": (17, 6), "Pusher-v5": (23, 7), "door": (39, 28)}
SIZES["relocate"] = (39, 30)
GOALS = dict(family="adroit", goals=1, reward_scale=10.0, reward_bias=-5.0, max_episode_steps=20)
GOALS |= dict(return_0=0.0, return_100=1.0)


def all_commands() -> list:
    found = {}
    for page in PAGES:
        for command in commands(page):
            words = shlex.split(command, comments=True)
            # runs/NAME is a run of the page's script
            name = " ".join([page.name, *words] if "runs/" in command else words)
            found.setdefault(name, pytest.param(page.name, words, id=name))
    return list(found.values())


def columns(kind: str, n: int = 40) -> dict[str, np.ndarray]:
    """Four episodes under D4RL's names. Adroit's succeed in their last step."""
    rng = np.random.default_rng(0)
    obs_dim, act_dim = SIZES[kind]
    terminals = np.arange(n) % 10 == 9
    rewards = rng.random(n) if "-v" in kind else terminals - 1.0
    observations = rng.normal(size=(n, obs_dim)).astype(np.float32)
    actions = rng.uniform(-0.4, 0.4, (n, act_dim)).astype(np.float32)
    return dict(observations=observations, actions=actions, rewards=rewards, terminals=terminals)


def dataset(path: Path, kind: str) -> None:
    rows = columns(kind)
    rows |= dict(ends=rows["terminals"], returns=np.repeat(np.arange(4.0), 10))
    about = dict(env_id=kind)
    if "-v" not in kind:
        about = dict(GOALS, env_id=f"gymnasium_robotics:AdroitHand{kind.title()}Sparse-v1")
        rows["rewards"] = rows["rewards"] + 1
    for name, column in rows.items():
        rows[name] = column.astype(np.float32 if column.dtype == float else column.dtype)
    prepared_file(path, rows, **about)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The repository, with datasets that its pages speak of."""
    folder = tmp_path_factory.mktemp("clone") / "smac"
    leave_out = shutil.ignore_patterns(".git", "runs", "__pycache__", "wandb", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=leave_out)
    kinds = {"walker2d-medium-replay-v2": "Walker2d-v5", "hopper-medium-replay-v2": "Hopper-v5"}
    kinds |= {"door-binary": "door", "door-binary-v0": "door", "relocate-binary": "relocate"}
    kinds |= dict(pusher="Pusher-v5")
    for name, kind in kinds.items():
        dataset(folder / "data" / f"{name}.hdf5", kind)
    for path in (folder / "experiments" / "sweeps").glob("*.toml"):  # of datasets of their own
        for name in re.findall(r'"([\w./-]+\.hdf5)"', path.read_text()):
            dataset(folder / name, "Hopper-v5")
    return folder


@pytest.fixture(scope="module")
def finished(clone, tmp_path_factory):
    """finished(script): the folder of its run."""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            runs = tmp_path_factory.mktemp("runs")
            module = importlib.import_module(name.removesuffix(".py"))
            words = reduced(name, ["--offline-batch-size", "8", "--runs-dir", str(runs)])
            made[name] = run_here(module, *words)
        return made[name]

    return make


def reduced(program: str, words: list[str]) -> list[str]:
    """The command's flags, but for fewer steps."""
    if "--collect" in words:
        return [*words, "--out", "runs/packed"]
    if program not in NAMES:
        return words + FEW.get(program, [])
    if "--resume" in words or "--help" in words:
        return words
    steps = dict(STEPS)
    is_smac = program == "smac_offline_to_online.py"
    if not is_smac:
        steps.pop("--score-steps")
    kept = []
    for before, word in zip(["", *words], words):
        if before in steps:
            steps[before] = min(int(word), steps[before])
        elif word not in steps:
            kept.append(word)
    kept += [str(x) for pair in steps.items() for x in pair] + LITTLE
    if "--init-from" not in words:
        kept += NETWORKS + (SCORE if is_smac else [])
    return kept


def make_source(words: list[str], folder: Path) -> None:
    """What data/prepare.py reads."""
    source, cache = words[0], folder / "d4rl"
    cache.mkdir(exist_ok=True)
    if source in ("my.hdf5", "my_door.hdf5"):
        hdf5(folder, columns("door" if "--task" in words else "Pusher-v5"), source)
    elif source == "low_dim.hdf5":
        rows = columns("Pusher-v5")
        keys = words[words.index("--obs-keys") + 1 :]
        parts = dict(zip(keys, np.split(rows["observations"], [20], 1)))
        rows = {"actions": rows["actions"], "rewards": rows["rewards"], "dones": rows["terminals"]}
        rows |= {f"obs/{key}": part for key, part in parts.items()}
        robomimic_file(folder, dict(demo_0=rows))
    elif source == "walker2d-medium-replay-v2":
        hdf5(cache, columns("Walker2d-v5"), "walker2d_medium_replay-v2.hdf5")
    elif source == "hopper-medium-replay-v2":
        hdf5(cache, columns("Hopper-v5"), "hopper_medium_replay-v2.hdf5")
    elif source == "hopper-medium-replay.hdf5":
        hdf5(folder, columns("Hopper-v5"), source)
    elif source == "door-binary-v0":
        for name in ("door2_sparse", "door_bc_sparse4"):
            awac_file(cache / "offpolicy_hand_data" / f"{name}.npy", ([-1, -1, 0], False, 0))
    elif source.startswith("minari:"):
        make_minari(source.removeprefix("minari:"))


def make_minari(name: str) -> None:
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    rows, ends = columns("Hopper-v5", 10), np.arange(9) == 8
    found = dict(observations=rows["observations"], actions=rows["actions"][:9])
    found |= dict(rewards=rows["rewards"][:9], terminations=ends, truncations=ends & False)
    buffers = [EpisodeBuffer(id=0, **found)]
    minari.create_dataset_from_buffers(name, buffers, env=gym.make("Hopper-v5"))


def load_program(path: Path):
    """A module of its own: what is patched in it is patched nowhere else."""
    spec = importlib.util.spec_from_file_location(f"documents_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call_each_once(steps: dict, args) -> dict:
    """In place of speed.py's measurement."""
    for step in steps.values():
        step()
    return {key: [1.0] for key in steps}


@pytest.mark.filterwarnings("ignore")  # of minari and matplotlib
@pytest.mark.parametrize("page, words", all_commands())
def test_a_command_runs(page, words, clone, finished, monkeypatch, tmp_path, capsys):
    program, *words = words
    monkeypatch.chdir(clone)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(clone / "d4rl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(torch, "compile", lambda update, **how: update)  # that: test_compile.py
    monkeypatch.setenv("CXX", sys.executable)  # is there, and is not called
    monkeypatch.setattr(sys, "path", sys.path[:])
    if program == "experiments/peers.py" and importlib.util.find_spec("d3rlpy") is None:
        pytest.skip("d3rlpy is not installed")

    owner = f"{Path(page).stem}.py"  # whose runs a page speaks of
    run = finished(owner if owner in NAMES else "smac_offline_to_online.py")
    shutil.rmtree(clone / "runs", ignore_errors=True)
    words = [word.replace("runs/...", "runs/NAME") for word in words]
    shutil.copytree(run, clone / "runs" / "NAME")
    if program == "experiments/report.py" and re.match("runs/|RUNS", words[0]):
        shutil.copytree(run, clone / words[0] / "NAME", dirs_exist_ok=True)
    if program == "data/prepare.py":
        words = ["Pusher-v5" if word == "ID" else word for word in words]
        make_source(words, clone)

    module = load_program(clone / program)
    if program == "experiments/speed.py":
        few = module.transitions(400)
        monkeypatch.setattr(module, "transitions", lambda n: few)
        monkeypatch.setattr(module, "take_turns", call_each_once)
    words = reduced(program, words)
    monkeypatch.setattr(sys, "argv", [program, *words])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.main()
    except SystemExit as end:
        if "error: no pictures" in str(end.code):
            pytest.skip(end.code)
        assert end.code in (0, None), end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    printed = capsys.readouterr().out
    if program == "experiments/sweep.py":
        check_commands_of_a_sweep(printed)


def check_commands_of_a_sweep(printed: str) -> None:
    """Not run, as each is hours: their flags are read."""
    found = re.findall(r"^\S+ \S*/(\w+)\.py (.*)$", printed, re.M)
    assert len(found) == len(printed.splitlines()) > 0
    for name, words in found:
        tyro.cli(importlib.import_module(name).Args, args=shlex.split(words))
