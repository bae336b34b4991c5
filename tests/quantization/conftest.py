"""Fixtures of the quantisation tests."""

import pytest
import torch


@pytest.fixture
def no_grad():
    """Run a test as inference does. A whole file: pytestmark = pytest.mark.usefixtures(...)."""
    with torch.no_grad():
        yield
