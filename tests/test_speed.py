"""The work of an update step, which a machine's noise does not change: matrix products, copies,
graphs, waits. And SMAC's update against the naive one of experiments/speed.py."""

import contextlib
import csv
import itertools
import os
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT

import muon
import smac_offline_to_online as smac
from muon import KELLER, Muon

sys.path.insert(0, str(ROOT / "experiments"))

import speed
from speed import ACT, BATCH, OBS, SCORE, SIZES

B, N, (h, _) = BATCH, SIZES["num_critics"], SIZES["critic_hidden"]


@pytest.fixture
def float32(monkeypatch):
    """bfloat16 rounds differently when it is compiled, and the naive update knows none."""
    for module in (muon, smac):
        monkeypatch.setattr(module, "bf16_is_fast", lambda device: False)


def sample(n=BATCH) -> smac.Batch:
    replay = speed.make_replay(speed.transitions(1000))
    return replay.unpack(replay.sample(n))


# ---- work. A product of (m, k) and (k, n) is 2 m k n operations. First the forward passes; a
# critic's head is no matrix product
STATE, HIDDEN = 2 * B * OBS * h, 2 * B * h * h  # the first layer of a policy, any hidden layer
PI, V = STATE + HIDDEN + 2 * B * h * ACT, STATE + HIDDEN + 2 * B * h  # a deterministic policy; V
GAUSSIAN = PI + 2 * B * h * ACT  # twice as many outputs
Q = N * (2 * B * (OBS + ACT) * h + HIDDEN)  # all critics
# A backward pass repeats the forward pass for the weights, and for what goes in; into the first
# layer nothing needs to.
Q_STEP = Q + Q + N * HIDDEN
# through the critics, whose own weights get no gradient
POLICY_STEP = GAUSSIAN + Q + Q + 2 * GAUSSIAN - STATE
MUON = 3 * 3 * 2 * h**3  # three steps of three products for a matrix


def smac_products():
    width, condition = SCORE["score_hidden"], SCORE["score_condition_hidden"][0]
    score = (OBS + 1) * condition + condition**2 + condition * 64  # the condition
    score += 2 * 64 * 64  # the level
    score += (ACT + 128) * width + SCORE["score_blocks"] * 2 * 4 * width**2 + width * ACT
    # grad_a Q back from the last layer: as many products as its forward pass
    gradient = N * (HIDDEN + 2 * B * h * ACT)
    critics = GAUSSIAN + Q + Q_STEP  # TD target and TD loss
    # the score of half policy actions, then grad_a Q: two passes, each with weights and inputs on
    # the way back
    matching = GAUSSIAN / 2 + 2 * B * score + Q_STEP + 3 * gradient
    return critics + matching + POLICY_STEP + (N + 1) * MUON


n = 10  # actions of each kind that Cal-QL asks about
PRODUCTS = {
    "SAC": GAUSSIAN + Q + Q_STEP + POLICY_STEP,
    # the policy moves every second time; TD3's follows the least of all critics, TD3+BC's the first
    "TD3": GAUSSIAN + Q + Q_STEP + POLICY_STEP / 2,
    "TD3+BC": PI + Q + Q_STEP + (PI + Q / N + Q / N + 2 * PI - STATE) / 2,
    "IQL": Q + (3 * V - STATE) + 2 * V + (3 * PI - STATE) + Q_STEP,
    "Cal-QL": GAUSSIAN + n * Q + Q_STEP + 2 * GAUSSIAN + 3 * n * Q_STEP + POLICY_STEP,
    "SMAC": smac_products(),
}


@pytest.mark.parametrize("row", PRODUCTS)
def test_an_update_has_no_more_products_than_the_formula(row):
    _, update = speed.build(row)
    batch = sample()
    counted = speed.flops(lambda: update(batch))
    assert counted <= PRODUCTS[row]
    assert counted > 0.9 * PRODUCTS[row]  # else the formula or the counter misses a part


