"""Environments pay what datasets hold, and a saved one goes on exactly where it stood."""

import sys
from dataclasses import asdict

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import HOPPER, ROOT

import smac_offline_to_online as smac

sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402

# gymnasium about Gymnasium-Robotics
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:.*share an object")


class Arm(gym.Env):
    """Dict observations and actions in [-2, 4]; it pays the sum of the action."""

    def __init__(self):
        self.action_space = gym.spaces.Box(-2, 4, (2,), np.float32)
        box = gym.spaces.Box(-9, 9, (2,), np.float64)
        self.observation_space = gym.spaces.Dict(far=box, close=gym.spaces.Box(-9, 9, (1,)))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.see(), {}

    def step(self, action):
        return self.see(), float(action.sum()), False, False, {}

    def see(self):
        return dict(far=np.array([2.0, 3.0]), close=np.array([1.0], np.float32))


gym.register("SmacTestArm-v0", Arm)


def task_of(task) -> smac.Task:
    return smac.Task(**asdict(task), mean_normalized_return=0.0)


def other_task(env_id, steps=5):
    return task_of(prepare.environment_task(env_id, {}, steps))


DOOR, KITCHEN, RELOCATE = (
    task_of(prepare.KNOWN[name])
    for name in ("door-binary-v0", "kitchen-mixed-v0", "relocate-binary-v0")
)
LOCOMOTION = smac.Task(**{k: v for k, v in HOPPER.items() if k != "format"} | dict(env_kwargs={}))


def actions(env, n, seed=0):
    sizes = (n, *env.action_space.shape)
    return np.random.default_rng(seed).uniform(-1, 1, sizes).astype(np.float32)


def answered(task, monkeypatch, *answers):
    """(reward, terminated, normalized return) of steps to which the inner environment answers with
    `answers`: (reward, terminated, info)."""
    env, left = smac.TaskEnv(task), iter(answers)
    inner = env.env.reset(seed=0)[0]
    env.reset(0)

    def step(action):
        reward, terminated, info = next(left)
        return inner, reward, terminated, False, info

    monkeypatch.setattr(env.env, "step", step)
    found = []
    for _ in answers:
        _, reward, terminated, _, _ = env.step(np.zeros(env.action_space.shape, np.float32))
        found.append((reward, terminated, env.normalized_return()))
    return found


def test_locomotion_is_the_plain_environment_with_raw_rewards():
    ours, raw = smac.TaskEnv(LOCOMOTION), gym.make("Hopper-v5")
    first, expected = ours.reset(3)[0], raw.reset(seed=3)[0]
    np.testing.assert_array_equal(first, expected.astype(np.float32))
    total = 0.0
    for action in actions(raw, 10):
        obs, reward, terminated, truncated, _ = raw.step(action)
        step = ours.step(action)
        np.testing.assert_array_equal(step[0], obs.astype(np.float32))
        assert step[1:4] == (reward, terminated, truncated) and step[0].dtype == np.float32
        total += reward
    score = 100 * (total + 20.272305) / (3234.3 + 20.272305)
    assert ours.normalized_return() == pytest.approx(score)
    assert LOCOMOTION.train_reward(7.0) == 7.0


def test_adroit_pays_success_and_ends_with_it(monkeypatch):
    fail, success = (7.0, False, dict(success=False)), (7.0, False, dict(success=True))
    assert answered(DOOR, monkeypatch, fail, success) == [(0.0, False, 0.0), (1.0, True, 100.0)]
    assert [DOOR.train_reward(r) for r in (0.0, 1.0)] == [-5.0, 5.0]  # WSRL's


def test_kitchen_pays_a_running_count_and_ends_at_four(monkeypatch):
    done = KITCHEN.env_kwargs["tasks_to_complete"]
    infos = [dict(episode_task_completions=done[:n]) for n in (0, 1, 1, 3, 4)]
    found = answered(KITCHEN, monkeypatch, *((9.0, True, info) for info in infos))
    assert found == [(n, n == 4, 25.0 * n) for n in (0, 1, 1, 3, 4)]
    assert [KITCHEN.train_reward(n) for n in (0, 4)] == [-4, 0]


