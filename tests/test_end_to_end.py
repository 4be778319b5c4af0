"""From every kind of source over data/prepare.py to the last picture of a run, in all four scripts,
and from a baseline's networks on to SMAC."""

import json
import math
import shlex
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import test_prepare
from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv
from helpers import hopper_file, load, rows_of, run_here
from test_prepare import DOOR, awac_file, hdf5, rows, run

import cal_ql
import iql
import smac_offline_to_online as smac
import td3_bc

cache = test_prepare.cache  # fixtures
serve = test_prepare.serve
minari_dataset = test_prepare.minari_dataset

# minari about a dataset without an author
pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None")

BASELINES = (cal_ql, iql, td3_bc)
each_script = pytest.mark.parametrize("script", (smac, *BASELINES), ids=lambda m: m.__name__)
each_baseline = pytest.mark.parametrize("baseline", BASELINES, ids=lambda m: m.__name__)

LIMIT = ("--max-episode-steps", 5)
ONLINE = shlex.split("""
    --device cpu --online-steps 12 --warmup-steps 4 --online-batch-size 8 --eval-every 3
    --eval-episodes 1 --final-episodes 1 --log-every 1
""")
OFFLINE = shlex.split("""
    --offline-steps 3 --offline-batch-size 8 --num-critics 2 --critic-hidden 8 8 --policy-hidden 8 8
""")
SCORE = shlex.split("""
    --score-steps 2 --score-batch-size 8 --score-hidden 8 --score-blocks 1
    --score-condition-hidden 8
""")


def train(script, printed: str, runs: Path) -> Path:
    """The run folder of a script on the dataset that the last line of prepare.py's output names."""
    command = shlex.split(printed.splitlines()[-1])
    assert command[:5] == ["go", "on:", "python", "smac_offline_to_online.py", "--dataset"]
    flags = [*OFFLINE, *ONLINE, "--runs-dir", runs]
    if script is smac:
        flags += SCORE
    return run_here(script, *command[4:], *flags)


def assert_all_phases(script, folder: Path, env_id: str, obs_dim: int, act_dim: int) -> list:
    """What every run leaves. Returns the replay's columns: s, a, r, s', terminal, return_to_go."""
    config = json.loads((folder / "config.json").read_text())
    assert config["algorithm"] == script.ALGORITHM
    assert config["task"]["env_id"] == env_id and config["task"]["max_episode_steps"] == 5

    evaluations = rows_of(folder / "evaluations.csv")
    steps = [(row["phase"], int(row["step"])) for row in evaluations]
    offline, online = (0, 3), (0, 3, 6, 9, 12)
    expected = [("offline", step) for step in offline] + [("online", step) for step in online]
    assert steps == [*expected, ("final", 12)]
    assert all(math.isfinite(float(row["normalized"])) for row in evaluations)
    assert all(1 <= int(row["length"]) <= 5 for row in evaluations)

    state = load(folder / "last.pt")
    phases = dict(score=2, offline=3, online=12)
    if script is not smac:
        del phases["score"]
    assert state["done"] == phases
    metrics = rows_of(folder / "metrics.csv")
    assert {row["phase"] for row in metrics} == set(phases)
    before, after = load(folder / "offline.pt")["agent"], state["agent"]
    assert not before["critic.weights.0"].equal(after["critic.weights.0"])  # it has learned online

    replay = state["replay"]
    assert replay["sizes"] == (obs_dim, act_dim, 1, obs_dim, 1, 1)
    assert len(replay["rows"]) == 12 and replay["rows"].isfinite().all()
    columns = replay["rows"].split(replay["sizes"], 1)
    assert 0 < columns[1].abs().max() <= 1
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    return columns


# ---- sources
@each_script
def test_a_name_of_d4rls(script, serve, cache, tmp_path):
    source = hdf5(tmp_path, rows((8, "terminal"), (6, "timeout")))
    serve(source.read_bytes())
    printed = run("hopper-medium-v2", *LIMIT, "--out", tmp_path / "prepared.hdf5")
    assert (cache / "hopper_medium-v2.hdf5").read_bytes() == source.read_bytes()
    folder = train(script, printed, tmp_path / "runs")
    terminal = assert_all_phases(script, folder, "Hopper-v5", 11, 3)[4]
    assert not terminal.any()  # five steps are too few to fall: all of its ends are time-outs


