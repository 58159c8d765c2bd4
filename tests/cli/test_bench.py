import json

import pytest
import torch

from vitfast.bench import runner, timing
from vitfast.cli import main


def exit_code(*arguments):
    """What the shell sees: argparse exits by itself, commands return."""
    try:
        return main(["bench", *arguments])
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "expected an integer of at least 1; got '0'"),
        (["--rounds", "many"], "expected an integer of at least 1; got 'many'"),
        (["--dtype", "int8"], "expected names from float32, float64, float16, bfloat16"),
        (["--dtype", "float32,float32"], "each once; got 'float32,float32'"),
        (["--dtype", ""], "expected names from"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["no_such_case"], "no case matches 'no_such_case'; vitfast bench --list and"),
        (["models/no_such_model"], "no case matches 'models/no_such_model'; vitfast bench --list and"),
        (["--json", "no/such/folder/out.json"], "there is no folder no/such/folder; create it first"),
        (["--json", "."], "--json: . is a folder; name a file in it"),
    ],
)
def test_wrong_input_is_named(capsys, monkeypatch, arguments, message):
    def measure(*_, **__):
        pytest.fail("measured in spite of wrong input")

    monkeypatch.setattr("vitfast.bench.run", measure)
    assert exit_code(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named_before_measuring(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("vitfast.bench.run", lambda *_, **__: pytest.fail("measured all the same"))
    link = tmp_path / "out.json"
    link.symlink_to(tmp_path / "no_such_folder" / "out.json")
    assert exit_code("swin_t_stage4", "--no-compile", "--json", str(link)) == 2
    assert f"--json: {link} cannot be written to: No such file or directory\n" in capsys.readouterr().err


def test_list(capsys):
    assert exit_code("swin_t_stage4", "--list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "window_attention/swin_t_stage4/forward",
        "window_attention/swin_t_stage4/forward_backward",
    ]


def test_no_gpu_is_no_failure(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exit_code("--device", "cuda") == 0
    assert "no CUDA device here: nothing was measured" in capsys.readouterr().out


def test_a_run_prints_a_table_and_writes_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("vitfast.bench.rates._PRODUCT_SIDE", {"cpu": 64})
    monkeypatch.setattr("vitfast.bench.rates._COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 0.0)
    path = tmp_path / "out.json"
    assert exit_code("swin_t_stage4/forward_b", "--rounds", "1", "--no-compile", "--json", str(path)) == 0
    printed = capsys.readouterr()
    report = json.loads(path.read_text())
    assert [record["impl"] for record in report["records"]] == ["vitfast", "sdpa", "math"]
    assert {frozenset(record) for record in report["records"]} == {frozenset(runner.RECORD_KEYS)}
    assert report["command"] == (
        "vitfast bench swin_t_stage4/forward_b --device cpu --dtype float32 --rounds 1 --no-compile"
    )
    assert str(tmp_path) not in path.read_text()
    assert "window_attention/swin_t_stage4/forward_backward  float32" in printed.out
    assert "torch.compile were left out" in printed.out
    assert "[1/1] window_attention/swin_t_stage4/forward_backward float32" in printed.err
