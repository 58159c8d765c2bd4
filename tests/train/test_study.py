"""The whole study, on images that take a second to learn."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from vitfast.analysis import calibration
from vitfast.train import DataError, Recipe, report, study
from vitfast.train.study import images_to_look_at


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of noisy images, dark & bright; the names need escaping in HTML."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images") / "dark & <bright>"
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(("dark & dim", "<bright>")):
        (root / name).mkdir(parents=True)
        for i in range(40):
            noise = torch.randint(0, 90, (16, 16, 3), generator=generator) + 150 * label
            Image.fromarray(noise.to(torch.uint8).numpy()).save(root / name / f"{i}.png")
    return root


PRESET = dataclasses.replace(
    study.PRESETS["quick"],
    recipe=Recipe(epochs=2, batch_size=16, lr=5e-3),
    alternet=study.PRESETS["quick"].alternet | {"width": 4},
    resnet=study.PRESETS["quick"].resnet | {"width": 4},
    smoothed=study.PRESETS["quick"].smoothed | {"width": 4},
    image_size=16,
    timing_rounds=2,
)


@pytest.fixture(scope="module")
def heard():
    return []


@pytest.fixture(scope="module")
def result(folder, heard):
    return study.run(str(folder), preset=PRESET, options={"seed": 0}, environment={"machine": {}}, say=heard.append)


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    return report.write(result, tmp_path_factory.mktemp("out") / "new" / "report")


# ---- the study -------------------------------------------------------------------------------------------------------


def test_all_models_are_trained_on_the_same_images(result, heard):
    assert (len(result.data.train), len(result.data.held_out)) == (64, 16)
    for model in result.models.values():
        assert [log.epoch for log in model.logs] == [1, 2]
        assert model.logs[-1].train_loss < model.logs[0].train_loss
        assert model.held_out.labels.equal(result.data.held_out.labels)
        assert model.held_out.accuracy == model.logs[-1].held_out_accuracy
        assert not model.model.training
    said = "\n".join(heard)
    assert "64 images to train on, 16 held out, 3x16x16, 2 classes" in said
    assert said.count("epoch   2/2") == 3


def test_alternet_has_the_attention_and_the_resnet_has_none(result):
    from vitfast.nn import LocalAttention2d

    attention = [m for m in result.alternet.model.modules() if isinstance(m, LocalAttention2d)]
    assert len(attention) == 3
    assert not any(isinstance(m, LocalAttention2d) for m in result.resnet.model.modules())
    assert [view.map_size for view in result.attention] == [(8, 8), (4, 4), (2, 2)]
    assert [len(view.distance) for view in result.attention] == [6, 12, 24]


def test_smoothed_resnet_is_the_resnet_with_smoothing(result):
    from vitfast.nn import Smoothing2d

    smoothings = [m for m in result.smoothed.model.modules() if isinstance(m, Smoothing2d)]
    assert len(smoothings) == 4
    assert result.smoothed.parameters == result.resnet.parameters
    assert not any(isinstance(m, Smoothing2d) for m in result.resnet.model.modules())


def test_noise_is_measured(result):
    for model in result.models.values():
        assert list(model.noisy) == list(study.NOISE)
        assert not model.noisy[0.25].logits.equal(model.held_out.logits)
        assert model.noisy[0.25].labels.equal(model.held_out.labels)
    numbers = result.summary()["models"]["smoothed"]["with_noise"]
    weakest = result.smoothed.noisy[0.05]
    assert numbers[0] == {"deviation": 0.05, "accuracy": weakest.accuracy, "nll": weakest.nll}


def test_steps_are_timed_and_agree(result):
    assert {name: len(seconds) for name, seconds in result.step_seconds.items()} == {
        "alternet": 2,
        "alternet_plain": 2,
        "resnet": 2,
    }
    medians = result.step_medians
    assert result.step_ratio == medians["alternet_plain"] / medians["alternet"]
    assert result.agreement.gradient_error_fused <= 2 * result.agreement.gradient_error_plain + 2**-23


def test_images_only_one_model_gets_right(result):
    alternet, resnet = result.only_right
    difference = result.alternet.held_out.accuracy - result.resnet.held_out.accuracy
    assert (alternet - resnet) / len(result.data.held_out) == pytest.approx(difference)


def test_the_summary_is_json_with_the_measures(result):
    numbers = json.loads(json.dumps(result.summary(), allow_nan=False))
    model, held_out = numbers["models"]["alternet"], result.alternet.held_out
    assert model["nll"] == calibration.nll(held_out.logits, held_out.labels)
    assert tuple(model["nll_interval_95"]) == calibration.nll_interval(held_out.logits, held_out.labels)
    assert tuple(model["accuracy_interval_95"]) == calibration.wilson_interval(held_out.accuracy, 16)
    assert model["expected_calibration_error"] == held_out.expected_calibration_error
    assert sum(model["reliability_diagram"]["count"]) == 16
    assert None in model["reliability_diagram"]["accuracy"]  # where a bin is empty
    assert len(model["epochs"]) == 2
    assert model["parameters"] == sum(p.numel() for p in result.alternet.model.parameters())
    assert numbers["recipe"]["epochs"] == 2
    assert numbers["options"] == {"seed": 0}


def test_the_same_seed_gives_the_same_study(folder, result):
    preset = dataclasses.replace(PRESET, timing_rounds=1)
    again, other = (study.run(str(folder), preset=preset, seed=seed) for seed in (0, 1))
    assert again.alternet.held_out.logits.equal(result.alternet.held_out.logits)
    assert again.resnet.held_out.logits.equal(result.resnet.held_out.logits)
    assert not other.data.held_out.images.equal(result.data.held_out.images)


def test_images_to_look_at_are_of_different_classes():
    labels = torch.tensor([0] * 50 + [1] * 3 + [3] * 2)
    places = images_to_look_at(labels, torch.Generator().manual_seed(0), count=20)
    assert labels[places[:3]].tolist() == [0, 1, 3]
    assert len(set(places.tolist())) == 20
    assert images_to_look_at(labels, torch.Generator()).sort().values.tolist() == list(range(55))


def test_images_that_cannot_be_used_stop_the_study(tmp_path):
    with pytest.raises(DataError, match="two classes"):
        study.run(str(tmp_path), preset=PRESET)


def test_presets_name_models_that_exist():
    from vitfast import create_model

    for preset in study.PRESETS.values():
        for options in (preset.alternet, preset.resnet, preset.smoothed):
            with torch.device("meta"):
                create_model(num_classes=10, in_channels=1, **options)


# ---- the report ------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects what a page consists of and checks that every element is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.svg_open = [], [], [], "", 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def values(self, *names):
        return [value for _, name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(page, written):
    text = written.read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert set(page.values("href")) - {"results.json"} == set()
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.values("xlink:href", "src"))
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert (written.parent / "results.json").is_file()
    assert sorted(file.name for file in written.parent.iterdir()) == ["index.html", "results.json"]


def test_the_page_has_every_figure_with_a_description(page):
    assert page.tags.count("svg") == 10
    labels = page.values("aria-label")
    assert len(labels) == 10
    assert all(labels)


def test_identifiers_are_unique_and_references_lead_somewhere(page, written):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    text = written.read_text(encoding="utf-8")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {v[1:] for v in page.values("xlink:href") if v.startswith("#")}
    assert used
    assert used <= set(ids)


def test_colours_follow_the_page(written):
    from vitfast.train.figures import FIRST, GRID, INK, MUTED, SECOND, THIRD

    text = written.read_text(encoding="utf-8")
    assert not [colour for colour in (INK, MUTED, GRID, FIRST, SECOND, THIRD) if colour in text]
    defined = re.findall(r"(--\w+): #", text[: text.index("</style>")])
    assert set(re.findall(r"var\((--\w+)\)", text)) == set(defined)
    assert all(defined.count(name) == 2 for name in defined)  # once for a light page, once for a dark one
    assert "prefers-color-scheme: dark" in text


def test_the_page_tells_the_numbers(page, result):
    for model in result.models.values():
        assert f"{100 * model.held_out.accuracy:.1f} %" in page.text
        assert f"{model.held_out.nll:.3f} " in page.text
    assert f"{result.step_ratio:.2f} x" in page.text
    assert "$" not in page.text


def test_names_are_escaped(page, written):
    assert "on dark & <bright>" in page.text
    assert "<bright>" not in written.read_text(encoding="utf-8")


def test_results_are_the_summary(written, result):
    assert json.loads((written.parent / "results.json").read_text()) == json.loads(json.dumps(result.summary()))


def test_writing_again_replaces_the_report(written, result):
    before = written.read_bytes()
    assert report.write(result, written.parent) == written
    assert written.read_bytes() == before  # figures have the same identifiers in every run