def test_sampling_is_one_gather():
    """It reads a batch's rows, however many the dataset has."""
    replay = speed.make_replay(speed.transitions(1000))
    with torch.profiler.profile(record_shapes=True) as profile:
        replay.unpack(replay.sample(BATCH))
    read = set()
    for event in profile.key_averages(True):
        if [1000, sum(replay.sizes)] in event.input_shapes:
            read.add(event.key)
    views = {"aten::select", "aten::as_strided"}
    assert read - views == {"aten::index_select"}


# ---- float32 products
def test_products_stay_float32_whoever_multiplies():
    """As any run multiplies, which conftest.py has set up."""
    x, y = torch.randn(256, 256), torch.randn(256, 256)
    error = ((x @ y).double() - x.double() @ y.double()).abs().max()
    assert error < 1e-3  # bfloat16's is near 0.3


@pytest.mark.parametrize(
    "capability, amx, precision",
    [("AVX512", False, "medium"), ("AVX512", True, "highest"), ("AVX2", False, "highest")],
)
def test_onednn_multiplies_where_it_keeps_float32(monkeypatch, capability, amx, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    try:
        smac.set_up(smac.Args(device="cpu"))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


# ---- the naive reference
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_naive_smac_has_the_same_losses_and_gradients(activation, float32):
    agent, update = speed.build("SMAC", critic_activation=activation, num_critics=3)
    for p in agent.parameters():  # zero biases would hide a mistake in them
        p.data.add_(0.05 * torch.randn(p.shape))
    naive, batch = speed.NaiveSMAC(agent), sample(64)
    torch.manual_seed(1)
    losses = naive.critic_loss(batch)
    parameters = list(naive.critics.parameters())
    gradients = torch.autograd.grad(losses[0] + agent.args.kappa * losses[1], parameters)
    torch.manual_seed(1)
    metrics = update(batch)
    ours = torch.stack([metrics["td_loss"], metrics["sm_loss"]])
    torch.testing.assert_close(torch.stack(losses), ours)
    assert metrics["sm_loss"] > 1e-3  # the comparison is not of zeros
    stacked = []
    for pair in zip(agent.critic.weights, agent.critic.biases):
        stacked += [p.grad.reshape(3, -1) for p in pair]
    for i, ours in enumerate(stacked):
        theirs = torch.stack([g.reshape(-1) for g in gradients[i :: len(stacked)]])
        near = 1e-5 * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=near)


def test_naive_smac_takes_the_same_steps(float32):
    """Five updates of critics, policy, temperature, targets and averages, with Jordan's polynomial
    in both."""
    rates = dict(critic_lr=1e-3, policy_lr=1e-3, temperature_lr=1e-3)
    agent, update = speed.build("SMAC", num_critics=3, **rates)
    for optimizer in agent.optimizers.values():
        optimizer.polynomial = KELLER
    naive, batches = speed.NaiveSMAC(agent), [sample(64) for _ in range(5)]
    start = [p.detach().clone() for p in agent.critic.parameters()]
    for one_update in (update, naive.update):
        torch.manual_seed(1)
        for batch in batches:
            metrics = one_update(batch)
        assert metrics["policy_loss"].isfinite()
    near = dict(rtol=1e-3, atol=1e-4)
    for name in ("policy", "policy_target", "policy_average"):
        pair = getattr(agent, name).parameters(), getattr(naive.agent, name).parameters()
        for ours, theirs in zip(*pair):
            torch.testing.assert_close(ours, theirs, **near)
    for name in ("log_temperature", "q_scale"):
        torch.testing.assert_close(getattr(agent, name), getattr(naive.agent, name), **near)
    pairs = ((agent.critic, naive.critics), (agent.critic_target, naive.targets))
    for stack, modules in pairs:
        for i, module in enumerate(modules):
            for layer, W, b in zip(module[::2], stack.weights, stack.biases):
                torch.testing.assert_close(W[i], layer.weight, **near)
                torch.testing.assert_close(b[i, 0], layer.bias, **near)
    for p, before in zip(agent.critic.parameters(), start):
        assert (p.detach() - before).abs().max() > 1e-3


