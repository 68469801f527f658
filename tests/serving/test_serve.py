"""The server: options, answers, limits, batches of concurrent requests, its end, and what it holds in memory."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deberta_kernels.testing import memory
from tests import needs
from tests.serving.conftest import EXAMPLES, WORDS

pytestmark = pytest.mark.packages("fastapi", "httpx")


@pytest.fixture(scope="module")
def serve() -> Any:
    needs.package("fastapi")
    import serve

    return serve


@pytest.fixture
def client(serve: Any, checkpoint: str) -> Iterator[Any]:
    from starlette.testclient import TestClient

    limits = ["--max-texts", "4", "--max-characters", "4000", "--max-request-bytes", "9000", "--threads", "1"]
    with TestClient(serve.create_app(serve.parse(["--model", checkpoint, *limits]))) as client:
        yield client


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--model", "no such directory"], "--model must be a directory or a hub id such as owner/name, got 'no such"),
        (["--model", "owner/absent"], "--model owner/absent is no directory, and the hub gives no configuration: "),
        (["--model", str(EXAMPLES)], "has no config.json; name a directory that save_pretrained wrote"),
        (["--max-batch", "0"], "--max-batch must be 1 or more, got 0"),
        (["--max-texts", "500"], r"--max-texts \(500\) must not be above --max-queue \(256\)"),
        (["--max-wait-ms", "-1"], "--max-wait-ms must be 0 to 10000, got -1"),
        (["--max-length", "2"], r"--max-length must be 3 or more .*, got 2"),
        (["--port", "70000"], "--port must be 0 to 65535, got 70000"),
        (["--threads", "0"], "--threads must be 1 or more, got 0"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_wrong_options_are_named(serve, checkpoint, wrong, message, capsys):
    with pytest.raises(SystemExit) as left:
        serve.parse(["--model", checkpoint, *wrong])
    assert left.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "bert"}', r"must hold a DeBERTa .*, got 'bert'"),
        ("config.json", "{", r"config.json cannot be read \(Expecting property name"),
        ("tokenizer.json", None, "has no tokenizer .*tokenizer.save_pretrained"),
    ],
)
def test_a_wrong_directory_is_told_before_it_is_loaded(serve, checkpoint, tmp_path, file, content, message, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / file).unlink()
    if content:
        (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        serve.parse(["--model", str(folder)])
    assert re.search(message, capsys.readouterr().err)


def test_a_model_without_a_head_is_refused(checkpoint, tmp_path):
    from classifier import Classifier
    from transformers import AutoModelForSequenceClassification

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    AutoModelForSequenceClassification.from_pretrained(checkpoint).deberta.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has no weights for classifier\.bias, .*: it is no trained classifier"):
        Classifier(str(folder))


def test_answers_are_the_stock_models(client, texts, same):
    import deberta_kernels as dk

    dk.reset_stats()
    for start in range(0, 12, 3):
        answer = client.post("/classify", json={"texts": texts[start : start + 3]})
        assert answer.status_code == 200
        for text, found in zip(texts[start:], answer.json()["results"]):
            same(text, found)
            assert not found["truncated"]
    assert sum(dk.stats()["calls"].values()) > 0
    assert dk.stats()["fallbacks"] == {}
    metrics = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines())
    assert metrics["classifier_texts_total"] == "12"
    assert metrics["deberta_kernels_fallbacks_total"] == "0"
    assert any(name.startswith('deberta_kernels_calls_total{backend="') for name in metrics)


def test_it_says_that_a_text_was_cut(client, same):
    text = "good film " * 300
    found = client.post("/classify", json={"texts": [text]}).json()["results"][0]
    assert found["truncated"]
    same(text, found)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ('{"texts": []}', 422, "body.texts: List should have at least 1 item"),
        ('{"texts": ["a", "a", "a", "a", "a"]}', 422, "body.texts: List should have at most 4 items"),
        ('{"texts": ["' + "x" * 4001 + '"]}', 422, "body.texts.0: String should have at most 4000 characters"),
        ('{"texts": [7]}', 422, "body.texts.0: Input should be a valid string"),
        ('{"texts": ["\\ud800"]}', 422, "body.texts.0: Input should be a valid string"),
        ('{"text": "a"}', 422, "body.texts: Field required"),
        ('{"texts": ["a"', 422, "JSON decode error"),
        ('{"texts": ["' + "x" * 9000 + '"]}', 413, "The request is longer than 9000 bytes"),
    ],
)
def test_wrong_requests_get_a_clear_answer(client, body, status, message):
    answer = client.post("/classify", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert message in str(answer.json()["detail"])
    assert len(answer.content) < 400
    assert client.get("/ready").json() == {"ready": True, "waiting": 0}


def test_a_long_request_without_a_length_is_refused_too(client):
    parts = (b"x" * 1000 for _ in range(20))
    answer = client.post("/classify", content=parts, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "longer than 9000 bytes" in answer.json()["detail"]


def test_the_loop_goes_on_while_the_model_computes(client):
    batcher = client.app.state.batcher
    classify, begun, free = batcher.classify, threading.Event(), threading.Event()

    def slowly(texts: list[str]) -> Any:
        begun.set()
        assert free.wait(20), "nothing else was answered meanwhile"
        return classify(texts)

    batcher.classify = slowly
    with ThreadPoolExecutor(1) as other:
        slow = other.submit(client.post, "/classify", json={"texts": ["a"]})
        assert begun.wait(20)
        assert client.get("/health").json() == {"status": "ok"}
        assert not slow.done()
        free.set()
        assert slow.result(30).status_code == 200


def test_a_failing_batch_harms_no_other(client):
    batcher = client.app.state.batcher
    classify = batcher.classify
    batcher.classify = lambda texts: 1 / 0
    answer = client.post("/classify", json={"texts": ["a", "the"]})
    assert (answer.status_code, "log says why" in answer.json()["detail"]) == (500, True)
    batcher.classify = classify
    assert client.post("/classify", json={"texts": ["a"]}).status_code == 200
    assert "classifier_failed_batches_total 1\n" in client.get("/metrics").text


def batcher_of(classify: Any, **options: Any) -> Any:
    from batching import Batcher

    return Batcher(lambda: classify, **{"max_batch": 4, "max_wait": 0.02, "max_queue": 16, **options})


def test_batches_fill_and_none_waits_for_ever():
    sizes: list[int] = []

    def classify(texts: list[str]) -> list[str]:
        sizes.append(len(texts))
        return [text.upper() for text in texts]

    async def scene() -> None:
        batcher = batcher_of(classify)
        await batcher.start()
        answers = await asyncio.gather(*(batcher.submit([f"t{i}"]) for i in range(10)))
        assert answers == [[f"T{i}"] for i in range(10)]
        assert sizes == [4, 4, 2]
        assert await asyncio.wait_for(batcher.submit(["alone"]), 10) == ["ALONE"]
        await asyncio.wait_for(batcher.close(), 10)  # nothing waits

    asyncio.run(scene())


def test_a_full_queue_refuses_and_the_end_answers_what_waits():
    from batching import QueueFull

    free = threading.Event()

    async def scene() -> None:
        batcher = batcher_of(lambda texts: free.wait(30) and texts, max_batch=2, max_queue=4)
        await batcher.start()
        begun = [asyncio.create_task(batcher.submit(["a", "b"])) for _ in range(1)]
        await asyncio.sleep(0.1)  # the worker has them
        begun += [asyncio.create_task(batcher.submit(["c", "d"])) for _ in range(2)]
        gone = asyncio.create_task(batcher.submit([]))
        await asyncio.sleep(0.1)
        assert await gone == []
        assert not batcher.ready
        with pytest.raises(QueueFull):
            await batcher.submit(["e"])
        begun[1].cancel()  # its client went away: nothing is computed for it
        end = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull):
            await batcher.submit([])
        free.set()
        await asyncio.wait_for(end, 30)
        assert [await task for task in (begun[0], begun[2])] == [["a", "b"], ["c", "d"]]
        assert (batcher.counts.texts, batcher.counts.refused) == (4, 2)

    asyncio.run(scene())


@pytest.fixture
def running(checkpoint: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The server as a process of its own: .url, .process."""
    needs.package("uvicorn")
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--model", checkpoint, "--port", "0", *request.param]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    lines: list[str] = []
    found = threading.Event()
    started = int(dict(zip(request.param, request.param[1:])).get("--workers", 1))

    def read() -> None:
        for line in process.stderr or ():
            lines.append(line)
            told = "".join(lines)
            if "Uvicorn running on" in told and told.count("Application startup complete") == started:
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert found.wait(120), "".join(lines)
        url = re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))
        assert url, "".join(lines)
        yield SimpleNamespace(url=url[0], process=process, lines=lines)
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.parametrize("running", [("--threads", "1", "--max-batch", "8", "--max-wait-ms", "200")], indirect=True)
def test_concurrent_requests_share_batches_and_the_last_are_answered(running, texts, same):
    import httpx

    def ask(text: str) -> dict[str, Any]:
        answer = httpx.post(running.url + "/classify", json={"texts": [text]}, timeout=60)
        assert answer.status_code == 200
        return answer.json()["results"][0]

    with ThreadPoolExecutor(16) as crowd:
        for text, found in zip(texts, crowd.map(ask, texts)):
            same(text, found)
    metrics = dict(line.rsplit(" ", 1) for line in httpx.get(running.url + "/metrics").text.splitlines())
    assert metrics["classifier_texts_total"] == "64"
    assert int(metrics["classifier_batches_total"]) < 48
    with ThreadPoolExecutor(1) as other:
        last = other.submit(
            httpx.post, running.url + "/classify", json={"texts": ["fine film " * 200] * 30}, timeout=60
        )
        while not last.done() and httpx.get(running.url + "/ready").json()["waiting"] == 0:
            pass
        running.process.send_signal(signal.SIGTERM)
        assert len(last.result(60).json()["results"]) == 30
    # uvicorn ends by the signal it got, once everything is closed.
    assert running.process.wait(60) in (0, -signal.SIGTERM)
    assert "Finished server process" in "".join(running.lines)


@pytest.mark.parametrize("running", [("--workers", "2", "--threads", "1")], indirect=True)
def test_workers_load_their_own_model(running, texts, same):
    import httpx

    answer = httpx.post(running.url + "/classify", json={"texts": texts[:5]}, timeout=120)
    for text, found in zip(texts, answer.json()["results"]):
        same(text, found)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) in (0, -signal.SIGTERM)


def test_memory_does_not_grow_with_the_number_of_lengths(checkpoint):
    from classifier import Classifier

    classifier = Classifier(checkpoint)
    draw = random.Random(1)
    lengths = draw.sample(range(1, 500), 300)

    def run(lengths: list[int]) -> int:
        for length in lengths:
            classifier([" ".join(draw.choices(WORDS, k=max(1, length // n))) for n in range(1, draw.randint(2, 6))])
        memory.reset_high_water()
        return memory.status("VmRSS")

    classifier.warm_up(6)
    before = run(lengths[:60])
    assert run(lengths[60:]) - before < 8e6
