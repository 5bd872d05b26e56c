"""Our routes and middleware on vLLM's OpenAI application, by its endpoint plug-in."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from server import console
from server.access.middleware import AccessMiddleware
from server.access.settings import make_access
from server.bodies import BodyMiddleware
from server.draining import Door, DrainingMiddleware
from server.limits import make_limits
from server.middleware import FieldsMiddleware

router = APIRouter()


@router.get("/v1/kv/policies")
async def show_policies(request: Request) -> JSONResponse:
    """The policies of this server, with their arguments as JSON schema."""
    return JSONResponse(request.app.state.longreach_desks.policies.describe())


@router.get("/v1/decode/selectors")
async def show_selectors(request: Request) -> JSONResponse:
    """The selectors of this server: whether requests may use them, and their arguments as JSON schema."""
    return JSONResponse(request.app.state.longreach_desks.selectors.describe())


@router.get("/v1/prefill/patterns")
async def show_patterns(request: Request) -> JSONResponse:
    """The patterns of this server, with their arguments as JSON schema."""
    return JSONResponse(request.app.state.longreach_desks.patterns.describe())


@router.get("/v1/models")
async def show_models(request: Request) -> JSONResponse:
    """vLLM's list of models, each with the server's defaults for our fields."""
    models = await request.app.state.openai_serving_models.show_available_models()
    content = models.model_dump()
    for model in content["data"]:
        model |= request.app.state.longreach_desks.completed({})
    return JSONResponse(content)


@router.get("/ready")
async def show_readiness(request: Request) -> JSONResponse:
    """Whether new requests should come here: 503 once the server drains, or its engine is dead.

    `/health` is for liveness: a server that drains is healthy, and restarting it would lose what it still does.
    """
    door: Door = request.app.state.longreach_door
    status = "draining" if door.closed else "engine dead" if request.app.state.engine_client.errored else "ready"
    content = {"status": status, "requests_under_way": door.under_way}
    return JSONResponse(content, status_code=200 if status == "ready" else 503)


class LongreachPlugin:
    """vLLM's `EndpointPlugin`: attached in `build_app`, given the engine in `init_app_state`."""

    name = "longreach"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        if app.state.args.console:
            app.include_router(console.router)
        # Added before vLLM's own, so they run inside them: authentication comes first. The last of ours runs first.
        app.add_middleware(FieldsMiddleware)
        app.add_middleware(DrainingMiddleware)
        app.add_middleware(BodyMiddleware)
        app.add_middleware(AccessMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        state.longreach_desks = engine_client.desks
        state.longreach_door = engine_client.door
        state.longreach_limits = make_limits(args, engine_client.model_config.max_model_len)
        state.longreach_access = make_access(args)


def create_plugin() -> LongreachPlugin:
    return LongreachPlugin()
