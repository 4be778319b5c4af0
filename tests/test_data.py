"""Which rows training sees, and which w and scores episodes get."""

import dataclasses
import re
import sys
import tracemalloc

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ROOT, hopper_file, write_hdf5

import smac_offline_to_online as smac

HOPPER, DOOR, KITCHEN = (smac.TASKS[k] for k in ("hopper-embedded", "door-binary-v0", "kitchen-mixed-v0"))


def episodes(*ends, next_observations=None, timeouts=True, rewards=None):
    """Rows of episodes (length, "terminal" | "timeout" | "open"). The state at step t of episode e is 100 e + t, so a
    right next state is always one larger. next_observations: "true", or "shifted", the following row's."""
    state = np.concatenate([100 * e + np.arange(n) for e, (n, _) in enumerate(ends, 1)]).astype(np.float32)
    last = np.cumsum([n for n, _ in ends]) - 1
    kinds = np.full(len(state), "inside", object)
    kinds[last] = [kind for _, kind in ends]
    terminals, cuts = kinds == "terminal", kinds == "timeout"
    raw = dict(observations=np.stack([state, -state], 1), actions=np.linspace(-1, 1, len(state))[:, None])
    raw |= dict(rewards=np.ones(len(state)) if rewards is None else np.array(rewards), terminals=terminals)
    if timeouts:
        raw["timeouts"] = cuts
    if next_observations == "true":
        raw["next_observations"] = raw["observations"] + [[1, -1]]
    if next_observations == "shifted":
        raw["next_observations"] = np.r_[raw["observations"][1:], raw["observations"][-1:] + [[1, -1]]]
    return raw


def states(data):
    return data["observations"][:, 0].tolist()


