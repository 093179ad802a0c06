"""Every Python block of the README and of docs/ runs as it stands, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest

from surgery.patchers.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = [
    (path, text.count("\n", 0, match.start()) + 1, match.group(1))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for text in [path.read_text(encoding="utf-8")]
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]


def test_there_are_examples():
    assert {"README.md", "new-model.md"} <= {path.name for path, _, _ in BLOCKS}


@pytest.mark.parametrize(("path", "line", "code"), BLOCKS, ids=[f"{path.name}:{line}" for path, line, _ in BLOCKS])
def test_block_runs(path, line, code, tmp_path, monkeypatch):
    if "from diffusers" in code:
        pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'surgery[diffusion]'")
    monkeypatch.chdir(tmp_path)
    # padding keeps the line numbers of a traceback those of the document
    compiled = compile("\n" * line + code, str(path), "exec")
    namespace = {"__name__": "__readme__"}
    with mock.patch.dict(FAMILIES):  # what a block adds is gone after it
        exec(compiled, namespace)
    assert "surgery" in namespace
