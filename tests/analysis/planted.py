"""The old home of tests.planted."""

from tests.planted import *  # noqa: F403
