"""Memory that was freed stays with the process, so that the next pass need not ask for it again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import sys, psutil, torch
from bpt_dist.training.sharding.placement import keep_pages
if sys.argv[1] == "keep":
    assert keep_pages()
block = torch.ones(50_000_000)
del block
print(psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep its pages")
def test_freed_memory_stays_with_the_process() -> None:
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", CODE, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "give back")
    )
    assert kept > given_back + 150_000_000
