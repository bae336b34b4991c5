"""Builds `fewstep._C` with CMake and maps the packages; everything else is in pyproject.toml.

`FEWSTEP_CUDA=auto|on|off` decides on the CUDA kernels, `FEWSTEP_CUDA_DEFINES` names macros to build
them with (variants to measure), `FEWSTEP_CMAKE_ARGS` is passed on verbatim.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
KERNELS = "kernels/triton"


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, the one build of record."""

    def build_extension(self, ext: Extension) -> None:
        """Build the native module into the place where setuptools expects it."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Inside the checkout, so that a second build only compiles what changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # Under build isolation Ninja lives in a folder that is gone at the next build, and
            # CMake would take its path from the cache.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DFEWSTEP_VERSION={self.distribution.get_version()}",
            f"-DFEWSTEP_CUDA={os.environ.get('FEWSTEP_CUDA', 'auto')}",
            f"-DFEWSTEP_CUDA_DEFINES={os.environ.get('FEWSTEP_CUDA_DEFINES', '')}",
            *shlex.split(os.environ.get("FEWSTEP_CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


packages = find_packages("python")
kernel_packages = [f"fewstep.kernels.{name}" for name in find_packages(KERNELS)]

setup(
    # Explicit map: kernels/ must not hold an __init__.py (it would shadow the `kernels` package
    # that diffusers imports), so the importable package is kernels/triton.
    packages=[*packages, "fewstep.kernels", *kernel_packages],
    package_dir={"": "python", "fewstep.kernels": KERNELS},
    package_data={
        "fewstep": ["py.typed"],
        "fewstep.ops": ["validated.json"],
        "fewstep.assets": ["**/*.safetensors", "**/*.json", "**/*.md"],
    },
    ext_modules=[Extension("fewstep._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
