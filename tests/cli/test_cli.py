"""The commands, run in this process, and twice as a process of their own."""

import json
import os
import subprocess
import sys

import pytest

import vitfast
from vitfast.cli import main
from vitfast.train import progress, study


def run(capsys, *argv):
    """(exit code, standard output, standard error) of a command."""
    try:
        code = main(argv)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_process(*argv, **options):
    command = [sys.executable, "-m", "vitfast", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


# ---- all commands ----------------------------------------------------------------------------------------------------


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"vitfast {vitfast.__version__}\n", "")


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("study", "hessian", "bench", "models", "info"):
        assert command in out
        assert run(capsys, command, "--help")[0] == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "required: command"),
        (("stdy",), "invalid choice: 'stdy'"),
        (("models", "--num-classes", "0"), "--num-classes must be at least 1; got 0"),
        (("models", "no such model"), "no model matches 'no such model'"),
        (("study", "--preset", "huge"), "invalid choice: 'huge'"),
        (("study", "--epochs", "0"), "must be an integer of at least 1; got '0'"),
        (("study", "--width", "1.5"), "must be an integer of at least 1; got '1.5'"),
        (("study", "--data", "/no/such/folder"), "/no/such/folder does not exist"),
        (("study", "--device", "abacus"), "--device abacus cannot be used here"),
        (("study", "--lr", "-1"), "must be a number above 0; got '-1'"),
        (("study", "--lr", "nan"), "must be a number above 0; got 'nan'"),
        (("study", "--image-size", "4"), "must be an integer of at least 8; got '4'"),
        (("study", "--seed", "-1"), "must be an integer of at least 0; got '-1'"),
        (("study", "--seed", str(2**63)), f"must be an integer of at least 0 and at most {2**63 - 1}; got '{2**63}'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert err.startswith("vitfast")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_130(capsys, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run", interrupted)
    assert run(capsys, "study", "--out", str(tmp_path)) == (130, "", "\ninterrupted\n")


def test_a_diverged_run_is_a_failure_not_wrong_input(capsys, monkeypatch, tmp_path):
    from vitfast.train import DivergedError

    def diverged(*args, **kwargs):
        raise DivergedError("the loss became nan in epoch 1")

    monkeypatch.setattr(study, "run", diverged)
    code, _, err = run(capsys, "study", "--out", str(tmp_path))
    assert (code, err) == (1, "vitfast study: error: the loss became nan in epoch 1\n")


def test_as_a_module():
    done = as_process("--version")
    assert (done.returncode, done.stdout) == (0, f"vitfast {vitfast.__version__}\n")


def test_a_reader_that_stops_reading_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "vitfast", "models", "alternet_18"],
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"")


# ---- info and models -------------------------------------------------------------------------------------------------


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for part in ("vitfast ", "python", "torch ", "cpu", "gpu", "compiled for", "in use"):
        assert part in out


def test_info_as_json(capsys):
    code, out, _ = run(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["vitfast"] == vitfast.__version__
    extension = found["extension"]
    assert extension["loaded"]
    assert extension["instruction_set"] in extension["instruction_sets"]


def test_info_without_the_extension_says_how_to_build_it(capsys, monkeypatch):
    from vitfast.ops import _extension

    monkeypatch.setattr(_extension, "_C", None)
    monkeypatch.setattr(_extension, "_load_error", ImportError("no module"))
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "pip install --no-build-isolation" in out
    assert json.loads(run(capsys, "info", "--json")[1])["extension"]["loaded"] is False


def test_models(capsys):
    code, out, _ = run(capsys, "models", "alternet_*", "--num-classes", "10")
    assert code == 0
    head, *rows = out.splitlines()
    assert "10 classes" in head
    assert [row.split()[0] for row in rows] == vitfast.list_models("alternet_*")
    parameters = sum(p.numel() for p in vitfast.create_model("alternet_18", num_classes=10).parameters())
    row = next(row for row in rows if row.startswith("alternet_18 "))
    assert int(row.split()[1].replace(",", "")) == parameters


# ---- hessian ---------------------------------------------------------------------------------------------------------


def test_hessian_writes_numbers_and_pictures(capsys, tmp_path):
    out = tmp_path / "hessian"
    options = ("--epochs", "1", "--set", "width=2", "--image-size", "8", "--batches", "2", "--batch-size", "8")
    code, said, err = run(capsys, "hessian", "--out", str(out), *options, "--eigenvalues", "2", "--steps", "5")
    assert code == 0, err
    assert "largest eigenvalues of all together" in said
    assert "are negative (NEP)" in said
    numbers = json.loads((out / "hessian.json").read_text())
    assert len(numbers["eigenvalues"]) == 2
    assert all(numbers["converged"])
    assert [len(values) for values in numbers["batch_eigenvalues"]] == [2, 2]
    for picture in ("density.svg", "largest.svg"):
        assert "<svg" in (out / picture).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "alexnet_9000"), "there is no model 'alexnet_9000'"),
        (("--set", "width"), "--set takes OPTION=VALUE; got 'width'"),
        (("--set", "colour=red"), "alternet_18 has no option colour"),
        (("--weights", "no/such.pt"), "there is no file no/such.pt"),
    ],
)
def test_hessian_names_wrong_input(capsys, tmp_path, options, message):
    code, _, err = run(capsys, "hessian", "--out", str(tmp_path), *options)
    assert code == 2
    assert message in err


# ---- study -----------------------------------------------------------------------------------------------------------


def test_study_writes_a_report(capsys, tmp_path):
    out = tmp_path / "some" / "report"
    code, said, err = run(
        capsys,
        *("study", "--out", str(out), "--epochs", "1", "--width", "4", "--image-size", "8", "--max-train", "64"),
        *("--batch-size", "32", "--lr", "0.01", "--seed", "3"),
    )
    assert (code, err) == (0, "")
    assert "64 images to train on, 359 held out, 1x8x8, 10 classes" in said
    assert f"the report: {out / 'index.html'}" in said
    assert (out / "index.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    numbers = json.loads((out / "results.json").read_text())
    assert numbers["options"] == {"preset": "quick", "data": "digits", "seed": 3, "device": "cpu"}
    assert numbers["recipe"] == numbers["recipe"] | {"epochs": 1, "batch_size": 32, "lr": 0.01}
    assert numbers["models"]["resnet"]["options"]["width"] == 4
    assert numbers["environment"]["versions"]["vitfast"] == vitfast.__version__


def test_study_does_not_train_when_the_report_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "report"):
        code, out, err = run(capsys, "study", "--out", str(folder))
        assert (code, out) == (2, "")
        assert f"{folder} cannot be used for the report" in err
        assert err.count("\n") == 1


def test_study_names_the_packages_it_lacks(capsys, monkeypatch, tmp_path):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, "study", "--out", str(tmp_path))
    assert code == 2
    assert "the study needs matplotlib and tqdm: pip install 'vitfast[study]'" in err


def test_bars_are_shown_on_a_terminal_only(capsys, monkeypatch):
    assert list(progress.bar(iter("abc"), "counting", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.bar(iter("abc"), "counting", 3)) == ["a", "b", "c"]
    assert "counting" in capsys.readouterr().err
