"""How mistakes look on the wire: problem JSON (RFC 9457), its `detail` one sentence. For both planes."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from robustkit.errors import RobustkitError
from robustkit.serve.logs import log
from robustkit.serve.refusal import Refused


def problem(status: int, detail: str, retry_after: float | None = None) -> JSONResponse:
    """A response that says what is wrong, and when to come again."""
    headers = {}
    if retry_after is not None:
        headers["Retry-After"] = str(math.ceil(retry_after))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        headers["Connection"] = "close"  # what is left of the body is not read
    body = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def install(app: FastAPI) -> None:
    """Let every refusal of `app` look like that."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return problem(error.status, str(error), error.retry_after)

    @app.exception_handler(RobustkitError)
    async def wrong(request: Request, error: RobustkitError) -> JSONResponse:
        return problem(422, str(error))

    @app.exception_handler(SQLAlchemyError)
    async def no_store(request: Request, error: SQLAlchemyError) -> JSONResponse:
        log("the store failed", {"error": type(error).__name__}, logging.ERROR)
        return problem(503, "the service's state is out of reach; come again.", retry_after=1)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem(422, f"{where}: {first['msg']}; see /openapi.json.")

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> JSONResponse:
        answer = problem(error.status_code, f"{error.detail}; see /openapi.json.")
        answer.headers.update(error.headers or {})
        return answer
