"""The environments pay what the datasets hold, and a saved one goes on exactly where it stood."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import smac_offline_to_online as smac

HOPPER, DOOR, KITCHEN = (smac.TASKS[k] for k in ("hopper-embedded", "door-binary-v0", "kitchen-mixed-v0"))


def actions(env, n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, *env.action_space.shape)).astype(np.float32)


def replace_step(env, monkeypatch, *answers):
    """The inner environment answers each step with (reward, terminated, info) from `answers`."""
    obs, left = env.reset(seed=0)[0], iter(answers)
    inner = obs if env.task is not KITCHEN else dict(observation=np.zeros(59))

    def step(action):
        reward, terminated, info = next(left)
        return inner, reward, terminated, False, info

    monkeypatch.setattr(env.env, "step", step)
    return [env.step(np.zeros(env.action_space.shape, np.float32))[1:4] for _ in answers]


def test_locomotion_pays_raw_rewards():
    ours, raw = smac.TaskEnv(HOPPER), gym.make("Hopper-v5")
    first, expected = ours.reset(seed=3)[0], raw.reset(seed=3)[0]
    np.testing.assert_array_equal(first, expected.astype(np.float32))
    for action in actions(raw, 10):
        obs, reward, terminated, truncated, _ = raw.step(action)
        step = ours.step(action)
        np.testing.assert_array_equal(step[0], obs.astype(np.float32))
        assert step[1:4] == (reward, terminated, truncated)


def test_adroit_pays_success_minus_one_and_ends_on_success(monkeypatch):
    env, fail, success = smac.TaskEnv(DOOR), (7.0, False, dict(success=False)), (7.0, False, dict(success=True))
    assert replace_step(env, monkeypatch, fail, success) == [(-1.0, False, False), (0.0, True, False)]
    rewards = smac.TaskEnv(DOOR)
    rewards.reset(seed=0)
    assert [rewards.step(a)[1] for a in actions(rewards, 3)] == [-1.0] * 3  # the real one, which does not open the door


def test_kitchen_pays_a_running_count_and_ends_at_four(monkeypatch):
    env, done = smac.TaskEnv(KITCHEN), ["microwave", "kettle", "bottom burner", "light switch"]
    answers = [(float(n == 1), n == 9, dict(episode_task_completions=done[:n])) for n in (0, 1, 1, 3, 4)]
    expected = [(0.0, False, False), (1.0, False, False), (1.0, False, False), (3.0, False, False), (4.0, True, False)]
    assert replace_step(env, monkeypatch, *answers) == expected
    assert env.obs.shape == (30,) and env.obs.dtype == np.float32


def test_an_episode_is_cut_at_the_limit_of_the_task():
    env = smac.TaskEnv(DOOR)
    env.reset(seed=0)
    ends = [env.step(a)[2:4] for a in actions(env, 200)]
    assert ends[-2:] == [(False, False), (False, True)]


@pytest.mark.parametrize("name", ["hopper-embedded", "relocate-binary-v0", "kitchen-mixed-v0"])
def test_a_loaded_environment_stands_exactly_where_the_saved_one_stood(name):
    task = smac.TASKS[name]
    env, other = smac.TaskEnv(task), smac.TaskEnv(task)
    sequence = actions(env, 14)
    env.reset(seed=8)  # an episode before, and one in the other: neither may leave a trace
    other.reset(seed=9)
    for action in sequence[:5]:
        env.step(action), other.step(-action)
    env.reset(seed=5)
    for action in sequence[:7]:
        env.step(action)
    other.load_state_dict(env.state_dict())
    np.testing.assert_array_equal(other.obs, env.obs)
    for action in sequence[7:]:
        ours, theirs = env.step(action), other.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:4] == theirs[1:4]
    np.testing.assert_array_equal(env.reset(seed=6)[0], other.reset(seed=6)[0])


def test_episode_seeds_differ_between_seeds_streams_and_episodes():
    streams = (smac.TRAINING, smac.EVALUATION, smac.FINAL)
    seeds = [smac.episode_seed(s, stream, e) for s in range(3) for stream in streams for e in range(3)]
    assert len(set(seeds)) == 27


class Leans(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 33).reshape(11, 3))

    def mode(self, s):
        return torch.tanh(s @ self.weight)


def test_evaluation_equals_a_plain_loop_over_raw_rewards():
    policy, seeds = Leans(), [4, 5, 6]
    expected, env = [], gym.make("Hopper-v5")
    for seed in seeds:
        obs, done, total, length = env.reset(seed=seed)[0], False, 0.0, 0
        while not done:
            action = policy.mode(torch.as_tensor(obs, dtype=torch.float32)[None])[0].detach().numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length, done = total + reward, length + 1, terminated or truncated
        expected.append((total, length, reward))
    random = torch.get_rng_state()
    results = smac.evaluate(policy, [smac.TaskEnv(HOPPER) for _ in seeds], seeds)
    assert [n for _, n, _ in results] == [n for _, n, _ in expected]
    np.testing.assert_allclose(results, expected, rtol=1e-3)
    assert torch.equal(torch.get_rng_state(), random)


def test_scores():
    np.testing.assert_allclose(HOPPER.score(np.array([-20.272305, 3234.3]), 0), [0, 100], atol=1e-4)
    assert DOOR.score(np.array([-50, -200]), np.array([0, -1])).tolist() == [100, 0]
    assert KITCHEN.score(0, np.array([0, 3, 4])).tolist() == [0, 75, 100]
