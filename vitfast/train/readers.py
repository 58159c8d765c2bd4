"""Reads images from files: scikit-learn's digits, folders of images, CIFAR-10 and CIFAR-100.

Every reader returns a `Source`: images as uint8 (n, channels, height, width), labels as int64 (n,).
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.train.progress import Track, silent

__all__ = ["DataError", "Source", "Split", "is_cifar", "read_cifar", "read_digits", "read_folder"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")


class DataError(ValueError):
    """The images that were named cannot be used; the message says why and what is expected."""


@dataclass(frozen=True)
class Split:
    """Labelled images: ``images`` uint8 (n, channels, height, width), ``labels`` int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Split:
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Source:
    """What a reader found.

    Attributes:
        name: of the data set, for people.
        classes: their names; label i is ``classes[i]``.
        train: images to train on.
        held_out: images that came as a split of their own, or None.
        mirror: whether an image and its mirror image show the same class.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    held_out: Split | None
    mirror: bool


def read_digits(image_size: int) -> Source:
    """The 1797 handwritten digits that come with scikit-learn, 8 x 8 pixels, enlarged bilinearly.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the bundled digits need scikit-learn ({error}): pip install 'vitfast[study]'") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear")
    labels = torch.from_numpy(digits.target).long()
    split = Split(images.round().to(torch.uint8), labels)
    return Source("scikit-learn digits", tuple(str(c) for c in digits.target_names), split, None, mirror=False)


def read_folder(path: Path, image_size: int, *, track: Track = silent) -> Source:
    """A folder with one sub-folder of images per class, or with ``train/`` and ``val/`` or ``test/`` that hold these.

    Images become RGB, are scaled until they cover ``image_size`` x ``image_size`` pixels, and are cut at the centre.

    Raises:
        DataError: there are fewer than two classes, a class without images, or an image that cannot be read.
    """
    held_out = next((path / name for name in HELD_OUT_FOLDERS if (path / name).is_dir()), None)
    if not (path / "train").is_dir() or held_out is None:
        classes = _class_folders(path)
        return Source(path.resolve().name, classes, _read_classes(path, classes, image_size, track), None, mirror=True)
    classes = _class_folders(path / "train")
    present = _subfolders(held_out)
    unknown = sorted(set(present) - set(classes))
    if unknown or not present:
        raise DataError(
            f"{held_out} must hold the same sub-folders as {path / 'train'}, or some of them; "
            + (f"{', '.join(unknown)} are not among these" if unknown else "it has none")
        )
    return Source(
        path.resolve().name,
        classes,
        _read_classes(path / "train", classes, image_size, track),
        _read_classes(held_out, present, image_size, track, index_in=classes),
        mirror=True,
    )


def _subfolders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _class_folders(path: Path) -> tuple[str, ...]:
    names = _subfolders(path)
    if len(names) < 2:
        raise DataError(
            f"{path} must hold one sub-folder of images for each of at least two classes; it has {len(names)}. "
            "CIFAR is recognised by its file names: data_batch_1 ... and test_batch, or train and test, maybe with .bin"
        )
    return names


def _read_classes(
    path: Path, classes: tuple[str, ...], image_size: int, track: Track, index_in: tuple[str, ...] | None = None
) -> Split:
    files = [
        (file, label)
        for label, name in enumerate(index_in or classes)
        if name in classes
        for file in _image_files(path / name)
    ]
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    for i, (file, _) in enumerate(track(files, f"reading {path.name}", len(files))):
        images[i] = _read_image(file, image_size)
    return Split(images, torch.tensor([label for _, label in files]))


def _image_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DataError(f"no images in {folder}; files that end in {', '.join(SUFFIXES)} are read")
    return files


def _read_image(file: Path, image_size: int) -> Tensor:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(f"reading image files needs Pillow ({error}): pip install 'vitfast[study]'") from error
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip these values at 255 instead of scaling them
                raise DataError(f"{file} has more than 8 bits per channel; convert it to 8 bits first")
            image = ImageOps.exif_transpose(image).convert("RGB")
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow: a broken PNG is a SyntaxError
        raise DataError(f"{file} cannot be read as an image: {error}") from error


