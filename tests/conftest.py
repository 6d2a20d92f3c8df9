"""Fixtures that every test may use."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real trajectories and pivot rows beside the checkout; see README.md for where a user gets the same files."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data is absent: put the public data sets into ../shared/data (README, section Data)")
    return folder
