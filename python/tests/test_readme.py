"""The examples of this folder's README, of the project's and of docs/engines.md, run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
FILES = [
    HERE / "README.md",
    HERE.parent / "README.md",
    HERE.parent / "docs" / "guide.md",
    HERE.parent / "docs" / "engines.md",
]
EXAMPLES = [
    pytest.param(code, id=f"{path.relative_to(HERE.parent)}-{number}")
    for path in FILES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch", "transformers"):
        if re.search(rf"^(import|from) .*\b{module}\b", code, re.MULTILINE):
            pytest.importorskip(module, reason=f"{module} is not installed: an example is not run")
    if "torch.compile" in code and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler: an example is not run")
    monkeypatch.chdir(HERE.parent)  # examples name files of the project
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out
