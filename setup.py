"""The native kernels: a C extension that may fail to build. Everything else stands in pyproject.toml.

One wheel serves Python 3.11 and later (the stable ABI), and CPUs old and new: the kernels are compiled for several
instruction sets, and the right ones are chosen at run time. So there is no -march here.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("src/kinegraph/native/source")
# Contraction makes multiply-adds of the products, which C's strict mode would not
FLAGS = ["-std=gnu11", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-pthread"]
# The first: vectors wider than the oldest CPU has stay inside functions. The second: each compiler has its own pragmas.
QUIET = ["-Wno-psabi", "-Wno-unknown-pragmas"]

setup(
    ext_modules=[
        Extension(
            "kinegraph.native._kernels",
            sources=sorted(str(path) for path in SOURCE.glob("*.c")),
            depends=sorted(str(path) for path in SOURCE.glob("*.h")),
            extra_compile_args=FLAGS + QUIET,
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
