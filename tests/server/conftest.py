"""A real PostgreSQL server for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from server.ledger.tables import schema
from tests.deploy.postgresql_server import run_postgresql


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """The address of a server that is started for the tests and ends with them."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL server is installed")
    with run_postgresql() as (address, _):
        yield address


@pytest.fixture
def postgresql(database: str) -> str:
    """The address of the server, after all tables have been dropped."""
    engine = sa.create_engine(database.replace("postgresql:", "postgresql+psycopg:"))
    schema.drop_all(engine)
    engine.dispose()
    return database
