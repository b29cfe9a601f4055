"""What our kernels believe of the processor, against what the processor and PyTorch say of it."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from leangpt.layers import linear_cpu
from leangpt.system import c_library, processor

X86 = platform.machine() in ("x86_64", "AMD64")
CPUINFO = Path("/proc/cpuinfo")
needs_cpuinfo = pytest.mark.skipif(not CPUINFO.exists(), reason="needs /proc/cpuinfo")
needs_x86 = pytest.mark.skipif(not X86 or not CPUINFO.exists(), reason="needs Linux on x86-64")
SOURCES = sorted((ROOT / "leangpt").rglob("*.c"))


@needs_cpuinfo
def test_flags_are_the_processors():
    """Every word, from a plain search of the file; another reading than c_library's."""
    lines = CPUINFO.read_text().splitlines()
    line = next((x for x in lines if x.split(":")[0].strip() in ("flags", "Features")), None)
    want = line.split(":")[1].split() if line else [platform.machine()]
    assert c_library.processor_flags() == want


@needs_x86
def test_flags_agree_with_what_pytorch_asks_the_processor_itself():
    flags = c_library.processor_flags()
    pairs = {"avx512_vnni": "vnni", "avx512_bf16": "avx512_bf16", "amx_tile": "amx_tile"}
    for flag, name in pairs.items():
        asked = getattr(torch.cpu, f"_is_{name}_supported", None)
        if asked is not None:
            assert (flag in flags) == asked(), flag
    assert processor.fast_bfloat16() == ("amx_tile" in flags)
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":  # never more than there is; less where the environment says so
        assert {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= set(flags)
    if capability == "AVX2":
        assert {"avx2", "fma"} <= set(flags)


@pytest.mark.parametrize("flags", [[], ["avx2"], ["avx512f", "avx512bw", "avx512_bf16"]])
def test_without_vnni_the_products_are_pytorchs(monkeypatch, flags):
    monkeypatch.setattr(c_library, "processor_flags", lambda: flags)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert linear_cpu.load(linear_cpu.SOURCE) is None


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_held_down_the_products_are_pytorchs(monkeypatch, capability):
    monkeypatch.setattr(c_library, "processor_flags", lambda: ["avx512_vnni"])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear_cpu.load(linear_cpu.SOURCE) is None


def compiles(source, march, tmp_path):
    """Does the compiler build a C file of ours for that processor?"""
    command = ["cc", *c_library.FLAGS, f"-march={march}", "-Wno-psabi"]
    command += [f"-I{linear_cpu.HEADER.parent}", "-c", str(source), "-o", str(tmp_path / "x.o")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not X86 or not shutil.which("cc"), reason="needs x86-64 and a C compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_kernels_need_no_more_than_is_asked_for(source, tmp_path):
    """Cascade Lake is the first processor with avx512_vnni: those who ask for that flag get by
    with it. All others build for the first of all x86-64."""
    needs_vnni = "linear_cpu.h" in source.read_text()
    assert compiles(source, "cascadelake" if needs_vnni else "x86-64", tmp_path)
    if needs_vnni:
        assert not compiles(source, "x86-64-v4", tmp_path)  # or nothing would have to be asked
