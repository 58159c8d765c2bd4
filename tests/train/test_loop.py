import copy

import pytest
import torch
from torch import nn

from vitfast.train import DivergedError, ImageData, Recipe, Split, evaluate, predict, train


def brightness_data(n=96):
    """Dark images are of class 0, bright ones of class 1."""
    labels = torch.arange(n) % 2
    noise = torch.randint(0, 60, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images = (noise + 150 * labels[:, None, None, None]).to(torch.uint8)
    split = Split(images, labels)
    return ImageData("brightness", ("dark", "bright"), split, split, False, torch.tensor([0.4]), torch.tensor([0.3]))


def small_model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 2)
    )


def test_training_learns_and_logs_every_epoch():
    data, model, heard = brightness_data(), small_model(), []
    logs = train(model, data, Recipe(epochs=4, batch_size=16), on_epoch=heard.append)
    assert heard == logs
    assert [log.epoch for log in logs] == [1, 2, 3, 4]
    assert logs[-1].train_loss < logs[0].train_loss
    assert logs[-1].held_out_accuracy == 1.0
    held_out = evaluate(model, data, data.held_out)
    assert held_out.accuracy == logs[-1].held_out_accuracy
    assert held_out.nll == logs[-1].held_out_nll


def test_the_same_seed_gives_the_same_run():
    data = brightness_data()
    recipe = Recipe(epochs=2, batch_size=16)
    runs = [train(small_model(dropout=0.5), data, recipe, seed=seed) for seed in (3, 3, 4)]
    numbers = [[(log.train_loss, log.train_accuracy, log.held_out_nll) for log in run] for run in runs]
    assert numbers[0] == numbers[1]
    assert numbers[0] != numbers[2]


def test_a_step_is_the_one_of_torch():
    """The loop's first epoch against the same steps written out."""
    from vitfast.train.data import batches
    from vitfast.train.recipes import cosine_schedule, make_optimizer

    data, recipe, model = brightness_data(), Recipe(epochs=1, batch_size=32, label_smoothing=0.1), small_model()
    expected = copy.deepcopy(model)
    train(model, data, recipe, seed=5)

    optimizer = make_optimizer(expected, recipe)
    schedule = cosine_schedule(optimizer, 3, 3)
    for images, labels in batches(data, data.train, 32, torch.Generator().manual_seed(5)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
    for got, want in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert got.equal(want)


def test_predict_uses_evaluation_mode_and_restores_the_mode():
    data, model = brightness_data(), small_model(dropout=0.9).train()
    before = copy.deepcopy(model.state_dict())
    logits = predict(model, data, data.held_out, batch_size=7)
    assert model.training
    assert not logits.requires_grad
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(data.normalize(data.held_out.images))
    torch.testing.assert_close(logits, expected.log_softmax(1))


def test_a_diverged_run_says_so():
    model = small_model()
    with torch.no_grad():
        model[-1].weight.fill_(torch.inf)
    with pytest.raises(DivergedError, match=r"epoch 1.*learning rate"):
        train(model, brightness_data(), Recipe(epochs=1))


def test_progress_is_told_of_every_step():
    seen = []

    def track(iterable, description, total):
        seen.append((description, total))
        return iterable

    train(small_model(), brightness_data(), Recipe(epochs=2, batch_size=40), track=track)
    assert seen == [("epoch 1/2", 2), ("epoch 2/2", 2)]
