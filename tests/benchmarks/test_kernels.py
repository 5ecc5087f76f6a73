"""benchmarks.kernels: what it times can be computed, on the CPU too."""

from argparse import Namespace

import pytest
import torch

from benchmarks import kernels
from benchmarks.weights import Source


@pytest.mark.parametrize("subject", kernels.SUBJECTS)
def test_every_piece_runs_and_knows_what_it_moves(subject, monkeypatch):
    monkeypatch.setattr(kernels, "CONTEXTS", ((1, 40), (2, 16)))
    monkeypatch.setattr(kernels, "COLD_BYTES", 1)
    args = Namespace(device="cpu", rows="1,3", formats="bf16,int8")
    pieces = 0
    with torch.inference_mode():
        for piece in kernels.SUBJECTS[subject](Source(None, "tiny").config, args):
            for call in piece.calls[:2]:
                call()
            assert piece.num_bytes > 0
            pieces += 1
    assert pieces >= 2
