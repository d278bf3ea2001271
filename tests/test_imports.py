"""The lint step that keeps imports pointing downwards."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "imports.py"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"stagewise/bank.py": "import torch", "losses/a.py": "from stagewise.bank import B"}, ""),
        (
            {
                "stagewise/bank.py": "def f():\n    from stagewise import oracle",
                "stagewise/oracle.py": "import stagewise.bank",
            },
            "Import circle: ",
        ),
        (
            {
                "stagewise/bank.py": "if TYPE_CHECKING:\n    from stagewise.losses.a import L",
                "losses/a.py": "",
            },
            "stagewise/bank.py imports stagewise.losses.a, which is on a higher floor.",
        ),
        (
            {
                "stagewise/bank.py": "if TYPE_CHECKING:\n    from stagewise.oracle import O",
                "stagewise/oracle.py": "from stagewise.bank import B",
            },
            "",
        ),
        (
            {"stagewise/bank.py": 'def f():\n    """See `g`."""'},
            'stagewise/bank.py:2 says "See"',
        ),
        (
            {"benchmarks/plan.py": "from report import R", "benchmarks/report.py": "import plan"},
            "Import circle: ",
        ),
    ],
)
def test_circles_and_upward_imports_fail(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    run = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == bool(said), run.stdout + run.stderr
    assert said in run.stdout
