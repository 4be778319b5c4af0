"""data/prepare.py: which rows a prepared file has, from every kind of source, and every refusal."""

import contextlib
import http.server
import io
import json
import re
import sys
import threading
from pathlib import Path
from unittest import mock

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from helpers import finish, start

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None", "ignore:env_spec is None")
HOPPER = ("--task", "hopper-medium-replay-v2")
DOOR = ("--task", "door-binary-v0")


def run(*words) -> str:
    """What `python data/prepare.py words...` prints."""
    out = io.StringIO()
    words = ["prepare.py", *map(str, words)]
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out):
        prepare.main()
    return out.getvalue()


def prepared(source, *flags):
    """The columns and the attributes of the file that is made of `source`, and what was printed."""
    out = Path(source).parent / "prepared" / "out.hdf5"
    if not Path(source).exists():  # minari:ID, a known name
        out = Path(prepare.os.environ["PREPARED"]) / "out.hdf5"
    printed = run(source, *flags, "--out", out)
    assert [p.name for p in out.parent.iterdir()] == ["out.hdf5"]  # no temporary file
    with h5py.File(out) as file:
        return {name: file[name][:] for name in file}, dict(file.attrs), printed


def refused(*words) -> str:
    with pytest.raises(SystemExit) as problem:
        run(*words)
    sentence = str(problem.value)
    assert sentence.startswith("error: ") and "\n" not in sentence
    return sentence


def transitions(columns) -> dict:
    """As the scripts read a file: the next state is the next row's."""
    columns = dict(columns)
    following = np.r_[columns["observations"][1:], columns["observations"][-1:]]
    columns["next_observations"] = following
    used = columns["terminals"] | ~columns["ends"]
    return {name: column[used] for name, column in columns.items()}


def states(columns) -> list:
    return columns["observations"][:, 0].tolist()


def rows(*ends, rewards=None, stored=None, timeouts=True, obs_dim=11, act_dim=3) -> dict:
    """Columns of episodes (length, "terminal" | "timeout" | "open"). The state at step t of episode
    e is 100 e + t. stored: next_observations that are "true", or "shifted": the following row's."""
    found = [100 * e + np.arange(n) for e, (n, _) in enumerate(ends, 1)]
    state = np.concatenate(found).astype(np.float32)
    last = np.cumsum([n for n, _ in ends]) - 1
    kinds = np.full(len(state), "inside", object)
    kinds[last] = [kind for _, kind in ends]
    columns = dict(observations=np.repeat(state[:, None], obs_dim, 1))
    columns["actions"] = np.linspace(-1, 1, len(state))[:, None].repeat(act_dim, 1)
    columns["rewards"] = np.ones(len(state)) if rewards is None else np.array(rewards)
    columns["terminals"] = kinds == "terminal"
    if timeouts:
        columns["timeouts"] = kinds == "timeout"
    if stored == "true":
        columns["next_observations"] = columns["observations"] + 1
    if stored == "shifted":
        obs = columns["observations"]
        columns["next_observations"] = np.r_[obs[1:], obs[-1:] + 1]
    return columns


def door_rows(*ends, **kwargs) -> dict:
    return rows(*ends, obs_dim=39, act_dim=28, **kwargs)


def hdf5(folder, columns, name="mine.hdf5") -> Path:
    with h5py.File(folder / name, "w") as file:
        for key, column in columns.items():
            file[key] = column
    return folder / name


def assert_next_states_are_right(columns):
    """Of transitions that bootstrap: one later in the same episode."""
    data = transitions(columns)
    step = data["next_observations"][:, 0] - data["observations"][:, 0]
    assert (step[~data["terminals"]] == 1).all()


# ---- ends of episodes
@pytest.mark.parametrize("stored", [None, "true", "shifted"])
def test_a_terminal_is_a_transition_and_an_end(tmp_path, stored):
    source = hdf5(tmp_path, rows((3, "terminal"), (2, "terminal"), stored=stored))
    columns, _, _ = prepared(source, *HOPPER)
    assert states(columns) == [100, 101, 102, 200, 201]
    assert columns["terminals"].tolist() == [0, 0, 1, 0, 1] == columns["ends"].tolist()
    assert_next_states_are_right(columns)


@pytest.mark.parametrize("stored, kept", [(None, False), ("true", True), ("shifted", False)])
def test_a_time_out_is_a_transition_only_with_its_true_next_state(tmp_path, stored, kept):
    source = hdf5(tmp_path, rows((3, "timeout"), (2, "terminal"), stored=stored))
    columns, _, _ = prepared(source, *HOPPER)
    assert states(columns) == [100, 101, 102, *[103] * kept, 200, 201]
    assert columns["ends"].tolist() == [0, 0, *[0] * kept, 1, 0, 1]
    assert columns["terminals"].sum() == 1
    assert states(transitions(columns)) == [100, 101, *[102] * kept, 200, 201]
    assert_next_states_are_right(columns)
    assert columns["returns"].tolist() == [3, 3, 3, *[3] * kept, 2, 2]


@pytest.mark.parametrize("stored, kept", [(None, False), ("true", True)])
def test_an_open_tail_ends_with_the_file(tmp_path, stored, kept):
    source = hdf5(tmp_path, rows((2, "terminal"), (3, "open"), stored=stored))
    columns, _, _ = prepared(source, *HOPPER)
    assert states(transitions(columns)) == [100, 101, 200, 201, *[202] * kept]
    assert columns["returns"].tolist() == [2, 2, 3, 3, 3, *[3] * kept]
    assert_next_states_are_right(columns)


def test_without_timeouts_steps_count_against_the_limit(tmp_path):
    ends = (4, "open"), (2, "terminal"), (4, "open"), (3, "open")
    source = hdf5(tmp_path, rows(*ends, timeouts=False))
    columns, about, _ = prepared(source, *HOPPER, "--max-episode-steps", 4)
    assert states(transitions(columns)) == [100, 101, 102, 200, 201, 300, 301, 302, 400, 401]
    assert columns["returns"][columns["ends"]].tolist() == [4, 2, 4, 3]
    assert about["max_episode_steps"] == 4


