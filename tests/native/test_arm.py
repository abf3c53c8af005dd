"""The AArch64 kernels on any machine: cross-compiled, emulated, and compared bit for bit (arm.sh, kernels_test.cpp)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

NOTHING_TO_RUN = 77  # arm.sh's status where the cross compiler or the emulator is missing


@pytest.mark.slow
def test_arm_kernels_give_the_same_bits() -> None:
    script = Path(__file__).with_name("arm.sh")
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    if done.returncode == NOTHING_TO_RUN:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
