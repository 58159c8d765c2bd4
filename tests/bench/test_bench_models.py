"""Benchmark cases of whole models, with models small enough for a test."""

import libraries  # noqa: F401  (before the libraries themselves)
import pytest
import timm
import torch
import torchvision
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast import bench
from vitfast.bench import libraries as bench_libraries
from vitfast.bench import models, runner
from vitfast.bench.case import OURS, Case, Unavailable
from vitfast.bench.models import INFERENCE, ORIGINAL, TRAINING
from vitfast.bench.processes import FLOOR, ProcessTimer, workers
from vitfast.bench.runner import DEFAULT_ROUNDS, RECORD_KEYS, error_limit
from vitfast.bench.timing import interleave

CPU = torch.device("cpu")


def timm_swin():
    shape = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2)}
    return timm.models.SwinTransformer(num_classes=5, **shape)


def torchvision_swin():
    return torchvision.models.SwinTransformer([2, 2], 24, [2, 2], [1, 2], [4, 4], num_classes=5)


def transformers_vit():
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config)


MODELS = {"timm": timm_swin, "torchvision": torchvision_swin, "transformers": transformers_vit}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
each_phase = pytest.mark.parametrize("phase", [INFERENCE, TRAINING])


def workload(build, phase):
    torch.manual_seed(0)
    return models.make_workload(build(), side=32, batch=3, phase=phase, device=CPU, dtype=torch.float32)


def tiny_case(phase, make=None):
    make = make or (lambda device, dtype: workload(timm_swin, phase))
    return Case("models", "tiny", phase, "tiny", (OURS, ORIGINAL), make, compiles=False)


class FixedRates:
    """Rates that are given instead of measured."""

    def __init__(self, device, dtypes):
        self.gemm_gflops, self.copy_gbs, self.samples = dict.fromkeys(dtypes, 100.0), 10.0, 0

    def sample(self):
        self.samples += 1


@pytest.fixture
def _fixed_rates(monkeypatch):
    monkeypatch.setattr(runner, "Rates", FixedRates)


@each_model
@each_phase
def test_accelerated_models_give_what_the_originals_give(build, phase):
    work = workload(build, phase)
    results = {variant.name: variant.run() for variant in work.variants}
    expected = work.expected()
    assert list(results) == [OURS, ORIGINAL]
    assert work.details["replaced"] > 0
    errors = {name: runner.relative_error(values, expected) for name, values in results.items()}
    assert errors[OURS] <= error_limit(errors[ORIGINAL], torch.float32)


@each_model
@each_phase
def test_the_limit_is_that_of_the_same_model_without_attention(build, phase):
    work = workload(build, phase)
    for ours, floor in zip(work.variants[0].run(), work.floor(), strict=True):
        assert floor.shape == ours.shape
        assert floor.isfinite().all()


class OperatorNames(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@each_model
@each_phase
def test_the_step_without_attention_has_no_attention_and_nothing_else_that_is_fused(build, phase):
    work = workload(build, phase)
    with OperatorNames() as called:
        work.floor()
    assert "aten::addmm" in called.names
    forbidden = ("vitfast", "mkldnn::", "aten::_softmax", "aten::_safe_softmax", "aten::_scaled_dot_product")
    assert not [name for name in called.names if name.startswith(forbidden)]


@pytest.mark.usefixtures("_fixed_rates")
def test_records_have_the_limit_and_the_memory_of_the_original():
    report = bench.run([tiny_case(INFERENCE), tiny_case(TRAINING)], CPU, [torch.float32], rounds=2, command="")
    assert [record["impl"] for record in report["records"]] == [OURS, ORIGINAL] * 2
    for record in report["records"]:
        assert record.keys() == RECORD_KEYS.keys()
        assert record["attention_share"] == pytest.approx(1 - 1 / record["ratio_limit"])
    original = report["records"][1]
    assert original["memory_share"] == 1
    table = bench.format_report(report)
    assert "attention is " in table
    assert " of the original, limit " in table


@pytest.mark.usefixtures("_fixed_rates")
def test_a_model_that_is_not_there_is_left_out_with_the_reason():
    def make(device, dtype):
        raise Unavailable("timm is not installed: pip install timm")

    lines = []
    report = bench.run([tiny_case(INFERENCE, make)], CPU, [torch.float32], rounds=1, command="", announce=lines.append)
    assert not report["records"]
    assert report["skipped"][0]["reason"] == "timm is not installed: pip install timm"
    assert "not measured, timm is not installed" in "".join(lines)
    assert "timm is not installed" in bench.format_report(report)


def test_missing_libraries_are_named(monkeypatch):
    with pytest.raises(Unavailable, match="no_such_library is not installed: pip install no_such_library"):
        bench_libraries.load("no_such_library")

    def broken(name):
        raise OSError("undefined symbol")

    monkeypatch.setattr(bench_libraries.importlib, "import_module", broken)
    with pytest.raises(Unavailable, match=r"the import of timm fails with OSError; python -c 'import timm' shows why"):
        bench_libraries.load("timm")


def test_models_are_asked_for_by_name():
    names = [case.name for case in bench.cases("models")]
    assert len(names) == 10
    assert {name.split("/")[1] for name in names} == {
        "timm_swin_t",
        "timm_vit_s",
        "torchvision_swin_t",
        "transformers_vit_s",
        "transformers_swin_t",
    }
    assert not any(case.operator == "models" for case in bench.cases())
    assert DEFAULT_ROUNDS >= 10


def test_processes_take_turns():
    """A worker builds the case by its name; this one is the quickest to build that has one."""
    (case,) = bench.cases("models/timm_vit_s/inference")
    with workers(case, [OURS, FLOOR], torch.float32) as runs:
        seconds = interleave(runs, ProcessTimer(), rounds=2)
    assert list(seconds) == [OURS, FLOOR]
    assert all(sample > 0 for samples in seconds.values() for sample in samples)
    assert not any(worker._process.is_alive() for worker in runs.values())
