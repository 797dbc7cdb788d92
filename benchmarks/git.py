"""What git says of the checkout. Nothing here needs torch, and without git there is nothing to say."""

from __future__ import annotations

import subprocess

from benchmarks.steps import ROOT


def revision(name: str) -> str:
    """The abbreviated git revision of a name; "" if there is no such revision or no git."""
    return _git("rev-parse", "--short=10", "--verify", "--quiet", f"{name}^{{commit}}")


def state() -> str:
    """The revision of the checkout; ends in "+" if files had changes that were not committed."""
    return revision("HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
