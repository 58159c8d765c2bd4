"""Large results ask the system for huge pages."""

import platform
from pathlib import Path

import pytest
import torch

import vitfast
from vitfast import _C, functional

SIDE = 2 << 20  # of a huge page

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="other systems have no /proc and no madvise")


def flags_of(address: int) -> list[str]:
    """The flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("the address is not mapped")


def large_results() -> dict[str, torch.Tensor]:
    qkv = torch.randn(2, 56, 56, 3, 8, 32, requires_grad=True)
    window = functional.window_attention_qkvpacked(qkv, window_size=7)
    tokens = functional.attention_qkvpacked(qkv.detach().flatten(1, 2))
    image = torch.randn(2, 64, 112, 112)
    return {
        "window": window,
        "gradient": torch.autograd.grad(window.sum(), qkv)[0],
        "tokens": tokens,
        "blur": functional.blur_pool2d(image, torch.ones(3) / 3),
    }


@pytest.mark.parametrize("kept", [0, 256 << 20], ids=["new memory", "kept memory"])
def test_whole_huge_pages_of_large_results_are_asked_for(kept):
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    _C.poison_scratch(False)  # poisoned memory comes from PyTorch
    before = vitfast.keep_result_memory(kept)
    try:
        for name, result in large_results().items():
            assert result.nbytes > 2 * SIDE
            first = -(-result.data_ptr() // SIDE) * SIDE
            assert "hg" in flags_of(first), name
            assert "hg" in flags_of(first + SIDE - 1), name
    finally:
        vitfast.keep_result_memory(before)