def test_naive_muon_is_muon(float32):
    torch.manual_seed(0)
    wide, tall = torch.nn.Linear(24, 16), torch.nn.Linear(16, 24)
    for layer in (wide, tall):
        copy = torch.nn.Parameter(layer.weight.detach().clone())
        ours = Muon([copy], lr=0.1, polynomial=KELLER)
        naive = speed.NaiveMuon(layer, [layer.weight], 0.1)
        for _ in range(3):
            x = torch.randn(8, layer.in_features)
            loss = (x @ copy.T + layer.bias.detach()).square().sum()
            copy.grad = torch.autograd.grad(loss, copy)[0]
            naive.descend(layer(x).square().sum())
            ours.step()
            layer.bias.data.zero_()
        torch.testing.assert_close(copy.detach(), layer.weight.detach(), rtol=1e-4, atol=1e-5)


# ---- compilation
needs_compiler = pytest.mark.skipif(
    not os.environ.get("SMAC_TEST_COMPILE") or not shutil.which(os.environ.get("CXX", "g++")),
    reason="minutes of compilation: set SMAC_TEST_COMPILE=1, with a C++ compiler",
)


@needs_compiler
@pytest.mark.parametrize("row", PRODUCTS)
def test_an_update_is_one_graph(row):
    _, update = speed.build(row)
    smac.compiled(update)  # its settings
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(update, fullgraph=True, dynamic=False, backend=backend)(sample())
    assert len(graphs) == 1


@needs_compiler
@pytest.mark.parametrize("row", PRODUCTS)
def test_compiled_updates_go_the_same_way(row, float32):
    sizes = dict(critic_hidden=(32, 32), policy_hidden=(32, 32))
    if row == "SMAC":
        sizes |= dict(score_hidden=32, score_condition_hidden=(32, 32))
    runs = []
    for compile in (False, True):
        agent, update = speed.build(row, compile, **sizes)
        replay = speed.make_replay(speed.transitions(1000))
        torch.manual_seed(1)
        for _ in range(200):
            metrics = update(replay.unpack(replay.sample(64)))
        runs.append((metrics, agent.state_dict()))
    (metrics, state), (compiled_metrics, compiled_state) = runs
    for name, x in metrics.items():
        close = dict(rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(compiled_metrics[name], x, **close)
    for name, x in state.items():
        # looser than the losses: where a gradient is near 0, Adam makes full steps of its rounding
        if x.is_floating_point():
            worst = (compiled_state[name] - x).norm() / x.norm().clamp(min=1e-3)
            assert worst < 5e-3, name


# ---- CUDA
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("row", PRODUCTS)
def test_an_update_never_waits_for_the_gpu(row):
    _, update = speed.build(row, device="cuda")
    step = speed.step_of(update, speed.make_replay(speed.transitions(1000), "cuda"))
    for _ in range(4):
        step()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "row, changes",
    [
        *((row, {}) for row in PRODUCTS),
        ("SAC", dict(online_kappa="auto")),
        ("SAC", dict(online_algorithm="awr")),
        ("TD3", dict(online_algorithm="td3+bc")),
    ],
)
def test_a_recorded_update_computes_what_the_plain_one_does(row, changes):
    """Two shapes of a batch, and TD3's two kinds of update: several graphs of one update."""
    replay = speed.make_replay(speed.transitions(1000), "cuda")
    runs = []
    for record in (False, True):
        agent, update = speed.build(row, device="cuda", record=record, **changes)
        torch.manual_seed(1)
        for size in [64] * 12 + [32] * 12:
            metrics = update(replay.unpack(replay.sample(size)))
        runs.append((metrics, agent.state_dict(), torch.rand(3, device="cuda")))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)


