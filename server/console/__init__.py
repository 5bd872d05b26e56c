"""The console: a page at `/console` to chat with a long document, beside the dense answer. Static files, no build."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.staticfiles import StaticFiles

from server.flags import Off, add_setting

PAGE = "index.html"
FOLDER = Path(__file__).parent / "static"
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
"""Nothing but our own files and this server's API; no script or style inside the page."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, and answered with 304: an update shows at once
}

router = APIRouter(include_in_schema=False)
_files = StaticFiles(directory=FOLDER)


@router.get("/console")
async def show_page(request: Request) -> Response:
    return await _send(PAGE, request)


@router.get("/console/{name}")
async def show_file(name: str, request: Request) -> Response:
    """A file of the page's.

    Raises:
        HTTPException: 404, there is none of that name.
    """
    return await _send(name, request)


async def _send(name: str, request: Request) -> Response:
    response = await _files.get_response(name, request.scope)
    response.headers.update(HEADERS)
    return response


def add_console_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "Console", "The page /console: chat with a long document beside the dense answer."
    )
    add_setting(group, "--no-console", "Don't serve the page.", Off, dest="console")