@each_script
def test_a_folder_of_awacs(script, tmp_path, monkeypatch):
    """A hand that opens the door at the third step of every episode."""
    step = AdroitHandDoorEnv.step

    def third_succeeds(env, action):
        obs, reward, terminated, truncated, info = step(env, action)
        info["success"] = env.data.time > 2.5 * env.dt
        return obs, reward, terminated, truncated, info

    monkeypatch.setattr(AdroitHandDoorEnv, "step", third_succeeds)
    source = tmp_path / "offpolicy_hand_data"
    awac_file(source / "door2_sparse.npy", ([-1, -1, 0], True, 1), ([-1, 0], True, 0))
    awac_file(source / "door_bc_sparse4.npy", ([-1, -1], False, 0), ([-1, -1, -1, 0], False, 0))
    printed = run(source, *DOOR, *LIMIT, "--out", tmp_path / "prepared.hdf5")
    folder = train(script, printed, tmp_path / "runs")
    env_id = "gymnasium_robotics:AdroitHandDoorSparse-v1"
    _, _, r, _, terminal, _ = assert_all_phases(script, folder, env_id, 39, 28)
    assert r.flatten().tolist() == 4 * [-5, -5, 5]
    assert terminal.flatten().tolist() == 4 * [0, 0, 1]
    results = rows_of(folder / "evaluations.csv")
    assert {(row["length"], float(row["normalized"])) for row in results} == {("3", 100.0)}


@each_script
def test_a_local_dataset_of_minaris(script, minari_dataset, tmp_path):
    """Of an environment whose observations are a Dict. The limit is the dataset's."""
    env = gym.make("gymnasium_robotics:FetchReachDense-v4", max_episode_steps=5)
    env.action_space.seed(0)
    episodes = []
    for seed in range(3):
        seen, actions, rewards = [env.reset(seed=seed)[0]], [], []
        for _ in range(5):
            actions.append(env.action_space.sample())
            obs, reward, _, _, _ = env.step(actions[-1])
            seen.append(obs)
            rewards.append(reward)
        stacked = {key: np.stack([obs[key] for obs in seen]) for key in seen[0]}
        episodes.append((stacked, np.array(actions), rewards, False, None))
    source = minari_dataset("fetch/reach/tiny-v0", env, episodes)
    printed = run(source, "--out", tmp_path / "prepared.hdf5")
    folder = train(script, printed, tmp_path / "runs")
    s = assert_all_phases(script, folder, "gymnasium_robotics:FetchReachDense-v4", 16, 4)[0]
    obs, _ = env.reset(seed=smac.episode_seed(0, smac.TRAINING, 0))
    first = gym.spaces.flatten(env.observation_space, obs)
    np.testing.assert_array_equal(s[0], np.float32(first))


@each_script
def test_ones_own_file(script, tmp_path):
    """Of an environment with other bounds of actions, which are rescaled on both sides."""
    columns = rows((8, "terminal"), (6, "timeout"), obs_dim=23, act_dim=7)
    columns["actions"] = 2 * columns["actions"]
    source, prepared = hdf5(tmp_path, columns), tmp_path / "prepared.hdf5"
    printed = run(source, "--env-id", "Pusher-v5", *LIMIT, "--out", prepared)
    folder = train(script, printed, tmp_path / "runs")
    s, a, r, s_next, _, _ = assert_all_phases(script, folder, "Pusher-v5", 23, 7)

    task = script.Task(**json.loads((folder / "config.json").read_text())["task"])
    env, raw = script.TaskEnv(task), gym.make("Pusher-v5")
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert (raw.action_space.low == -2).all() and (raw.action_space.high == 2).all()
    data = script.load_dataset(prepared, 23, 7)
    expected = columns["actions"][:8] / 2
    np.testing.assert_allclose(data["actions"][:8], expected, atol=2e-5)
    obs, _ = raw.reset(seed=script.episode_seed(0, script.TRAINING, 0))
    for i in range(5):  # the first episode once more, with actions within Pusher's own bounds
        np.testing.assert_allclose(s[i], obs, atol=1e-4)
        obs, reward, _, _, _ = raw.step(2 * a[i].numpy())
        np.testing.assert_allclose(s_next[i], obs, atol=1e-4)
        assert r[i].item() == pytest.approx(reward, abs=1e-4)


