"""The optional native library; everything else is declared in pyproject.toml.

Without a C compiler the installation succeeds and decoding takes the PyTorch path. The library runs
on OpenMP's threads where the compiler has OpenMP, else on threads of its own; `HIRE_OPENMP=off` in
the environment builds it so everywhere.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FOLDER = Path("hireconvert") / "native"


class BuildKernels(build_ext):
    """Builds the plain shared library; with OpenMP where the compiler has it."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension. Raises build errors, which `optional` makes warnings."""
        plain, linked = ext.extra_compile_args, ext.extra_link_args
        if wants_openmp():
            ext.extra_compile_args = [*plain, "-fopenmp"]
            ext.extra_link_args = [*linked, "-fopenmp"]
            try:
                super().build_extension(ext)
                return
            except (CompileError, LinkError):
                self.force = True  # what was compiled asks for OpenMP
        ext.extra_compile_args, ext.extra_link_args = plain, linked
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: it is no Python module and has no init function."""
        return []


def wants_openmp() -> bool:
    """Not on macOS: whatever OpenMP there is, torch's wheel brings another one."""
    return sys.platform not in ("win32", "darwin") and os.environ.get("HIRE_OPENMP") != "off"


unix = sys.platform != "win32"
setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "hireconvert._kernels",
            sources=sorted(path.as_posix() for path in FOLDER.glob("*.c")),
            depends=sorted(path.as_posix() for path in FOLDER.glob("*.h")),
            # Products are fused where the kernels say so, whatever the compiler would like.
            extra_compile_args=["-std=c11", "-O2", "-g0", "-fvisibility=hidden", "-pthread",
                                "-ffp-contract=off"] if unix else [],
            extra_link_args=["-pthread"] if unix else [],
            libraries=["m"] if unix else [],
            optional=True,
        )
    ],
)  # fmt: skip
