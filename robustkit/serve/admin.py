"""The control plane, on its own port with its own credential: models, incidents, quarantine, retraining, accounts.

Every change is an event of the chain, with who asked for it (header X-Operator) and why.
"""

from __future__ import annotations

import io
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Response
from PIL import Image
from pydantic import BaseModel, Field
from sqlalchemy import Engine

from robustkit import __version__
from robustkit.errors import RobustkitError
from robustkit.serve import auth, events, incident, problems
from robustkit.serve.incident import State
from robustkit.serve.quarantine import Quarantine
from robustkit.serve.refusal import Refused
from robustkit.serve.registry import Registry

# What a store takes: PostgreSQL has no NUL in text, neither has integers beyond 64 bits.
_Text = Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*\S[^\x00-\x1f\x7f]*$")]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Account = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Moment = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
_Actor = Annotated[str, Header(alias="X-Operator", pattern=r"^[ -~]{1,100}$")]


class Because(BaseModel):
    """Why."""

    reason: _Text


class Registration(BaseModel):
    """A signed folder in the service's incoming folder, by its name."""

    name: _Name


class Assignment(Because):
    """Which model an alias names; `percent` is the share of accounts that a canary answers."""

    model: _Digest
    percent: int = Field(100, ge=1, le=100)


class Move(Because):
    """Where an incident goes."""

    to: State


class Bridge(Because):
    """How long the ensemble answers, in seconds from now."""

    seconds: float = Field(gt=0, le=incident.LONGEST_BRIDGE)


class Request(Because):
    """What to train against, by the names of families."""

    families: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]] = Field(
        min_length=1, max_length=10
    )


class Judgement(Because):
    """What the gate found about a candidate."""

    model: _Digest
    passed: bool


class Ban(Because):
    """For how long an account is refused, in seconds from now."""

    seconds: float = Field(gt=0, le=10 * 365 * 86_400)


class Key(BaseModel):
    """A new customer's key; it is shown once."""

    api_key: str
    account: str


