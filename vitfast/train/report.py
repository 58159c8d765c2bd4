"""The study's report: one HTML page that needs nothing else, and the numbers behind it as JSON."""

from __future__ import annotations

import dataclasses
import json
from html import escape
from pathlib import Path
from string import Template

from vitfast.train import figures
from vitfast.train.study import ModelResult, StudyResult

__all__ = ["render", "write"]

IMAGES_SHOWN = 4
HEADS_SHOWN = 6


def write(result: StudyResult, folder: str | Path) -> Path:
    """Writes ``index.html`` and ``results.json`` into ``folder``, which is made if need be; returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(result.summary(), indent=1, allow_nan=False)
    page = folder / "index.html"
    (folder / "results.json").write_text(numbers + "\n", encoding="utf-8")
    page.write_text(render(result), encoding="utf-8")
    return page


def render(result: StudyResult) -> str:
    """The page as a string."""
    data, views = result.data, result.attention
    models = result.models.values()
    colours = {"alternet": figures.FIRST, "resnet": figures.SECOND, "smoothed": figures.THIRD}
    coloured = [(model, colours[name]) for name, model in result.models.items()]
    curves = [(model.title, colour, model.logs) for model, colour in coloured]
    noisy = [(model.title, colour, {0.0: model.held_out} | model.noisy) for model, colour in coloured]
    shown = data.held_out.images[result.attention_images[:IMAGES_SHOWN]]
    channels, height, width = data.shape
    return _PAGE.substitute(
        style=_STYLE,
        data=escape(data.name),
        alternet=result.alternet.options["name"],
        resnet=result.resnet.options["name"],
        smoothed=result.smoothed.options["name"],
        classes=len(data.classes),
        image=f"{height} x {width} pixels, {'grey' if channels == 1 else 'in colour'}",
        train_images=f"{len(data.train):,}",
        held_out_images=f"{len(data.held_out):,}",
        epochs=result.recipe.epochs,
        tiles=_tiles(result),
        models="".join(_model_row(model) for model in models),
        only_alternet=result.only_right[0],
        only_resnet=result.only_right[1],
        accuracy_curves=figures.accuracy_curves("accuracy", curves),
        loss_curves=figures.loss_curves("loss", curves),
        reliability="".join(
            _figure(figures.reliability(f"reliability{i}", model.title, colour, model.held_out.reliability_diagram))
            for i, (model, colour) in enumerate(coloured, start=1)
        ),
        noise_curves=figures.noise_curves("noise", noisy),
        steps=_steps(result),
        attention_images=len(result.attention_images),
        on_images=figures.attention_on_images("images", shown, views),
        by_offset=figures.attention_by_offset("offset", views, heads=HEADS_SHOWN),
        distances=figures.attention_distances("distance", figures.FIRST, views),
        heads_shown=HEADS_SHOWN,
        blocks=", ".join(f"<code>{escape(view.name)}</code>" for view in views),
        settings=_details(
            {"options": result.options, "recipe": dataclasses.asdict(result.recipe)} | result.environment
        ),
        seconds=f"{result.seconds:.0f}",
    )


def _tiles(result: StudyResult) -> str:
    tiles = [
        (f"{100 * model.held_out.accuracy:.1f} %", f"accuracy of {model.title}") for model in result.models.values()
    ]
    tiles.append(
        (f"{result.step_ratio:.2f} x", "plain PyTorch's time for a training step of AlterNet, over the fused one's")
    )
    return "".join(f'<div class="tile"><b>{value}</b>{escape(label)}</div>' for value, label in tiles)


def _model_row(model: ModelResult) -> str:
    held_out = model.held_out
    cells = [
        f"{model.parameters / 1e6:.2f} M",
        _with_interval(held_out.accuracy, held_out.accuracy_interval, "{:.1f}", 100),
        _with_interval(held_out.nll, held_out.nll_interval, "{:.3f}"),
        _with_interval(
            held_out.expected_calibration_error, held_out.expected_calibration_error_interval, "{:.1f}", 100
        ),
        f"{model.training_seconds:.0f} s",
    ]
    return f"<tr><th>{escape(model.title)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _with_interval(value: float, interval: tuple[float, float], form: str, factor: float = 1) -> str:
    value, low, high = (form.format(factor * number) for number in (value, *interval))
    return f"{value} <small>{low} to {high}</small>"


def _steps(result: StudyResult) -> str:
    names = {
        "alternet": ("AlterNet\nfused", figures.FIRST),
        "alternet_plain": ("AlterNet\nplain PyTorch", figures.MUTED),
        "resnet": ("ResNet\n(no attention)", figures.SECOND),
    }
    bars = [(label, colour, result.step_seconds[name]) for name, (label, colour) in names.items()]
    agreement = result.agreement
    return _figure(figures.step_bars("steps", bars)) + _STEP_TEXT.substitute(
        rounds=len(result.step_seconds["alternet"]),
        batch_size=min(result.recipe.batch_size, len(result.data.train)),
        ratio=f"{result.step_ratio:.2f}",
        loss_fused=f"{agreement.loss_fused:.7g}",
        loss_plain=f"{agreement.loss_plain:.7g}",
        loss_float64=f"{agreement.loss_float64:.7g}",
        error_fused=f"{agreement.gradient_error_fused:.1e}",
        error_plain=f"{agreement.gradient_error_plain:.1e}",
        difference=f"{agreement.gradient_difference:.1e}",
    )


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _details(sections: dict) -> str:
    rows = (
        f"<tr><td>{escape(section)}</td><td>{escape(str(name))}</td><td>{escape(_plain(value))}</td></tr>"
        for section, entries in sections.items()
        for name, value in entries.items()
    )
    return "<table class='settings'>" + "".join(rows) + "</table>"


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --muted: #59636e; --grid: #dfe3e8; --tile: #f4f6f8;
  --first: #1f6fb4; --second: #c4601c; --third: #3d7d3a; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e4e8ec; --muted: #9aa5b1; --grid: #343c46;
  --tile: #1e242b; --first: #64aef0; --second: #f09a58; --third: #7cc576; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.2rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: var(--first); }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
.tile { flex: 1 1 12rem; background: var(--tile); border-radius: .5rem; padding: .8rem 1rem; color: var(--muted); }
.tile b { display: block; color: var(--ink); font-size: 1.7rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { flex: 1 1 24rem; min-width: 0; max-width: 40rem; margin: .8rem 0; }
figure.wide { max-width: 46rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, small, .note { color: var(--muted); font-size: .86rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
td small { display: block; white-space: nowrap; }
.settings { font-size: .86rem; overflow-wrap: anywhere; }
code { font-size: .92em; }
"""

