import os
import sys
from pathlib import Path

if os.environ.get("SMAC_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all runs on one device, before torch looks
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from helpers import TINY, hopper_file, run_here

import smac_offline_to_online as smac

smac.set_up(smac.Args(device="cpu"))  # threads and products as in any run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A tiny Hopper file."""
    return hopper_file(tmp_path_factory.mktemp("data") / "hopper.hdf5")


@pytest.fixture(scope="session")
def reference(dataset, tmp_path_factory):
    """The run folder of all three phases of SMAC, never interrupted."""
    runs = tmp_path_factory.mktemp("reference")
    return run_here(smac, "--dataset", dataset, "--runs-dir", runs, *TINY)
