"""Whole runs, tiny: every algorithm, every way to start, what they write and what can be read again."""

import dataclasses
import json
import os
import re
import shutil

import h5py
import pytest
import torch
from helpers import ROOT, SCRIPT, TINY, load, only_run, parse, rows_of, run_here, same
from matplotlib.axes import Axes

import smac_offline_to_online as smac


def evaluations(folder, phase, step=None):
    rows = [row for row in rows_of(folder / "evaluations.csv") if row["phase"] == phase]
    return [(r["episode"], r["return"], r["length"], r["score"]) for r in rows if step in (None, int(r["step"]))]


def metrics(folder, phase):
    return {row["name"] for row in rows_of(folder / "metrics.csv") if row["phase"] == phase}


def explained():
    """The names in the metrics table of docs/smac.md."""
    table = (ROOT / "docs" / "smac.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    return {name.removeprefix("score/") for name in re.findall(r"`([\w/]+)`", table)}


# ---- the run folder
def test_a_run_leaves_its_files(reference):
    names = {p.name for p in reference.iterdir()}
    assert {"offline.pt", "last.pt", "curve.png", "config.json", "metrics.csv", "evaluations.csv"} <= names
    assert any("tfevents" in name for name in names)
    assert not any(name.endswith((".tmp", ".part")) for name in names)
    assert (reference / SCRIPT.name).read_text() == SCRIPT.read_text()
    assert (reference / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_config_holds_every_flag_and_where_it_came_from(reference, dataset):
    config = json.loads((reference / "config.json").read_text())
    expected = vars(parse(*TINY, "--dataset", dataset))
    different = {k for k, v in expected.items() if config[k] != (list(v) if isinstance(v, tuple) else v)}
    assert different == {"runs_dir", "save_replay"}
    assert config["algorithm"] == "smac" and config["torch"] == torch.__version__ and "--dataset" in config["command"]


def test_metrics_of_every_phase(reference):
    identity = {"cosine_data", "cosine_policy", "cosine_uniform"}
    seconds = {"seconds/update"}
    assert {"loss"} | seconds <= metrics(reference, "score")
    losses = {"td_loss", "policy_loss", "q", "q_std", "entropy", "temperature"}
    assert {"sm_loss", "alpha"} | losses | identity | seconds <= metrics(reference, "offline")
    assert losses | identity | seconds | {"seconds/environment"} <= metrics(reference, "online")
    assert metrics(reference, "score") | metrics(reference, "offline") | metrics(reference, "online") <= explained()


@pytest.mark.parametrize("returns, best", [([1, 3, 5, 2], 50), ([2, 2, 2, 2], 75), ([9, 1, 2, 3], 0)])
def test_best_is_the_checkpoint_of_the_best_online_evaluation(reference, dataset, tmp_path, monkeypatch, returns, best):
    """The one at the hand-over counts: where nothing after it is better, best.pt is what came in."""
    left = iter([*returns, 0])
    monkeypatch.setattr(smac, "evaluate", lambda policy, envs, seeds: [(next(left), 9, 0.0)] * len(envs))
    start = ["--init-from", reference / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    folder = run_here(*TINY, *start)
    assert load(folder / "best.pt")["evaluations"][-1][:2] == ("online", best)


# ---- from offline to online
def test_the_hand_over_changes_nothing(reference):
    """The online phase starts with the networks, and with the episodes, that pretraining ended with."""
    assert evaluations(reference, "online", 0) == evaluations(reference, "offline", 50) != []


@pytest.mark.parametrize(
    "algorithm, flags",
    [
        ("sac", ["--utd", 4, "--backup-entropy"]),
        ("td3", ["--offline-fraction", 0]),
        ("td3+bc", ["--bc-weight", 0.2]),
        ("awr", ["--offline-fraction", 1]),
        ("none", []),
    ],
)
def test_every_online_algorithm_starts_from_offline_pt(reference, dataset, tmp_path, algorithm, flags):
    start = ["--init-from", reference / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    folder = run_here(*TINY, *start, "--online-algorithm", algorithm, *flags)
    assert {row["phase"] for row in rows_of(folder / "evaluations.csv")} <= {"online", "final"}
    assert len(evaluations(folder, "final")) == 2
    agent, before = load(folder / "last.pt")["agent"] if algorithm != "none" else None, load(reference / "offline.pt")
    if algorithm != "none":
        assert evaluations(folder, "online", 0) == evaluations(reference, "offline", 50) != []
        assert {"td_loss", "policy_loss"} <= metrics(folder, "online") <= explained()
        assert not torch.equal(agent["policy.head.weight"], before["agent"]["policy.head.weight"])
        assert same(load(folder / "last.pt")["score_model"], before["score_model"])


def test_a_checkpoint_brings_the_shape_of_its_networks(reference, dataset, tmp_path):
    """--init-from with no flag for any network, none of which has its default size."""
    shapes = ("score", "num-critics", "critic-hidden", "policy-hidden")
    flags, keep = [], True
    for word in TINY:
        keep = not word.startswith(tuple(f"--{shape}" for shape in shapes)) if word.startswith("--") else keep
        flags += [word] * keep
    start = ["--init-from", reference / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    folder = run_here(*flags, *start)
    assert evaluations(folder, "online", 0) == evaluations(reference, "offline", 50)


def test_the_online_phase_begins_with_the_policy_that_was_evaluated(dataset, tmp_path):
    flags = ["--online-steps", 10, "--warmup-steps", 10, "--policy-average", 0.05, "--dataset", dataset]
    folder = run_here(*TINY, *flags, "--runs-dir", tmp_path)

    def parts(name, network):
        agent = load(folder / name)["agent"]
        return [v for k, v in sorted(agent.items()) if k.startswith(f"{network}.")]

    average = parts("offline.pt", "policy_average")
    assert not same(parts("offline.pt", "policy"), average)
    for network in ("policy", "policy_average", "policy_target"):  # no update has followed
        assert same(parts("last.pt", network), average)


def test_a_checkpoint_brings_its_task_its_dataset_and_what_its_critics_were_trained_for(reference, tmp_path):
    state = load(reference / "offline.pt")
    changed = dict(task="hopper-medium-v2", dataset="a.hdf5", gamma=0.9, tau=0.5, online_steps=7)
    for algorithm, tau in (("smac", 0.5), ("iql", smac.OfflineFlags.tau)):
        torch.save(state | dict(args=state["args"] | changed | dict(algorithm=algorithm)), tmp_path / "offline.pt")
        args = parse("--init-from", tmp_path / "offline.pt")
        assert (args.task, args.dataset, args.gamma, args.tau) == ("hopper-medium-v2", "a.hdf5", 0.9, tau)
        assert args.online_steps == smac.OnlineFlags.online_steps
        assert parse("--init-from", tmp_path / "offline.pt", "--task", "hopper-embedded").dataset is None


def test_every_collected_episode_is_kept(reference):
    rows, episodes = load(reference / "last.pt")["replay"]["rows"], rows_of(reference / "episodes.csv")
    ends = [i + 1 for i, row in enumerate(rows[:, -2:]) if row.any()]
    assert ends and [int(e["step"]) for e in episodes] == ends
    for begin, end, episode in zip([0, *ends], ends, episodes):
        assert float(episode["return"]) == pytest.approx(rows[begin:end, 14].sum().item(), rel=1e-4)
        assert int(episode["length"]) == end - begin


def test_a_resumed_runs_configuration_says_so(reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "run")
    (folder / "notes.csv").write_text("a user's own")
    run_here("--resume", folder, "--online-steps", 85, "--critic-lr", 1e-4, "--save-replay", tmp_path / "replay.hdf5")
    before, after = (json.loads((path / "config.json").read_text()) for path in (reference, folder))
    assert (after["online_steps"], after["critic_lr"]) == (85, 1e-4) and after["command"] == before["command"]
    assert "--resume" in after["resumed"][0]["command"]
    tables = load(folder / "last.pt")["sizes"].keys()  # what a resume cuts off at the checkpoint: nobody else's files
    assert tables == {"metrics.csv", "evaluations.csv", "episodes.csv"}


def test_networks_of_another_script_go_online_too(reference, dataset, tmp_path):
    """Such a file has an agent with fewer parts, no score model and other optimisers."""
    state = load(reference / "offline.pt")
    agent = {k: v for k, v in state["agent"].items() if k.startswith("critic")}
    agent |= {k.replace("_average", ""): v for k, v in state["agent"].items() if k.startswith("policy_average")}
    state = {k: v for k, v in state.items() if k not in ("score_model", "critic", "policy", "temperature", "alpha_net")}
    torch.save(state | dict(agent=agent, args=state["args"] | dict(algorithm="iql")), tmp_path / "offline.pt")
    start = ["--init-from", tmp_path / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path / "runs"]
    folder = run_here(*TINY, *start)
    assert evaluations(folder, "online", 0) == evaluations(reference, "offline", 50)
    assert parse(*start, "--optimizer", "adam").optimizer == "adam"  # its optimisers are fresh in any case


def test_the_curve_hands_over_where_pretraining_ended(dataset, tmp_path, monkeypatch):
    """Not at its last evaluation: here there is none after the first."""
    drawn, lines = [], []
    plot, axvline = Axes.plot, Axes.axvline
    monkeypatch.setattr(Axes, "plot", lambda self, x, *rest, **kw: (drawn.append(x), plot(self, x, *rest, **kw))[1])
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **kw: (lines.append(x), axvline(self, x, **kw))[1])
    steps = ["--score-steps", 1, "--offline-steps", 4, "--online-steps", 20, "--warmup-steps", 15, "--eval-every", 10]
    run_here(*TINY, *steps, "--dataset", dataset, "--runs-dir", tmp_path)
    assert lines == [4] and drawn == [(0,), (4, 14, 24)]


def test_from_scratch_needs_no_dataset(tmp_path):
    flags = ["--offline-steps", 0, "--online-steps", 60, "--warmup-steps", 20, "--runs-dir", tmp_path]
    folder = run_here(*TINY, *flags, "--dataset", tmp_path / "nowhere.hdf5")
    assert {row["phase"] for row in rows_of(folder / "metrics.csv")} == {"online"}
    state = load(folder / "last.pt")
    assert state["position"] == dict(online=60)
    actions = state["replay"]["rows"][:20, 11:14]  # the warm start is uniform
    assert actions.abs().max() > 0.8 and actions.abs().max() <= 1 and 0.4 < actions.std() < 0.75


@pytest.mark.parametrize("mode", ["fixed", "learned"])
def test_alpha_modes_and_normalised_observations(dataset, tmp_path, mode):
    flags = ["--alpha-mode", mode, "--normalize-observations", "--online-algorithm", "none", "--runs-dir", tmp_path]
    folder = run_here(*TINY, *flags, "--dataset", dataset, "--score-steps", 10, "--offline-steps", 25)
    agent = load(folder / "offline.pt")["agent"]
    with h5py.File(dataset) as f:
        mean = torch.as_tensor(f["observations"][()].mean(0))
    for network in ("policy", "critic", "policy_average", "policy_target", "critic_target"):
        torch.testing.assert_close(agent[f"{network}.mean"], mean, rtol=1e-3, atol=1e-3)
        assert (agent[f"{network}.std"] != 1).all()


def test_the_checkpoint_holds_the_normaliser_of_every_network(reference):
    state = load(reference / "offline.pt")  # the embedded row normalises observations in policy and critics
    for name in ("policy", "policy_average", "policy_target", "critic", "critic_target"):
        assert torch.equal(state["agent"][f"{name}.mean"], state["score_model"]["mean"])
        assert torch.equal(state["agent"][f"{name}.std"], state["score_model"]["std"])
    assert (state["score_model"]["std"] != 1).all()


def test_observations_are_not_normalised_where_not_asked(dataset, tmp_path):
    few = ("--no-normalize-observations", "--online-algorithm", "none", "--score-steps", 1, "--offline-steps", 1)
    folder = run_here(*TINY, "--dataset", dataset, "--runs-dir", tmp_path, *few)
    state = load(folder / "offline.pt")
    assert (state["agent"]["policy.mean"] == 0).all() and (state["agent"]["critic.std"] == 1).all()
    assert (state["score_model"]["std"] != 1).all()  # the score model always is


def test_init_from_takes_the_learning_rates_of_the_flags(reference, dataset, tmp_path):
    start = ["--init-from", reference / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    folder = run_here(*TINY, *start, "--critic-lr", 1e-5, "--online-lr-scale", 1)
    rates = [group["lr"].item() for group in load(folder / "last.pt")["critic"]["param_groups"]]
    assert rates == pytest.approx([1e-5, 1e-5])


def test_a_checkpoint_counts_the_step_it_was_made_in(reference):
    assert load(reference / "offline.pt")["position"] == dict(score=50, offline=50)


def test_from_scratch_leaves_a_fraction_of_no_dataset(tmp_path):
    few = ["--offline-steps", 0, "--offline-fraction", 0.5, "--runs-dir", tmp_path]
    assert load(run_here(*TINY, *few) / "last.pt")["position"] == dict(online=80)


def test_a_single_critic_is_enough(dataset, tmp_path):
    folder = run_here(*TINY, "--dataset", dataset, "--runs-dir", tmp_path, "--num-critics", 1)
    assert load(folder / "last.pt")["position"]["online"] == 80


def test_what_cannot_be_written_at_the_end_does_not_cost_the_summary(reference, dataset, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(smac.Replay, "write", full)
    start = ["--init-from", reference / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    folder = run_here(*TINY, *start, "--save-replay", tmp_path / "replay.hdf5")
    assert (folder / "curve.png").exists()


def test_stop_at_score_ends_the_run_early(reference, dataset, tmp_path):
    start = ["--init-from", reference / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    folder = run_here(*TINY, *start, "--stop-at-score", -1000)
    assert load(folder / "last.pt")["position"]["online"] == 25
    assert len(evaluations(folder, "final")) == 2


# ---- what the updates get
def calls(monkeypatch, owner, name):
    """A list that fills with the arguments of every call."""
    function, seen = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *x: (seen.append(x), function(*x))[1])
    return seen


def test_the_score_is_asked_of_averaged_weights_without_dropout(dataset, tmp_path, monkeypatch):
    seen = calls(monkeypatch, smac.Updates, "offline")
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--offline-steps", 3, "--online-algorithm", "none"]
    state = load(run_here(*TINY, *flags) / "last.pt")
    model = seen[0][0].model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert same(dict(model.state_dict()), state["score_model"])
    differences = [(x - state["score_model"][k]).abs().max() for k, x in state["model"].items() if k.endswith("weight")]
    assert all(0 < d < 0.1 for d in differences)


@pytest.mark.parametrize("flag, conditioned", [("--score-return", True), ("--no-score-return", False)])
def test_the_score_is_conditioned_on_the_return_unless_told_not_to(dataset, tmp_path, monkeypatch, flag, conditioned):
    seen = calls(monkeypatch, smac, "diffusion_loss")
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--online-algorithm", "none", "--offline-steps", 1]
    run_here(*TINY, *flags, "--score-steps", 4, flag)
    w = torch.cat([w for _, _, _, w in seen])
    assert w.min() >= 0 and w.max() <= 1 and bool((w < 1).any()) == conditioned


def test_online_batches_mix_dataset_and_replay_after_the_warm_start(reference, dataset, tmp_path, monkeypatch):
    seen = calls(monkeypatch, smac.Updates, "online")
    start = ["--init-from", reference / "offline.pt", "--dataset", dataset, "--runs-dir", tmp_path]
    folder = run_here(*TINY, *start, "--offline-fraction", 0.25)
    collected = {tuple(row.tolist()) for row in load(folder / "last.pt")["replay"]["rows"]}
    mine = torch.tensor([[tuple(row.tolist()) in collected for row in rows] for _, rows, _ in seen])
    assert mine.shape == (80 - 30, 16) and (mine.sum(1) == 12).all()
    assert not mine[:, :12].all()  # shuffled: with --utd the parts are alike


# ---- collected data
def test_a_saved_replay_is_what_was_collected(reference):
    state = load(reference / "last.pt")["replay"]["rows"]
    with h5py.File(reference.parents[1] / "replay.hdf5") as f:
        assert {"command", "git_commit", "seed", "env_id"} <= f.attrs.keys()
        saved = {k: torch.as_tensor(f[k][()]) for k in f}
    s, a, r, _, terminal, cut = state.split((11, 3, 1, 11, 1, 1), 1)
    columns = dict(observations=s, actions=a, rewards=r, terminals=terminal, timeouts=cut)
    for name, column in columns.items():
        torch.testing.assert_close(saved[name].float(), column.squeeze(1), rtol=0, atol=0)


def test_every_training_episode_starts_anew(reference):
    rows = load(reference / "last.pt")["replay"]["rows"]
    ends = rows[:-1, -2:].any(1)
    starts = rows[torch.cat([torch.tensor([True]), ends])][:, :11]
    assert len(starts) >= 2 and len(starts.unique(dim=0)) == len(starts)


def test_a_saved_replay_is_a_dataset(reference, tmp_path):
    flags = ["--dataset", reference.parents[1] / "replay.hdf5", "--runs-dir", tmp_path]
    folder = run_here(*TINY, *flags, "--score-steps", 10, "--offline-steps", 10, "--online-algorithm", "none")
    assert load(folder / "last.pt")["position"] == dict(score=10, offline=10)


def test_a_time_out_is_stored_as_no_terminal_with_the_episodes_own_next_state(tmp_path, monkeypatch):
    task = dataclasses.replace(smac.TASKS["hopper-embedded"], max_steps=7)  # too short to fall
    monkeypatch.setitem(smac.TASKS, "hopper-embedded", task)
    flags = ["--offline-steps", 0, "--online-steps", 40, "--warmup-steps", 30, "--runs-dir", tmp_path]
    rows = load(run_here(*TINY, *flags) / "last.pt")["replay"]["rows"]
    s, _, _, s_next, terminal, cut = rows.split((11, 3, 1, 11, 1, 1), 1)
    assert terminal.sum() == 0
    assert cut.squeeze(1).nonzero().squeeze(1).tolist() == [6, 13, 20, 27, 34]
    follows = (s_next[:-1] == s[1:]).all(1)
    assert torch.equal(follows, cut[:-1, 0] == 0)
    env = smac.TaskEnv(task)
    env.reset(seed=smac.episode_seed(0, smac.TRAINING, 0))
    for action in rows[:7, 11:14]:
        obs = env.step(action.numpy())[0]
    torch.testing.assert_close(s_next[6], torch.as_tensor(obs), rtol=0, atol=0)


def test_training_sees_transformed_rewards_and_evaluation_raw_ones(tmp_path):
    flags = ["--task", "door-binary-v0", "--offline-steps", 0, "--online-steps", 20, "--warmup-steps", 15]
    flags += ["--eval-episodes", 1, "--final-episodes", 1, "--runs-dir", tmp_path / "runs"]
    folder = run_here(*TINY, *flags, "--save-replay", tmp_path / "replay.hdf5")
    assert (load(folder / "last.pt")["replay"]["rows"][:, 39 + 28] == -5).all()
    with h5py.File(tmp_path / "replay.hdf5") as f:
        assert (f["rewards"][()] == -1).all()
    assert evaluations(folder, "final") == [("0", "-200", "200", "0")]


# ---- flags
def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert [name for name in vars(parse()) if f"--{name.replace('_', '-')}" not in text] == []


def test_a_row_sets_defaults_and_flags_override_it():
    assert parse().score_steps == smac.ROWS["hopper-embedded"]["score_steps"]
    door = parse("--task", "door-binary-v0", "--critic-hidden", 64)
    assert door.policy_hidden == (256,) * 3 and door.awr_temperature == 20.0 and door.critic_hidden == (64,)
    assert parse("--task", "kitchen-mixed-v0").kappa == 50.0
    plain = parse("--task", "hopper-medium-replay-v2")
    assert plain.kappa == 40.0 and plain.score_steps == 1_000_000 and plain.num_critics == 10
    scratch = parse("--offline-steps", 0)
    assert scratch.optimizer == "adam" and scratch.backup_entropy and scratch.online_steps == 1_000_000


def test_every_row_names_real_flags_with_values_of_their_type():
    flags = vars(parse("--task", "hopper-medium-v2"))
    for name, row in smac.ROWS.items():
        assert row.keys() <= flags.keys(), name
        assert all(type(value) is type(flags[k]) for k, value in row.items()), name


def test_every_task_parses():
    for name in smac.TASKS:
        assert parse("--task", name).task == name


def test_a_resumed_runs_flags_are_the_defaults(reference):
    args = parse("--resume", reference, "--online-steps", 90)
    assert args.online_steps == 90 and args.score_steps == 50 and args.critic_hidden == (16, 16)
    assert args.resume == reference


# ---- compilation
def test_without_a_compiler_the_run_goes_on_with_a_warning(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    flags = ["--dataset", dataset, "--runs-dir", tmp_path / "runs", "--score-steps", 5, "--offline-steps", 5]
    folder = run_here(*TINY, *flags, "--compile", "--online-algorithm", "none")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "compile" in line]
    assert "going on" in warning and load(folder / "last.pt")["position"]["offline"] == 5


@pytest.mark.skipif(not os.environ.get("SMAC_TEST_COMPILE"), reason="minutes of compilation: set SMAC_TEST_COMPILE=1")
def test_compiled_updates_compute_the_same(dataset, tmp_path):
    flags = ["--dataset", dataset, "--score-steps", 5, "--offline-steps", 20, "--online-steps", 50]
    states = []
    for extra in ([], ["--compile"]):
        runs = tmp_path / str(len(extra))
        states.append(load(run_here(*TINY, *flags, "--runs-dir", runs, *extra) / "offline.pt"))
        assert load(only_run(runs) / "last.pt")["position"]["online"] == 50
    for name, x in states[0]["agent"].items():
        torch.testing.assert_close(states[1]["agent"][name], x, rtol=1e-3, atol=1e-4)
