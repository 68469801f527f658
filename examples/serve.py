"""A web server for a DeBERTa classifier: python examples/serve.py --model DIRECTORY_OR_HUB_ID [--help].

    curl http://127.0.0.1:8000/classify -H 'Content-Type: application/json' -d '{"texts": ["A fine day."]}'

Concurrent requests share batches. GET /health says that the process lives, /ready whether it takes texts, /metrics what
it did, for Prometheus. It needs: pip install fastapi 'uvicorn>=0.37'
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any

from batching import Batcher, QueueFull
from classifier import DTYPES, Classifier, check_model, cores

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from pydantic import BaseModel, Field
except ImportError as absence:
    raise SystemExit(f"FastAPI and uvicorn are missing ({absence}): pip install fastapi 'uvicorn>=0.37'") from absence

__all__ = ["create_app", "main", "parse"]

# How `main` hands the options to the processes that uvicorn starts.
OPTIONS = "SERVE_OPTIONS"
log = logging.getLogger("uvicorn.error")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; leave with a message that names what is wrong."""
    parser = argparse.ArgumentParser(description="Serve a DeBERTa classifier over HTTP.", allow_abbrev=False)
    parser.add_argument("--model", required=True, type=expanduser, help="directory or hub id of a sequence classifier")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a model of its own")
    parser.add_argument("--threads", type=int, help="of PyTorch in each worker; default: cores / workers")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--no-patch", action="store_true", help="serve the stock model")
    parser.add_argument("--max-batch", type=int, default=16, help="most texts of one forward")
    parser.add_argument("--max-wait-ms", type=float, default=5.0, help="longest wait for more texts to fill a batch")
    parser.add_argument("--max-queue", type=int, default=256, help="most texts that wait; more get 503")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens of a text; the rest is cut off, and the answer says so"
    )
    parser.add_argument("--max-texts", type=int, default=32, help="texts of one request; more get 422")
    parser.add_argument("--max-characters", type=int, default=20_000, help="characters of a text; more get 422")
    parser.add_argument("--max-request-bytes", type=int, default=1_000_000, help="bytes of a request; more get 413")
    options = parser.parse_args(arguments)
    for name in ("workers", "max_batch", "max_queue", "max_texts", "max_characters", "max_request_bytes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(options, name)}")
    if not 0 <= options.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {options.port}")
    if options.max_length < 3:
        parser.error(f"--max-length must be 3 or more (two tokens are [CLS] and [SEP]), got {options.max_length}")
    if not 0 <= options.max_wait_ms <= 10_000:
        parser.error(f"--max-wait-ms must be 0 to 10000, got {options.max_wait_ms:g}")
    if options.max_texts > options.max_queue:
        parser.error(f"--max-texts ({options.max_texts}) must not be above --max-queue ({options.max_queue})")
    if options.threads is None:
        options.threads = max(1, cores() // options.workers)
    if options.threads < 1:
        parser.error(f"--threads must be 1 or more, got {options.threads}")
    try:
        check_model(options.model)
    except ValueError as error:
        parser.error(str(error))
    return options


class BodyLimit:
    """Answer 413 to a request whose body is longer than it may be, before it is held or parsed."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most
        self.message = f"The request is longer than {most} bytes; send fewer or shorter texts (--max-request-bytes)."

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Take one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, self.message, {"Connection": "close"})
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.most:
            answer = JSONResponse({"detail": self.message}, 413, {"Connection": "close"})
            await answer(scope, receive, send)
            return
        await self.app(scope, counted, send)


def load(options: argparse.Namespace) -> Classifier:
    """Load, patch and warm up; called in the worker thread."""
    start = time.perf_counter()
    classifier = Classifier(
        options.model, options.threads, options.max_length, options.dtype, patch=not options.no_patch
    )
    classifier.warm_up(options.max_batch)
    log.info("%s is ready after %.1f s on %d threads", options.model, time.perf_counter() - start, options.threads)
    log.info("%s", classifier.report or "not patched (--no-patch)")
    return classifier


def create_app(options: argparse.Namespace | None = None) -> FastAPI:
    """Return the program that uvicorn runs; nothing is loaded until it starts, so a fork before that is harmless.

    Args:
        options: from `parse`; default: those that `main` left in the environment.
    """
    options = options or argparse.Namespace(**json.loads(os.environ[OPTIONS]))
    batcher = Batcher(lambda: load(options), options.max_batch, options.max_wait_ms / 1000, options.max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await batcher.start()
            yield
        finally:
            await batcher.close()

    app = FastAPI(title="DeBERTa classifier", lifespan=lifespan)
    app.add_middleware(BodyLimit, most=options.max_request_bytes)
    app.state.batcher = batcher
    _add_errors(app)
    _add_routes(app, options, batcher)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without what was sent, which may be long, or no valid Unicode.
        where = [(".".join(map(str, part["loc"])), part["msg"]) for part in error.errors()]
        return JSONResponse({"detail": [f"{place}: {message}" for place, message in where]}, 422)


def _add_routes(app: FastAPI, options: argparse.Namespace, batcher: Batcher) -> None:
    Text = Annotated[str, Field(max_length=options.max_characters)]

    class Texts(BaseModel):
        texts: Annotated[list[Text], Field(min_length=1, max_length=options.max_texts)]

    async def classify(request: Texts) -> dict[str, Any]:
        try:
            return {"model": options.model, "results": await batcher.submit(request.texts)}
        except QueueFull:
            raise HTTPException(503, "Too many texts wait; try again soon.", {"Retry-After": "1"}) from None
        except Exception:
            log.exception("a batch failed")
            raise HTTPException(500, "The model failed; the server's log says why.") from None

    # The class above is local, so its name in an annotation would mean nothing to FastAPI.
    classify.__annotations__ = {"request": Texts, "return": dict[str, Any]}
    app.post("/classify")(classify)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": batcher.ready, "waiting": batcher.waiting}, 200 if batcher.ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse("\n".join(metric_lines(batcher)) + "\n")


def metric_lines(batcher: Batcher) -> list[str]:
    """Return what happened so far, in the text format of Prometheus."""
    import deberta_kernels as dk

    counts, stats = batcher.counts, dk.stats()
    lines = [
        f"classifier_texts_total {counts.texts}",
        f"classifier_batches_total {counts.batches}",
        f"classifier_failed_batches_total {counts.failures}",
        f"classifier_refused_requests_total {counts.refused}",
        f"classifier_waiting_texts {batcher.waiting}",
        f"classifier_wait_seconds_total {counts.waited:.6f}",
        f"classifier_compute_seconds_total {counts.computed:.6f}",
    ]
    lines += [f'deberta_kernels_calls_total{{backend="{name}"}} {count}' for name, count in stats["calls"].items()]
    # Reasons are sentences: their number is for an alarm, /metrics is no place to read them.
    return [*lines, f"deberta_kernels_fallbacks_total {sum(stats['fallbacks'].values())}"]


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes; requests that have begun are answered first."""
    options = parse(arguments)
    os.environ[OPTIONS] = json.dumps(vars(options))
    # As a name, not as an object: uvicorn's workers are new processes, which import it themselves. One that imports and
    # loads for long is not dead yet.
    uvicorn.run(
        "serve:create_app", factory=True, app_dir=str(Path(__file__).parent), host=options.host, port=options.port,
        workers=options.workers, timeout_graceful_shutdown=30, timeout_worker_healthcheck=120,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