_STEP_TEXT = Template(
    """<p>One training step (forward, backward, optimiser) on a batch of $batch_size images; bars are medians, dots the
$rounds measured steps of each way, taken in turn. Plain PyTorch takes <b>$ratio times</b> as long as the fused
kernels for the same model; only the attention differs, everything else of the network is the same code.</p>
<p>Both compute the same step. Loss: $loss_fused fused, $loss_plain plain, $loss_float64 in float64. Relative distance
of the gradient of all parameters from its float64 value: $error_fused fused, $error_plain plain; from each other:
$difference.</p>"""
)

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>vitfast study: $data</title>
<style>$style</style>
</head>
<body>
<h1>AlterNet, the ResNet it comes from and a smoothed one, on $data</h1>
<p>A ResNet (<code>$resnet</code>), AlterNet (<code>$alternet</code>), which is that ResNet with attention in windows in
place of the last block of its later stages, and the ResNet with a blur after its stages (<code>$smoothed</code>),
trained by one recipe for $epochs epochs on $train_images images ($classes classes, $image). Every measure of quality is
taken on $held_out_images images held out from training.</p>
<div class="tiles">$tiles</div>

<h2>How good they are</h2>
<div class="scroll"><table>
<tr><th></th><th>parameters</th><th>accuracy (%)</th><th>NLL (nats)</th><th>ECE (%)</th><th>training</th></tr>
$models
</table></div>
<p class="note">Small numbers are 95 % intervals over samples of as many held-out images; they say nothing of another
training run with another seed. NLL is the mean negative log-likelihood, ECE the expected calibration error in 15
bins. Of AlterNet and the ResNet, only AlterNet classifies
$only_alternet of the images correctly, only the ResNet $only_resnet.</p>

<h2>How they learned</h2>
<div class="figures"><figure>$accuracy_curves</figure><figure>$loss_curves</figure></div>
<p class="note">Training images are shifted at random, held-out images are not, so training accuracy can be the lower
one.</p>

<h2>Whether they know what they know</h2>
<p>Of the predictions a model makes with confidence 0.8, eight in ten should be right: bars on the dashed line. Bars
above it are images where the model is too modest, bars below it where it is too sure of itself.</p>
<div class="figures">$reliability</div>

<h2>What noise does to them</h2>
<p>White noise on the held-out images, the same for all models, none of which was trained with noise. A blur is a
low-pass filter, and high frequencies are where noise differs most from images; whether that shows in a single training
run is another question.</p>
<figure>$noise_curves<figcaption>Accuracy against the standard deviation of the noise, where black is 0 and white is 1.
Bands are 95 % intervals over samples of images.</figcaption></figure>

<h2>How long a training step takes</h2>
$steps

<h2>What the attention looks at</h2>
<p>AlterNet's attention blocks, first to last: $blocks. Each place attends to the places of its own window. A value of
1 is what a place would get if attention were uniform.</p>
<figure class="wide">$on_images<figcaption>Attention received by each place, averaged over heads and queries, in
held-out images drawn at random from different classes. Lines are the borders of the windows; each block has its own
scale.</figcaption></figure>
<div class="figures">
<figure>$by_offset<figcaption>Where the first $heads_shown heads look, seen from the query (+): the mean over all
queries of $attention_images images.</figcaption></figure>
<figure>$distances<figcaption>How far each head looks: the distance to what it attends to, weighted by
attention.</figcaption>
</figure>
</div>

<h2>How this was made</h2>
<p>The study took $seconds s. All numbers are in <a href="results.json">results.json</a>.</p>
<details><summary>Options, recipe, machine and versions</summary><div class="scroll">$settings</div></details>
</body>
</html>
"""
)
