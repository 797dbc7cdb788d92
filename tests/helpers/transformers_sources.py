"""The source distribution of the installed transformers, whose wheel has no tests."""

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

BUILD = Path(__file__).parents[2] / "build"
SOURCES = BUILD / f"transformers-{transformers.__version__}"


def why_not():
    """None if the sources are in ``SOURCES``, where they are downloaded once; otherwise why they cannot be had."""
    if importlib.util.find_spec("parameterized") is None:
        return "transformers' common tests need the package parameterized"
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "transformers.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be downloading them
        return None if (SOURCES / "tests" / "__init__.py").is_file() else _download()


def _download():
    folder = BUILD / "downloads"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--dest", folder]
    done = subprocess.run([*command, f"transformers=={transformers.__version__}"], capture_output=True, text=True)
    if done.returncode:
        return f"the sources of transformers {transformers.__version__} cannot be had: {done.stderr.strip()[-300:]}"
    with tarfile.open(folder / f"{SOURCES.name}.tar.gz") as archive:
        archive.extractall(BUILD, filter="data")
    shutil.rmtree(folder)
    (SOURCES / "tests" / "__init__.py").touch()  # which is left out, and which one of the tests imports
    return None
