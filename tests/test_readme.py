"""Every Python block of the README runs as it stands, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = [
    (text.count("\n", 0, match.start()) + 1, match.group(1))
    for text in [README.read_text(encoding="utf-8")]
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]


def test_the_readme_has_examples():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize(("line", "code"), BLOCKS, ids=[f"line {line}" for line, _ in BLOCKS])
def test_block_runs(line, code, tmp_path, monkeypatch):
    if "from diffusers" in code:
        pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'surgery[diffusion]'")
    monkeypatch.chdir(tmp_path)
    # padding keeps the line numbers of a traceback those of the README
    compiled = compile("\n" * line + code, str(README), "exec")
    namespace = {"__name__": "__readme__"}
    exec(compiled, namespace)
    assert "surgery" in namespace
