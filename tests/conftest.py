import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import pytest
import torch
from helpers import TINY, hopper_file, run_here

from smac_offline_to_online import float32_products

matplotlib.use("Agg")
torch.set_num_threads(1)
torch.set_float32_matmul_precision(float32_products(torch.device("cpu")))  # as any run in this process would


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A tiny Hopper file."""
    return hopper_file(tmp_path_factory.mktemp("data") / "hopper.hdf5")


@pytest.fixture(scope="session")
def reference(dataset, tmp_path_factory):
    """The run folder of all three phases, never interrupted; its replay is in replay.hdf5 beside it."""
    folder = tmp_path_factory.mktemp("reference")
    flags = ["--dataset", dataset, "--runs-dir", folder / "runs", "--save-replay", folder / "replay.hdf5"]
    return run_here(*TINY, *flags)
