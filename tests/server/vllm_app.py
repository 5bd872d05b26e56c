"""vLLM's own application with our plug-in, built by vLLM from flags; only the engine is missing."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.plugins.endpoint_plugins.interface import init_endpoint_plugins_state

from server.app import allow_plugin
from server.draining import Door
from server.policies import PolicyDesk
from tests.server.asgi import desks

DESK = PolicyDesk({"policy": "random", "budget": "25%"}, 32)
DESKS = desks(DESK, default={"selector": "recycled"})
ENGINE = SimpleNamespace(desks=DESKS, door=Door(), errored=False, model_config=SimpleNamespace(max_model_len=512))


class Models:
    async def show_available_models(self) -> ModelList:
        return ModelList(data=[ModelCard(id="tiny", max_model_len=512), ModelCard(id="lora", parent="tiny")])


def application(args: Namespace, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """What `longreach serve` with these flags serves, as long as nothing is generated."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    allow_plugin()
    app = build_app(args, ("generate",))
    app.state.openai_serving_models = Models()
    app.state.log_stats = False
    app.state.engine_client = ENGINE
    asyncio.run(init_endpoint_plugins_state(ENGINE, app.state, args))
    return app
