"""One finished tiny run and one cache, shared by the tests of the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_run import finetune


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    finetune(runs, cache, "--name", "whole")
    return runs / "whole"