@each_script
def test_a_run_of_smacs(script, reference, tmp_path):
    """Its dataset is what that run has collected."""
    prepared = tmp_path / "prepared.hdf5"
    printed = run(reference, *LIMIT, "--out", prepared)
    folder = train(script, printed, tmp_path / "runs")
    assert_all_phases(script, folder, "Hopper-v5", 11, 3)

    replay = load(reference / "last.pt")["replay"]
    s, a, r, s_next, terminal, _ = (x.numpy() for x in replay["rows"].split(replay["sizes"], 1))
    data = script.load_dataset(prepared, 11, 3)
    np.testing.assert_array_equal(data["observations"], s)
    np.testing.assert_allclose(data["actions"], a, atol=2e-5)
    np.testing.assert_array_equal(data["rewards"], r[:, 0])
    np.testing.assert_array_equal(data["terminals"], terminal[:, 0])
    inside = terminal[:, 0] == 0
    np.testing.assert_array_equal(data["next_observations"][inside], s_next[inside])


# ---- from a baseline's networks on to SMAC
@pytest.fixture(scope="module")
def short_episodes(tmp_path_factory):
    return hopper_file(tmp_path_factory.mktemp("short") / "hopper.hdf5", 3, max_episode_steps=5)


@each_baseline
@pytest.mark.parametrize("kappa", ["1", "default"])
def test_a_baselines_networks_go_on_in_smac(baseline, kappa, short_episodes, tmp_path):
    """With --online-kappa 1 phase 1 comes first. By default there is no cosine to keep: plain."""
    flags = ["--dataset", short_episodes, "--runs-dir", tmp_path / "baseline"]
    before = run_here(baseline, *flags, *OFFLINE, *ONLINE, "--online-steps", 0)
    flags = ["--init-from", before / "offline.pt", "--runs-dir", tmp_path / "smac"]
    if kappa == "1":
        flags += ["--online-kappa", 1]
    folder = run_here(smac, *flags, *ONLINE, *SCORE)

    config = json.loads((folder / "config.json").read_text())
    assert config["init_algorithm"] == baseline.ALGORITHM
    metrics = rows_of(folder / "metrics.csv")
    online = {row["name"] for row in metrics if row["phase"] == "online"}
    matched = {"sm_loss", "alpha", "cosine_batch", "cosine_policy", "cosine_collected"}
    state = load(folder / "last.pt")
    if kappa == "1":
        assert state["done"] == dict(score=2, online=12)
        assert state["args"]["online_kappa"] == 1
        assert state["agent"]["score_model.fitted"]
        assert matched <= online
        matching = [row for row in metrics if row["name"] in ("sm_loss", "alpha")]
        assert all(float(row["value"]) > 0 for row in matching)
    else:
        assert state["done"] == dict(online=12)
        assert state["args"]["online_kappa"] == 0
        assert not state["agent"]["score_model.fitted"]
        assert not matched & online
    assert "td_loss" in online and "online_kappa" not in online

    theirs = rows_of(before / "evaluations.csv")
    theirs = [row for row in theirs if row["phase"] == "offline" and row["step"] == "3"]
    ours = rows_of(folder / "evaluations.csv")
    expected = float(theirs[0]["normalized"])
    assert float(ours[0]["normalized"]) == pytest.approx(expected, rel=1e-3)
    assert {row["phase"] for row in ours} == {"online", "final"}
    assert all(math.isfinite(float(row["normalized"])) for row in ours)
    assert state["replay"]["rows"].isfinite().all()
    assert (folder / "curve.png").is_file()
