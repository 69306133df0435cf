"""Builds the part that is written in C; all else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "guardserve.native",
            ["guardserve/native.c"],
            extra_compile_args=["-std=c11", "-O3", "-fopenmp-simd"],
            py_limited_api=True,
            optional=True,  # without a compiler all is the same, but slower
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
