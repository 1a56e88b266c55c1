"""Fine-tuning with null-space regularisation: SING scores as metrics and as a differentiable loss."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

# The public names and their homes stand in one place, the stub beside this file, which type checkers read too.
_IMPORTS = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
_HOME_OF = {each.name: node.module for node in _IMPORTS if isinstance(node, ast.ImportFrom) for each in node.names}
__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import singreg` costs nothing for those who need one function."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'singreg' has no attribute {name!r}")
    return getattr(import_module(str(_HOME_OF[name])), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
