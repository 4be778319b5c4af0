"""--compile: each update is one graph, and computes what it computes without."""

import pytest
import torch
from helpers import same
from test_losses import agent_of, batch_of

LEARNED = dict(online_kappa=1.0, alpha_mode="learned", optimizer="adam", backup_entropy=True)
UPDATES = [("offline", {}), ("sac", LEARNED), ("td3", {}), ("td3+bc", {}), ("awr", {})]


@pytest.mark.parametrize("name, flags", UPDATES)
def test_an_update_is_one_graph_with_the_numbers_of_the_plain_one(name, flags):
    torch._dynamo.reset()
    batch, results, states = batch_of(8), [], []
    for compiled in (False, True):
        torch.manual_seed(1)
        agent = agent_of(online_algorithm="sac" if name == "offline" else name, **flags)
        before = {key: x.clone() for key, x in agent.state_dict().items()}
        update = agent.offline_update if name == "offline" else agent.online_update
        inputs = (batch,) if name == "offline" else (batch, True)
        if compiled:
            update = torch.compile(update, fullgraph=True, dynamic=False, backend="eager")
        with torch._dynamo.config.patch(trace_autograd_ops=True):  # as `compiled` sets it
            results.append([update(*inputs) for _ in range(2)])
        states.append(agent.state_dict())
        assert not same(states[-1], before)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