def test_with_timeouts_the_limit_is_not_counted(tmp_path):
    source = hdf5(tmp_path, rows((6, "timeout"), (2, "terminal")))
    columns, _, _ = prepared(source, *HOPPER, "--max-episode-steps", 4)
    assert columns["returns"][columns["ends"]].tolist() == [6, 2]


def test_a_jump_ends_an_episode(tmp_path):
    ends = (3, "open"), (2, "terminal")
    source = hdf5(tmp_path, rows(*ends, stored="true", rewards=[1, 1, 1, 5, 5]))
    columns, _, printed = prepared(source, *HOPPER)
    assert states(columns) == [100, 101, 102, 103, 200, 201]
    assert columns["returns"].tolist() == [3, 3, 3, 3, 10, 10]
    assert_next_states_are_right(columns)
    assert "no order" not in printed


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_coarser_next_observations_are_no_jumps(tmp_path, dtype):
    rng = np.random.default_rng(0)
    columns = rows((40, "open"), (40, "terminal"))
    columns["observations"] = rng.normal(0, 3, (80, 11)).astype(np.float32)
    columns["observations"][::7] *= 1e-3
    following = np.r_[columns["observations"][1:], np.ones((1, 11))]
    following[39, 0] += 0.05  # the only jump
    columns["next_observations"] = following.astype(dtype)
    columns, _, printed = prepared(hdf5(tmp_path, columns), *HOPPER)
    assert np.flatnonzero(columns["ends"]).tolist() == [40, 80] and "no order" not in printed
    assert columns["observations"].dtype == np.float32
    assert columns["observations"][40, 0] == np.float32(dtype(following[39, 0]))


def walk(n=2000):
    """Rows of one slowly changing episode after the other, and the same in no order."""
    steps = np.random.default_rng(0).normal(size=(n, 11)).cumsum(0)
    columns = rows((n, "open"))
    columns["observations"] = steps.astype(np.float32)
    columns["terminals"] = np.arange(n) % 100 == 99
    order = np.random.default_rng(1).permutation(n)
    return columns, order


def test_rows_in_no_order_are_transitions_where_next_states_are_stored(tmp_path):
    columns, order = walk()
    following = np.r_[columns["observations"][1:], columns["observations"][:1]]
    columns["next_observations"] = following
    shuffled = {name: column[order] for name, column in columns.items()}
    found, _, printed = prepared(hdf5(tmp_path, shuffled), *HOPPER)
    data = transitions(found)
    assert "mine.hdf5: rows are in no order" in printed
    np.testing.assert_array_equal(data["observations"], shuffled["observations"])
    inside = ~data["terminals"]
    expected = shuffled["next_observations"][inside]
    np.testing.assert_array_equal(data["next_observations"][inside], expected)
    assert inside.sum() == 1980


def test_rows_in_no_order_without_next_states_are_refused(tmp_path):
    columns, order = walk()
    prepared(hdf5(tmp_path, columns), *HOPPER)
    shuffled = {name: column[order] for name, column in columns.items()}
    assert "no order" in refused(hdf5(tmp_path, shuffled), *HOPPER)


def test_episodes_of_one_step_are_in_order(tmp_path):
    columns = rows(*[(1, "terminal")] * 5, stored="true")
    found, _, printed = prepared(hdf5(tmp_path, columns), *HOPPER)
    assert found["terminals"].all() and len(found["ends"]) == 5 and "no order" not in printed


# ---- columns
def test_columns_have_the_scripts_types_and_actions_stay_inside_the_bounds(tmp_path):
    columns, _, _ = prepared(hdf5(tmp_path, rows((3, "terminal"))), *HOPPER)
    for name in ("observations", "actions", "rewards", "returns"):
        assert columns[name].dtype == np.float32
    assert columns["terminals"].dtype == bool == columns["ends"].dtype
    expected = np.array([-1 + 1e-5, 0, 1 - 1e-5], np.float32)
    np.testing.assert_array_equal(columns["actions"][:, 0], expected)
    assert np.isfinite(np.arctanh(columns["actions"])).all()


def test_dones_npz_integer_and_two_dimensional_columns_are_read(tmp_path):
    columns = rows((3, "terminal"), (2, "timeout"), stored="true")
    expected, _, _ = prepared(hdf5(tmp_path, columns), *HOPPER)
    columns["dones"] = columns.pop("terminals").astype(int)[:, None]
    columns["rewards"] = columns["rewards"].astype(int)[:, None]
    np.savez(tmp_path / "mine.npz", **columns, extra=np.zeros(2))
    found, about, _ = prepared(tmp_path / "mine.npz", *HOPPER)
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column)
    assert about["source"] == "mine.npz"


def test_attributes_of_a_known_task(tmp_path):
    source = hdf5(tmp_path, rows((1, "terminal"), (1, "terminal"), rewards=[-20.272305, 3234.3]))
    _, about, printed = prepared(source, *HOPPER)
    expected = dict(format="smac-dataset-1", env_id="Hopper-v5", env_kwargs="{}", goals=0)
    expected |= dict(family="locomotion", max_episode_steps=1000, reward_scale=1, reward_bias=0)
    expected |= dict(return_0=-20.272305, return_100=3234.3, source="mine.hdf5")
    expected |= dict(command="prepare.py mine.hdf5 --task hopper-medium-replay-v2 --out out.hdf5")
    assert about.pop("mean_normalized_return") == pytest.approx(50)
    assert about == expected
    assert "normalized mean return of all episodes: 50.0" in printed
    assert f"--dataset {tmp_path / 'prepared' / 'out.hdf5'}" in printed


