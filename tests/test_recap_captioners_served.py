"""Captions from an OpenAI-compatible server: in order, with retries, and whatever it answers is one clear line."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("openai")

from recap.caption_checks import faults
from recap.captioners import open_captioner, served
from recap.captioners.served import Served
from recap.captioners.text import Caption
from recap.config import Style
from recap.config.captioner import Captioner
from recap.config.relabel import Checks
from recap.errors import UserError

STYLE = Style(prompt="A short caption:", max_new_tokens=16)
COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "yellow": (240, 230, 20)}


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), colour) for colour in COLOURS.values()]


def colour_of(body: dict[str, Any]) -> str:
    """The colour of the picture in a request."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    found = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).getpixel((3, 3))
    assert isinstance(found, tuple)
    return min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], found, strict=True)))


def completion(text: Any, finish_reason: str = "stop") -> dict[str, Any]:
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [
        {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}]}


class Server:
    """A server on loopback. `answer` makes status, body and headers of a request's body; all that came is kept."""

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                ours.requests.append(body)
                ours.headers.append({name.lower(): value for name, value in self.headers.items()})
                ours.paths.append(self.path)
                status, content, headers = answer(body)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)),
                                    **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start a server on loopback. The client of this test has no key, and asks no proxy."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    started: list[Server] = []

    def start(answer: Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]) -> Server:
        started.append(Server(answer))
        return started[-1]

    yield start
    for server in started:
        server.server.shutdown()
        server.server.server_close()


def opened(url: str) -> Served:
    captioner = open_captioner(Captioner(family="vlm", model="tiny", server=url), "cpu")
    assert isinstance(captioner, Served)
    return captioner


def captions(captioner: Served, images: list[Image.Image], style: Style = STYLE) -> list[Caption]:
    return captioner.caption(captioner.encode(captioner.preprocess(images)), style)


def test_answers_come_in_the_order_of_the_images_and_some_at_a_time(serve: Callable[..., Server]) -> None:
    together, most = [0], [0]
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.3 if colour_of(body) == "red" else 0.05)  # the first image is the last one answered
        with lock:
            together[0] -= 1
        return 200, completion(f" It is\n{colour_of(body)}."), {}

    server = serve(answer)
    found = captions(opened(server.url), pictures() * 10)
    assert found == [Caption(f"It is {name}.", True) for name in COLOURS] * 10
    assert 1 < most[0] <= served.MAX_REQUESTS
    assert set(server.paths) == {"/v1/chat/completions"}
    request = server.requests[0]
    assert request["model"] == "tiny"
    assert request["temperature"] == 0
    assert request["max_tokens"] == 16
    assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"]
    assert request["messages"][0]["content"][1]["text"] == "A short caption:"
    assert "authorization" not in server.headers[0]


def test_what_is_lost_for_a_while_is_asked_again(serve: Callable[..., Server]) -> None:
    answers = iter([(503, {"error": {"message": "busy"}}, {}), (429, {"error": {"message": "slowly"}}, {}),
                    (200, completion("red"), {})])
    server = serve(lambda _: next(answers))
    assert captions(opened(server.url), pictures()[:1]) == [Caption("red", True)]
    assert len(server.requests) == 3


def test_a_caption_that_was_cut_off_has_not_ended(serve: Callable[..., Server]) -> None:
    server = serve(lambda body: (200, completion("red", "stop" if colour_of(body) == "red" else "length"), {}))
    assert [caption.ended for caption in captions(opened(server.url), pictures()[:2])] == [True, False]


@pytest.mark.parametrize(("answer", "message"), [
    ((404, {"error": {"message": "no model 'tiny' here"}}, {}), r"answered 404: .*no model 'tiny' here.*serves tiny"),
    ((400, {"error": {"message": "no\nimages\x1b[31m"}}, {}), r"answered 400: .*no images \[31m"),
    ((200, b"<html>", {}), "gives no chat completion"),
    ((200, {"choices": []}, {}), "gives no chat completion"),
    ((200, {"choices": [{"text": "red"}]}, {}), "gives no chat completion"),
    ((200, {"choices": [{"message": None}]}, {}), "gives no chat completion"),
    ((200, {"choices": ["red"]}, {}), "gives no chat completion"),
    ((200, completion("x" * 3_000_000), {}), "its answer does not end"),
    ((200, b"[" * 100_000, {}), "gives no chat completion"),
])
def test_an_error_is_one_clear_line(serve: Callable[..., Server], answer: Any, message: str) -> None:
    server = serve(lambda _: answer)
    with pytest.raises(UserError, match=message) as caught:
        captions(opened(server.url), pictures() * 2)
    said = str(caught.value)
    assert said.startswith(f"captioner.server: {server.url} ")
    assert said.isprintable()
    assert len(said) < 500


