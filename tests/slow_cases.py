"""Cases of tables that only scripts/test.sh --all runs: marked slow, and not prepared where no test asks for them."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def marked(cases: Collection[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test; those that are not ``quick`` are slow."""
    assert set(quick) <= set(cases), set(quick) - set(cases)
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in quick else pytest.mark.slow)
        for case in cases
    ]


def wanted(request: pytest.FixtureRequest, cases: Mapping[Any, Any], quick: Collection[Any]) -> dict[Any, Any]:
    """What a fixture of a file prepares: the quick cases, or all where slow tests of that file run too."""
    here = [item for item in request.session.items if item.path == request.path]
    slow = any(item.get_closest_marker("slow") for item in here)
    return {name: case for name, case in cases.items() if slow or name in quick}