def test_a_row_without_a_next_state_is_left_out_but_counts_in_the_mean(tmp_path):
    columns = rows((1, "timeout"), (2, "terminal"), rewards=[3234.3, 0, -20.272305])
    columns, about, printed = prepared(hdf5(tmp_path, columns), *HOPPER)
    assert states(columns) == [200, 201] and "left out: 1 of 2 episodes" in printed
    assert about["mean_normalized_return"] == pytest.approx(50)


# ---- any environment
def pusher(actions):
    columns = rows((len(actions), "terminal"), obs_dim=23)
    columns["actions"] = np.array(actions, np.float32)[:, None].repeat(7, 1)
    return columns


def test_any_environment_has_its_actions_rescaled(tmp_path):
    source = hdf5(tmp_path, pusher([-2, -0.5, 0, 1, 2]))
    columns, about, printed = prepared(source, "--env-id", "Pusher-v5")
    expected = [-1 + 1e-5, -0.25, 0, 0.5, 1 - 1e-5]
    np.testing.assert_allclose(columns["actions"][:, 3], expected, atol=1e-7)
    assert about["env_id"] == "Pusher-v5" and about["max_episode_steps"] == 100
    assert about["family"] == "other" and about["goals"] == 0
    assert (about["return_0"], about["return_100"], about["mean_normalized_return"]) == (0, 100, 5)
    assert "clipped" not in printed


@pytest.mark.parametrize("largest, excess", [(2 + 1e-6, ""), (2.3, "reach 7.5 %")])
def test_actions_a_little_beyond_the_bounds_are_clipped(tmp_path, largest, excess):
    source = hdf5(tmp_path, pusher([-1, 0, largest]))
    columns, _, printed = prepared(source, "--env-id", "Pusher-v5")
    assert columns["actions"].max() == np.float32(1 - 1e-5)
    assert "clipped: 7 numbers of actions" in printed and excess in printed


def test_actions_far_beyond_the_bounds_are_refused(tmp_path):
    source = hdf5(tmp_path, pusher([-1, 0, 2.5]))
    sentence = refused(source, "--env-id", "Pusher-v5", "--out", tmp_path / "a")
    assert "12 % of their range" in sentence and not (tmp_path / "a").exists()


def test_keyword_arguments_reach_the_environment(tmp_path):
    flags = ("--env-id", "Hopper-v5", "--env-kwargs")
    source = hdf5(tmp_path, rows((2, "terminal"), obs_dim=12))
    kwargs = '{"exclude_current_positions_from_observation": false}'
    columns, about, _ = prepared(source, *flags, kwargs)
    assert columns["observations"].shape == (2, 12) and about["env_kwargs"] == kwargs
    assert about["family"] == "locomotion" and about["return_100"] == 3234.3
    for wrong in ("{", "[1]", '"a"'):
        assert "no JSON object" in refused(source, *flags, wrong)


