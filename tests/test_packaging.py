"""The wheel: one for every Python and PyTorch, usable without a compiler, complete in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.wheel import check_libraries, faults, install, linked_environment

ROOT = Path(__file__).parents[1]


def build_wheel(target: Path, **environment: str) -> Path:
    """A wheel of the working tree less what git ignores, built in a copy so that nothing here is touched."""
    source = target / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", target, source]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


def python(wheel: Path, code: str) -> str:
    """What ``code`` prints with the wheel's content first on the path, in an empty folder."""
    installed = wheel.parent / "installed"
    if not installed.exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(installed)
    (wheel.parent / "empty").mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=wheel.parent / "empty",
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Without the CUDA library, which takes a minute to build: make wheel-test has it as well.

    Without optimisation, in a third of the time: nothing below depends on it, and what is installed here has it.
    """
    folder = tmp_path_factory.mktemp("wheel")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    assert compiler is not None, "there is no C++ compiler"
    quick = folder / "c++"
    quick.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} "$@" -O0\n')
    quick.chmod(0o755)
    return build_wheel(folder, VGG_FAST_CUDA="0", CXX=str(quick))


def test_the_wheel_is_for_every_python(wheel):
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]
    names = zipfile.ZipFile(wheel).namelist()
    assert "vgg_fast/_C.abi3.so" in names
    assert "vgg_fast/kernels/conv3x3.py" in names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "vgg_fast").rglob("*.py")} <= set(names)  # also a new subpackage
    assert "vgg_fast/py.typed" in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "benchmarks/"))]
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert wheel.stat().st_size < 30e6


def test_pip_installs_the_wheel_next_to_any_pytorch(wheel, tmp_path):
    """A CPU build of PyTorch that is there is enough, and no package of CUDA's is asked for."""
    assert faults(wheel, ("_C",)) == []
    python = linked_environment(tmp_path / "environment")
    install(wheel, python)
    check = [sys.executable, "-m", "pip", "--python", python, "check"]
    assert "vgg-fast" not in subprocess.run(check, capture_output=True, text=True).stdout, "a requirement is not met"
    (tmp_path / "empty").mkdir()
    assert "the CPU library loads" in check_libraries(python, "cpu", tmp_path / "empty")


@pytest.mark.parametrize(
    ("requirement", "said"),
    [("torch==2.13.0", "asks for"), ("torch>=2.10\nRequires-Dist: nvidia-cublas", "pulls"), ("torch>=2.10", "lacks")],
)
def test_a_faulty_wheel_is_found(tmp_path, requirement, said):
    bad = tmp_path / "vgg_fast-0.1.0-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("vgg_fast-0.1.0.dist-info/METADATA", f"Name: vgg-fast\nRequires-Dist: {requirement}\n")
        if said != "lacks":
            archive.writestr("vgg_fast/_C.abi3.so", "")
    (fault,) = faults(bad, ("_C",))
    assert said in fault


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"VGG_FAST_CUDA": "yes"}, "VGG_FAST_CUDA is 'yes'; it must be 0"),
        ({"VGG_FAST_CUDA": "1", "VGG_FAST_CUDA_ARCHS": "70"}, "'70' is no architecture .* such as 80,90"),
        ({"VGG_FAST_CUDA_ARCHS": "ampere"}, "'ampere' is no architecture"),
        # On a machine without nvcc the next thing that is wanting.
        ({"VGG_FAST_CUDA": "1", "VGG_FAST_CUDA_ARCHS": "80,990"}, "does not know sm_990; it knows .*sm_80|no nvcc"),
        ({"VGG_FAST_CUDA": "1", "PATH": "", "CXX": ""}, "VGG_FAST_CUDA=1, but no C\\+\\+ compiler was found|no nvcc"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_errors(tmp_path, variables, said):
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(said, done.stderr.splitlines()[-1]), done.stderr


def test_the_library_needs_no_python_and_only_stable_symbols(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("vgg_fast/_C.abi3.so", tmp_path)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    undefined = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert any(s.startswith("aoti_torch_") for s in undefined)
    assert not [s for s in undefined if s.startswith(("Py", "_Py"))]
    assert not [s for s in undefined if "c10" in s or "at4" in s or "2at" in s], "symbols of the unstable C++ ABI"


def test_the_installed_wheel_runs(wheel):
    code = "import torch, vgg_fast, vgg_fast.kernels; from vgg_fast import library; print(vgg_fast.__file__); "
    code += "print(library.missing('_C'), torch.ops.vgg_fast.conv3x3(torch.ones(1,3,4,4), torch.ones(8,3,3,3)).sum())"
    location, result = python(wheel, code).splitlines()
    assert location == str(wheel.parent / "installed/vgg_fast/__init__.py")
    assert result == "None tensor(2400.)"


def test_without_a_compiler_it_installs_works_and_says_what_it_lacks(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    wheel = build_wheel(tmp_path, PATH=str(tools), CXX="")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]
    code = """
import torch, vgg_fast
print(vgg_fast.backends()[0].reason)
x, w = torch.ones(1, 3, 4, 4), torch.ones(8, 3, 3, 3)
assert torch.equal(torch.ops.vgg_fast.conv3x3(x, w, None, True, True), torch.nn.functional.max_pool2d(
    torch.relu(torch.nn.functional.conv2d(x, w, padding=1)), 2))
from vgg_fast.accelerate import accelerate
from vgg_fast.explain import explain
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU()).eval()
expected = model(x)
torch.set_grad_enabled(False)
assert torch.equal(accelerate(model)(x), expected)
print("no C++ compiler" in str(explain(model, x)).replace("\\n", " "))
"""
    reason, explained = python(wheel, code).splitlines()
    assert reason == "no C++ compiler was found when vgg-fast was installed"
    assert explained == "True"


def test_a_library_that_does_not_compile_is_an_error(tmp_path):
    """Only a missing compiler is forgiven."""
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(AssertionError, match=r"_C does not compile with"):
        build_wheel(tmp_path, CXX=str(broken), CC=str(broken), PATH=f"{tmp_path}:{os.environ['PATH']}")
