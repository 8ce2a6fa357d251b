"""The demo at full size, with its own settings, reaches the accuracy that its file promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.run.files import CHECKOUT


@pytest.mark.slow
@pytest.mark.timeout(1500)  # 4 to 6 minutes on two free cores
def test_the_demo_reaches_85_percent(tmp_path: Path) -> None:
    words = [f"data.directory={tmp_path / 'data'}", f"data.raw_dir={tmp_path / 'raw'}", "run_dir=demo"]
    outputs = ""
    for script in ("preprocess.py", "train.py", "evaluate.py"):
        done = subprocess.run(
            [sys.executable, str(CHECKOUT / script), "experiment=demo", *words],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs += done.stdout
    found = re.search(r"^top-1 ([\d.]+)% \(\d+ of (\d+)\)", outputs, re.MULTILINE)
    assert found, outputs
    assert float(found[1]) >= 85.0