@pytest.mark.parametrize("env_id, stated", [("FetchReachDense-v4", "other"), ("Hopper-v5", "loc")])
def test_a_file_without_rows_describes_an_environment(tmp_path, env_id, stated):
    printed = run("none", "--env-id", env_id, "--out", tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5") as file:
        env = gym.make(file.attrs["env_id"])
        obs_dim = gym.spaces.flatdim(env.observation_space)
        assert file["observations"].shape == (0, obs_dim)
        assert file["actions"].shape == (0, *env.action_space.shape)
        assert file["ends"].shape == file["returns"].shape == (0,)
        assert file.attrs["family"].startswith(stated)
        assert file.attrs["max_episode_steps"] == env.spec.max_episode_steps
    assert "--offline-steps 0" in printed


def test_ones_own_module_may_lie_where_one_is(tmp_path):
    code = "import gymnasium as gym\nfrom gymnasium.envs.mujoco.pusher_v5 import PusherEnv\n"
    code += "gym.register('Mine-v0', PusherEnv, max_episode_steps=7)\n"
    (tmp_path / "robots_of_mine.py").write_text(code)
    script = ROOT / "data" / "prepare.py"
    words = [script, "none", "--env-id", "robots_of_mine:Mine-v0", "--out", tmp_path / "mine.hdf5"]
    code, printed, problem = finish(start(*words, cwd=tmp_path))
    assert code == 0, problem
    assert "--offline-steps 0" in printed
    words = ["--dataset", tmp_path / "mine.hdf5", "--offline-steps", 0, "--online-steps", 3]
    words += ["--device", "cpu", "--eval-episodes", 1, "--final-episodes", 1]
    code, printed, problem = finish(start(ROOT / "td3_bc.py", *words, cwd=tmp_path))
    assert code == 0, problem


@pytest.mark.parametrize(
    "flags, problem",
    [
        (("--env-id", "CartPole-v1"), "bounded vector"),
        (("--env-id", "NoSuch-v0"), "cannot be made"),
        (("--env-id", "CarRacing-v3"), "."),
        (("--env-id", "Pusher-v5", "--env-kwargs", '{"no_such": 1}'), "cannot be made"),
        (("--env-kwargs", '{"a": 1}'), "--env-id"),
        (("--env-id", "Pusher-v5", "--task", "hopper-medium-v2"), "leave --env-id away"),
        (("--task", "hopper-meduim-v2"), "hopper-medium-v2"),
        ((), "--env-id ID or --task NAME"),
    ],
)
def test_environments_that_cannot_be_used_are_refused(tmp_path, flags, problem):
    assert problem in refused("none", *flags, "--out", tmp_path / "a.hdf5")
    assert not (tmp_path / "a.hdf5").exists()


def test_an_environment_without_a_limit_needs_one(tmp_path):
    gym.register("Endless-v0", entry_point="gymnasium.envs.mujoco.pusher_v5:PusherEnv")
    flags = ("none", "--env-id", "Endless-v0", "--out", tmp_path / "a.hdf5")
    try:
        assert "--max-episode-steps" in refused(*flags)
        run(*flags, "--max-episode-steps", 30)
    finally:
        del gym.registry["Endless-v0"]
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert file.attrs["max_episode_steps"] == 30


# ---- binary Adroit
ATTEMPTS = [[0, 0, 0], [0, 0, 1, 0, 1, 0], [0, 1]]


@pytest.mark.parametrize("shift", [0, -1])
def test_binary_episodes_end_at_their_first_success(tmp_path, shift):
    ends = (3, "timeout"), (6, "timeout"), (2, "timeout")
    columns = door_rows(*ends, rewards=np.concatenate(ATTEMPTS) + shift, stored="true")
    columns, about, printed = prepared(hdf5(tmp_path, columns), *DOOR)
    assert states(columns) == [200, 201, 202, 300, 301]
    assert columns["rewards"].tolist() == [0, 0, 1, 0, 1]
    assert columns["terminals"].tolist() == [0, 0, 1, 0, 1] == columns["ends"].tolist()
    assert columns["returns"].tolist() == [-2, -2, -2, -1, -1]  # quicker is better
    assert about["mean_normalized_return"] == pytest.approx(200 / 3)  # the failed one counts
    assert about["env_id"] == "gymnasium_robotics:AdroitHandDoorSparse-v1"
    assert (about["family"], about["goals"], about["max_episode_steps"]) == ("adroit", 1, 200)
    assert (about["reward_scale"], about["reward_bias"]) == (10, -5)
    assert (about["return_0"], about["return_100"]) == (0, 1)
    assert "left out: 1 of 3 episodes, which have no success" in printed
    assert "cut:      3 steps after the first time" in printed


def test_binary_episodes_can_be_cut_at_their_last_success(tmp_path):
    ends = (3, "timeout"), (6, "timeout"), (2, "timeout")
    columns = door_rows(*ends, rewards=np.concatenate(ATTEMPTS))
    columns, _, _ = prepared(hdf5(tmp_path, columns), *DOOR, "--cut", "last")
    assert states(columns) == [200, 201, 202, 203, 204, 300, 301]
    assert columns["terminals"].tolist() == [0, 0, 1, 0, 1, 0, 1]
    assert columns["ends"].tolist() == [0, 0, 0, 0, 1, 0, 1]
    assert columns["returns"].tolist() == [-3, -3, -3, -3, -3, -1, -1]
    assert_next_states_are_right(columns)


@pytest.mark.parametrize(
    "rewards, problem",
    [([-1, 0, 0.5], "-1, 0, 0.5"), ([-0.1, 10], "-0.1, 10"), ([-1, -1], "no success"), ([0], "no")],
)
def test_other_rewards_of_a_binary_task_are_refused(tmp_path, rewards, problem):
    source = hdf5(tmp_path, door_rows((len(rewards), "timeout"), rewards=rewards))
    assert problem in refused(source, *DOOR)


# ---- kitchen, Ant
def kitchen_rows(*ends, rewards, obs_dim=60):
    return rows(*ends, rewards=rewards, obs_dim=obs_dim, act_dim=9)


def test_kitchen_ends_at_the_fourth_subtask_only(tmp_path):
    ends = (3, "timeout"), (5, "timeout"), (2, "terminal")
    columns = kitchen_rows(*ends, rewards=[0, 1, 1, 1, 2, 3, 4, 4, 2, 3])
    columns, about, printed = prepared(hdf5(tmp_path, columns), "--task", "kitchen-mixed-v0")
    assert states(transitions(columns)) == [100, 101, 200, 201, 202, 203, 300]
    assert columns["terminals"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert columns["returns"].tolist() == [1, 1, 1, 4, 4, 4, 4, 3, 3]
    assert about["mean_normalized_return"] == pytest.approx(100 * (1 + 4 + 3) / 12)
    assert (about["family"], about["goals"], about["reward_bias"]) == ("kitchen", 4, -4)
    assert about["max_episode_steps"] == 280 and about["return_100"] == 4
    subtasks = ["microwave", "kettle", "bottom burner", "light switch"]
    assert json.loads(about["env_kwargs"]) == dict(tasks_to_complete=subtasks)
    assert "cut:      1 steps" in printed


def test_kitchen_observations_are_positions_from_both_layouts(tmp_path):
    joints, velocities, objects = np.arange(9.0), np.full(9, -1.0), np.arange(100, 121.0)
    goal, object_velocities = np.full(30, -2.0), np.full(20, -3.0)
    for obs in (
        np.r_[joints, objects, goal],
        np.r_[joints, velocities, objects, object_velocities],
    ):
        columns = kitchen_rows((2, "timeout"), rewards=[0, 1], obs_dim=len(obs))
        columns["observations"] = np.tile(obs, (2, 1))
        columns, _, _ = prepared(hdf5(tmp_path, columns), "--task", "kitchen-complete-v0")
        np.testing.assert_array_equal(columns["observations"][0], np.r_[joints, objects])


def test_ant_observations_lose_the_contact_forces(tmp_path):
    columns = rows((2, "terminal"), obs_dim=111, act_dim=8)
    columns["observations"] = np.arange(222.0).reshape(2, 111)
    found, about, _ = prepared(hdf5(tmp_path, columns), "--task", "ant-medium-v2")
    np.testing.assert_array_equal(found["observations"], columns["observations"][:, :27])
    columns["observations"] = columns["observations"][:, :29]
    assert "(29, 8) numbers" in refused(hdf5(tmp_path, columns), "--task", "ant-medium-v2")
    kwargs = json.loads(about["env_kwargs"])
    assert kwargs == dict(include_cfrc_ext_in_observation=False, contact_cost_weight=0)


# ---- known names
@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder of D4RL's, and one for what is prepared."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("PREPARED", str(tmp_path / "prepared"))
    return tmp_path / "d4rl"


def test_the_known_names():
    names = run("--list").split()
    assert len(names) == 4 * 5 + 3 + 3 and names[0] == "hopper-random-v2"
    files = {prepare.d4rl_file(name) for name in names if "binary" not in name}
    assert len(files) == 23 and "gym_mujoco_v2/halfcheetah_medium_replay-v2.hdf5" in files
    assert "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5" in files
    assert "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5" in files
    assert prepare.KNOWN["pen-binary-v0"].max_episode_steps == 100
    assert prepare.KNOWN["ant-expert-v2"].return_0 == -325.6


def test_names_that_are_not_known_are_refused_with_near_ones(tmp_path):
    assert "hopper-medium-v2" in refused("hoper-medium-v2")
    assert "--list" in refused(tmp_path / "nothing.hdf5", *HOPPER)
    assert "name a source" in refused()


def awac_file(path, *found):
    """AWAC's .npy file of episodes (rewards, observations as dicts?, rewards too many)."""
    array = np.empty(len(found), object)
    for i, (rewards, as_dicts, extra) in enumerate(found):
        obs = np.arange(39.0) + 100 * np.arange(len(rewards))[:, None]
        listed = [dict(state_observation=o) for o in obs] if as_dicts else obs
        paid = np.reshape(rewards + [0] * extra, (-1, 1))
        array[i] = dict(observations=listed, actions=np.zeros((len(rewards), 28)), rewards=paid)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=True)


def test_adroits_files_lie_in_d4rls_folder(cache):
    assert "1yUdJnGgYit94X_AvV6JJP5Y3Lx2JF30Y" in refused("door-binary-v0")
    folder = cache / "offpolicy_hand_data"
    awac_file(folder / "door2_sparse.npy", ([-1, -1, 0], True, 1), ([-1, 0], True, 0))
    assert "door_bc_sparse4.npy" in refused("door-binary-v0")
    awac_file(folder / "door_bc_sparse4.npy", ([-1, -1], False, 0))
    columns, about, _ = prepared("door-binary-v0")
    assert states(columns) == [0, 100, 200, 0, 100]
    assert columns["rewards"].tolist() == [0, 0, 1, 0, 1]
    assert about["mean_normalized_return"] == pytest.approx(200 / 3)
    assert about["source"] == "door-binary-v0"
    assert "is no run's folder" in refused(folder, *HOPPER)
    again, _, _ = prepared(folder, *DOOR)
    np.testing.assert_array_equal(again["observations"], columns["observations"])
    (folder / "door_bc_sparse4.npy").write_bytes(b"half")
    assert "unpack it again" in refused("door-binary-v0")


# ---- downloads, from a local server
@pytest.fixture
def serve(monkeypatch):
    """serve(body, length, status): any file of D4RL's address comes with these."""
    servers = []

    def start(body, length=None, status=200):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(prepare, "D4RL", f"http://127.0.0.1:{server.server_port}/")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def body(tmp_path):
    return hdf5(tmp_path, rows((3, "terminal"), (2, "timeout")), "served.hdf5").read_bytes()


def test_a_known_name_is_fetched_once_into_d4rls_folder(serve, body, cache, capsys):
    serve(body)
    columns, about, _ = prepared("hopper-medium-v2")
    assert "hopper_medium-v2.hdf5: 100%" in capsys.readouterr().err
    assert [p.name for p in cache.iterdir()] == ["hopper_medium-v2.hdf5"]
    assert (cache / "hopper_medium-v2.hdf5").read_bytes() == body
    assert len(columns["ends"]) == 5 and about["source"] == "hopper-medium-v2"
    assert about["command"] == "prepare.py hopper-medium-v2 --out out.hdf5"
    serve(b"", status=404)
    prepared("hopper-medium-v2")  # from the folder


@pytest.mark.parametrize(
    "part, length, status",
    [(0.5, 1, 200), (0, 0, 404), (1, 1, 500), (0, 0, 200), (None, 1, 200)],
)
def test_what_does_not_arrive_whole_is_not_there(serve, body, cache, part, length, status):
    """A connection that breaks, errors of the server, nothing, a page of HTML."""
    sent = b"<html>log in</html>" if part is None else body[: int(part * len(body))]
    size = len(sent) if part is None else int(length * len(body))
    serve(sent, size, status)
    sentence = refused("hopper-medium-v2")
    assert "cannot download http" in sentence and str(cache / "hopper_medium-v2.hdf5") in sentence
    assert list(cache.iterdir()) == []


def test_a_server_that_is_not_there_and_a_folder_that_cannot_be(cache, monkeypatch):
    monkeypatch.setattr(prepare, "D4RL", "http://127.0.0.1:9/")
    assert "cannot download" in refused("hopper-medium-v2")
    cache.rmdir()
    cache.write_text("")
    assert "cannot download" in refused("hopper-medium-v2")


def test_a_dead_connection_times_out(cache, monkeypatch):
    given = {}

    def urlopen(url, timeout=None):
        given["timeout"] = timeout
        raise TimeoutError("timed out")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)
    assert "timed out" in refused("hopper-medium-v2") and 0 < given["timeout"] <= 60


