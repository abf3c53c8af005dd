"""Limits, disconnects, keys, live control and the command itself, over real connections."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import serving, wait_idle

import d2moe
from d2moe.errors import StorageError
from d2moe.policy import POLICIES
from d2moe.policy.policy import Policy
from d2moe.runtime.generate import Model
from d2moe.serve.gate import Guard
from d2moe.serve.service import Limits

LONG: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture(scope="module")
def small() -> Iterator[SimpleNamespace]:
    """Two answers at once, one may wait."""
    with serving(Limits(queue=1, tokens=2000, body_bytes=20_000), max_sequences=2) as one:
        yield one


def post(server: SimpleNamespace, path: str = "/v1/completions", **values: Any) -> httpx.Response:
    return server.http.post(path, json={"model": "tiny", "prompt": "a", "max_tokens": 2, **values})  # type: ignore[no-any-return]


def refused(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert re.search(words, error["message"]), error
    assert set(error) == {"message", "type", "param", "code"}


@contextlib.contextmanager
def begun(server: SimpleNamespace, stream: bool, body: dict[str, Any] = LONG) -> Iterator[socket.socket]:
    """A connection on which a long answer has been asked for; it is closed at the end."""
    address = server.url.removeprefix("http://").split(":")
    data = json.dumps({**body, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection((address[0], int(address[1])), timeout=20) as connection:
        connection.sendall(head.encode() + data)
        yield connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_everything(small: SimpleNamespace, stream: bool) -> None:
    worker, pages = small.service.worker, small.service.engine.pages
    with begun(small, stream) as connection:
        if stream:
            assert b"data: " in connection.recv(4096) + connection.recv(4096)
        while not worker.running:
            time.sleep(0.002)
        (job,) = worker._scheduler.running
    wait_idle(small)
    assert job.cancelled and len(job.request.tokens) < 1900, "it ended early"
    assert pages.available == pages.blocks


def test_a_silent_stream_gives_signs_of_life(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2moe.serve.stream.PING_S", 0.005)
    step = small.service.engine.step
    monkeypatch.setattr(small.service.engine, "step", lambda chunks: (time.sleep(0.03), step(chunks))[1])
    lines = post(small, stream=True, max_tokens=3, ignore_eos=True).text.strip().split("\n\n")
    assert lines.count(": at work") >= 3 and sum(line.startswith("data: {") for line in lines) == 3 and lines[-1] == "data: [DONE]"


def test_a_full_queue_says_when_to_come_back(small: SimpleNamespace) -> None:
    worker = small.service.worker
    with contextlib.ExitStack() as connections:
        for _ in range(3):
            connections.enter_context(begun(small, True))
        while worker.live < 3 or worker.running < 2:
            time.sleep(0.002)
        response = post(small)
        refused(response, 429, "3 requests are running or waiting, of 3 that may")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert small.http.get("/health").json() == {"status": "ok", "running": 2, "waiting": 1}
    wait_idle(small)
    assert post(small).status_code == 200


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_token": 3}, "^max_token: unknown field"), ({"bits": 1.5}, "^bits: .*greater than or equal to 2"),
        ({"bits": 9}, "^bits: .*less than or equal to 8"), ({"quality": "best", "bits": 3}, "give one of the two"),
        ({"quality": "good"}, "quality"),
        ({"prompt": ""}, "prompt is empty"), ({"prompt": []}, "prompt is empty"), ({"prompt": [[]]}, "prompt is empty"),
        ({"prompt": [1, 4096]}, "token 4096"), ({"prompt": "\ud800"}, "not valid Unicode"), ({"prompt": [5] * 2049}, "has 2,049 tokens"),
        ({"max_tokens": 2001}, "2,001 tokens are more than this server gives"), ({"temperature": -1}, "temperature"),
        ({"n": 17}, "^n: "), ({"logit_bias": {"x": 1}}, "logit_bias"), ({"stop": [""]}, "stop"),
        ({"stop": "x" * 1001}, "^stop.*1000"), ({"best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 4}, "4 answers in one request, at most 3 may run and wait"), ({"prompt": ["a"] * 300}, "300 prompts"),
        ({"seed": "x"}, "seed"), ({"\ud800": 1}, "unicode"), ({"prompt": {"a": 1}}, "prompt"), ({"stream": 7}, "stream"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_a_clear_400(small: SimpleNamespace, values: dict[str, Any], words: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2, **values})
    refused(small.http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400, words)


def test_bodies_that_are_no_requests(small: SimpleNamespace) -> None:
    def send(content: Any, kind: str = "application/json") -> httpx.Response:
        return small.http.post("/v1/completions", content=content, headers={"content-type": kind})  # type: ignore[no-any-return]

    refused(send(b"{"), 400, "JSON")
    refused(send(b"[" * 9000), 400, "")
    refused(send(b'{"model": "tiny", "prompt": "a"}', "text/plain"), 400, "")
    refused(send(b'{"model": "tiny", "prompt": "a", "temperature": NaN}'), 400, "temperature")
    refused(send(b"x" * 20_001), 413, "more than the 20,000 bytes")
    refused(send(iter([b" " * 15_000, b" " * 15_000])), 413, "more than the 20,000 bytes")  # no length in the header
    refused(small.http.get("/nothing/../../etc/passwd"), 404, "Not Found")
    refused(small.http.get("/v1/completions"), 405, "Not Allowed")


def test_headers_are_limited(small: SimpleNamespace) -> None:
    address = small.url.removeprefix("http://").split(":")
    for n_bytes, status in ((16_000, b"200"), (40_000, b"431"), (900_000, b"4")):
        with socket.create_connection((address[0], int(address[1])), timeout=20) as connection:
            with contextlib.suppress(OSError):  # it need not read all of it
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * n_bytes + b"\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100).startswith(b"HTTP/1.1 " + status)
    assert small.http.get("/health").status_code == 200


def test_no_field_reaches_the_file_system(small: SimpleNamespace, tmp_path: Path) -> None:
    """Schemas and grammars may refer to others by name in many systems; here that is an error, or text."""
    secret = tmp_path / "secret.json"
    secret.write_text('{"const": "s3cret"}')
    schema = {"type": "object", "properties": {"a": {"$ref": f"file://{secret}"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 30, "temperature": 0}
    refused(small.http.post("/v1/chat/completions", json={**body, "response_format": form}), 400, "json_schema cannot be used")
    for grammar in (f"%import {secret}\nstart: a", f'start: %json {{"$ref": "file://{secret}"}}'):
        refused(post(small, grammar=grammar), 400, "lark cannot be used")
    answer = small.http.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"path": f"{{% include '{secret}' %}}"}})
    assert answer.status_code == 200 and "s3cret" not in answer.text
    evil = {**body, "messages": [{"role": "user", "content": "{{ cycler.__init__.__globals__.os.popen('id').read() }}"}]}
    said = small.http.post("/v1/chat/completions", json=evil).json()
    assert said["usage"]["prompt_tokens"] > 20, "messages are no templates"


@pytest.mark.parametrize(
    "template",
    ["{{ cycler.__init__.__globals__.os.getcwd() }}", "{% include '/etc/passwd' %}", "{% for i in range(10**9) %}a{% endfor %}"],
)
def test_a_template_is_data(small: SimpleNamespace, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.service.model.tokenizer, "_template", template)
    monkeypatch.setattr(small.service.model.tokenizer, "_tool_template", None)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    refused(small.http.post("/v1/chat/completions", json=body), 400, "chat template of .* refuses these messages")


def test_chat_refusals(small: SimpleNamespace) -> None:
    def chat(**values: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **values}
        return small.http.post("/v1/chat/completions", json=body)  # type: ignore[no-any-return]

    assert chat().status_code == 200
    image = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]
    refused(chat(messages=[{"role": "user", "content": image}]), 400, "content")
    refused(chat(messages=[]), 400, "messages")
    refused(chat(max_completion_tokens=3), 400, "not both")
    refused(chat(tool_choice="required"), 400, "no tools")
    refused(chat(chat_template_kwargs={"messages": []}), 400, "must not hold messages")
    refused(chat(response_format={"type": "json_schema"}), 400, "needs json_schema")
    with serving(template=None) as plain:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
        refused(plain.http.post("/v1/chat/completions", json=body), 400, "has no chat template")


def test_memory_goes_down_and_up_while_answers_run(small: SimpleNamespace, alone: Model) -> None:
    wish = {"prompt": "The dog and the cat", "max_tokens": 150, "temperature": 0.8, "bits": 8, "ignore_eos": True}
    expected = [alone.generate(seed=seed, **wish).text for seed in range(2)]
    found: dict[int, str] = {}

    def ask(seed: int) -> None:
        found[seed] = post(small, seed=seed, **wish).json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    state = small.http.get("/admin/state").json()
    whole, least = state["memory_bytes"], state["least_memory_bytes"]
    rng = np.random.default_rng()
    while any(thread.is_alive() for thread in threads):
        budget = int(rng.integers(least, least + 4_000_000))
        now = small.http.post("/admin/memory", json={"memory": budget}).json()
        assert now["memory_bytes"] == budget and now["expert_bytes"] <= now["expert_budget_bytes"] < 5_000_000
        time.sleep(0.02)
    assert [found[seed] for seed in range(2)] == expected
    refused(small.http.post("/admin/memory", json={"memory": least - 1}), 400, "least that would do")
    refused(small.http.post("/admin/memory", json={"memory": "much"}), 400, "memory is 'much', expected a number of bytes")
    assert small.http.post("/admin/memory", json={"memory": whole}).json()["memory_bytes"] == whole


def test_the_default_width_can_change(small: SimpleNamespace) -> None:
    assert small.http.post("/admin/defaults", json={"bits": 3}).json()["default_bits"] == 3
    narrow = post(small, max_tokens=60).json()["usage"]["bits"]
    assert small.http.post("/admin/defaults", json={"bits": 6.5}).json()["default_bits"] == 6.5
    assert narrow < 4 < 5 < post(small, max_tokens=60).json()["usage"]["bits"]
    refused(small.http.post("/admin/defaults", json={"bits": 9}), 400, "less than or equal to 8")
    assert small.http.post("/admin/defaults", json={"bits": 4}).json()["default_bits"] == 4
    state = small.http.get("/admin/state").json()
    widths = {int(d) for row in state["planes"] for d in row}
    assert len(state["planes"]) == len(state["heat"]) == len(state["layers"]) == 4 and widths <= {0, 2, 3, 4, 5, 6, 7, 8}
    assert max(int(d) for row in state["heat"] for d in row) > 3, "the experts of the last answer are hot"


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "belady"])
def test_the_policy_can_change_while_answers_run(small: SimpleNamespace, alone: Model, name: str) -> None:
    """Whatever was decided so far: texts are those of a policy that moves bytes only, before, during and after; heat goes on."""
    wish = {"prompt": list(range(100, 250)), "max_tokens": 60, "temperature": 0.8, "bits": 8, "ignore_eos": True, "seed": 3}
    expected = alone.generate(**wish).text
    least = small.http.get("/admin/state").json()["least_memory_bytes"]
    small.http.post("/admin/memory", json={"memory": least + 3_000_000})
    assert post(small, **wish).json()["choices"][0]["text"] == expected
    with begun(small, True, {**LONG, **wish, "max_tokens": 1000}):
        while not small.service.worker.running:
            time.sleep(0.002)
        now = small.http.post("/admin/policy", json={"policy": name}).json()
        assert now["policy"] == name in now["policies"] and "belady" not in now["policies"]
        text = post(small, **wish).json()["choices"][0]["text"]
        moves_only = type(small.service.engine.policy).choose is Policy.choose
        assert not moves_only or text == expected
        if name in ("edgemoe", "adapmoe"):  # its own text, and no block that another policy filled
            with d2moe.load(context=2048, policy=name) as other:
                assert text == other.generate(**wish).text
        heat = small.http.get("/admin/state").json()["heat"]
        assert max(int(d) for row in heat for d in row) > 3, heat
        used = small.service.engine.ledger.used_bytes
        assert name in ("on-demand", "copies") or used > 1_000_000, "those keep nothing"
    wait_idle(small)
    small.http.post("/admin/policy", json={"policy": "hebf"})
    assert small.service.engine.ledger.rank is None
    assert post(small, **wish).json()["choices"][0]["text"] == expected


def test_policies_that_do_not_fit_are_refused_and_change_nothing(small: SimpleNamespace) -> None:
    small.http.post("/admin/policy", json={"policy": "lfu"})
    before = small.service.engine.policy
    refused(small.http.post("/admin/policy", json={"policy": "belady"}), 400, "must know the future")
    refused(small.http.post("/admin/policy", json={"policy": "mru"}), 400, "policy is 'mru', expected one of hebf")
    refused(small.http.post("/admin/policy", json={"policy": "lfu", "learn": "/etc/passwd"}), 400, "learn: unknown field")
    assert small.service.engine.policy is before and small.service.engine.ledger.rank == before._rank
    assert post(small, max_tokens=20).status_code == 200
    assert small.http.post("/admin/policy", json={"policy": "hebf"}).json()["policy"] == "hebf"


def test_control_from_the_command_line(small: SimpleNamespace) -> None:
    def control(*arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "d2moe", "control", *arguments]
        environment = {**os.environ, "D2MOE_API_KEY": key}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)

    engine, whole = small.service.engine, small.service.engine.budget.memory
    done = control("--url", small.url, "--memory", str(whole + 10**7), "--bits", "3.5", "--policy", "lru", "--json")
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout)
    assert (state["memory_bytes"], state["default_bits"], state["policy"]) == (whole + 10**7, 3.5, "lru")
    assert (engine.budget.memory, small.service.default_bits, engine.policy.name) == (whole + 10**7, 3.5, "lru")
    shown = control("--url", small.url, "--memory", str(whole), "--bits", "4", "--policy", "hebf")
    assert re.search(r"default bits +4 *\n +policy +hebf *\n", shown.stdout), shown.stdout
    for arguments, words in (
        (["--memory", "1MB"], "refuses: .*least that would do"), (["--policy", "belady"], "refuses: .*must know the future"),
        (["--url", "http://127.0.0.1:1"], "no d2moe server answers at http://127.0.0.1:1"), (["--url", "nowhere"], "url is 'nowhere'"),
    ):  # fmt: skip
        out = control("--url", small.url, *arguments)
        assert out.returncode == 1 and re.match(f"error: .*{words}", out.stderr) and out.stderr.count("\n") == 1, out.stderr
    with serving(guard=Guard(api_key="k1")) as guarded:
        assert "API key is missing" in control("--url", guarded.url).stderr
        assert control("--url", guarded.url, key="k1").returncode == 0


def test_metrics_count_what_happened(small: SimpleNamespace) -> None:
    def read() -> dict[str, float]:
        text = small.http.get("/metrics").text
        return {f"{s.name}{sorted(s.labels.items())}": s.value for f in text_string_to_metric_families(text) for s in f.samples}

    before = read()
    post(small, max_tokens=7, bits=3, ignore_eos=True, prompt=[5] * 100)
    post(small, max_tokens=1, bits=3, ignore_eos=True, prompt=[5] * 100)
    after = read()

    def rose(name: str, labels: str = "[]") -> float:
        return after[f"d2moe_{name}{labels}"] - before.get(f"d2moe_{name}{labels}", 0)

    assert rose("generated_tokens_total") == 8 and rose("prompt_tokens_total") == 200
    assert rose("prompt_tokens_reused_total") == 64 and rose("requests_total", "[('outcome', 'length')]") == 2
    assert rose("time_to_first_token_seconds_count") == 2 and rose("time_per_token_seconds_count") == 6
    assert rose("tokens_total") == 100 + 6 + 36 and rose("steps_total") == 8 == rose("step_seconds_count")
    assert after["d2moe_resident_bytes[]"] > 5e7 and 0 < after["d2moe_expert_hit_rate[]"] < 1
    for name in ("resident_bytes", "read_bytes_total", "wanted_bytes_total", "missing_bytes_total"):
        planes = sum(v for k, v in after.items() if k.startswith(f"d2moe_plane_{name}["))
        assert planes == after[f"d2moe_expert_{name}[]"] > 0, name


@pytest.mark.parametrize("policy", ["hebf", "lookahead"])
def test_metrics_of_widths_are_those_that_were_used(policy: str) -> None:
    """A fractional dial, in slots that hold a part of the experts: per width, what was read, wanted, missing and computed."""
    with serving(expert_memory="2MB", policy=policy) as server:
        asked = [2.5, 3.7, 2.5, 8.0]
        bits = [post(server, bits=b, max_tokens=30, ignore_eos=True).json()["usage"]["bits"] for b in asked]
        post(server, bits=8, max_tokens=1)
        text = server.http.get("/metrics").text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        values = {(s.name.removeprefix("d2moe_"), s.labels.get("bits", s.labels.get("le", ""))): s.value for s in samples}
        c, ledger = server.service.engine.counters, server.service.engine.ledger
        taken = (0, *range(2, 9))  # 0: left out by the width router
        widths = np.array([values["expert_uses_total", str(b)] for b in taken])
        assert widths.sum() == c.uses and widths @ np.array(taken) == c.use_bits and (widths[[0, 1, 2, 3, 7]] > 0).all()
        assert 2.2 < bits[0] < 3 < bits[1] < 4.5 and bits[3] == 8
        assert [values["request_bits_bucket", b] for b in ("2.0", "2.5", "4.0")] == [0, 2, 3] and values["request_bits_count", ""] == 5
        hit = {b: values["plane_hit_rate", str(b)] for b in range(2, 9)}
        for b in hit:
            size = ledger.base_bytes if b == 2 else ledger.plane_bytes
            assert values["plane_wanted_bytes_total", str(b)] % size == 0
            missing = values["plane_missing_bytes_total", str(b)]
            assert hit[b] == pytest.approx(1 - missing / values["plane_wanted_bytes_total", str(b)])
        ahead = values["expert_read_bytes_total", ""] - values["expert_missing_bytes_total", ""]
        assert ahead > 0 if policy == "lookahead" else ahead == 0
        assert sum(values["plane_read_bytes_total", str(b)] for b in hit) == values["expert_read_bytes_total", ""]
        assert hit[2] > hit[8], "low planes are wanted by all"
        assert values["memory_budget_bytes", ""] == server.service.engine.budget.memory
        assert values["stall_seconds_total", ""] > 0


def test_a_failed_read_is_a_500_and_the_next_request_works(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small.service.engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", lambda chunks: (_ for _ in ()).throw(StorageError("/secret/layer-000: the file ends")))
        refused(post(small), 500, "^the engine failed; the server's log says more$")
        events = post(small, stream=True).text.strip().split("\n\n")
        assert "engine failed" in json.loads(events[-2].removeprefix("data: "))["error"]["message"] and events[-1] == "data: [DONE]"
    assert post(small).status_code == 200


def test_ids_headers_and_hosts(small: SimpleNamespace) -> None:
    response = small.http.get("/health", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1" and "default-src 'self'" in response.headers["content-security-policy"]
    assert re.fullmatch("[0-9a-f]{32}", small.http.get("/health", headers={"x-request-id": "no spaces"}).headers["x-request-id"])
    refused(small.http.get("/v1/models", headers={"host": "evil.example"}), 421, "this server answers to")
    done = post(small)
    assert done.json()["id"] == f"cmpl-{done.headers['x-request-id']}"


def test_a_key_is_asked_for() -> None:
    with serving(guard=Guard(api_key="s3cret")) as server:
        for path in ("/v1/models", "/metrics", "/admin/state", "/openapi.json"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
                refused(server.http.get(path, headers=headers), 401, "API key is missing or wrong")
            assert server.http.get(path, headers={"authorization": "Bearer s3cret"}).status_code == 200
        for path in ("/", "/health", "/page/page.js", "/page/page.css"):
            assert server.http.get(path).status_code == 200


def test_admin_is_for_this_machine_without_a_key(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2moe.serve.gate.is_loopback", lambda host: False)
    refused(small.http.get("/admin/state"), 403, "own machine only")
    refused(small.http.post("/admin/memory", json={"memory": "1GB"}), 403, "own machine only")
    assert small.http.get("/v1/models").status_code == 200


def test_a_stop_lets_answers_end() -> None:
    with serving() as server, begun(server, True, {**LONG, "max_tokens": 300}) as connection:
        while not server.service.worker.running:
            time.sleep(0.002)
        server.stop()
        data = b""
        while part := connection.recv(65536):
            data += part
            if b"[DONE]" in data:
                break
        assert data.count(b'"finish_reason": "length"') == 1 and b"[DONE]" in data


def test_answers_that_take_too_long_are_told_of_the_end() -> None:
    with serving(Limits(drain_s=0.2)) as server, begun(server, True) as first, begun(server, False) as second:
        while server.service.worker.running < 2:
            time.sleep(0.002)
        server.stop()
        streamed, whole = (b"".join(iter(lambda c=c: c.recv(65536), b"")) for c in (first, second))  # type: ignore[misc]
    assert b"stopped before the answer ended" in streamed
    assert b"[DONE]" in streamed and whole.startswith(b"HTTP/1.1 503 ") and b"stopped before the answer ended" in whole


def test_the_command(tmp_path: Any) -> None:
    command = [sys.executable, "-m", "d2moe", "serve"]
    environment = {**os.environ, "D2MOE_API_KEY": "k"}
    with subprocess.Popen(
        [*command, "builtin", "--memory", "280MB", "--port", "0", "--log", "json"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        banner = process.stderr.readline()
        url = re.search(r"qwen3moe-14m at (http://127.0.0.1:\d+)/ \(memory 280.0 MB", banner)
        assert url, banner
        body = {"model": "qwen3moe-14m", "prompt": "Once", "max_tokens": 5, "seed": 1}
        response = httpx.post(f"{url[1]}/v1/completions", json=body, headers={"authorization": "Bearer k"}, timeout=30)
        assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 5
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1])  # type: ignore[index]
        assert peak * 1024 <= 280_000_000
        taken = subprocess.run(
            [*command, "builtin", "--port", url[1].split(":")[-1]], capture_output=True, text=True, check=False, timeout=60
        )
        assert taken.returncode == 1 and re.fullmatch(r"error: cannot listen on 127.0.0.1 port \d+: .*; choose another.*\n", taken.stderr)
        process.send_signal(signal.SIGINT)
        lines = process.stderr.read().splitlines()
        assert process.wait(20) == 0
    (line,) = [json.loads(text) for text in lines if "/v1/completions" in text]
    assert line["status"] == 200 and line["generated_tokens"] == 5 and line["request_id"] in response.json()["id"]
    assert "Once" not in "".join(lines), "the log holds no text of users"
    bare = "import sys; sys.modules['uvicorn'] = None; from d2moe.cli import main; sys.exit(main(['serve', 'builtin']))"
    out = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=False, timeout=60)
    assert out.returncode == 1 and out.stderr.endswith("which the server needs; run: pip install 'd2moe[serve]'\n")
    for arguments, words in (
        (["/nowhere"], "nowhere"), (["builtin", "--memory", "60MB"], "least that would do"),
        (["builtin", "--chat-template", str(tmp_path / "t")], "t"), (["builtin", "--host", "256.1.1.1"], "cannot listen"),
    ):  # fmt: skip
        out = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=60)
        assert out.returncode in (1, 2) and words in out.stderr and "Traceback" not in out.stderr, out.stderr
