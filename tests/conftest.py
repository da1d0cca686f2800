import pytest

from tests.frameworks import backends_under_test
from xglm_core.backends import require_frameworks
from xglm_core.errors import BackendError


def pytest_configure():
    """A backend that was asked for and cannot be imported is an error: its tests must not vanish in silence."""
    for name in backends_under_test():
        try:
            require_frameworks(name)
        except BackendError as error:
            raise pytest.UsageError(f"{error} (or leave {name} out of XGLM_TEST_BACKENDS)") from None
