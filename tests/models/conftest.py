"""What the authors' own models have and compute, and the weights and images they computed it for."""

import functools
import gzip
import json
import math
import pathlib
import zlib

import numpy as np
import pytest
import torch

DATA = pathlib.Path(__file__).parent.parent / "data"


class Golden:
    """The facts of tests/data, and what they were computed from."""

    @functools.cached_property
    def facts(self) -> dict[str, dict]:
        """Model name -> params, input, aliases, state."""
        with gzip.open(DATA / "hdvw_models.json.gz") as file:
            return json.load(file)

    def logits(self, name: str) -> torch.Tensor:
        with np.load(DATA / "hdvw_logits.npz") as file:
            return torch.from_numpy(file[name])

    def weights(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Numbers that depend on the state-dict key alone, of the size usual for its kind."""
        normal = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(math.prod(shape))
        if key.endswith("num_batches_tracked"):
            return torch.zeros(shape, dtype=torch.int64)
        if key.endswith("running_var"):
            values = 1.0 + 0.1 * np.abs(normal)
        elif key.endswith(("running_mean", "bias")):
            values = 0.1 * normal
        elif len(shape) <= 1:
            values = 1.0 + 0.1 * normal
        else:
            values = normal * math.sqrt(2.0 / math.prod(shape[1:]))
        return torch.from_numpy(values.reshape(shape))

    def images(self, shape: tuple[int, ...]) -> torch.Tensor:
        normal = np.random.RandomState(0).standard_normal(math.prod(shape))
        return torch.from_numpy(normal.reshape(shape))

    def load(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model in float64 and evaluation mode with those weights."""
        model = model.double().eval()  # first: loading copies into the dtype that the model has
        model.load_state_dict({key: self.weights(key, tuple(value.shape)) for key, value in model.state_dict().items()})
        return model

    def state(self, model: torch.nn.Module) -> list[list]:
        return [[key, list(value.shape)] for key, value in model.state_dict().items()]


@pytest.fixture(scope="session")
def golden():
    return Golden()
