"""The readers, on files made here."""

import io
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vitfast.train.data import load
from vitfast.train.readers import DataError, is_cifar, read_cifar, read_digits, read_folder


def write_image(path, colour, size=(12, 10), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("cat", (200, 0, 0)), ("dog", (0, 0, 200))):
        for i, suffix in enumerate(("png", "jpg", "JPEG", "bmp")):
            write_image(tmp_path / "pets" / name / f"{i}.{suffix}", colour)
    return tmp_path / "pets"


# ---- digits and folders --------------------------------------------------------------------------------------------


def test_digits_are_the_bundled_ones():
    digits = read_digits(16)
    assert digits.train.images.shape == (1797, 1, 16, 16)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255
    assert digits.classes == tuple("0123456789")
    assert torch.bincount(digits.train.labels).min() > 170
    assert digits.held_out is None
    assert not digits.mirror


def test_folder_of_classes(folder):
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    source = read_folder(folder, 8)
    assert (source.name, source.classes, source.held_out) == ("pets", ("cat", "dog"), None)
    assert source.train.images.shape == (8, 3, 8, 8)
    assert source.train.labels.tolist() == [0] * 4 + [1] * 4
    red, blue = source.train.images[0], source.train.images[4]
    assert red[:, 4, 4].tolist() == [200, 0, 0]
    assert blue[:, 4, 4].tolist() == [0, 0, 200]


def test_folder_with_splits(folder):
    root = folder.parent
    (root / "data").mkdir()
    folder.rename(root / "data" / "train")
    write_image(root / "data" / "val" / "dog" / "a.png", (0, 0, 9))
    source = read_folder(root / "data", 8)
    assert len(source.train) == 8
    assert source.held_out.labels.tolist() == [1]  # of the classes in train/, though val/ has no cats
    write_image(root / "data" / "val" / "fox" / "a.png", (0, 0, 9))
    with pytest.raises(DataError, match="fox are not among these"):
        read_folder(root / "data", 8)
    shutil.rmtree(root / "data" / "val")
    (root / "data" / "val").mkdir()
    with pytest.raises(DataError, match="it has none"):
        read_folder(root / "data", 8)


def test_images_are_cut_at_the_centre_and_grey_or_transparent_ones_become_rgb(tmp_path):
    image = Image.new("RGB", (30, 10))
    image.paste((255, 255, 255), (10, 0, 20, 10))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "wide.png")
    write_image(tmp_path / "b" / "grey.png", 77, mode="L")
    write_image(tmp_path / "b" / "palette.gif", 3, mode="P")
    source = read_folder(tmp_path, 10)
    assert source.train.images[0].min() == 255
    assert source.train.images[1].unique().tolist() == [77]


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "photo.png", exif=exif)
    write_image(tmp_path / "b" / "b.png", (0, 0, 0))
    assert read_folder(tmp_path, 8).train.images[0, 0, :, 0].tolist() == [0] * 4 + [255] * 4


def test_folders_that_cannot_be_used(folder, tmp_path):
    (tmp_path / "one" / "only").mkdir(parents=True)
    with pytest.raises(DataError, match="at least two classes; it has 1"):
        read_folder(tmp_path / "one", 8)
    (folder / "eel").mkdir()
    with pytest.raises(DataError, match=r"no images in .*eel"):
        read_folder(folder, 8)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n broken", b"plain text"])
def test_a_broken_image_is_named(folder, content):
    (folder / "cat" / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        read_folder(folder, 8)


def test_a_truncated_image_is_named(folder):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    (folder / "cat" / "short.png").write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(DataError, match=r"short\.png cannot be read"):
        read_folder(folder, 8)


def test_deep_images_are_refused_not_clipped(folder):
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(folder / "cat" / "deep.png")
    with pytest.raises(DataError, match="8 bits"):
        read_folder(folder, 8)


# ---- CIFAR -----------------------------------------------------------------------------------------------------------

N = 4  # images of a batch


def cifar_arrays(batches, classes):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batches, N, 3072), dtype=np.uint8)
    labels = rng.integers(0, classes, (batches, N))
    labels[0, 0] = classes - 1
    return images, labels


