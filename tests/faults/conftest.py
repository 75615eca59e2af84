"""One fork server and one tiny world for all trials of a test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server import ForkServer
from trials import Trials


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    with ForkServer() as found:
        yield found


@pytest.fixture(scope="session")
def trials(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(server, tmp_path_factory.mktemp("trials"))