def assert_next_states_are_right(data):
    """Of rows that bootstrap: the following state. Of terminals: at least not another episode's."""
    step = data["next_observations"][:, 0] - data["observations"][:, 0]
    assert (step[data["terminals"] == 0] == 1).all()
    assert (data["next_observations"][:, 0] // 100 == data["observations"][:, 0] // 100).all()


# ---- ends of episodes
@pytest.mark.parametrize("next_observations", [None, "true", "shifted"])
def test_a_terminal_row_stays_without_another_episodes_state(next_observations):
    raw = episodes((3, "terminal"), (2, "terminal"), next_observations=next_observations)
    data = smac.to_transitions(raw, HOPPER)
    assert states(data) == [100, 101, 102, 200, 201]
    assert data["terminals"].tolist() == [0, 0, 1, 0, 1]
    assert_next_states_are_right(data)


@pytest.mark.parametrize("next_observations, kept", [(None, False), ("true", True), ("shifted", False)])
def test_a_time_out_row_stays_only_with_its_true_next_state(next_observations, kept):
    raw = episodes((3, "timeout"), (2, "terminal"), next_observations=next_observations)
    data = smac.to_transitions(raw, HOPPER)
    assert states(data) == [100, 101, *[102.0] * kept, 200, 201]
    assert data["terminals"].tolist() == [0, 0, *[0] * kept, 0, 1]  # a time-out is no terminal
    assert_next_states_are_right(data)


@pytest.mark.parametrize("next_observations, kept", [(None, False), ("true", True)])
def test_an_open_tail_ends_with_the_file(next_observations, kept):
    data = smac.to_transitions(episodes((2, "terminal"), (3, "open"), next_observations=next_observations), HOPPER)
    assert states(data) == [100, 101, 200, 201, *[202.0] * kept]
    assert_next_states_are_right(data)
    assert data["returns"].tolist() == [2, 3]


def test_without_timeouts_steps_count_against_the_limit():
    task = dataclasses.replace(HOPPER, max_steps=4)
    data = smac.to_transitions(episodes((4, "open"), (2, "terminal"), (4, "open"), (3, "open"), timeouts=False), task)
    assert states(data) == [100, 101, 102, 200, 201, 300, 301, 302, 400, 401]
    assert data["returns"].tolist() == [4, 2, 4, 3]
    assert_next_states_are_right(data)


def test_with_timeouts_the_limit_is_not_counted():
    data = smac.to_transitions(episodes((6, "timeout"), (2, "terminal")), dataclasses.replace(HOPPER, max_steps=4))
    assert data["returns"].tolist() == [6, 2]


def test_a_jump_in_the_stored_next_states_ends_an_episode():
    raw = episodes((3, "open"), (2, "terminal"), next_observations="true", rewards=[1, 1, 1, 5, 5])
    data = smac.to_transitions(raw, HOPPER)
    assert states(data) == [100, 101, 102, 200, 201]
    assert data["returns"].tolist() == [3, 10] and data["w"].tolist() == [0, 0, 0, 1, 1]
    assert data["terminated"].tolist() == [False, True]
    assert_next_states_are_right(data)


# ---- w
def test_w_is_the_min_max_of_whole_raw_returns():
    """The rewards of dropped rows count: with them the first episode is the best one, without them the worst."""
    ends = (3, "timeout"), (2, "terminal"), (1, "terminal")
    data = smac.to_transitions(episodes(*ends, rewards=[0, 0, 20, 5, 5, 4]), HOPPER)
    assert data["returns"].tolist() == [20, 10, 4]
    np.testing.assert_allclose(data["w"], [1, 1, 6 / 16, 6 / 16, 0])


def test_equal_returns_give_w_one_everywhere():
    assert smac.to_transitions(episodes((2, "terminal"), (2, "terminal")), HOPPER)["w"].tolist() == [1] * 4


def test_scores_are_d4rls():
    data = smac.to_transitions(episodes((1, "terminal"), (1, "terminal"), rewards=[-20.272305, 3234.3]), HOPPER)
    np.testing.assert_allclose(data["scores"], [0, 100], atol=1e-4)


def test_actions_are_clipped_inside_the_bounds_and_all_is_single_precision():
    data = smac.to_transitions(episodes((3, "terminal")), HOPPER)
    np.testing.assert_allclose(data["actions"][:, 0], [-1 + 1e-5, 0, 1 - 1e-5], atol=1e-7)
    assert np.isfinite(np.arctanh(data["actions"])).all()
    columns = ("observations", "actions", "rewards", "next_observations", "terminals", "w")
    assert all(data[k].dtype == np.float32 for k in columns)


# ---- binary Adroit
def test_adroit_keeps_successful_episodes_up_to_the_last_success():
    rewards = [[-1, -1, -1], [-1, -1, 0, -1, 0, -1], [-1, 0]]
    raw = episodes((3, "timeout"), (6, "timeout"), (2, "timeout"), rewards=np.concatenate(rewards))
    data = smac.to_transitions(raw, DOOR)
    assert states(data) == [200, 201, 202, 203, 204, 300, 301]
    assert data["terminals"].tolist() == [0, 0, 1, 0, 1, 0, 1]  # every successful step ends the return
    assert data["w"].tolist() == [0] * 5 + [1] * 2  # the return of the cut episode: a faster success is better
    assert data["returns"].tolist() == [-3, -1]
    assert_next_states_are_right(data)


def test_adroit_scores_count_the_failed_episodes():
    raw = episodes((2, "timeout"), (2, "timeout"), rewards=[-1, -1, -1, 0])
    assert smac.to_transitions(raw, DOOR)["scores"].tolist() == [0, 100]


@pytest.mark.parametrize("rewards", [[-1, 0, 0.5], [0, 1], [-1, -1]])
def test_adroit_refuses_other_rewards_and_data_without_success(rewards):
    with pytest.raises(smac.BadInput, match="success"):
        smac.to_transitions(episodes((len(rewards), "timeout"), rewards=rewards), DOOR)


# ---- kitchen
def test_kitchen_ends_at_four_subtasks_only_and_counts_the_solved_ones():
    raw = episodes((3, "timeout"), (4, "timeout"), (2, "timeout"), rewards=[0, 1, 1, 1, 2, 3, 4, 2, 1])
    data = smac.to_transitions(raw, KITCHEN)
    assert states(data) == [100, 101, 200, 201, 202, 203, 300]
    assert data["terminals"].tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert data["returns"].tolist() == [1, 4, 2] and data["scores"].tolist() == [25, 100, 50]
    np.testing.assert_allclose(data["w"], [0, 0, 1, 1, 1, 1, 1 / 3])
    assert_next_states_are_right(data)


def test_a_kitchen_terminal_of_the_file_is_no_terminal_below_four():
    data = smac.to_transitions(episodes((2, "terminal"), (2, "terminal"), rewards=[0, 1, 3, 4]), KITCHEN)
    assert data["terminals"].tolist() == [0, 0, 1] and states(data) == [100, 200, 201]


def test_kitchen_rows_after_the_fourth_subtask_are_no_episodes_of_their_own():
    raw = episodes((5, "timeout"), (2, "timeout"), rewards=[0, 4, 4, 4, 4, 0, 1])
    data = smac.to_transitions(raw, KITCHEN)
    assert data["scores"].tolist() == [100, 25] and data["returns"].tolist() == [4, 1]


# ---- observations
def test_kitchen_observations_are_positions_from_both_layouts():
    joints, velocities, objects = np.arange(9.0), np.full(9, -1.0), np.arange(100, 121.0)
    goal, object_velocities = np.full(30, -2.0), np.full(20, -3.0)
    ours = np.r_[joints, objects]
    np.testing.assert_array_equal(smac.observation(KITCHEN, np.r_[joints, objects, goal][None])[0], ours)
    gymnasium = np.r_[joints, velocities, objects, object_velocities]
    np.testing.assert_array_equal(smac.observation(KITCHEN, dict(observation=gymnasium)), ours)
    assert smac.observation(KITCHEN, gymnasium[None]).shape == (1, 30)


def test_ant_observations_lose_the_contact_forces():
    obs = np.arange(2 * 111.0).reshape(2, 111)
    np.testing.assert_array_equal(smac.observation(smac.TASKS["ant-medium-v2"], obs), obs[:, :27])
    np.testing.assert_array_equal(smac.observation(HOPPER, obs), obs)


# ---- files
def test_a_written_file_reads_back(tmp_path):
    path = hopper_file(tmp_path / "a.hdf5", episodes=3)
    raw = smac.read_dataset(HOPPER, str(path))
    assert raw.keys() == {"observations", "actions", "rewards", "terminals", "timeouts"}
    smac.check_dataset(raw, 11, 3, "a")
    assert len(smac.to_transitions(raw, HOPPER)["rewards"]) == len(raw["rewards"])  # Hopper falls: all are terminals


def test_the_embedded_dataset_is_what_its_page_says():
    raw, page = smac.read_dataset(HOPPER, None), (ROOT / "data" / "README.md").read_text()
    smac.check_dataset(raw, 11, 3, "embedded")
    data = smac.to_transitions(raw, HOPPER)
    numbers = re.findall(r"(\d[\d,]*) (?:rows|episodes|terminals)", page)[:3]
    found = len(raw["rewards"]), len(data["returns"]), int(data["terminals"].sum())
    assert [f"{n:,}" for n in found] == numbers
    assert data["scores"].max() > 5 * data["scores"].mean()  # mixed: there is something to gain


def adroit_files(folder, first, second):
    folder.mkdir(parents=True)
    for name, found in (("door2_sparse.npy", first), ("door_bc_sparse4.npy", second)):
        array = np.empty(len(found), object)
        array[:] = found
        np.save(folder / name, array, allow_pickle=True)


def adroit_episode(rewards, as_dicts=False, extra=0):
    n = len(rewards)
    obs = np.arange(39.0) + 100 * np.arange(n)[:, None]
    listed = [dict(state_observation=o) for o in obs] if as_dicts else obs
    return dict(observations=listed, actions=np.zeros((n, 28)), rewards=np.reshape(rewards + [0] * extra, (-1, 1)))


def test_adroit_files_with_dict_observations_and_one_reward_too_many(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    demonstrations = [adroit_episode([-1, -1, 0], as_dicts=True, extra=1), adroit_episode([-1, 0], as_dicts=True)]
    adroit_files(tmp_path / "offpolicy_hand_data", demonstrations, [adroit_episode([-1, -1])])
    raw = smac.read_dataset(DOOR, None)
    smac.check_dataset(raw, 39, 28, "door")
    assert raw["rewards"].tolist() == [-1, -1, 0, -1, 0, -1, -1]
    assert raw["observations"][:, 0].tolist() == [0, 100, 200, 0, 100, 0, 100]
    data = smac.to_transitions(raw, DOOR)
    assert data["rewards"].tolist() == [-1, -1, 0, -1, 0] and data["scores"].tolist() == [100, 100, 0]


def test_missing_adroit_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    with pytest.raises(smac.BadInput, match="door2_sparse.npy"):
        smac.read_dataset(DOOR, None)


def minari_dataset(folder, monkeypatch, name, found, obs_dim, act_dim, as_dicts=False):
    """A local Minari dataset of episodes (rewards, terminated, successes); states as in `episodes`."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float64)
    buffers = []
    for e, (rewards, terminated, successes) in enumerate(found, 1):
        n = len(rewards)
        obs = np.repeat(100.0 * e + np.arange(n + 1)[:, None], obs_dim, 1)
        buffer = dict(observations=dict(observation=obs) if as_dicts else obs)
        buffer |= dict(actions=np.zeros((n, act_dim), np.float32), rewards=np.array(rewards, float))
        buffer |= dict(terminations=np.arange(n) == n - 1 if terminated else np.zeros(n, bool))
        buffer |= dict(truncations=~buffer["terminations"] & (np.arange(n) == n - 1))
        infos = None if successes is None else dict(success=np.array(successes))
        buffers.append(EpisodeBuffer(id=e - 1, infos=infos, **buffer))
    minari.create_dataset_from_buffers(
        name,
        buffers,
        observation_space=gym.spaces.Dict(observation=space) if as_dicts else space,
        action_space=gym.spaces.Box(-1, 1, (act_dim,), np.float32),
        data_format="hdf5",
    )
    return f"minari:{name}"


def test_minari_gives_true_next_states(tmp_path, monkeypatch):
    found = [([1, 1, 1], True, None), ([1, 1], False, None)]
    raw = smac.read_dataset(HOPPER, minari_dataset(tmp_path, monkeypatch, "mujoco/hopper/tiny-v0", found, 11, 3))
    smac.check_dataset(raw, 11, 3, "tiny")
    data = smac.to_transitions(raw, HOPPER)
    assert states(data) == [100, 101, 102, 200, 201] and data["terminals"].tolist() == [0, 0, 1, 0, 0]
    assert data["next_observations"][:, 0].tolist() == [101, 102, 103, 201, 202]
    assert data["returns"].tolist() == [3, 2] and data["w"].tolist() == [1, 1, 1, 0, 0]


def test_minari_adroit_rewards_are_success_minus_one(tmp_path, monkeypatch):
    """Whether infos has an entry for the first state or not."""
    found = [([7, 8, 9], False, [False, False, False, True]), ([7, 8], False, [False, True, False])]
    raw = smac.read_dataset(DOOR, minari_dataset(tmp_path, monkeypatch, "adroit/door/tiny-v0", found, 39, 28))
    assert raw["rewards"].tolist() == [-1, -1, 0, 0, -1]


def test_minari_kitchen_rewards_become_a_running_count(tmp_path, monkeypatch):
    found = [([0, 1, 0, 1], False, None), ([1, 0], False, None)]
    name = minari_dataset(tmp_path, monkeypatch, "kitchen/tiny-v0", found, 59, 9, as_dicts=True)
    raw = smac.read_dataset(KITCHEN, name)
    assert raw["rewards"].tolist() == [0, 1, 1, 2, 1, 1]
    assert smac.observation(KITCHEN, raw["observations"]).shape == (6, 30)


# ---- replay
def filled(capacity, *states):
    """A replay with a row for each of `states`, added one by one."""
    replay = smac.Replay(capacity, 1, 1, torch.device("cpu"))
    for x in states:
        replay.add(*(np.full((1, 1), value) for value in (x, 0, 0, x + 1, 0, 0)))
    return replay


def test_replay_overwrites_its_oldest_rows_and_samples_only_what_it_holds():
    assert set(filled(5, 1, 2).sample(200)[:, 0].tolist()) == {1, 2}
    replay = filled(5, 1, 2, 3, 4)
    replay.add(*(np.array(column)[:, None] for column in ([5, 6, 7], [0] * 3, [0] * 3, [6, 7, 8], [0] * 3, [0] * 3)))
    sample = replay.sample(500)
    assert set(sample[:, 0].tolist()) == {3, 4, 5, 6, 7}
    assert (sample[:, 3] == sample[:, 0] + 1).all()


def test_replay_state_dict_round_trip():
    replay, other = filled(6, 1, 2, 3, 4), filled(6)
    state = replay.state_dict()
    replay.add(*(np.full((1, 1), 9) for _ in replay.sizes))  # must not reach into the saved state
    other.load_state_dict(state)
    assert set(other.sample(300)[:, 0].tolist()) == {1, 2, 3, 4}
    other.add(*(np.full((1, 1), 9) for _ in replay.sizes))
    assert torch.equal(other.rows, replay.rows)


@pytest.mark.parametrize("task, rewards", [(HOPPER, [0.5, 1.5, 2.5, 3.5, 4.5]), (DOOR, [-1, -1, 0, -1, 0])])
def test_replay_writes_raw_rewards_that_read_back(task, rewards, tmp_path):
    replay = smac.Replay(9, 2, 1, torch.device("cpu"))
    obs = np.array([[100, 0], [101, 0], [102, 0], [200, 0], [201, 0]])
    terminal, cut = [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]
    trained = task.scale * np.array(rewards) + task.bias
    replay.add(obs, np.linspace(-0.9, 0.9, 5), trained, obs + [[1, 0]], np.array(terminal), np.array(cut))
    replay.write(tmp_path / "new" / "replay.hdf5", task, seed=3)
    raw = smac.read_dataset(task, str(tmp_path / "new" / "replay.hdf5"))
    smac.check_dataset(raw, 2, 1, "replay")
    assert raw["rewards"].tolist() == rewards
    assert raw["terminals"].tolist() == [False, False, True, False, False]
    assert raw["timeouts"].tolist() == [False, False, False, False, True]
    data = smac.to_transitions(raw, task)
    kept = [100, 101, 102, 200] + [201] * (task is DOOR)  # there the last row is a success, here a time-out
    assert states(data) == kept
    assert_next_states_are_right(data)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["replay.hdf5"]


def test_a_file_may_hold_integer_rewards_and_double_observations(tmp_path):
    raw = episodes((3, "terminal"), rewards=np.array([1, 0, 1]))
    raw = smac.read_dataset(HOPPER, str(write_hdf5(tmp_path / "a.hdf5", raw | {"extra": np.zeros(2)})))
    smac.check_dataset(raw, 2, 1, "a")
    assert smac.to_transitions(raw, HOPPER)["rewards"].tolist() == [1, 0, 1]


def test_a_large_dataset_is_not_copied_many_times():
    n = 200_000
    raw = dict(observations=np.random.default_rng(0).standard_normal((n, 11)).astype(np.float32))
    raw |= dict(actions=np.zeros((n, 3), np.float32), rewards=np.zeros(n, np.float32), terminals=np.zeros(n, bool))
    raw |= dict(next_observations=np.roll(raw["observations"], -1, 0), timeouts=np.arange(n) % 1000 == 999)
    tracemalloc.start()
    try:
        data = smac.to_transitions(raw, HOPPER)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * sum(v.nbytes for v in data.values())


def test_the_dataset_fills_its_replay_row_for_row(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["smac", "--eval-episodes", "1", "--runs-dir", str(tmp_path)])
    inputs = smac.set_up(smac.parse_flags())
    assert inputs.dataset.added == len(inputs.dataset.rows) > 100_000  # added in parts
    parts = dict(zip(smac.COLUMNS, inputs.dataset.rows.split(inputs.dataset.sizes, 1)))
    for k, part in parts.items():
        np.testing.assert_array_equal(part.squeeze(1), inputs.data[k])  # the embedded task leaves rewards as they are
