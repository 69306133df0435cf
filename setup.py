"""Builds the part that is written in C; all else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "guardserve.native",
            [f"native/{part}.c" for part in ("module", "tensors", "finite", "modes", "sums", "slot", "forward")],
            depends=["native/native.h"],
            extra_compile_args=["-std=c11", "-O3", "-fopenmp-simd", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,  # without a compiler all is the same, but slower
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
