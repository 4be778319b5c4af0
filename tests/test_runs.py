"""Whole runs, tiny: every algorithm, every way to start, what they write and what can be read."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from helpers import (
    HOPPER,
    ROOT,
    SCRIPT,
    TINY,
    hopper_file,
    load,
    parse,
    prepared_file,
    rows_of,
    run_here,
    same,
)
from matplotlib.axes import Axes

import smac_offline_to_online as smac

FEW = ["--score-steps", 3, "--offline-steps", 4, "--online-steps", 12, "--warmup-steps", 8]
FEW = [*TINY, *FEW, "--eval-every", 100, "--eval-episodes", 1, "--final-episodes", 1]
POLICIES = ("policy", "policy_average", "policy_target")


def evaluations(folder, phase, step=None):
    rows = [row for row in rows_of(folder / "evaluations.csv") if row["phase"] == phase]
    return [list(r.values())[2:] for r in rows if step in (None, int(r["step"]))]


def metrics(folder, phase):
    return {row["name"] for row in rows_of(folder / "metrics.csv") if row["phase"] == phase}


def part(state, network):
    """The parameters of one network in a checkpoint."""
    return [x for name, x in sorted(state["agent"].items()) if name.startswith(f"{network}.")]


def replay_columns(folder, obs_dim=11, act_dim=3):
    """s, a, r, s', terminal, return to go."""
    rows = load(folder / "last.pt")["replay"]["rows"]
    return rows.split((obs_dim, act_dim, 1, obs_dim, 1, 1), 1)


def calls(monkeypatch, owner, name):
    """A list that fills with the arguments of every call."""
    function, seen = getattr(owner, name), []

    def spy(*inputs, **flags):
        seen.append(inputs)
        return function(*inputs, **flags)

    monkeypatch.setattr(owner, name, spy)
    return seen


@pytest.fixture
def start(reference, dataset, tmp_path):
    """Flags of a run that goes on from the reference's pretrained networks."""
    flags = ["--init-from", reference / "offline.pt", "--runs-dir", tmp_path / "runs"]
    return [*flags, "--online-steps", 80]


