"""Trained weights: from a file or the Hugging Face Hub, in any known layout, into a model."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.models.layouts import to_native

__all__ = ["load_weights", "read_weights"]

# In a folder or a repository, the first that is there.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Where training scripts put the weights among other things, the most specific name first.
_WRAPPERS = ("state_dict", "model_state_dict", "model")

# What wrappers of a model put in front of all keys.
_PREFIXES = ("module.", "_orig_mod.")

# The layers whose size is the number of classes, in this package's models.
_CLASSIFIERS = tuple(
    f"{layer}.{part}" for layer in ("head", "head.fc", "classifier.0.dense") for part in ("weight", "bias")
)

# Layers before a classifier that only go with it: transformers' pooler, and the hidden layer of ImageNet-21k.
_BEFORE_CLASSIFIERS = ("pooler.", "pre_logits.", "pre_logits/")

_MOST_LISTED = 10


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor], *, classifier: bool = True) -> nn.Module:
    """Loads trained weights into a model of this package, in place.

    Known are the layouts of timm (1.x, and 0.5 with its other Swin), torchvision, transformers, Google's ``.npz`` files
    of ViT, and those of Park & Kim; which one it is, the keys tell. Position embeddings and bias tables of another
    image or window size are interpolated. Weights are converted to the dtype and device of the model.

    Args:
        model: from `vitfast.create_model`.
        source: a state dict; or a file: ``.safetensors``, ``.npz``, else what ``torch.save`` wrote, of which only
            tensors and plain data are unpickled; or a folder with such a file, as transformers saves models; or the
            name of a repository on the Hugging Face Hub, "owner/name", which is downloaded once.
        classifier: False leaves the classifier of the model as it is, for a task with other classes. What a checkpoint
            has between the last block and its classifier is then of no use, and is left out.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: there is no such file, and the name is not that of a repository.
        ImportError: the package that reads this kind of source is not installed.
        ValueError: the source holds no weights, or not those of this model: the message lists what is missing, what is
            unexpected and what has another shape. The model is then unchanged.

    >>> model = vitfast.create_model("vit_s", num_classes=10)
    >>> vitfast.load_weights(model, "timm/vit_small_patch16_224.augreg_in21k_ft_in1k", classifier=False)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_weights takes a model, a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(source, (str, Path, Mapping)):
        raise TypeError(f"source must be a state dict, a path or a repository; got {type(source).__name__}")
    named = f"the state dict of {len(source)} entries" if isinstance(source, Mapping) else str(source)
    state = to_native(dict(source) if isinstance(source, Mapping) else read_weights(source))
    own = model.state_dict()
    if not classifier:
        state = {key: value for key, value in state.items() if not _belongs_to_classifier(key)}
        state |= {key: own[key] for key in _CLASSIFIERS if key in own}
    if hasattr(model, "fit_state_dict"):
        model.fit_state_dict(state)
    problems = _differences(state, own)
    if problems:
        raise ValueError(f"{named} does not fit this {type(model).__name__}: {problems}")
    model.load_state_dict(state)
    return model


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with the names that they have there. See `load_weights` for the sources."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = _file_in(path)
    elif not path.exists():
        path = _download(str(source))
    if path.suffix == ".json":
        state = {key: value for shard in _shards(path) for key, value in _read_file(path.parent / shard).items()}
    else:
        state = _read_file(path)
    return _without_prefixes(state)


def _file_in(folder: Path) -> Path:
    found = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"there are no weights in {folder}; expected one of {', '.join(_FILES)}")
    return found


def _download(name: str) -> Path:
    """The file of a repository on the Hugging Face Hub, from its cache if it is there."""
    repository = name.removeprefix("hf-hub:")
    if repository.count("/") != 1 or Path(name).suffix in (".safetensors", ".npz", ".bin", ".pt", ".pth", ".ckpt"):
        raise FileNotFoundError(f"there is no file {name}; a repository of the Hugging Face Hub is named owner/name")
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"there is no file {name}, and a repository of the Hugging Face Hub needs the package huggingface_hub: "
            'pip install "vitfast[weights]"'
        ) from error
    for file in _FILES:
        try:
            path = Path(hf_hub_download(repository, file))
        except errors.EntryNotFoundError:  # not in the repository; or, without a network, not in the cache
            continue
        except (errors.HfHubHTTPError, errors.HFValidationError) as error:
            raise FileNotFoundError(f"there is no file {name}, nor such a repository: {error}") from error
        if path.suffix == ".json":
            for shard in _shards(path):
                hf_hub_download(repository, shard)
        return path
    raise FileNotFoundError(
        f"there is no file {name}, and the repository of that name holds none of {', '.join(_FILES)}; or the Hugging "
        "Face Hub cannot be reached, and its cache has none"
    )


def _shards(index: Path) -> list[str]:
    """The files that an index lists."""
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    return _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f'{path.name} needs the package safetensors: pip install "vitfast[weights]"') from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of NumPy arrays: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a file of tensors and plain data that torch.save wrote. Whatever else a pickle holds may "
            "run code, and is not read; if you trust it, read it by torch.load(..., weights_only=False) and give "
            f"load_weights the state dict. PyTorch says: {str(error).splitlines()[0] if str(error) else 'it is empty'}"
        ) from error
    return _tensors(path, content)


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in what a training script saved."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds no state dict; expected tensors by name, or a dictionary with them under one of "
            f"{', '.join(_WRAPPERS)}"
        )
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in _PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _belongs_to_classifier(key: str) -> bool:
    return key in _CLASSIFIERS or key.startswith(_BEFORE_CLASSIFIERS)


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What keeps ``state`` from being loaded, or nothing."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and state[key].shape != own[key].shape]
    shapes = [f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in reshaped]
    found = [
        f"{title}: {_listed(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if found and all(_belongs_to_classifier(key) for key in (*missing, *unexpected, *reshaped)):
        found.append("only the classifier differs: load_weights(..., classifier=False) keeps that of the model")
    return "; ".join(found)


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
