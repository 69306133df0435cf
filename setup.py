"""Builds the part that is written in C; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "guardserve.native",
            sorted(map(str, Path("native").glob("*.c"))),
            depends=["native/native.h"],
            extra_compile_args=["-std=c11", "-O3", "-fopenmp-simd", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,  # without a compiler all is the same, but slower
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