def create_admin(
    engine: Engine,
    registry: Registry,
    quarantine: Quarantine,
    incoming: Path,
    token: str,
    pseudonyms: bytes,
) -> FastAPI:
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

    def champion() -> str:
        return registry.aliases()["champion"].digest

    # --- models ---------------------------------------------------------------------------------------

    @app.get("/admin/models")
    def models() -> dict[str, Any]:
        """What is registered, and which alias names what."""
        return {"models": registry.models(), "aliases": registry.aliases()}

    @app.post("/admin/models", status_code=201)
    def register(wanted: Registration, actor: _Actor = "operator") -> dict[str, str]:
        """Take over a signed folder from the incoming folder."""
        return {"model": registry.register(incoming / wanted.name, actor=actor, now=time.time())}

    @app.put("/admin/models/aliases/{alias}")
    def assign(alias: str, wanted: Assignment, actor: _Actor = "operator") -> dict[str, Any]:
        """Let an alias name a model; a canary must not have failed its gate."""
        if alias in ("canary", "champion") and _failed(engine, wanted.model):
            raise RobustkitError(f"model {wanted.model[:12]} did not pass its gate; retrain it.")
        registry.assign(
            alias,
            wanted.model,
            reason=wanted.reason,
            actor=actor,
            now=time.time(),
            percent=wanted.percent,
        )
        return {"aliases": registry.aliases()}

    @app.post("/admin/models/promote")
    def promote(why: Because, actor: _Actor = "operator") -> dict[str, Any]:
        """The canary becomes champion, the champion last-good."""
        registry.promote(reason=why.reason, actor=actor, now=time.time())
        return {"aliases": registry.aliases()}

    @app.post("/admin/models/rollback")
    def rollback(why: Because, actor: _Actor = "operator") -> dict[str, Any]:
        """Take back the canary, or without one the last promotion."""
        taken = registry.rollback(reason=why.reason, actor=actor, now=time.time())
        return {"taken_back": taken, "aliases": registry.aliases()}

    # --- incidents ------------------------------------------------------------------------------------

    @app.get("/admin/incidents")
    def incidents(number: Annotated[int | None, Query(ge=0, le=2**31)] = None) -> dict[str, Any]:
        """The posture now, and the timeline of an incident, the latest unless it is numbered."""
        posture = incident.posture(engine, time.time())
        told = [asdict(event) for event in incident.timeline(engine, number)]
        return {"posture": asdict(posture), "timeline": told}

    @app.post("/admin/incidents")
    def move(wanted: Move, actor: _Actor = "operator") -> dict[str, Any]:
        """Lead the incident to another state."""
        posture = incident.move(
            engine, wanted.to, reason=wanted.reason, actor=actor, model=champion(), now=time.time()
        )
        return {"posture": asdict(posture)}

    @app.post("/admin/incidents/bridge")
    def bridge(wanted: Bridge, actor: _Actor = "operator") -> dict[str, Any]:
        """Let the ensemble answer while the incident is contained, for so long."""
        now = time.time()
        posture = incident.bridge(
            engine, now + wanted.seconds, reason=wanted.reason, actor=actor, model=champion(), now=now
        )
        return {"posture": asdict(posture)}

    @app.post("/admin/incidents/notes", status_code=201)
    def note(why: Because, actor: _Actor = "operator") -> dict[str, Any]:
        """Add a finding to the timeline."""
        incident.note(engine, why.reason, actor=actor, now=time.time())
        return {"timeline": [asdict(event) for event in incident.timeline(engine)]}

    # --- quarantine -----------------------------------------------------------------------------------

    @app.get("/admin/quarantine")
    def kept(account: _Account | None = None, since: _Moment = 0) -> dict[str, Any]:
        """What is kept, without the images."""
        size, refused = quarantine.usage()
        items = [asdict(item) for item in quarantine.items(account=account, since=since)]
        return {"bytes": size, "refused": refused, "items": items}

    @app.get("/admin/quarantine/{digest}", response_class=Response)
    def image(digest: _Digest, actor: _Actor = "operator") -> Response:
        """One kept image as PNG; that somebody looked at a customer's photograph is an event."""
        pixels = quarantine.read(digest)
        events.append(engine, "quarantine.read", {"digest": digest}, actor=actor, now=time.time())
        out = io.BytesIO()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(out, "PNG")
        return Response(out.getvalue(), media_type="image/png")

    @app.post("/admin/quarantine/expire")
    def expire(actor: _Actor = "operator") -> dict[str, int]:
        """Remove what is over its time."""
        now = time.time()
        removed = quarantine.expire(now)
        events.append(engine, "quarantine.expired", {"removed": removed}, actor=actor, now=now)
        return {"removed": removed}

    # --- retraining: asked for here, done where the data and the GPUs are --------------------------------

    @app.get("/admin/retrain")
    def retraining() -> dict[str, Any]:
        """What was asked for, and what the gate found."""
        return {"events": [asdict(event) for event in events.timeline(engine, kinds=("retrain",))]}

    @app.post("/admin/retrain", status_code=202)
    def retrain(wanted: Request, actor: _Actor = "operator") -> dict[str, Any]:
        """Ask for a candidate; whoever trains reads this event."""
        body = {"champion": champion(), **wanted.model_dump()}
        return asdict(events.append(engine, "retrain.requested", body, actor=actor, now=time.time()))

    @app.post("/admin/retrain/judgements", status_code=201)
    def judge(found: Judgement, actor: _Actor = "operator") -> dict[str, Any]:
        """Enter what the gate found; a candidate that failed cannot become canary."""
        event = events.append(engine, "retrain.judged", found.model_dump(), actor=actor, now=time.time())
        return asdict(event)

    # --- events and accounts ----------------------------------------------------------------------------

    @app.get("/admin/events")
    def chain(after: Annotated[int, Query(ge=0, le=2**53)] = 0) -> dict[str, Any]:
        """A thousand events behind number `after`."""
        return {"events": [asdict(event) for event in events.timeline(engine, after=after)]}

    @app.get("/admin/events/verify")
    def verify() -> dict[str, Any]:
        """Whether the chain holds; number and digest of the newest event are the anchor to keep elsewhere."""
        count = events.verify(engine)
        return {"events": count, "newest": events.newest(engine)}

    @app.post("/admin/keys", status_code=201)
    def make_key(actor: _Actor = "operator") -> Key:
        """A key for a new account."""
        now = time.time()
        key = auth.make_key(engine, pseudonyms, now)
        account = auth.pseudonym(pseudonyms, f"key:{key}")
        events.append(engine, "account.made", {"account": account}, actor=actor, now=now)
        return Key(api_key=key, account=account)

    @app.post("/admin/accounts/{account}/ban")
    def ban(account: _Account, wanted: Ban, actor: _Actor = "operator") -> dict[str, float]:
        """Refuse an account for so long."""
        now = time.time()
        until = now + wanted.seconds
        auth.ban(engine, account, until, now)
        body = {"account": account, "until": until, "reason": wanted.reason}
        events.append(engine, "account.banned", body, actor=actor, now=now)
        return {"until": until}

    @app.post("/admin/accounts/{account}/revoke")
    def revoke(account: _Account, why: Because, actor: _Actor = "operator") -> dict[str, str]:
        """End an account."""
        now = time.time()
        auth.revoke(engine, account, now)
        body = {"account": account, "reason": why.reason}
        events.append(engine, "account.revoked", body, actor=actor, now=now)
        return {"account": account}

    return app


def _failed(engine: Engine, model: str) -> bool:
    """Whether the last judgement about a model was that it failed."""
    judged = [
        event for event in events.timeline(engine, kinds=("retrain.judged",)) if event.body["model"] == model
    ]
    return bool(judged) and not judged[-1].body["passed"]
