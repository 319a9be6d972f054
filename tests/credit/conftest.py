"""Fixtures for the tests of credit."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked_types():
    """As in use, without the tests' type checks, which would refuse a wrong choice first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