# ---- CIFAR ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The file names of one published form of CIFAR, and where a label stands.

    ``label`` is the key of the labels in a pickled batch, or the place of the label among the bytes that precede each
    image of a binary one. ``names`` is the key of the class names in the pickled meta file.
    """

    name: str
    train: tuple[str, ...]
    test: str
    meta: str
    label: str | int
    names: str | None = None
    label_bytes: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


_LAYOUTS = (
    _Layout(
        "CIFAR-10", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "labels", "label_names"
    ),
    _Layout("CIFAR-100", ("train",), "test", "meta", "fine_labels", "fine_label_names"),
    _Layout(
        "CIFAR-10", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", 0, None, 1
    ),
    _Layout("CIFAR-100", ("train.bin",), "test.bin", "fine_label_names.txt", 1, None, 2),
)
_IMAGE_BYTES = 3 * 32 * 32


def is_cifar(path: Path) -> bool:
    """Whether ``path`` is a tar archive, or a folder with the files of CIFAR in it or one level down."""
    return path.is_file() or _cifar_folder(path) is not None


def read_cifar(path: Path) -> Source:
    """CIFAR-10 or CIFAR-100 (fine labels): the folder of its python or binary version, or its ``.tar.gz``.

    Archives are read in memory: nothing is extracted. Pickled batches can hold arrays and basic types only; whatever
    else a pickle asks for is refused before it is imported.

    Raises:
        DataError: files are missing, or hold something else.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; format as described at
    https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    files = _read_archive(path) if path.is_file() else _read_cifar_folder(path)
    layout = max(_LAYOUTS, key=lambda candidate: len(files.keys() & set(candidate.files)))
    missing = [name for name in layout.files if name not in files]
    if missing:
        raise DataError(f"{path} is not a complete {layout.name}: {', '.join(missing)} missing")
    classes = _class_names(layout, files[layout.meta])
    batches = [_read_batch(layout, name, files[name], len(classes)) for name in (*layout.train, layout.test)]
    train = Split(torch.cat([b.images for b in batches[:-1]]), torch.cat([b.labels for b in batches[:-1]]))
    return Source(layout.name, classes, train, batches[-1], mirror=True)


def _cifar_folder(path: Path) -> Path | None:
    """``path`` or the folder in it that holds a test split of CIFAR."""
    for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        if any((folder / layout.test).is_file() and (folder / layout.meta).is_file() for layout in _LAYOUTS):
            return folder
    return None


def _read_cifar_folder(path: Path) -> dict[str, bytes]:
    folder = _cifar_folder(path)
    if folder is None:
        raise DataError(f"{path} holds no files of CIFAR (expected: {', '.join(_LAYOUTS[0].files)}, or the like)")
    wanted = {name for layout in _LAYOUTS for name in layout.files}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name in wanted}


def _read_archive(path: Path) -> dict[str, bytes]:
    wanted = {name for layout in _LAYOUTS for name in layout.files}
    try:
        if not tarfile.is_tarfile(path):
            raise DataError(f"{path} is not a tar archive; name a folder of images, or CIFAR's .tar.gz")
        with tarfile.open(path) as archive:
            return {
                name: archive.extractfile(member).read()
                for member in archive
                if member.isfile() and (name := Path(member.name).name) in wanted
            }
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as a tar archive of CIFAR: {error}") from error


def _class_names(layout: _Layout, content: bytes) -> tuple[str, ...]:
    if layout.names is None:
        names = content.decode("latin1").split()
    else:
        names = _entry(_unpickle(layout.meta, content), layout.names, layout.meta)
        names = [name.decode("latin1") if isinstance(name, bytes) else name for name in names]
    if len(names) < 2:
        raise DataError(f"{layout.meta} names {len(names)} classes; at least two are expected")
    return tuple(names)


def _read_batch(layout: _Layout, name: str, content: bytes, classes: int) -> Split:
    if layout.names is None:
        record = layout.label_bytes + _IMAGE_BYTES
        if not content or len(content) % record:
            raise DataError(f"{name} must be made of records of {record} bytes; it has {len(content)} bytes")
        records = np.frombuffer(content, np.uint8).reshape(-1, record)
        labels, images = records[:, layout.label], records[:, layout.label_bytes :]
    else:
        batch = _unpickle(name, content)
        labels, images = _entry(batch, layout.label, name), _entry(batch, "data", name)
        if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
            raise DataError(f"the labels in {name} must be a list of integers")
        if not isinstance(images, np.ndarray) or (images.dtype, images.shape) != (
            np.uint8,
            (len(labels), _IMAGE_BYTES),
        ):
            found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise DataError(
                f"'data' in {name} must be uint8 ({len(labels)}, {_IMAGE_BYTES}), a row for each label; got {found}"
            )
    labels = torch.tensor(np.asarray(labels, dtype=np.int64))
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"the labels in {name} must be in 0 ... {classes - 1}, one per image")
    return Split(torch.tensor(images).unflatten(1, (3, 32, 32)), labels)


def _entry(batch: object, key: str, name: str):
    """``batch[key]``; pickles of Python 2 have bytes as keys when they are read as such, of Python 3 strings."""
    if not isinstance(batch, Mapping) or (key not in batch and key.encode() not in batch):
        raise DataError(f"{name} must be a pickled dictionary with the key {key!r}")
    return batch[key] if key in batch else batch[key.encode()]


def _unpickle(name: str, content: bytes):
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"{name} is not a readable pickle: {type(error).__name__}: {error}") from error


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, which pickles of protocol 2 call to make bytes from a latin-1 string."""
    if encoding != "latin1":
        raise DataError(f"the pickle encodes a string as {encoding!r}; only 'latin1' is expected")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and basic types. Any other global is an error, raised before anything is imported."""

    _reconstruct = np.empty(0).__reduce__()[0]
    _frombuffer = np.empty(1).__reduce_ex__(5)[0]
    _allowed = {  # noqa: RUF012
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _frombuffer,
        ("numpy._core.numeric", "_frombuffer"): _frombuffer,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str):
        try:
            return self._allowed[module, name]
        except KeyError:
            raise DataError(
                f"the pickle asks for {module}.{name}, which a file of CIFAR has no need of; it was not executed"
            ) from None
