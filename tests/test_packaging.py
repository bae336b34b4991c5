"""`pip install .` from the checkout and from an sdist: build isolation, no torch at build time."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Quick to compile: no nvcc, and not optimised, which the build under all other tests is.
QUICK = {"FEWSTEP_CUDA": "off", "FEWSTEP_CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"}
ENV = {**os.environ, **QUICK}


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build sdist -> wheel in isolated environments."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT), env=ENV)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_sdist_holds_sources_and_no_builds(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = run("git", "ls-files", "csrc", "kernels", "python", cwd=ROOT).split()
    wanted = {p for p in tracked if Path(p).name not in {".gitignore"}}
    assert not wanted - names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.slow
def test_wheel_from_sdist_runs_outside_the_checkout(built, tmp_path):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert [name for name in names if name.startswith("fewstep/_C.")]
    for name in ("fewstep/py.typed", "fewstep/ops/validated.json"):
        assert name in names
    kernels = {f"fewstep/kernels/{p.name}" for p in (ROOT / "kernels" / "triton").glob("*.py")}
    assert not kernels - set(names)
    tracked = run("git", "ls-files", "python/fewstep/assets", cwd=ROOT).split()
    wanted = {p.removeprefix("python/") for p in tracked if not p.endswith(".gitignore")}
    assert not wanted - set(names)

    code = (
        "import fewstep, torch; from fewstep import ops; import sys;"
        "assert fewstep.__file__.startswith(sys.argv[1]), fewstep.__file__;"
        "x, y = torch.randn(2, 3, 64), torch.randn(2, 3, 64);"
        "torch.testing.assert_close(ops.cache_metric(x, y, impl='native'),"
        " ops.cache_metric(x, y, impl='reference'))"
    )
    site = str(tmp_path / "site")
    run(sys.executable, "-c", code, site, cwd=tmp_path, env={**os.environ, "PYTHONPATH": site})


@pytest.mark.slow
def test_an_unpacked_sdist_builds_again(built, tmp_path):
    """What the first build leaves behind neither breaks nor enters the second."""
    shutil.unpack_archive(built[0], tmp_path)
    (tree,) = (path for path in tmp_path.iterdir() if path.is_dir())
    contents = []
    for attempt in ("first", "second"):
        out = tmp_path / attempt
        run(sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(tree), env=ENV)
        with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
            contents.append(sorted(archive.namelist()))
    assert contents[0] == contents[1]