# ---- the run folder
def test_a_run_leaves_its_files(reference):
    names = {p.name for p in reference.iterdir() if "tfevents" not in p.name}
    tables = {"config.json", "metrics.csv", "evaluations.csv", "curve.png"}
    assert names == {"offline.pt", "last.pt", SCRIPT.name, "muon.py"} | tables
    assert any("tfevents" in p.name for p in reference.iterdir())
    for name in (SCRIPT.name, "muon.py"):
        assert (reference / name).read_text() == (ROOT / name).read_text()
    assert (reference / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert re.fullmatch(r"hopper__smac__0__\d{8}-\d{6}b*", reference.name)


def test_config_holds_every_flag_the_task_and_where_it_came_from(reference, dataset):
    config = json.loads((reference / "config.json").read_text())
    args, task = parse(*TINY, "--dataset", dataset, "--runs-dir", reference.parent)
    assert json.loads(json.dumps(dataclasses.asdict(args))).items() <= config.items()
    assert config["task"] == task._asdict() and config["algorithm"] == "smac"
    assert config["torch"] == torch.__version__ and "--dataset" in config["command"]


def test_metrics_of_every_phase(reference):
    cosines = {"cosine_data", "cosine_policy", "cosine_uniform"}
    losses = {"td_loss", "policy_loss", "q", "q_std", "entropy", "temperature", "seconds"}
    assert metrics(reference, "score") == {"loss", "seconds"}
    matching = {"sm_loss", "alpha", "cosine_batch"}
    assert metrics(reference, "offline") == matching | losses | cosines
    collected = {"collected", "collected_length", "cosine_collected", "online_kappa"}
    assert metrics(reference, "online") == matching | losses | cosines | collected
    table = (ROOT / "docs" / "smac.md").read_text().split("| name in `metrics.csv`")[1]
    explained = {name.split("/")[-1] for name in re.findall(r"`([\w/]+)`", table.split("\n\n")[0])}
    assert set(explained) >= {row["name"] for row in rows_of(reference / "metrics.csv")}


def test_evaluations_at_every_step_that_is_due(reference):
    rows = [(row["phase"], int(row["step"])) for row in rows_of(reference / "evaluations.csv")]
    due = [("offline", step) for step in (0, 25, 50)]
    due += [("online", step) for step in (0, 25, 50, 75)] + [("final", 80)]
    assert rows == [row for row in due for _ in range(2)]


def test_the_printed_table_is_that_of_the_evaluations(start, capsys):
    folder = run_here(smac, *start, "--eval-every", 10, "--online-steps", 130)
    printed = dict(re.findall(r"^  (\w.*?) {2,}(-?[\d.]+)$", capsys.readouterr().out, re.MULTILINE))
    steps = range(0, 131, 10)
    means = [np.mean([float(r[3]) for r in evaluations(folder, "online", s)]) for s in steps]
    rows = [row for row in rows_of(folder / "metrics.csv") if row["name"] == "collected"]
    early = [float(row["value"]) for row in rows if 30 < int(row["step"]) <= 50]
    expected = {
        "dataset, mean episode": HOPPER["mean_normalized_return"],
        "at the hand-over": means[0],
        "worst early": min(means[:6]),  # until step 30 + (130 - 30) / 5 = 50
        "collected early": np.mean(early),
        "last": means[-1],
        "best": max(means),
        "mean gap to the best": max(means) - np.mean(means),
        "final, new episodes": np.mean([float(r[3]) for r in evaluations(folder, "final")]),
    }
    assert {name: float(x) for name, x in printed.items()} == pytest.approx(expected, abs=0.051)
    assert list(printed) == list(expected)


def test_the_curve_hands_over_where_pretraining_ended(dataset, tmp_path, monkeypatch):
    """Not at its last evaluation: here there is none after the first."""
    drawn, lines = calls(monkeypatch, Axes, "plot"), calls(monkeypatch, Axes, "axvline")
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--eval-every", 5]
    run_here(smac, *FEW, *flags)
    assert [x.tolist() for _, x, *_ in drawn] == [[0], [4, 9, 14], []]
    assert [x for _, x in lines] == [4]


def test_every_collected_episode_is_logged(reference):
    _, _, r, _, terminal, _ = replay_columns(reference)
    ends, rows = (
        [int(i) + 1 for i in terminal.flatten().nonzero()],
        rows_of(reference / "metrics.csv"),
    )
    found = {}
    for name in ("collected", "collected_length"):
        found[name] = {int(x["step"]): float(x["value"]) for x in rows if x["name"] == name}
    assert ends and list(found["collected"]) == ends
    for begin, end in zip([0, *ends], ends):
        score = 100 * (r[begin:end].sum().item() + 20.272305) / (3234.3 + 20.272305)
        assert found["collected"][end] == pytest.approx(score, rel=1e-3)
        assert found["collected_length"][end] == end - begin


def test_how_often_a_run_logs_does_not_change_it(dataset, tmp_path):
    flags = [*FEW, "--dataset", dataset, "--runs-dir", tmp_path]
    one, other = (load(run_here(smac, *flags, "--log-every", n) / "last.pt") for n in (1, 50))
    assert same(one["agent"], other["agent"]) and same(one["rng"], other["rng"])


def test_how_often_a_run_evaluates_does_not_change_it(dataset, tmp_path):
    flags = [*FEW, "--dataset", dataset, "--runs-dir", tmp_path]
    one, other = (load(run_here(smac, *flags, "--eval-every", n) / "last.pt") for n in (3, 50))
    assert same(one["agent"], other["agent"]) and same(one["replay"], other["replay"])


def test_keep_every_keeps_networks_to_start_from(dataset, tmp_path):
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--keep-every", 2]
    folder = run_here(smac, *FEW, *flags)
    names = ["offline-2", "offline-4", "offline", "last", "score-2"]
    names += [f"online-{step}" for step in range(2, 13, 2)]
    assert {p.stem for p in folder.glob("*.pt")} == set(names)
    assert same(load(folder / "offline-4.pt")["agent"], load(folder / "offline.pt")["agent"])
    kept = ["--init-from", folder / "online-10.pt", "--runs-dir", tmp_path / "b"]
    assert load(run_here(smac, *kept, *FEW) / "last.pt")["done"] == dict(online=12)


# ---- from offline to online
def test_the_hand_over_changes_nothing(reference):
    """The online phase starts with the policy and the episodes that pretraining ended with."""
    assert evaluations(reference, "online", 0) == evaluations(reference, "offline", 50) != []


def test_the_online_phase_begins_with_the_policy_that_was_evaluated(dataset, tmp_path):
    flags = ["--online-steps", 5, "--warmup-steps", 5, "--policy-average-rate", 0.05]
    folder = run_here(smac, *FEW, *flags, "--dataset", dataset, "--runs-dir", tmp_path)
    before, after = load(folder / "offline.pt"), load(folder / "last.pt")
    average = part(before, "policy_average")
    assert not same(part(before, "policy"), average)
    for network in POLICIES:  # no update has followed
        assert same(part(after, network), average)


def test_the_average_has_a_rate_of_its_own_online(dataset, tmp_path):
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--online-average-rate", 1]
    folder = run_here(smac, *FEW, *flags, "--policy-average-rate", 0.05)
    for name, equal in (("offline.pt", False), ("last.pt", True)):
        state = load(folder / name)
        assert same(part(state, "policy"), part(state, "policy_average")) == equal


@pytest.mark.parametrize("algorithm", ["sac", "td3", "td3+bc", "awr"])
def test_every_online_algorithm_starts_from_offline_pt(reference, start, algorithm):
    """With no flag for any network: the checkpoint brings their shapes."""
    flags = ["--online-algorithm", algorithm, "--online-steps", 20, "--warmup-steps", 10]
    folder = run_here(smac, *start, *flags)
    assert metrics(folder, "online") >= {"td_loss", "policy_loss"} and not metrics(folder, "score")
    assert evaluations(folder, "online", 0) == evaluations(reference, "offline", 50)
    before, after = load(reference / "offline.pt"), load(folder / "last.pt")
    assert not same(part(after, "policy"), part(before, "policy"))
    assert same(part(after, "score_model"), part(before, "score_model"))
    assert after["done"] == dict(online=20) and not (folder / "offline.pt").exists()


def test_a_checkpoints_flags_are_the_defaults_but_for_what_was_that_runs_alone(reference, dataset):
    start = ["--init-from", reference / "offline.pt"]
    args, task = parse(*start, "--critic-lr", 1e-5)
    saved = smac.Args(**load(reference / "offline.pt")["args"])
    changed = dict(init_from=str(start[1]), online_steps=200_000, runs_dir="runs", critic_lr=1e-5)
    assert args == dataclasses.replace(saved, cuda_graphs=True, **changed)
    assert args.dataset == str(dataset) and task.env_id == "Hopper-v5"
    assert parse(*start, "--preset", "small")[0].online_steps == 17_500


def test_rates_are_those_of_the_flags_and_online_their_share(start):
    flags = ["--critic-lr", 1e-5, "--policy-lr", 1e-6, "--temperature-lr", 1e-7]
    state = load(run_here(smac, *start, *FEW, *flags, "--online-lr-scale", 0.5) / "last.pt")
    for name, rate in dict(critic=0.5e-5, policy=0.5e-6, temperature=1e-7).items():
        rates = [group["lr"].item() for group in state[name]["param_groups"]]
        assert rates == pytest.approx([rate] * len(rates)), name


@pytest.mark.parametrize(
    "cooldown, shares",
    {
        0.0: [0, 0, 0, 0, 0, 0],
        0.5: [0, 0, 0, 0, 1 / 3, 2 / 3],
        1.0: [0, 1 / 6, 2 / 6, 0.5, 4 / 6, 5 / 6],
    }.items(),
)
def test_pretraining_cools_in_its_last_share(cooldown, shares):
    args = smac.Args(offline_steps=6, offline_cooldown=cooldown)
    assert [smac.cooled(step, args) for step in range(6)] == pytest.approx(shares)


def test_rates_at_the_hand_over_are_nearly_the_online_ones(dataset, tmp_path):
    """Of four updates two cool: the last has gone half of the way from 1 to 0.2."""
    cooling = ["--offline-cooldown", 0.5, "--online-lr-scale", 0.2, "--runs-dir", tmp_path / "runs"]
    folder = run_here(smac, "--dataset", dataset, *FEW, *cooling)
    state = load(folder / "offline.pt")
    for name, rate in dict(critic=0.6 * 3e-4, policy=0.6 * 1e-4, temperature=1e-4).items():
        rates = [group["lr"].item() for group in state[name]["param_groups"]]
        assert rates == pytest.approx([rate] * len(rates)), name


def test_networks_of_another_script_go_online_too(reference, start, tmp_path):
    """Such a file has an agent with fewer parts, and no optimisers that fit."""
    state = load(reference / "offline.pt")
    agent = {k: v for k, v in state["agent"].items() if k.startswith("critic")}
    for name, x in state["agent"].items():
        if name.startswith("policy_average"):
            agent[name.replace("_average", "")] = x
    args = {k: v for k, v in state["args"].items() if k not in ("score_hidden", "optimizer", "tau")}
    state |= dict(agent=agent, args=args | dict(preset="auto"), algorithm="iql", policy={})
    torch.save(state, tmp_path / "offline.pt")
    folder = run_here(smac, *start, *TINY, "--init-from", tmp_path / "offline.pt")
    assert evaluations(folder, "online", 0) == evaluations(reference, "offline", 50)
    assert parse("--init-from", tmp_path / "offline.pt")[0].tau == smac.Args.tau


@pytest.mark.parametrize("log_std", [None, -1.5])
def test_a_policy_without_a_deviation_gets_one(reference, start, tmp_path, log_std):
    """IQL's has one for all states, TD3+BC's has none."""
    state = load(reference / "offline.pt")
    for name in ("policy.head.weight", "policy.head.bias"):
        state["agent"][name] = state["agent"][name][:3]
    if log_std:
        state["agent"]["policy.log_std"] = torch.full((3,), log_std)
    torch.save(state | dict(algorithm="td3_bc"), tmp_path / "offline.pt")
    flags = ["--init-from", tmp_path / "offline.pt", "--online-steps", 5, "--warmup-steps", 5]
    after = load(run_here(smac, *FEW, *start, *flags) / "last.pt")["agent"]
    assert torch.equal(after["policy.head.bias"][:3], state["agent"]["policy.head.bias"])
    deviation = after["policy.head.bias"][3:].exp().tolist()
    assert deviation == pytest.approx([np.exp(log_std or np.log(0.1))] * 3)
    assert (after["policy.head.weight"][3:] == 0).all() and after["q_scale"] > 0


def test_online_kappa_fits_a_score_model_where_there_is_none(dataset, tmp_path):
    flags = [*FEW, "--dataset", dataset, "--runs-dir", tmp_path]
    plain = run_here(smac, *flags, "--kappa", 0, "--online-steps", 0)
    assert not load(plain / "offline.pt")["agent"]["score_model.fitted"]
    assert load(plain / "last.pt")["done"] == dict(offline=4)
    start = [
        "--init-from",
        plain / "offline.pt",
        "--online-steps",
        12,
        "--runs-dir",
        tmp_path / "b",
    ]
    folder = run_here(smac, *start, "--online-kappa", 2, "--log-every", 1)
    state = load(folder / "last.pt")
    assert state["done"] == dict(score=3, online=12) and state["agent"]["score_model.fitted"]
    assert {"sm_loss", "cosine_policy"} <= metrics(folder, "online")


# ---- from scratch
def test_from_scratch_needs_no_rows(tmp_path):
    empty = {}
    for name, shape in dict(observations=(0, 11), actions=(0, 3), rewards=(0,)).items():
        empty[name] = np.zeros(shape, np.float32)
    for name in ("terminals", "ends"):
        empty[name] = np.zeros(0, bool)
    path = prepared_file(tmp_path / "empty.hdf5", empty | dict(returns=np.zeros(0, np.float32)))
    flags = ["--dataset", path, "--offline-steps", 0, "--warmup-steps", 20, "--online-steps", 30]
    folder = run_here(smac, *FEW, *flags, "--runs-dir", tmp_path / "runs")
    assert {row["phase"] for row in rows_of(folder / "metrics.csv")} == {"online"}
    assert load(folder / "last.pt")["done"] == dict(online=30)
    actions = replay_columns(folder)[1][:20]  # the warm start is uniform
    assert 0.8 < actions.abs().max() <= 1 and 0.4 < actions.std() < 0.75


# ---- what is collected
def test_a_time_out_is_no_terminal_and_has_its_own_last_state(tmp_path):
    """Offline, where the file shows it in a row of its own, and online."""
    path = hopper_file(tmp_path / "short.hdf5", 4, max_episode_steps=7)  # too short to fall
    data = smac.load_dataset(path, 11, 3)
    assert len(data["rewards"]) == 3 * 7 + 6 and not data["terminals"].any()
    assert np.flatnonzero(data["last"]).tolist() == [6, 13, 20, 26]

    flags = ["--dataset", path, "--runs-dir", tmp_path, "--online-steps", 30, "--warmup-steps", 25]
    folder = run_here(smac, *FEW, *flags)
    task = smac.read_task(path)
    s, a, _, s_next, terminal, _ = replay_columns(folder)
    assert terminal.sum() == 0
    env = smac.TaskEnv(task)
    for begin, seed in ((0, 0), (7, 7)):
        obs, _ = env.reset(smac.episode_seed(0, smac.TRAINING, seed))
        for t in range(begin, begin + 7):
            np.testing.assert_array_equal(s[t], obs)
            obs = env.step(a[t].numpy())[0]
            np.testing.assert_array_equal(s_next[t], obs)
    follows = (s_next[:-1] == s[1:]).all(1)
    assert (~follows).nonzero().flatten().tolist() == [6, 13, 20, 27]


def test_terminals_are_stored_and_every_episode_starts_anew(reference, dataset):
    s, _, _, s_next, terminal, _ = replay_columns(reference)
    follows = (s_next[:-1] == s[1:]).all(1)
    assert torch.equal(~follows, terminal[:-1, 0].bool()) and terminal.sum() >= 2
    starts = s[torch.cat([torch.tensor([True]), ~follows])]
    assert len(starts.unique(dim=0)) == len(starts)
    data = smac.load_dataset(dataset, 11, 3)
    assert data["terminals"].sum() == 14 and data["last"].sum() == 15  # the tail is open
    before = ~data["last"]
    before[-1] = False
    following = data["observations"][1:][before[:-1]]
    np.testing.assert_array_equal(data["next_observations"][before], following)


def test_training_sees_scaled_rewards_and_evaluation_raw_ones(tmp_path):
    door = dict(env_id="gymnasium_robotics:AdroitHandDoorSparse-v1", max_episode_steps=20)
    door |= dict(family="adroit", goals=1, reward_scale=10.0, reward_bias=-5.0)
    door |= dict(return_0=0.0, return_100=1.0)
    columns = dict(observations=np.random.default_rng(0).normal(size=(30, 39)).astype(np.float32))
    columns |= dict(actions=np.zeros((30, 28), np.float32), ends=np.arange(30) % 10 == 9)
    columns |= dict(terminals=columns["ends"], returns=np.full(30, -9, np.float32))
    columns |= dict(rewards=columns["ends"].astype(np.float32))
    path = prepared_file(tmp_path / "door.hdf5", columns, **door)
    data = smac.load_dataset(path, 39, 28)
    replay = smac.dataset_replay(data, smac.read_task(path), torch.device("cpu"))
    assert replay.unpack(replay.rows).r.tolist() == 3 * [*9 * [-5.0], 5.0]
    folder = run_here(smac, *FEW, "--dataset", path, "--runs-dir", tmp_path)
    assert (replay_columns(folder, 39, 28)[2] == -5).all()
    assert evaluations(folder, "final") == [["0", "0", "20", "0"]]


# ---- what the updates get
def test_the_score_is_asked_of_averaged_weights_without_dropout(reference):
    seen, state = [], load(reference / "last.pt")
    for name, x in state["model"].items():
        average = state["agent"][f"score_model.{name}"]
        if name.endswith("weight"):
            seen.append((x - average).abs().max())
    assert seen and all(0 < difference < 0.1 for difference in seen)
    agent = smac.Agent(11, 3, smac.Args(**state["args"]))
    assert not agent.score_model.training
    assert not any(p.requires_grad for p in agent.score_model.parameters())


@pytest.mark.parametrize("flag", ["--score-return", "--no-score-return"])
def test_the_score_is_conditioned_on_the_return_unless_told_not_to(
    dataset, tmp_path, monkeypatch, flag
):
    seen = calls(monkeypatch, smac.ScoreModel, "loss")
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--online-steps", 0]
    run_here(smac, *FEW, *flags, flag)
    w = torch.cat([w for _, _, _, w in seen])
    assert w.min() >= 0 and w.max() <= 1 and bool((w < 1).any()) == (flag == "--score-return")


def test_online_batches_mix_dataset_and_replay_after_the_warm_start(start, monkeypatch):
    seen = calls(monkeypatch, smac.Agent, "online_update")
    flags = ["--online-steps", 25, "--warmup-steps", 20, "--offline-fraction", 0.25]
    folder = run_here(smac, *start, *flags)
    collected = {tuple(s.tolist()) for s in replay_columns(folder)[0]}
    assert len(seen) == 25 - 20
    mine = []
    for _, batch in seen:
        mine.append([tuple(s.tolist()) in collected for s in batch.s])
    assert {sum(row) for row in mine} == {12}
    assert mine[0] != mine[1]  # score matching takes policy actions at the first half of the states


@pytest.mark.parametrize("algorithm", ["sac", "td3", "td3+bc", "awr"])
def test_td3_moves_its_policy_every_second_time_all_others_always(start, monkeypatch, algorithm):
    update, turns = smac.Agent.online_update, []

    def watched(self, batch, policy_turn):
        turns.append(policy_turn)
        return update(self, batch, policy_turn)

    monkeypatch.setattr(smac.Agent, "online_update", watched)
    flags = ["--online-steps", 26, "--warmup-steps", 20, "--online-algorithm", algorithm]
    run_here(smac, *start, *flags, "--no-cuda-graphs")
    assert turns == ([False, True] * 3 if algorithm.startswith("td3") else [True] * 6)


@pytest.mark.parametrize("flag", ["--normalize-observations", "--no-normalize-observations"])
def test_observations_are_normalised_where_asked(dataset, tmp_path, flag):
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--online-steps", 0]
    state = load(run_here(smac, *FEW, *flags, flag) / "offline.pt")["agent"]
    mean = smac.load_dataset(dataset, 11, 3)["observations"].mean(0)
    for network in (*POLICIES, "critic", "critic_target", "score_model"):
        expected = torch.as_tensor(mean)
        if flag.startswith("--no-") and network != "score_model":  # it always is
            expected = torch.zeros(11)
        found = state[f"{network}.normalize.mean"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert bool((state[f"{network}.normalize.std"] == 1).all()) == bool((found == 0).all())


def test_a_single_critic_is_enough(dataset, tmp_path):
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--num-critics", 1]
    assert load(run_here(smac, *FEW, *flags) / "last.pt")["done"]["online"] == 12


# ---- flags
def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code in (0, None)
    for field in dataclasses.fields(smac.Args):
        assert f"--{field.name.replace('_', '-')}" in text


def test_a_preset_sets_defaults_and_flags_override_it(dataset, tmp_path):
    assert parse()[0].score_steps == smac.PRESETS["small"]["score_steps"]
    assert parse("--preset", "paper")[0] == dataclasses.replace(smac.Args(), preset="paper")
    scratch = parse("--offline-steps", 0)[0]
    assert scratch.optimizer == "adam" and scratch.backup_entropy
    assert parse("--offline-steps", 0, "--preset", "small")[0].optimizer == "muon"
    families = dict(locomotion="paper", other="paper", adroit="adroit", kitchen="kitchen")
    for family, name in families.items():
        path = prepared_file(tmp_path / f"{family}.hdf5", {}, family=family)
        args = parse("--dataset", path, "--kappa", 7)[0]
        expected = dataclasses.replace(smac.Args(), **smac.PRESETS[name])
        assert args == dataclasses.replace(expected, dataset=str(path), kappa=7.0)


def test_every_preset_names_real_flags_with_values_of_their_type():
    defaults = dataclasses.asdict(smac.Args())
    for name, preset in smac.PRESETS.items():
        for flag, value in preset.items():
            kinds = {type(defaults[flag])} | ({float} if flag == "online_kappa" else set())
            assert type(value) in kinds, (name, flag)


def test_the_start_prints_the_flags_that_differ_fitted_to_the_terminal(
    dataset, tmp_path, reference, monkeypatch, capsys
):
    """And no other flag: neither the preset's nor the checkpoint's."""
    monkeypatch.setenv("COLUMNS", "60")
    flags = ["--device", "cpu", "--preset", "small", "--kappa", 1]  # 1 is the preset's
    parse("--seed", 3, "--tau", 0.5, *flags)
    printed = capsys.readouterr().out
    assert printed == "hopper-embedded on cpu, preset small, seed 3, tau 0.5\n"
    parse("--resume", reference, "--eval-every", 7, "--threads", 2)
    assert capsys.readouterr().out == "resumed, threads 2, eval_every 7\n"
    path = reference / "offline.pt"
    parse("--device", "cpu", "--init-from", path, "--tau", 0.5, "--gamma", 0.9, "--online-kappa", 2)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 60 < len(printed)
    text = "".join(printed.split())  # a path that is too long is broken
    assert text.startswith("hopperoncpu,presetpaperandflagsof/")
    assert text.endswith("offline.pt,seed0,gamma0.9,tau0.5,online_kappa2.0")


def test_a_run_that_only_warms_up_says_so(start, capsys):
    run_here(smac, *start, "--online-steps", 5)
    assert "no update online" in capsys.readouterr().out


def test_bars_say_which_phase_it_is_and_evaluations_their_bracket(dataset, tmp_path, capsys):
    run_here(smac, *FEW, "--dataset", dataset, "--runs-dir", tmp_path)
    bars = capsys.readouterr()
    for name in ("1/3 score model", "2/3 offline updates", "3/3 online steps"):
        assert name in bars.err
    assert re.search(r"online +0 +normalized return .*\(episodes .* to .*\)", bars.out + bars.err)


def test_home_is_found_in_every_path(reference, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(dataset.parent))
    args, _ = parse("--dataset", f"~/{dataset.name}", "--runs-dir", "~/runs")
    assert smac.find_dataset(args.dataset) == dataset
    args.device = "cpu"
    task = smac.read_task(dataset)
    run = smac.Run(args, task, {}, {})
    assert run.path.parent == dataset.parent / "runs"
    monkeypatch.setenv("HOME", str(reference))
    assert parse("--init-from", "~/offline.pt")[0].num_critics == 3
    assert parse("--resume", "~")[0].resume == "~"


def test_a_run_needs_no_git(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--online-steps", 0, "--kappa", 0]
    folder = run_here(smac, *FEW, *flags, "--offline-steps", 1)
    assert json.loads((folder / "config.json").read_text())["commit"] == ""


def test_networks_can_be_evaluated_without_a_step(reference, start):
    folder = run_here(smac, *start, "--online-steps", 0)
    assert len(evaluations(folder, "final")) == 2


def test_the_next_command_is_printed_only_where_it_works(dataset, tmp_path, capsys):
    flags = ["--offline-steps", 0, "--dataset", dataset, "--runs-dir", tmp_path]
    run_here(smac, *FEW, *flags)
    assert "offline.pt" not in capsys.readouterr().out


def test_runs_that_begin_in_one_second_get_folders_of_their_own(dataset, tmp_path, monkeypatch):
    """Even where neither sees the other's when it looks."""
    monkeypatch.setattr(smac.time, "strftime", lambda form: "__now")
    monkeypatch.setattr(smac.Path, "exists", lambda path: False)
    flags = ["--dataset", dataset, "--runs-dir", tmp_path, "--online-steps", 0, "--kappa", 0]
    folders = [run_here(smac, *FEW, *flags, "--offline-steps", 1) for _ in range(2)]
    assert [p.name for p in folders] == ["hopper__smac__0__now", "hopper__smac__0__nowb"]


def test_every_0_steps_is_never(dataset, tmp_path):
    never = ["--eval-every", 0, "--checkpoint-every", 0, "--log-every", 0]
    folder = run_here(smac, *FEW, *never, "--dataset", dataset, "--runs-dir", tmp_path)
    steps = [(row["phase"], row["step"]) for row in rows_of(folder / "evaluations.csv")]
    assert {phase for phase, step in steps if step != "0"} == {"final"}
    assert (folder / "last.pt").exists() and (folder / "curve.png").exists()