def cifar10(folder, *, protocol=2, key=str):
    images, labels = cifar_arrays(6, 10)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    folder.mkdir(parents=True)
    for name, image, label in zip(names, images, labels, strict=True):
        batch = {key("data"): image, key("labels"): label.tolist(), key("batch_label"): key(name)}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    classes = [key(f"class{i}") for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({key("label_names"): classes}, protocol))
    return images, labels


def cifar100_binary(folder):
    images, labels = cifar_arrays(2, 100)
    folder.mkdir(parents=True)
    for name, image, label in zip(("train.bin", "test.bin"), images, labels, strict=True):
        coarse = np.full((N, 1), 19, np.uint8)
        records = np.concatenate([coarse, label[:, None].astype(np.uint8), image], axis=1)
        (folder / name).write_bytes(records.tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine{i}" for i in range(100)) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(f"coarse{i}" for i in range(20)) + "\n")
    return images, labels


def check(source, name, classes, images, labels):
    assert (source.name, source.classes[0], len(source.classes)) == (name, *classes)
    images = torch.from_numpy(images).unflatten(2, (3, 32, 32))
    assert source.train.images.equal(images[:-1].flatten(0, 1))
    assert source.held_out.images.equal(images[-1])
    assert source.train.labels.tolist() == labels[:-1].flatten().tolist()
    assert source.held_out.labels.tolist() == labels[-1].tolist()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("key", [str, str.encode])
def test_cifar10_pickles(tmp_path, protocol, key):
    images, labels = cifar10(tmp_path / "cifar-10-batches-py", protocol=protocol, key=lambda text: key(text))
    for path in (tmp_path / "cifar-10-batches-py", tmp_path):
        assert is_cifar(path)
        check(read_cifar(path), "CIFAR-10", ("class0", 10), images, labels)


def test_cifar10_as_python_2_pickled_it(tmp_path):
    """Byte strings of Python 2 are read as latin-1 text, and the array's bytes survive that."""
    images, labels = cifar10(tmp_path / "batches", protocol=2)

    def python_2_array(array):
        head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
        shape = b"(I%d\nI%d\nt" % array.shape
        data = b"T" + array.nbytes.to_bytes(4, "little") + array.tobytes()
        return head + b"(I1\n" + shape + dtype + b"I00\n" + data + b"tb"

    label_items = b"".join(b"I%d\n" % label for label in labels[0])
    batch = b"(S'data'\n" + python_2_array(images[0]) + b"S'labels'\n(" + label_items + b"ld."
    (tmp_path / "batches" / "data_batch_1").write_bytes(batch)
    check(read_cifar(tmp_path / "batches"), "CIFAR-10", ("class0", 10), images, labels)


def test_cifar10_archive(tmp_path):
    images, labels = cifar10(tmp_path / "cifar-10-batches-py")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    assert is_cifar(tmp_path / "cifar-10-python.tar.gz")
    check(read_cifar(tmp_path / "cifar-10-python.tar.gz"), "CIFAR-10", ("class0", 10), images, labels)


def test_cifar100_binary(tmp_path):
    images, labels = cifar100_binary(tmp_path / "cifar-100-binary")
    check(read_cifar(tmp_path / "cifar-100-binary"), "CIFAR-100", ("fine0", 100), images, labels)


def test_cifar100_pickles_use_the_fine_labels(tmp_path):
    images, labels = cifar_arrays(2, 100)
    for name, image, label in zip(("train", "test"), images, labels, strict=True):
        batch = {"data": image, "fine_labels": label.tolist(), "coarse_labels": [0] * N}
        (tmp_path / name).write_bytes(pickle.dumps(batch, 2))
    names = {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": ["coarse"] * 20}
    (tmp_path / "meta").write_bytes(pickle.dumps(names, 2))
    check(read_cifar(tmp_path), "CIFAR-100", ("fine0", 100), images, labels)


def test_cifar10_binary(tmp_path):
    images, labels = cifar_arrays(6, 10)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name, image, label in zip(names, images, labels, strict=True):
        (tmp_path / name).write_bytes(np.concatenate([label[:, None].astype(np.uint8), image], axis=1).tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n\n")
    check(read_cifar(tmp_path), "CIFAR-10", ("class0", 10), images, labels)


class Attack:
    """Pickled, it asks for a shell to run a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_a_malicious_pickle_is_refused_unexecuted(tmp_path, name):
    cifar10(tmp_path / "batches")
    (tmp_path / "batches" / name).write_bytes(pickle.dumps({"data": Attack(tmp_path / "marker")}))
    with pytest.raises(DataError, match=rf"{name}: the pickle asks for .*system.*not executed"):
        read_cifar(tmp_path / "batches")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nload\n(S'file'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
        b"c_codecs\nencode\n(S'x'\nS'zlib'\ntR.",
    ],
)
def test_other_globals_are_refused(tmp_path, content):
    cifar10(tmp_path / "batches")
    (tmp_path / "batches" / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=r"test_batch: the pickle"):
        read_cifar(tmp_path / "batches")


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (b"", "not a readable pickle"),
        (pickle.dumps({})[:-1], "not a readable pickle"),
        (pickle.dumps([1, 2]), "dictionary with the key 'labels'"),
        (pickle.dumps({"labels": [0]}), "dictionary with the key 'data'"),
        (pickle.dumps({"labels": [0], "data": np.zeros((2, 3072), np.uint8)}), r"\(1, 3072\).*\(2, 3072\)"),
        (pickle.dumps({"labels": [0], "data": np.zeros((1, 3072))}), "uint8.*float64"),
        (pickle.dumps({"labels": [10], "data": np.zeros((1, 3072), np.uint8)}), r"0 \.\.\. 9"),
        (pickle.dumps({"labels": [-1], "data": np.zeros((1, 3072), np.uint8)}), r"0 \.\.\. 9"),
        (pickle.dumps({"labels": ["cat"], "data": np.zeros((1, 3072), np.uint8)}), "labels"),
        (pickle.dumps({"labels": 3, "data": np.zeros((1, 3072), np.uint8)}), "labels"),
    ],
)
def test_a_batch_with_other_content_is_named(tmp_path, batch, match):
    cifar10(tmp_path / "batches")
    (tmp_path / "batches" / "data_batch_2").write_bytes(batch)
    with pytest.raises(DataError, match=match) as error:
        read_cifar(tmp_path / "batches")
    assert "data_batch_2" in str(error.value)


def test_missing_files_are_named(tmp_path):
    cifar10(tmp_path / "batches")
    (tmp_path / "batches" / "data_batch_4").unlink()
    with pytest.raises(DataError, match="CIFAR-10: data_batch_4 missing"):
        read_cifar(tmp_path / "batches")


def test_a_binary_batch_of_a_wrong_size_is_named(tmp_path):
    cifar100_binary(tmp_path / "batches")
    (tmp_path / "batches" / "test.bin").write_bytes(bytes(3000))
    with pytest.raises(DataError, match=r"test\.bin must be made of records of 3074 bytes; it has 3000"):
        read_cifar(tmp_path / "batches")


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "cifar.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"is not a tar archive; .* CIFAR's \.tar\.gz$") as error:
        read_cifar(tmp_path / "cifar.tar.gz")
    assert "\n" not in str(error.value)
    with tarfile.open(tmp_path / "empty.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match="missing"):
        read_cifar(tmp_path / "empty.tar.gz")


def test_load_recognises_cifar_and_keeps_its_split(tmp_path):
    images, _ = cifar100_binary(tmp_path / "cifar-100-binary")
    data = load(tmp_path / "cifar-100-binary", image_size=8)
    assert (data.name, data.shape, data.mirror) == ("CIFAR-100", (3, 32, 32), True)
    assert data.held_out.images.flatten(1).numpy().tolist() == images[1].tolist()


def test_a_single_held_out_image_is_too_few(folder):
    root = folder.parent / "data"
    root.mkdir()
    folder.rename(root / "train")
    write_image(root / "test" / "dog" / "a.png", (0, 0, 9))
    with pytest.raises(DataError, match="single image to hold out; at least two"):
        load(root, image_size=8)
