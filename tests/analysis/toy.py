"""The old home of tests.toy."""

from tests.toy import *  # noqa: F403
from tests.toy import ToySplit as ToyPart  # noqa: F401
