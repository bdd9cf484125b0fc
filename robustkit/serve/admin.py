"""The control plane, on its own port with its own credential: models, accounts."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header
from pydantic import BaseModel
from sqlalchemy import Engine

from robustkit import __version__
from robustkit.serve import auth, problems
from robustkit.serve.refusal import Refused
from robustkit.serve.registry import Registry


class Key(BaseModel):
    """A new customer's key; it is shown once."""

    api_key: str
    account: str


def create_admin(engine: Engine, registry: Registry, token: str, pseudonyms: bytes) -> FastAPI:
    """The control plane as an ASGI application; every path asks for `token`."""

    def operator(authorization: Annotated[str | None, Header()] = None) -> None:
        if not auth.same(auth.bearer(authorization), token):
            raise Refused(401, "this is not the admin credential; it lies in credentials.json.")

    app = FastAPI(
        title="robustkit.serve control plane",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(operator)],
    )
    problems.install(app)

    @app.get("/admin/models")
    def models() -> dict[str, Any]:
        """What is registered, and which alias names what."""
        return {"models": registry.models(), "aliases": registry.aliases()}

    @app.post("/admin/keys", status_code=201)
    def make_key() -> Key:
        """A key for a new account."""
        key = auth.make_key(engine, pseudonyms, time.time())
        return Key(api_key=key, account=auth.pseudonym(pseudonyms, f"key:{key}"))

    return app
