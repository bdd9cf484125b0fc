"""The data plane: POST /v1/classify, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import ClientDisconnect

from robustkit import __version__
from robustkit.serve import problems
from robustkit.serve.auth import Accounts, bearer, same
from robustkit.serve.logs import log
from robustkit.serve.pipeline import Pipeline
from robustkit.serve.pool import Gate, Pool
from robustkit.serve.refusal import Refused
from robustkit.serve.throttle import Throttle


class Answer(BaseModel):
    """What a client learns about its image; `scores` by the output policy."""

    label: str
    index: int
    scores: dict[str, float] | None = None
    request_id: str


class Problem(BaseModel):
    """Why there is no answer."""

    title: str
    status: int
    detail: str


_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_BODY = {"requestBody": {"required": True, "content": {"image/png": _IMAGE, "image/jpeg": _IMAGE}}}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": meaning,
        "content": {"application/problem+json": {"schema": Problem.model_json_schema()}},
    }
    for status, meaning in {
        401: "no valid credential",
        403: "banned, or rejected by a detector",
        408: "the body did not come in time",
        413: "too many bytes or pixels",
        415: "neither PNG nor JPEG",
        422: "damaged, animated, or more than one picture",
        429: "asked too often; see Retry-After",
        503: "busy, draining, or its state out of reach; see Retry-After",
    }.items()
}


class Plane:
    """One replica's data plane and what it stands on. `draining` is set when the replica takes leave."""

    def __init__(
        self, pipeline: Pipeline, accounts: Accounts, throttle: Throttle, pool: Pool, metrics_token: str
    ) -> None:
        self.pipeline, self.accounts, self.throttle, self.pool = pipeline, accounts, throttle, pool
        self.readers = Gate(pipeline.settings.readers)
        self.metrics = pipeline.metrics
        self.metrics_token = metrics_token
        self.draining = False

    async def classify(self, request: Request, entry: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request; `entry` collects what its log line will say. Raises: Refused.

        Whoever may not ask is refused before a byte of the body is read.
        """
        self.throttle.address(request.client.host if request.client else "")
        identity = self.accounts.identify(request.headers.get("authorization"))
        now = time.time()
        check = partial(self.accounts.check, identity, now)
        if self.accounts.is_fresh(identity):
            check()
        else:
            await self.pool.run(check)
        entry["account"] = identity.account
        self.throttle.account(identity.account)
        settings = self.pipeline.settings
        with self.readers.entered():
            body = await _body(request, settings.most_bytes, settings.body_seconds)
            return await self.pool.run(partial(self.pipeline.answer, identity.account, body, now))


def create_app(plane: Plane) -> FastAPI:
    """The data plane as an ASGI application."""
    app = FastAPI(title="robustkit.serve", version=__version__, docs_url=None, redoc_url=None)
    problems.install(app)

    @app.post(
        "/v1/classify",
        response_model=Answer,
        response_model_exclude_none=True,
        responses=_REFUSALS,
        openapi_extra=_BODY | {"security": [{"bearer": []}]},
    )
    async def classify(request: Request) -> JSONResponse:
        """Classify one PNG or JPEG."""
        started, entry = time.monotonic(), {"request": secrets.token_hex(8)}
        status = 500
        try:
            told = await plane.classify(request, entry)
            status = 200
            entry["label"] = told["label"]
            return JSONResponse({**told, "request_id": entry["request"]})
        except Refused as error:
            status, entry["refused"] = error.status, str(error)
            raise
        finally:
            seconds = time.monotonic() - started
            plane.metrics.requests.labels(str(status)).inc()
            plane.metrics.seconds.observe(seconds)
            log("classify", {"status": status, "ms": round(1000 * seconds, 2), **entry})

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: _REFUSALS[503]})
    async def readyz() -> dict[str, str]:
        """The replica takes requests: it is not about to leave."""
        if plane.draining:
            raise Refused(503, "the replica is taking leave; ask another.", retry_after=1)
        return {"status": "ready", "model": plane.pipeline.router.champion.digest[:12]}

    @app.get("/metrics", response_class=Response, responses={401: _REFUSALS[401]})
    async def metrics(request: Request) -> Response:
        """For Prometheus, with the metrics credential: an attacker would learn here what was flagged."""
        if not same(bearer(request.headers.get("authorization")), plane.metrics_token):
            raise Refused(401, "this is not the metrics credential; it lies in credentials.json.")
        plane.metrics.inside.set(plane.pool.inside)
        with suppress(SQLAlchemyError):  # a store out of reach: what was known before stands
            await asyncio.to_thread(plane.pipeline.publish)
        return Response(plane.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _body(request: Request, most: int, seconds: float) -> bytes:
    """The whole body. Raises: Refused, 413 at the first byte too many, whatever was declared, 408 for a slow one."""
    declared = request.headers.get("content-length", "")
    too_large = Refused(413, f"the body has more than {most:,} bytes; send a smaller image.")
    if declared.isascii() and declared.isdigit() and int(declared) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body did not come within {seconds:g} seconds; send it faster.") from None
    except ClientDisconnect:
        raise Refused(400, "the client went away before its body was whole.") from None
    return bytes(body)
