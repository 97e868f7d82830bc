"""The tests of `on_pretend_device.py`, in a process of their own: the device stays registered."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

CASES = Path(__file__).with_name("on_pretend_device.py")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
@pytest.mark.parametrize(
    "marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_nothing_is_left_on_the_cpu_that_works_on_an_accelerator(marked):
    run = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", CASES, "-m", marked]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
