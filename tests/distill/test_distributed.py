"""Two processes that share a batch have the gradients of one process with all of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.distill.two_processes import CASES, gradients_of_case, joint_batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="torch was built without torch.distributed"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed") / "gradients.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # any free port
    subprocess.run(
        [*launch, "-m", "tests.distill.two_processes", str(path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
        capture_output=True,
    )
    return torch.load(path)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_joint_batch(found, case):
    expected = gradients_of_case(joint_batch(), distributed=False, **CASES[case])
    assert expected["model.encoder.layers.0.self_attn.q_proj.weight"].norm() > 1e-3
    torch.testing.assert_close(found["gradients"][case], expected, rtol=1e-9, atol=1e-12)


def test_both_processes_have_the_same_gradients(found):
    assert found["spread"] == 0.0
