"""The server that tests share, and the official client."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="tests/serve is NOT TESTED: the extra serve is not installed")

from openai import OpenAI
from serving import serving, wait_idle

import d2moe
from d2moe.runtime.generate import Model


@pytest.fixture(scope="session")
def server() -> Iterator[SimpleNamespace]:
    with serving() as one:
        yield one


@pytest.fixture(scope="session")
def client(server: SimpleNamespace) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="session")
def alone() -> Iterator[Model]:
    """The same model without a server."""
    with d2moe.load(context=2048) as model:
        yield model


@pytest.fixture
def idle(server: SimpleNamespace) -> Iterator[None]:
    """All cache blocks are free before and after."""
    wait_idle(server)
    yield
    wait_idle(server)
    pages = server.service.engine.pages
    assert pages.available == pages.blocks