# ---- Minari
@pytest.fixture
def minari_dataset(tmp_path, monkeypatch, cache):
    """minari_dataset(name, env_id, episodes): a local one. An episode is (observations, actions,
    rewards, terminated, infos)."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def make(name, env, episodes, **kwargs):
        buffers = []
        for i, (obs, actions, rewards, terminated, infos) in enumerate(episodes):
            last = np.arange(len(rewards)) == len(rewards) - 1
            flags = dict(terminations=last & terminated, truncations=last & (not terminated))
            rewards = np.array(rewards, float)
            columns = dict(observations=obs, actions=actions, rewards=rewards, infos=infos)
            buffers.append(EpisodeBuffer(id=i, **columns, **flags))
        minari.create_dataset_from_buffers(name, buffers, env=env, data_format="hdf5", **kwargs)
        return f"minari:{name}"

    return make


def state_rows(e, n, obs_dim):
    return np.repeat(100.0 * e + np.arange(n + 1)[:, None], obs_dim, 1)


def test_minari_names_its_environment_and_knows_next_states(minari_dataset):
    env = gym.make("Hopper-v5", exclude_current_positions_from_observation=False)
    actions = np.zeros((3, 3), np.float32)
    episodes = [(state_rows(1, 3, 12), actions, [1, 1, 1], True, None)]
    episodes.append((state_rows(2, 2, 12), actions[:2], [1, 1], False, None))
    source = minari_dataset("mujoco/hopper/tiny-v0", env, episodes)
    columns, about, _ = prepared(source)
    assert states(columns) == [100, 101, 102, 200, 201, 202]
    assert columns["terminals"].tolist() == [0, 0, 1, 0, 0, 0]
    assert columns["ends"].tolist() == [0, 0, 1, 0, 0, 1]
    assert columns["returns"].tolist() == [3, 3, 3, 2, 2, 2]
    assert_next_states_are_right(columns)
    assert about["env_id"] == "Hopper-v5" and about["max_episode_steps"] == 1000
    kwargs = json.loads(about["env_kwargs"])
    assert kwargs == dict(exclude_current_positions_from_observation=False)
    assert (about["return_0"], about["return_100"]) == (-20.272305, 3234.3)
    assert about["source"] == source and about["command"] == f"prepare.py {source} --out out.hdf5"


def test_minaris_references_and_limit_are_taken(minari_dataset):
    env = gym.make("Hopper-v5", max_episode_steps=7)
    episodes = [(state_rows(1, 2, 11), np.zeros((2, 3), np.float32), [1, 2], True, None)]
    references = dict(ref_min_score=1.0, ref_max_score=5.0)
    source = minari_dataset("mujoco/hopper/scored-v0", env, episodes, **references)
    _, about, _ = prepared(source)
    assert (about["return_0"], about["return_100"], about["max_episode_steps"]) == (1, 5, 7)
    assert about["mean_normalized_return"] == 50


def test_a_dict_of_observations_is_flattened_as_in_the_environment(minari_dataset):
    env = gym.make("gymnasium_robotics:FetchReachDense-v4")
    obs, _ = env.reset(seed=0)
    seen, actions, rewards = [obs], [], []
    env.action_space.seed(0)
    for _ in range(3):
        actions.append(env.action_space.sample())
        obs, reward, _, _, _ = env.step(actions[-1])
        seen.append(obs)
        rewards.append(reward)
    stacked = {key: np.stack([o[key] for o in seen]) for key in obs}
    episode = (stacked, np.array(actions), rewards, False, None)
    source = minari_dataset("fetch/reach/tiny-v0", env, [episode])
    columns, about, _ = prepared(source)
    flat = [gym.spaces.flatten(env.observation_space, o) for o in seen]
    np.testing.assert_array_equal(columns["observations"], np.float32(flat))
    assert about["env_id"] == "gymnasium_robotics:FetchReachDense-v4"
    np.testing.assert_allclose(columns["actions"][:3], actions, atol=1e-5)
    sentence = refused(source, "--env-id", "Pusher-v5")
    assert "not those of Pusher-v5" in sentence or "Pusher-v5 has (23, 7)" in sentence
    sentence = refused(source, "--env-id", "FetchPush-v4")
    assert "(16, 4) numbers, gymnasium_robotics:FetchPush-v4 has (31, 4)" in sentence


@pytest.mark.parametrize("first", [[], [False]])
def test_minaris_binary_rewards_are_the_success_in_its_infos(minari_dataset, first):
    """Whether infos has an entry for the first state or not."""
    success = dict(success=np.array([*first, False, False, True]))
    actions = np.zeros((3, 28), np.float32)
    spaces = dict(observation_space=gym.spaces.Box(-np.inf, np.inf, (39,), np.float64))
    spaces["action_space"] = gym.spaces.Box(-1, 1, (28,), np.float32)
    episodes = [(state_rows(1, 3, 39), actions, [7, 8, 9], False, success)]
    source = minari_dataset("adroit/door/tiny-v0", None, episodes, **spaces)
    assert "--env-id ID or --task NAME" in refused(source)
    columns, _, _ = prepared(source, *DOOR)
    assert columns["rewards"].tolist() == [0, 0, 1]
    episodes = [(state_rows(1, 3, 39), actions, [7, 8, 9], False, None)]
    source = minari_dataset("adroit/door/bare-v0", None, episodes, **spaces)
    assert "no success in its infos" in refused(source, *DOOR)


def test_minaris_kitchen_rewards_become_a_running_count(minari_dataset):
    space = gym.spaces.Box(-np.inf, np.inf, (59,), np.float64)
    spaces = dict(observation_space=gym.spaces.Dict(observation=space))
    spaces["action_space"] = gym.spaces.Box(-1, 1, (9,), np.float32)
    obs = dict(observation=state_rows(1, 4, 59))
    episodes = [(obs, np.zeros((4, 9), np.float32), [0, 1, 0, 1], False, None)]
    subtasks = dict(tasks_to_complete=["microwave", "kettle"])
    kitchen = gym.make("gymnasium_robotics:FrankaKitchen-v1", **subtasks)
    references = dict(ref_min_score=0.5, ref_max_score=3.5)
    source = minari_dataset("kitchen/tiny-v0", kitchen, episodes, **spaces, **references)
    _, about, _ = prepared(source)
    assert (about["goals"], about["reward_bias"], about["mean_normalized_return"]) == (2, -2, 100)
    assert (about["return_0"], about["return_100"], about["max_episode_steps"]) == (0, 2, 280)
    columns, _, _ = prepared(source, "--task", "kitchen-mixed-v0")
    assert columns["rewards"].tolist() == [0, 1, 1, 2, 0] and columns["returns"][0] == 2
    assert columns["observations"].shape == (5, 30)


def test_minari_that_cannot_load_is_one_sentence(monkeypatch):
    import minari

    problem = ImportError("huggingface_hub\nis not installed")
    monkeypatch.setattr(minari, "load_dataset", mock.Mock(side_effect=problem))
    assert "pip install 'minari[hf]'" in refused("minari:mujoco/hopper/medium-v0")


# ---- robomimic
def robomimic_file(folder, demos):
    with h5py.File(folder / "low_dim.hdf5", "w") as file:
        for name, columns in demos.items():
            for key, column in columns.items():
                file[f"data/{name}/{key}"] = column
    return folder / "low_dim.hdf5"


def demo(e, dones, **more):
    n = len(dones)
    obs = 100.0 * e + np.arange(n)[:, None]
    columns = {"obs/pos": obs.repeat(8, 1), "obs/vel": -obs.repeat(3, 1), "obs/image": obs}
    columns |= dict(actions=np.zeros((n, 3)), rewards=np.ones(n), dones=np.array(dones))
    return columns | more


def test_robomimics_groups_are_episodes(tmp_path):
    more = {"next_obs/pos": np.full((2, 8), 202.0), "next_obs/vel": np.full((2, 3), -202.0)}
    more["next_obs/pos"][0], more["next_obs/vel"][0] = 201, -201
    demos = dict(demo_10=demo(3, [0, 0, 1]), demo_9=demo(2, [0, 0], **more), demo_0=demo(1, [0, 0]))
    source = robomimic_file(tmp_path, demos)
    columns, _, _ = prepared(source, *HOPPER, "--obs-keys", "pos", "vel")
    assert states(columns) == [100, 101, 200, 201, 202, 300, 301, 302]
    assert columns["observations"][3].tolist() == [201] * 8 + [-201] * 3
    assert columns["ends"].tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
    assert np.flatnonzero(columns["terminals"]).tolist() == [7]
    assert_next_states_are_right(columns)
    sentence = "choose --obs-keys among image pos vel"
    assert sentence in refused(source, *HOPPER)
    assert sentence in refused(source, *HOPPER, "--obs-keys", "pos", "speed")


# ---- a run's replay
def run_folder(folder, name, columns, extra=0):
    """A run's last.pt with the replay rows s, a, r, s', terminal."""
    parts = [np.asarray(column, np.float32).reshape(len(columns[0]), -1) for column in columns]
    parts += [np.zeros((len(parts[0]), 1), np.float32)] * extra
    task = {key: value for key, value in prepare.asdict(prepare.KNOWN[name]).items()}
    task["mean_normalized_return"] = 11.6
    replay = dict(rows=torch.tensor(np.concatenate(parts, 1)))
    replay["sizes"] = tuple(part.shape[1] for part in parts)
    folder.mkdir()
    torch.save(dict(replay=replay, task=task), folder / "last.pt")
    return folder


@pytest.mark.parametrize("extra", [0, 1])
def test_a_runs_replay_is_a_source(tmp_path, extra):
    s = np.array([100, 101, 102, 200, 201])[:, None].repeat(11, 1)
    actions = np.linspace(-0.9, 0.9, 5)[:, None].repeat(3, 1)
    terminal = [0, 0, 1, 0, 0]
    columns = s, actions, [0.5, 1.5, 2.5, 3.5, 4.5], s + 1, terminal
    folder = run_folder(tmp_path / "my_run", "hopper-medium-v2", columns, extra)
    found, about, _ = prepared(folder)
    assert states(found) == [100, 101, 102, 200, 201, 202]
    assert found["terminals"].tolist() == [0, 0, 1, 0, 0, 0]
    assert found["rewards"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 0]
    assert found["returns"].tolist() == [4.5] * 3 + [8] * 3
    np.testing.assert_array_equal(found["actions"][:5], actions.astype(np.float32))
    assert about["env_id"] == "Hopper-v5" and about["source"] == "my_run"
    assert about["mean_normalized_return"] == pytest.approx(100 * (6.25 + 20.272305) / 3254.572305)
    assert about["command"] == "prepare.py my_run --out out.hdf5"
    again, _, _ = prepared(folder / "last.pt")
    np.testing.assert_array_equal(again["observations"], found["observations"])


def test_a_runs_goal_rewards_become_raw(tmp_path):
    s = np.array([100, 101, 200, 201])[:, None].repeat(39, 1)
    columns = s, np.zeros((4, 28)), [-5, 5, -5, -5], s + 1, [0, 1, 0, 0]
    found, about, _ = prepared(run_folder(tmp_path / "r", "door-binary-v0", columns))
    assert found["rewards"].tolist() == [0, 1] and found["terminals"].tolist() == [0, 1]
    assert about["mean_normalized_return"] == 50 and about["reward_scale"] == 10


def test_a_runs_actions_are_not_rescaled_twice(tmp_path):
    s = np.arange(100, 103)[:, None].repeat(23, 1)
    task = prepare.describe("Pusher-v5", {}, 100)
    with mock.patch.dict(prepare.KNOWN, pusher=task):
        columns = s, np.full((3, 7), 0.5), [1, 1, 1], s + 1, [0, 0, 1]
        folder = run_folder(tmp_path / "r", "pusher", columns)
    found, _, _ = prepared(folder)
    assert (found["actions"] == 0.5).all()


def test_a_run_that_has_collected_nothing_is_refused(tmp_path):
    columns = [np.zeros((1, size)) for size in (11, 3, 1, 11, 1)]
    folder = run_folder(tmp_path / "run", "hopper-medium-replay-v2", columns)
    saved = torch.load(folder / "last.pt")
    saved["replay"]["rows"] = saved["replay"]["rows"][:0]
    torch.save(saved, folder / "last.pt")
    assert "has collected nothing" in refused(folder)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text("{}")
    assert "holds no replay" in refused(tmp_path / "new")


def test_a_checkpoint_without_a_replay_is_refused(tmp_path):
    torch.save(dict(agent={}), tmp_path / "offline.pt")
    assert "holds no replay" in refused(tmp_path / "offline.pt")
    (tmp_path / "last.pt").write_bytes(b"half")
    assert "holds no replay" in refused(tmp_path)


# ---- refusals
@pytest.mark.parametrize(
    "change, problem",
    [
        (dict(rewards=None), "but no rewards"),
        (dict(terminals=None), "but no terminals"),
        (dict(actions=None), "but no actions"),
        (
            dict(rewards=np.ones(4)),
            "rewards are float64 of shape (4,) beside observations of (5, 11)",
        ),
        (dict(terminals=np.zeros((5, 2))), "terminals are float64 of shape (10,)"),
        (dict(timeouts=np.zeros(3)), "timeouts are float64 of shape (3,)"),
        (dict(next_observations=np.zeros((5, 7))), "next_observations are float64 of shape (5, 7)"),
        (dict(observations=np.zeros(5)), "observations are float64 of shape (5,)"),
        (dict(actions=np.zeros((5, 3, 1))), "actions at row 0"),
        (dict(actions=np.full((5, 3), b"a")), "actions are |S1"),
        (dict(observations=np.zeros((5, 12))), "(12, 3) numbers, Hopper-v5 has (11, 3)"),
        (dict(actions=np.zeros((5, 4))), "(11, 4) numbers, Hopper-v5 has (11, 3)"),
        (dict(rewards=[1, 1, 1, np.nan, 1]), "rewards have NaN or infinity, first in row 3"),
        (dict(actions=np.where(np.eye(5, 3, -1), np.inf, 0)), "actions have NaN or infinity"),
        (dict(terminals=[0, 0, 0.5, 0, 1]), "terminals have values besides 0 and 1"),
        (dict(timeouts=[0, 0, np.nan, 0, 1]), "timeouts have values besides 0 and 1"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(tmp_path, change, problem):
    columns = rows((3, "terminal"), (2, "timeout")) | change
    columns = {name: column for name, column in columns.items() if column is not None}
    out = tmp_path / "a.hdf5"
    assert problem in refused(hdf5(tmp_path, columns), *HOPPER, "--out", out)
    assert not out.exists()


def test_nan_is_found_in_every_part_of_observations(tmp_path):
    columns = rows((3, "terminal"), (2, "timeout"), stored="true")
    columns["observations"][4, 3] = np.nan
    assert "observations have NaN or infinity, first in row 4" in refused(
        hdf5(tmp_path, columns), *HOPPER
    )
    columns = rows((3, "terminal"), (2, "timeout"), stored="true")
    columns["next_observations"][4, 3] = np.inf
    assert "NaN or infinity" in refused(hdf5(tmp_path, columns), *HOPPER)


def test_files_that_are_not_whole_or_empty_are_refused(tmp_path):
    source = hdf5(tmp_path, rows((300, "terminal")))
    source.write_bytes(source.read_bytes()[:-2000])
    assert "no whole HDF5" in refused(source, *HOPPER)
    source.write_bytes(b"not HDF5")
    assert "no whole HDF5" in refused(source, *HOPPER)
    (tmp_path / "a.npz").write_bytes(b"PK half")
    assert "no whole HDF5" in refused(tmp_path / "a.npz", *HOPPER)
    empty = {name: column[:0] for name, column in rows((3, "terminal")).items()}
    assert "no transition" in refused(hdf5(tmp_path, empty), *HOPPER)
    columns = rows((1, "timeout"), (1, "timeout"))
    assert "no transition" in refused(hdf5(tmp_path, columns), *HOPPER)


def test_sources_without_an_environment_and_prepared_ones_are_refused(tmp_path):
    source = hdf5(tmp_path, rows((3, "terminal")))
    assert "--env-id ID or --task NAME" in refused(source)
    run(source, *HOPPER, "--out", tmp_path / "a.hdf5")
    assert "is prepared" in refused(tmp_path / "a.hdf5", *HOPPER, "--out", tmp_path / "b.hdf5")


def test_the_source_is_never_overwritten(tmp_path, monkeypatch):
    source = hdf5(tmp_path, rows((3, "terminal")))
    before = source.read_bytes()
    assert "source itself" in refused(source, *HOPPER, "--out", source)
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    assert "source itself" in refused(source, *HOPPER)
    assert source.read_bytes() == before


def test_where_a_file_goes(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    source = hdf5(tmp_path / "in", rows((3, "terminal")))
    monkeypatch.setattr(prepare, "FOLDER", tmp_path / "data")
    assert run(source, *HOPPER).endswith("--dataset mine --preset small\n")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["mine.hdf5"]
    assert prepare.default_name(prepare.Args("minari:a/b/c-v0"), Path("x")) == "a-b-c-v0"
    folder = prepare.Args(str(tmp_path / "in"))
    assert prepare.default_name(folder, tmp_path / "in") == "in"
    assert prepare.default_name(folder, tmp_path / "in" / "last.pt") == "in"
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "a.hdf5"
    assert "cannot be written" in refused(source, *HOPPER, "--out", out)


def test_the_embedded_dataset_is_what_its_page_says():
    page = (ROOT / "data" / "README.md").read_text()
    with h5py.File(ROOT / "data" / "hopper-embedded.hdf5") as file:
        columns, about = {name: file[name][:] for name in file}, dict(file.attrs)
    numbers = re.findall(r"(\d[\d,]*) (?:rows|episodes|terminals)", page)[:3]
    found = len(columns["ends"]), columns["ends"].sum(), columns["terminals"].sum()
    assert [f"{n:,}" for n in found] == numbers
    assert round(about["mean_normalized_return"], 1) == 11.6
    assert f"python data/{about['command']}" in " ".join(page.split())
    best = 100 * (columns["returns"].max() - about["return_0"])
    assert best / (about["return_100"] - about["return_0"]) > 85  # there is something to gain