def test_recordings_are_kept_apart_by_flags_and_shapes(monkeypatch):
    """Without a GPU: a replayed graph calls the update with the tensors of its recording."""
    calls = []

    def update(pair, number, turn):
        calls.append((pair, number, turn))
        return number + 1

    class Graph:
        def replay(self):
            update(*self.recorded)

    @contextlib.contextmanager
    def recording(graph):
        yield
        graph.recorded = calls.pop()

    fake = dict(Stream=mock.Mock, CUDAGraph=Graph, graph=recording, current_stream=mock.Mock)
    for name, thing in dict(fake, stream=lambda stream: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, thing)
    recorded = smac.Recorded(update)
    for i, n, turn in itertools.product(range(6), (2, 3), (False, True)):
        pair = (torch.full((n,), float(i)), torch.full((1, n), 10.0 * i))
        recorded(pair, torch.tensor(100.0 * i), turn=turn)
        (x, y), number, was = calls[-1]
        assert x.tolist() == [i] * n and y.tolist() == [[10 * i] * n]
        assert number == 100 * i and was == turn
    assert len(recorded.graphs) == 4 and len(calls) == 6 * 4


# ---- the measurement
def test_turns_are_taken_in_order(monkeypatch):
    called, clock = [], itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    steps = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = speed.take_turns(steps, speed.Args(quick=True))
    assert [len(x) for x in seconds.values()] == [5, 5]
    # two calls a turn, since a call seems to take longer than a turn shall
    assert called[-20:] == list("aabb") * 5


def test_the_table_is_written(tmp_path, monkeypatch, capsys):
    def take_turns(steps, args):
        for step in steps.values():
            step()
        fast, slow = [1.0, 2.0, 4.0], [2.0, 4.0, 4.0]
        return {key: fast if "eager" in key else slow for key in steps}

    monkeypatch.setattr(speed, "take_turns", take_turns)
    small = speed.transitions(400)
    monkeypatch.setattr(speed, "transitions", lambda n: small)
    gone = mock.Mock(side_effect=ImportError("gone"))
    monkeypatch.setitem(speed.PEERS, "TD3+BC", ("no-such-library", gone))
    for preset in ("paper", "adroit"):
        monkeypatch.setitem(smac.PRESETS, preset, SIZES | SCORE)
    words = ["speed.py", "--quick", "--only", "TD3+BC", "SMAC", "--out", f"{tmp_path}/s.csv"]
    words.append("--paper")
    monkeypatch.setattr(sys, "argv", words)
    speed.main()
    assert "TD3+BC: without no-such-library" in capsys.readouterr().out
    with open(tmp_path / "s.csv", newline="") as f:
        table = list(csv.DictReader(f))
    one = {(line["row"], line["contender"]): line for line in table}
    ours = one["SMAC", "eager"]
    assert [float(ours[key]) for key in ("value", "low", "high", "ratio")] == [0.5, 0.25, 1.0, 2.0]
    assert float(ours["gflop"]) == pytest.approx(PRODUCTS["SMAC"] / 1e9, rel=1e-3)
    assert one["adroit, online", "eager"]["value"] == "0.5"
    assert one["TD3+BC", "eager"]["ratio"] == "" and ("TD3+BC", "peer") not in one
    assert ours["torch"] == torch.__version__ and ours["threads"] == "1"
    sigma = [float(one["2 x 256 x 256", "ours"][f"sigma_{x}"]) for x in ("5", "50", "max")]
    # bfloat16's rounding lifts one value in a hundred
    most = 1.8 if muon.bf16_is_fast(torch.device("cpu")) else 1.3
    assert 0.5 < sigma[0] < sigma[1] < sigma[2] < most


def test_nothing_committed_is_overwritten_unasked():
    assert speed.Args().out.parts[0] == "runs"


def test_random_transitions_end_their_episodes():
    columns = speed.transitions(1000)
    terminals, timeouts = columns["terminals"], columns["timeouts"]
    ends = np.flatnonzero(terminals | timeouts)
    assert ends[-1] == 999 and np.diff(ends).max() <= 200
    assert not (terminals & timeouts).any()
