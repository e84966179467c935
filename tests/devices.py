"""Tests that run on a CPU everywhere, and on a GPU with `-m cuda`."""

import pytest
import torch

on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
