"""Tests that run on a CPU everywhere, and on a GPU with `-m cuda`."""

import pytest

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
