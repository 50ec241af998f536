"""The optional packages that simulation needs."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import SpikeQuantError

__all__ = ["require_packages"]


def require_packages(*names: str, extra: str = "convert") -> None:
    """Raises SpikeQuantError, with a remedy, if one of the packages is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise SpikeQuantError(
            f"this needs the Python package {' and '.join(missing)}",
            f"run pip install 'spikequant-gguf[{extra}]'",
        )
