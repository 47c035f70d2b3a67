"""Fixtures: devices, random numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

import tokenselect as ts
from definitions import Draw


@pytest.fixture
def device() -> ts.Device:
    return ts.Device.cpu()


@pytest.fixture
def emulated() -> ts.Device:
    return ts.Device.emulated()


@pytest.fixture
def draw() -> Draw:
    random = np.random.default_rng(1)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(shape).astype(np.float32)

    return normal
