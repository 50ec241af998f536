"""A few seconds of what `make soak` does for 20 minutes."""

from __future__ import annotations

from pathlib import Path

from soak import soak

SECONDS = 5


def test_server_under_load(tiny_models: dict[str, Path]) -> None:
    result = soak(tiny_models["spk4"], SECONDS)
    assert result.failures == []
    assert min(result.requests[kind] for kind in ("whole", "cancelled", "too long")) > 0
    assert len(result.memory) > 20 and result.seconds >= SECONDS
