"""What every test needs: Triton's interpreter, one thread, a tiny model."""

import os

# Triton runs its kernels in the CPU interpreter only if this is set when it is first imported, by whichever test
os.environ["TRITON_INTERPRET"] = "1"
# Two test processes that use every core each run many times slower than two that use one.
os.environ["OMP_NUM_THREADS"] = "1"

from grace.arithmetic import SETTINGS

os.environ.update(SETTINGS)  # as a subcommand that a test starts computes, whose bits are compared with those made here

import pytest
import torch
from tiny_models import make_llava

torch.set_num_threads(1)


@pytest.fixture
def llava():
    return make_llava()
