"""Only what pyproject.toml cannot say: the cffi extension modules."""

from setuptools import setup

setup(
    cffi_modules=[
        "cachefiles/_kabi_build.py:ffibuilder",
        "confine/_kabi_build.py:ffibuilder",
        "fanotify/_kabi_build.py:ffibuilder",
        "mounts/_kabi_build.py:ffibuilder",
        "erofs_builder/_hot_build.py:ffibuilder",
        "loader/_take_build.py:ffibuilder",
        "loader/keeper/_events_build.py:ffibuilder",
    ],
)