def test_kitchen_shows_the_30_positions():
    env = smac.TaskEnv(KITCHEN)
    obs = env.reset(0)[0]
    whole = env.env.reset(seed=0)[0]["observation"]
    expected = np.r_[whole[:9], whole[18:39]].astype(np.float32)
    np.testing.assert_array_equal(obs, expected)
    assert obs.shape == (30,) and obs.dtype == np.float32
    assert env.step(np.zeros(9, np.float32))[1:4] == (0.0, False, False)  # the real one


def test_an_episode_is_cut_at_the_limit_of_the_task():
    env = smac.TaskEnv(DOOR._replace(max_episode_steps=3))
    env.reset(0)
    steps = [env.step(a)[1:4] for a in actions(env, 3)]
    assert steps == [(0, False, False), (0, False, False), (0, False, True)]  # nothing opens


def test_actions_are_rescaled_to_the_bounds_of_the_environment():
    pusher, raw = smac.TaskEnv(other_task("Pusher-v5")), gym.make("Pusher-v5")
    assert (pusher.action_space.low == -1).all() and (pusher.action_space.high == 1).all()
    pusher.reset(0), raw.reset(seed=0)
    assert (raw.action_space.high == 2).all()
    for action in actions(raw, 3):
        obs, reward, *_ = raw.step(2 * action)
        step = pusher.step(action)
        np.testing.assert_allclose(step[0], obs, rtol=1e-5, atol=1e-6)
        assert step[1] == pytest.approx(reward)
    assert pusher.normalized_return() == pytest.approx(sum(pusher.rewards))  # no references


def test_a_dict_of_observations_is_flattened():
    env = smac.TaskEnv(other_task("SmacTestArm-v0"))
    assert env.reset(0)[0].tolist() == [2, 3, 1] and env.obs.dtype == np.float32
    rewards = [env.step(np.full(2, x, np.float32))[1] for x in (-1, 0, 1)]
    assert rewards == pytest.approx([-4, 2, 8])


@pytest.mark.parametrize("task", [LOCOMOTION, RELOCATE, KITCHEN], ids=lambda task: task.family)
def test_a_loaded_environment_stands_exactly_where_the_saved_one_stood(task):
    env, other = smac.TaskEnv(task), smac.TaskEnv(task)
    sequence = actions(env, 10)
    env.reset(8)  # an episode before, and one in the other: neither may leave a trace
    other.reset(9)
    for action in sequence[:4]:
        env.step(action), other.step(-action)
    env.reset(5)
    for action in sequence[:5]:
        env.step(action)
    other.load_state_dict(env.state_dict())
    assert (other.obs == env.obs).all() and other.rewards == env.rewards
    for action in sequence[5:]:
        ours, theirs = env.step(action), other.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:4] == theirs[1:4]
    np.testing.assert_array_equal(env.reset(6)[0], other.reset(6)[0])


def test_episode_seeds_differ_between_seeds_streams_and_episodes():
    seeds = set()
    for seed in range(3):
        for stream in (smac.TRAINING, smac.EVALUATION, smac.FINAL):
            seeds |= {smac.episode_seed(seed, stream, episode) for episode in range(3)}
    assert len(seeds) == 27


class Leans(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 33).reshape(11, 3))

    def mode(self, s):
        return torch.tanh(s @ self.weight)


def test_a_rollout_equals_a_plain_loop_and_draws_no_random_numbers():
    policy, seeds, raw = Leans(), [4, 5, 6], gym.make("Hopper-v5")
    envs, random = [smac.TaskEnv(LOCOMOTION) for _ in seeds], torch.get_rng_state()
    smac.rollout(policy, envs, seeds)
    assert torch.equal(torch.get_rng_state(), random)
    for env, seed in zip(envs, seeds):
        obs, done, rewards = raw.reset(seed=seed)[0], False, []
        while not done:
            action = policy.mode(torch.as_tensor(obs, dtype=torch.float32)[None])[0]
            obs, reward, terminated, truncated, _ = raw.step(action.detach().numpy())
            rewards.append(reward)
            done = terminated or truncated
        assert len(env.rewards) == len(rewards)
        np.testing.assert_allclose(env.rewards, rewards, rtol=1e-3)
