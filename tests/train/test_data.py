import pytest
import torch

from vitfast.train.data import DataError, ImageData, Split, batches, load, shift_and_mirror, stratified_split


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def image_data(n=20, shape=(3, 16, 16), **options):
    images = torch.randint(0, 256, (n, *shape), generator=generator(), dtype=torch.uint8)
    split = Split(images, torch.arange(n) % 2)
    settings = {"mirror": False, "mean": torch.zeros(shape[0]), "std": torch.ones(shape[0])}
    return ImageData("test", ("a", "b"), split, split, **(settings | options))


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_split_is_stratified_disjoint_and_complete():
    labels = torch.tensor([0] * 50 + [1] * 10 + [3] * 2)  # class 2 has no images
    split = Split(torch.arange(62)[:, None, None, None], labels)
    first, second = stratified_split(split, 0.2, generator())
    assert torch.bincount(first.labels).tolist() == [10, 2, 0, 1]
    assert torch.bincount(second.labels).tolist() == [40, 8, 0, 1]
    seen = torch.cat([first.images.flatten(), second.images.flatten()])
    assert seen.sort().values.tolist() == list(range(62))
    assert labels[first.images.flatten()].equal(first.labels)


def test_split_depends_on_the_seed_only():
    held_out = [load(seed=seed, image_size=8).held_out.images for seed in (0, 0, 1)]
    assert held_out[0].equal(held_out[1])
    assert not held_out[0].equal(held_out[2])


def test_a_class_of_one_image_cannot_be_split():
    with pytest.raises(DataError, match="class 1 has a single image"):
        stratified_split(Split(torch.zeros(3, 1, 1, 1), torch.tensor([0, 1, 0])), 0.5, generator())


def test_digits_are_loaded_and_normalised():
    data = load("digits", image_size=16)
    assert (len(data.train), len(data.held_out)) == (1438, 359)
    assert data.shape == (1, 16, 16)
    normalised = data.normalize(data.train.images)
    assert normalised.mean() == pytest.approx(0, abs=1e-5)
    assert normalised.std(correction=0) == pytest.approx(1, abs=1e-5)
    assert data.mirror is False


def test_images_can_be_limited_evenly():
    data = load("digits", image_size=8, max_train=200, max_held_out=55)
    assert (len(data.train), len(data.held_out)) == (200, 55)
    counts = torch.bincount(data.train.labels)
    assert counts.min() >= 19
    assert counts.max() <= 21


def test_a_constant_channel_stays_finite(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8), (10 * i, 7, 7)).save(tmp_path / name / f"{i}.png")
    data = load(tmp_path, image_size=8)
    assert data.normalize(data.train.images).isfinite().all()


def test_a_source_that_does_not_exist_is_named():
    with pytest.raises(DataError, match="/nowhere/at/all does not exist"):
        load("/nowhere/at/all")


# ---- augmentation and batches ----------------------------------------------------------------------------------------


def test_shift_moves_images_and_fills_with_black():
    images = torch.randint(1, 256, (64, 2, 9, 7), generator=generator(), dtype=torch.uint8)
    shifted = shift_and_mirror(images, generator(1), padding=2, mirror=False)
    assert shifted.shape == images.shape
    assert shifted.dtype == images.dtype
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    found = set()
    for image, original in zip(shifted, padded, strict=True):
        crops = [(y, x) for y in range(5) for x in range(5) if image.equal(original[:, y : y + 9, x : x + 7])]
        assert len(crops) == 1
        found.add(crops[0])
    assert len(found) > 15  # of 25


def test_mirror_flips_about_half_of_the_images():
    images = torch.arange(1000 * 4, dtype=torch.int32).view(1000, 1, 1, 4)
    mirrored = shift_and_mirror(images, generator(), padding=0, mirror=True)
    flipped = (mirrored == images.flip(3)).all(dim=(1, 2, 3))
    kept = (mirrored == images).all(dim=(1, 2, 3))
    assert (flipped ^ kept).all()
    assert 400 < flipped.sum() < 600
    assert shift_and_mirror(images, generator(), padding=0, mirror=False).equal(images)


def test_test_batches_are_all_images_in_order():
    data = image_data(n=20)
    images, labels = zip(*batches(data, data.train, 8), strict=True)
    assert [len(batch) for batch in images] == [8, 8, 4]
    assert torch.cat(images).equal(data.normalize(data.train.images))
    assert torch.cat(labels).equal(data.train.labels)


def test_training_batches_are_complete_shuffled_and_seeded():
    data = image_data(n=20)
    runs = [list(batches(data, data.train, 8, generator(seed))) for seed in (0, 0, 1)]
    assert [len(labels) for _, labels in runs[0]] == [8, 8]
    assert all(a.equal(b) for (a, _), (b, _) in zip(runs[0], runs[1], strict=True))
    assert not runs[0][0][0].equal(runs[2][0][0])
    assert len(list(batches(data, data.train, 64, generator()))) == 1


def test_normalisation_comes_after_the_black_border():
    data = image_data(n=4, mean=torch.tensor([0.5, 0.5, 0.5]), std=torch.tensor([0.25, 0.25, 0.25]))
    images, _ = next(batches(data, Split(torch.full_like(data.train.images, 255), data.train.labels), 4, generator()))
    assert set(images.unique().tolist()) <= {-2.0, 2.0}