REFUSED = "not this\nimage\x1b[31m" + "!" * 999


@pytest.mark.parametrize(("refusal", "message"), [
    ((400, {"error": {"message": REFUSED}}, {}), "answered 400: "),
    ((413, {"error": {"message": REFUSED}}, {}), "answered 413: "),
    ((422, {"error": {"message": REFUSED}}, {}), "answered 422: "),
    ((500, {"error": {"message": REFUSED}}, {}), "answered 500: "),
    ((200, completion("a pers", "content_filter"), {}), "filters what it says"),
    ((200, b"<html>", {}), "gives no chat completion: "),
    ((200, completion("x" * 3_000_000), {}), "gives no chat completion: its answer does not end"),
])
def test_an_image_that_is_refused_is_given_up_alone(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch,
                                                    refusal: Any, message: str) -> None:
    told: list[str] = []
    monkeypatch.setattr(served.progress, "warn", told.append)
    monkeypatch.setattr(served, "MAX_RETRIES", 0)
    server = serve(lambda body: refusal if colour_of(body) == "green" else (200, completion(colour_of(body)), {}))
    captioner = opened(server.url)
    expected = [Caption(name, True) if name != "green" else Caption("", False) for name in COLOURS]
    assert captions(captioner, pictures()) == captions(captioner, pictures()) == expected
    assert faults("", False, "short", STYLE.prompt, Checks())[0] == "empty"
    warning, = told  # once, though two images were refused
    assert warning.startswith(f"captioner.server: {server.url} {message}")
    assert warning.isprintable() and len(warning) < 500


def test_refusals_in_a_row_end_the_run(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "MAX_REQUESTS", 1)
    server = serve(lambda body: (200, completion("red"), {}) if colour_of(body) == "red" else (
        400, {"error": {"message": "no"}}, {}))
    red, green = pictures()[:2]
    assert captions(opened(server.url), [green] * 7 + [red])[-1].text == "red"
    with pytest.raises(UserError, match=r"answered 400: .*no; that was request 8 in a row that it did not caption"):
        captions(opened(server.url), [green] * 8)
    captioner = opened(server.url)
    assert len(captions(captioner, [red] + [green] * 63 + [red] + [green] * 63)) == 128
    with pytest.raises(UserError, match="that was request 64 in a row"):
        captions(captioner, [green])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_image_is_the_cause_of_ends_the_run_at_once(serve: Callable[..., Server], status: int) -> None:
    server = serve(lambda body: (status, {"error": {"message": "no"}}, {}) if colour_of(body) == "green" else (
        200, completion("red"), {}))
    with pytest.raises(UserError, match=f"answered {status}: .*no;"):
        captions(opened(server.url), pictures())


def test_of_an_image_that_is_too_long_the_middle_is_sent() -> None:
    image = Image.new("RGB", (2000, 10), "white")
    image.paste((250, 0, 0), (750, 0, 1250, 10))
    url, = opened("http://127.0.0.1:9/v1").preprocess([image])
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.size == (500, 10) and sent.resize((1, 1)).getpixel((0, 0)) == pytest.approx((250, 0, 0), abs=9)


def test_after_an_error_what_waits_is_not_sent(serve: Callable[..., Server]) -> None:
    server = serve(lambda _: (400, {"error": {"message": "no"}}, {}))
    with pytest.raises(UserError, match="answered 400"):
        captions(opened(server.url), pictures() * 50)
    assert len(server.requests) < 200


def test_a_server_that_is_not_there_is_one_clear_line(serve: Callable[..., Server],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "MAX_RETRIES", 0)
    with pytest.raises(UserError, match="can't be reached"):
        captions(opened("http://127.0.0.1:9/v1"), pictures()[:1])


