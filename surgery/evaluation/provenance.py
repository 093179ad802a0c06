"""Where numbers come from: versions, source, device."""

from __future__ import annotations

import hashlib
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

PACKAGE = Path(__file__).resolve().parents[1]


def provenance(model: nn.Module) -> dict[str, str]:
    """Everything needed to know which code gave a number, and on what."""
    import transformers

    from .. import __version__

    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    return {
        "surgery": __version__,
        "source": source(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(parameter.device) if on_gpu else str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def source() -> str:
    """The commit of this package's checkout ("-dirty" after it: with changes), or a hash of its files."""
    try:
        # a package installed below some other checkout is not part of it
        _git("ls-files", "--error-unmatch", "__init__.py")
        return f"git {_git('rev-parse', 'HEAD')}{'-dirty' if _git('status', '--porcelain', '--', '.') else ''}"
    except (OSError, subprocess.SubprocessError):
        digest = hashlib.sha256()
        for path in sorted(PACKAGE.rglob("*.py")):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
        return f"sha256 {digest.hexdigest()}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
