"""Images to train and to test on: which, how they are split, and how they become batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.train.progress import Track, silent
from vitfast.train.readers import DataError, Split, is_cifar, read_cifar, read_digits, read_folder

__all__ = ["DataError", "ImageData", "Split", "batches", "load", "shift_and_mirror", "stratified_split"]

HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class ImageData:
    """Labelled images in two splits, and how a model wants to see them.

    Attributes:
        name: of the data set, for people.
        classes: their names; label i is ``classes[i]``.
        train, held_out: the splits; the second is never trained on.
        mirror: whether an image and its mirror image show the same class.
        mean, std: (channels,), of the training images scaled to [0, 1].
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    held_out: Split
    mirror: bool
    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return tuple(self.train.images.shape[1:])

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (n, channels, height, width) to float32 with mean 0 and deviation 1 over the training images."""
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]


def load(
    source: str | Path = "digits",
    *,
    image_size: int = 32,
    seed: int = 0,
    max_train: int | None = None,
    max_held_out: int | None = None,
    track: Track = silent,
) -> ImageData:
    """Reads images and splits them.

    Args:
        source: ``"digits"`` for scikit-learn's bundled digits; a folder with one sub-folder of images per class, or
            with such folders inside ``train/`` and ``val/`` or ``test/``; or CIFAR-10 or CIFAR-100, as its folder or
            ``.tar.gz`` (python or binary version).
        image_size: pixels of a side, for digits and folders; CIFAR keeps its 32.
        seed: of the split, where the source has none of its own: a fifth of each class is held out.
        max_train, max_held_out: take at most so many images, the same share of each class; None for all.
        track: shows progress; see `vitfast.train.progress`.

    Raises:
        DataError: the source does not exist or cannot be used; the message says why.
    """
    found = _read(source, image_size, track)
    generator = torch.Generator().manual_seed(seed)
    if found.held_out is None:
        held_out, train = stratified_split(found.train, HELD_OUT_SHARE, generator)
    else:
        train, held_out = found.train, found.held_out
    train, held_out = (_limit(s, n, generator) for s, n in ((train, max_train), (held_out, max_held_out)))
    if len(held_out) < 2:
        raise DataError(
            f"{source} has a single image to hold out; at least two are needed to tell how sure a measure is"
        )
    mean, std = _statistics(train.images)
    return ImageData(found.name, found.classes, train, held_out, found.mirror, mean, std)


def _read(source: str | Path, image_size: int, track: Track):
    if source == "digits":
        return read_digits(image_size)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"{path} does not exist. Name a folder with one sub-folder of images per class, "
            "the folder or archive of CIFAR-10 or CIFAR-100, or 'digits'"
        )
    try:
        return read_cifar(path) if is_cifar(path) else read_folder(path, image_size, track=track)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def stratified_split(split: Split, share: float, generator: torch.Generator) -> tuple[Split, Split]:
    """Splits at random into ``share`` of each class and the rest: at least one image of each class in both.

    Raises:
        DataError: a class has only one image.
    """
    counts = torch.bincount(split.labels)
    if (counts == 1).any():
        raise DataError(
            f"class {int(torch.nonzero(counts == 1)[0])} has a single image; "
            "at least two are needed, one to train on and one to hold out"
        )
    first, second = [], []
    for label, count in enumerate(counts.tolist()):
        members = torch.nonzero(split.labels == label).flatten()
        members = members[torch.randperm(count, generator=generator)]
        taken = min(max(round(share * count), 1), count - 1) if count else 0
        first.append(members[:taken])
        second.append(members[taken:])
    return split[torch.cat(first).sort().values], split[torch.cat(second).sort().values]


def _limit(split: Split, count: int | None, generator: torch.Generator) -> Split:
    """At most ``count`` images, the same share of each class, up to rounding."""
    if count is None or len(split) <= count:
        return split
    order = torch.randperm(len(split), generator=generator)
    labels = split.labels[order]
    # The rank of an image in its class, as a share of the class: the smallest ones are spread evenly over the classes.
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    share = (rank + 0.5) / counts[labels[by_class]]
    return split[order[by_class[share.argsort(stable=True)[:count]]].sort().values]


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of images scaled to [0, 1], exact, from a histogram of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    histograms = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(images.shape[1])])
    weights = histograms.double() / histograms.sum(1, keepdim=True)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().clamp(min=1 / 255).float()  # a channel without variation stays finite


def shift_and_mirror(images: Tensor, generator: torch.Generator, *, padding: int, mirror: bool) -> Tensor:
    """Random crops of the images padded with ``padding`` black pixels, half of them mirrored if ``mirror`` is set.

    Args:
        images: (n, channels, height, width), any dtype.

    Returns:
        The same shape; each image is moved by up to ``padding`` pixels along each axis.
    """
    n, _, height, width = images.shape
    places = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    crops = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    images = crops[torch.arange(n), :, places[0], places[1]]
    if mirror:
        mirrored = torch.rand(n, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def batches(
    data: ImageData, split: Split, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels, batch after batch.

    Args:
        generator: with one, for training: a random order, random crops (and mirror images where ``data.mirror`` says
            so), and no incomplete batch at the end. Without: all images as they are, in order.
    """
    if generator is None:
        for start in range(0, len(split), batch_size):
            yield data.normalize(split.images[start : start + batch_size]), split.labels[start : start + batch_size]
        return
    order = torch.randperm(len(split), generator=generator)
    for start in range(0, batch_count(split, batch_size) * batch_size, batch_size):
        batch = split[order[start : start + batch_size]]
        padding = max(data.shape[1:]) // 8
        images = shift_and_mirror(batch.images, generator, padding=padding, mirror=data.mirror)
        yield data.normalize(images), batch.labels


def batch_count(split: Split, batch_size: int) -> int:
    """Training batches of an epoch: complete ones, or a single smaller one where there are too few images."""
    return max(len(split) // batch_size, 1)