def test_a_server_that_does_not_answer_is_one_clear_line(serve: Callable[..., Server],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "MAX_RETRIES", 0)
    monkeypatch.setattr(served, "TIMEOUT", 0.2)
    server = serve(lambda _: (time.sleep(1), (200, completion("late"), {}))[1])
    with pytest.raises(UserError, match="does not answer"):
        captions(opened(server.url), pictures()[:1])


def test_an_answer_that_breaks_off_is_one_clear_line(serve: Callable[..., Server]) -> None:
    server = serve(lambda _: (200, completion("red"), {"Content-Length": "5000"}))
    with pytest.raises(UserError, match="broke off"):
        captions(opened(server.url), pictures()[:1])


def test_the_key_goes_to_the_server_and_nowhere_else(serve: Callable[..., Server], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = serve(lambda _: (200, completion("stolen"), {}))
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server = serve(lambda _: (307, {}, {"Location": elsewhere.url + "/chat/completions"}))
    with pytest.raises(UserError, match="answered 307"):
        captions(opened(server.url), pictures()[:1])
    assert server.headers[0]["authorization"] == "Bearer secret-key"
    assert not elsewhere.requests
    echo = serve(lambda _: (401, {"error": {"message": "wrong key secret-key"}}, {}))
    with pytest.raises(UserError, match="wrong key …") as caught:
        captions(opened(echo.url), pictures()[:1])
    assert "secret-key" not in str(caught.value)


def test_hostile_text_is_shown_and_bounded(serve: Callable[..., Server]) -> None:
    server = serve(lambda body: (200, completion({"red": "a\x00b\u202e\x1b[2J\r\nc", "green": "y" * 5000, "blue": None,
                                                  "yellow": ["not", "text"]}[colour_of(body)]), {}))
    found = captions(opened(server.url), pictures())
    assert found[0].text == "a b [2J c"
    assert len(found[1].text) == 16 * served.MAX_LETTERS_PER_TOKEN
    assert not found[1].ended
    assert found[2].text == ""


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"no_repeat_ngram_size": 2}])
def test_what_a_server_cannot_do_is_one_clear_line(more: dict[str, int]) -> None:
    with pytest.raises(UserError, match="leave num_beams and no_repeat_ngram_size out"):
        captions(opened("http://127.0.0.1:9/v1"), pictures(), STYLE.model_copy(update=more))


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://localhost/v1", "/v1"])
def test_what_is_no_address_is_one_clear_line(address: str) -> None:
    with pytest.raises(UserError, match="is not an address"):
        opened(address)


def test_without_openai_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recap.openai_api.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'recap-t2i\[server\]'"):
        opened("http://127.0.0.1:9/v1")


def test_a_picture_that_jpeg_has_no_room_for_is_sent_as_png() -> None:
    url, = opened("http://127.0.0.1:9/v1").preprocess([Image.new("RGB", (66_000, 1320))])
    assert url.startswith("data:image/png;base64,")


@pytest.fixture
def transformers_serve(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """`transformers serve` with a tiny LLaVA from a folder, offline: address and folder."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from test_recap_captioners_vlm import write
    folder = write("llava", tmp_path / "llava")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([Path(sys.executable).with_name("transformers"), "serve", str(folder), "--host",
                                    "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
                                   env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while not is_up(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"transformers serve did not start: {(tmp_path / 'log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_up(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.full
def test_what_transformers_serves_is_what_the_model_says_here(transformers_serve: tuple[str, Path],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = transformers_serve
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = Captioner(family="vlm", model=str(folder), dtype="float32")
    there = open_captioner(config.model_copy(update={"server": url}), "cpu")
    here = open_captioner(config, "cpu")
    as_sent = [Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2]))).convert("RGB")
               for sent in there.preprocess(pictures())]
    for style in (STYLE, Style(prompt="A detailed caption:", max_new_tokens=24)):
        found = there.caption(there.encode(there.preprocess(pictures())), style)
        assert found == here.caption(here.encode(here.preprocess(as_sent)), style)
        assert len({caption.text for caption in found}) > 1
