"""Our routes and middleware on vLLM's OpenAI application, by its endpoint plug-in."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from server.middleware import KVCacheMiddleware

router = APIRouter()


@router.get("/v1/kv/policies")
async def show_policies(request: Request) -> JSONResponse:
    """The policies of this server, with their arguments as JSON schema."""
    return JSONResponse(request.app.state.kv_policies.describe())


@router.get("/v1/models")
async def show_models(request: Request) -> JSONResponse:
    """vLLM's list of models, each with the server's default policy."""
    models = await request.app.state.openai_serving_models.show_available_models()
    content = models.model_dump()
    for model in content["data"]:
        model["kv_cache"] = request.app.state.kv_policies.default
    return JSONResponse(content)


class LongreachPlugin:
    """vLLM's `EndpointPlugin`: attached in `build_app`, given the engine in `init_app_state`."""

    name = "longreach"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        # Added before vLLM's own, so it runs inside them: authentication comes first.
        app.add_middleware(KVCacheMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        state.kv_policies = engine_client.desk


def create_plugin() -> LongreachPlugin:
    return LongreachPlugin()
