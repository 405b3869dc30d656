"""The optional native library; everything else is declared in pyproject.toml.

Without a C compiler the installation succeeds and decoding takes the PyTorch path.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("hireconvert") / "native"


class BuildKernels(build_ext):
    """Builds the plain shared library; with OpenMP where the compiler has it, else one thread."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension. Raises CompileError, which `optional` makes a warning."""
        try:
            super().build_extension(ext)
        except CompileError:
            ext.extra_compile_args = [f for f in ext.extra_compile_args if f != "-fopenmp"]
            ext.extra_link_args = []
            super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: it is no Python module and has no init function."""
        return []


flags = (
    [] if sys.platform == "win32" else ["-std=c11", "-O2", "-g0", "-fvisibility=hidden", "-fopenmp"]
)
setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "hireconvert._kernels",
            sources=sorted(path.as_posix() for path in FOLDER.glob("*.c")),
            depends=sorted(path.as_posix() for path in FOLDER.glob("*.h")),
            extra_compile_args=flags,
            extra_link_args=[flag for flag in flags if flag == "-fopenmp"],
            libraries=["m"] if flags else [],
            optional=True,
        )
    ],
)
