"""The package as it is built and installed: the compiled library, its errors, its public names."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitfast
from vitfast import _C

LIBRARY = Path(_C.__file__)
PACKAGE = Path(vitfast.__file__).parent
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm reads the symbols of the built library")
elf_only = pytest.mark.skipif(
    platform.system() != "Linux", reason="symbol names of the C++ runtime are those of ELF systems"
)


def run_python(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter, with none of this one's modules."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


# ---- the built library ---------------------------------------------------------------------------------------------


def symbols(*options: str) -> list[str]:
    output = subprocess.run(["nm", "--dynamic", *options, LIBRARY], capture_output=True, text=True, check=True).stdout
    return [
        line.split(maxsplit=2)[-1] if line[0] != " " else line.split(maxsplit=1)[-1] for line in output.splitlines()
    ]


@needs_nm
@elf_only
def test_library_uses_nothing_of_libtorch_but_its_stable_abi():
    names = symbols("--undefined-only", "--demangle")
    assert names
    unstable = [name for name in names if re.search(r"\b(at|c10|torch)::", name)]
    assert unstable == []
    of_torch = {name for name in names if re.match(r"(U )?(aoti_)?torch_", name)}
    assert of_torch  # the C functions of the stable ABI


@needs_nm
@elf_only
def test_undefined_symbols_are_known():
    """Those of the stable ABI, of Python, and of the C and C++ runtimes; no second OpenMP, no BLAS."""
    known = re.compile(
        r"aoti_torch_\w+|torch_\w+"  # libtorch's stable C interface
        r"|_?Py\w+"  # Python
        r"|_Z\w+|__cxa_\w+|__gxx_personality_v0|__dynamic_cast|__once_proxy"  # C++ runtime, seen to hold no torch above
        r"|__gmon_start__|_ITM_\w+|__stack_chk_fail|__cpu_\w+|_Unwind_\w+"  # compiler runtime
        r"|\w*mem(cpy|set|move|cmp|chr)\w*|\w*str\w+|malloc|calloc|realloc|free|abort|\w*printf\w*|__\w*_chk"
        r"|__libc_single_threaded|__errno_location|__assert_fail|__tls_get_addr|pthread_\w+|std\w+|f?(put|write)\w*|dl\w+|erfc?|exp\w*|log\w*|sqrt\w*|tanh|sysconf|madvise|m(un)?map|__register_atfork"
    )
    names = [re.sub(r"^[UwV] ", "", name).split("@")[0] for name in symbols("--undefined-only")]
    assert [name for name in names if not known.fullmatch(name)] == []


@needs_nm
@elf_only
def test_library_exports_its_module_function_only():
    exported = [re.sub(r"^[A-Za-z] ", "", name) for name in symbols("--defined-only")]
    linker = {"__bss_start", "_edata", "_end", "_init", "_fini"}
    templates = "_Z"  # of the C++ library, which the compiler exports so that all libraries share one copy
    assert [name for name in exported if not name.startswith(templates) and name not in linker] == ["PyInit__C"]


def test_library_does_not_tell_where_it_was_built():
    assert str(Path(vitfast.__file__).parents[1]).encode() not in LIBRARY.read_bytes()


def test_build_info():
    info = _C.build_info()
    assert set(info) == {"compiler", "flags", "torch_target", "instruction_sets", "cuda_architectures"}
    assert "-march=native" not in info["flags"]
    assert tuple(map(int, info["torch_target"].split("."))) >= (2, 10)
    assert info["instruction_sets"][0] == "baseline"
    assert info["compiler"]


# ---- instruction sets ----------------------------------------------------------------------------------------------


def test_forced_instruction_set_is_reported(instruction_set):
    assert _C.instruction_set() == instruction_set


def test_best_instruction_set_is_chosen():
    _C.set_instruction_set("baseline")
    _C.set_instruction_set(None)
    usable = _C.usable_instruction_sets()
    assert _C.instruction_set() == usable[-1]
    assert [name for name in _C.build_info()["instruction_sets"] if name in usable] == usable


@pytest.mark.parametrize("name", ["", "sse9", "AVX2", "native"])
def test_unknown_instruction_set(name):
    before = _C.instruction_set()
    with pytest.raises(ValueError, match=f"must be one of baseline, avx2, avx512; got '{name}'"):
        _C.set_instruction_set(name)
    assert _C.instruction_set() == before


@pytest.mark.parametrize("wrong", [2, ["avx2"], b"\xff"], ids=repr)
def test_instruction_set_that_is_no_name(wrong):
    with pytest.raises((TypeError, ValueError)):
        _C.set_instruction_set(wrong)


# ---- a missing or broken extension ---------------------------------------------------------------------------------

MISSING = "import sys; sys.modules['vitfast._C'] = None\n"  # how Python marks a module that cannot be imported
SETUP = "import torch, vitfast\nx = torch.ones(1, 2, 2, 1, 4)\n"
CALL = SETUP + "vitfast.functional.window_attention(x, x, x, window_size=2)\n"


def test_missing_extension_says_how_to_build_it():
    result = run_python(MISSING + CALL)
    assert result.returncode == 1
    last = result.stderr[result.stderr.rindex("ExtensionError") :]
    assert "vitfast._C" in last
    assert "pip install --no-build-isolation" in last
    assert "vitfast.backend('reference')" in last


def test_missing_extension_does_not_hinder_the_reference():
    code = "with vitfast.backend('reference'): print(vitfast.functional.window_attention(x, x, x, window_size=2).sum())"
    result = run_python(MISSING + SETUP + code)
    assert result.returncode == 0, result.stderr
    assert "16" in result.stdout


def test_missing_extension_is_an_import_error_of_the_package():
    assert issubclass(vitfast.ExtensionError, ImportError)
    code = MISSING + "import vitfast\nfrom vitfast.ops import _extension\nprint(_extension.available())"
    result = run_python(code)
    assert result.stdout.strip() == "False", result.stderr


def test_broken_extension_says_what_is_wrong(tmp_path):
    """A library that does not load, as after a build for another PyTorch."""
    copy = tmp_path / "vitfast"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / LIBRARY.name).write_bytes(b"not a library")
    result = run_python(CALL, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    last = result.stderr[result.stderr.rindex("ExtensionError") :]
    assert LIBRARY.name in last
    assert "pip install --no-build-isolation" in last


# ---- the public surface --------------------------------------------------------------------------------------------


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+([.\w+]*)?", vitfast.__version__)


def test_public_names_exist():
    for name in vitfast.__all__:
        assert getattr(vitfast, name) is not None
    assert {"window_attention", "window_attention_qkvpacked"} <= set(vitfast.functional.__all__)
    for name in vitfast.functional.__all__:
        assert callable(getattr(vitfast.functional, name))


def test_operators_are_registered_by_the_import():
    for name in ("window_attention", "window_attention_qkvpacked"):
        for suffix in ("", "_backward"):
            assert hasattr(torch.ops.vitfast, name + suffix)


def test_works_from_another_folder(tmp_path):
    code = "import vitfast, torch\nx = torch.ones(1, 2, 2, 1, 4)\n"
    code += "print(vitfast.functional.window_attention(x, x, x, window_size=2).shape)"
    result = run_python(code, cwd=tmp_path)
    assert result.stdout.strip() == "torch.Size([1, 2, 2, 1, 4])", result.stderr


def test_two_processes_after_fork_compute_the_same(tmp_path):
    """A data loader's workers inherit the parent's state and may call the operator."""
    code = """
import multiprocessing, torch, vitfast
x = torch.linspace(-1, 1, 4 * 49 * 64).view(4, 7, 7, 2, 32)
def work(_):
    torch.set_num_threads(1)
    return vitfast.functional.window_attention(x, x, x, window_size=7).sum().item()
if __name__ == "__main__":
    torch.set_num_threads(1)
    here = work(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(set(pool.map(work, range(4))) == {here})
"""
    result = run_python(code, cwd=tmp_path)
    assert result.stdout.strip() == "True", result.stderr
