from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from clips import RECIPES, encode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a clip by its name in RECIPES; each is encoded once a session."""
    folder = tmp_path_factory.mktemp("clips")

    def path(name: str) -> Path:
        return folder / name if (folder / name).exists() else encode(RECIPES[name], folder)

    return path
