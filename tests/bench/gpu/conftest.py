"""A folder in which parts of `bench.gpu` are small Python processes."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import parts as gpu_parts


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the program `script.py` that parts run as `python -m script`: it prints, writes rows, and ends as its options say.

    Time stands still until it has printed: Python starts as slowly as the machine is busy.
    """
    starting = 0.0

    class Begun(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            nonlocal starting
            since = time.monotonic()
            while self.poll() is None and not (tmp_path / f"begun {self.pid}").exists():
                time.sleep(0.01)
                assert time.monotonic() < since + 60
            starting += time.monotonic() - since
            return super().wait(timeout)

    monkeypatch.setattr(gpu_parts, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Begun}))
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: time.monotonic() - starting))
    (tmp_path / "script.py").write_text(
        "import argparse, os, pathlib, subprocess, sys, time\n"
        "p = argparse.ArgumentParser()\n"
        "for name in ('--say', '--csv', '--commit', '--sleep', '--exit'): p.add_argument(name, default='')\n"
        "p.add_argument('--child', action='store_true')\n"
        "o = p.parse_args()\n"
        "with open('began', 'a') as f: f.write(o.say + '\\n')\n"
        "rows = 'row,status,p50_ms,commit\\na,ok,1,0123abc\\nb,FAILED,,0123abc\\nc,skipped,,0123abc\\nd,ok,1,f\\n'\n"
        "if o.csv: pathlib.Path(o.csv).write_text(rows)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']) if o.child else None\n"
        "if child: pathlib.Path('child').write_text(str(child.pid))\n"
        "print(o.say, flush=True)\n"
        "pathlib.Path(f'begun {os.getpid()}').touch()\n"
        "if o.sleep: time.sleep(float(o.sleep))\n"
        "if o.exit == 'segfault': os.abort()\n"
        "sys.exit(int(o.exit or 0))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_parts.facts, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts, "GRACE", 1.0)
    return tmp_path
