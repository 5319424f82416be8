"""A vision-language model behind an OpenAI-compatible server (vLLM, SGLang, `transformers serve`, …), for relabelling.

What such a server answers is text from elsewhere: it is read up to a limit, and shown on one line. An image that it
does not caption has an empty caption, which a check finds; the others go on.
"""

import base64
import io
import json
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, Self

from PIL import Image

from recap import progress
from recap.captioners import Captioner
from recap.captioners.text import Caption
from recap.config import Draw, Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.errors import UserError
from recap.image_filters import middle
from recap.openai_api import CONNECT_TIMEOUT, client_options, request_headers, without_key
from recap.sample import visible

MAX_REQUESTS = 16
"""At a time. A server puts those that it has together into batches of its own."""
MAX_RETRIES = 6
"""Of a request, for lost connections, 408, 409, 429 and 5xx: about half a second after the first, then up to 8 s."""
TIMEOUT = 300.0
"""Seconds for an answer."""
MAX_ANSWER_BYTES = 1 << 20
MAX_LETTERS_PER_TOKEN = 32
"""A caption that is longer than its tokens can be is cut."""
JPEG_MAX_SIDE = 65_500
OF_ONE_IMAGE = (400, 413, 422, 500)
"""Statuses that an image may be the cause of: too large, too long, of a shape that the model can't read."""
MAX_REFUSED, MAX_REFUSED_LATER = 8, 64
"""Requests in a row that are given up before it is the server's fault; the fewer, where none was answered before."""


class Refused(Exception):
    """A request that no other is like; `kind` of reason, and what the server said."""

    def __init__(self, kind: str, said: str = "") -> None:
        super().__init__(f"{kind}: {said}" if said else kind)
        self.kind = kind


class Served(Captioner):
    """Captions in the words of a model that is served elsewhere. Features are the encoded pictures themselves."""

    def __init__(self, client: Any, server: str, model: str) -> None:
        self.client, self.server, self.model = client, server, model
        self.lock = threading.Lock()
        self.num_refused, self.ever_answered = 0, False
        """The first of them in a row."""
        self.told: set[str] = set()
        """Kinds of refusal that the user knows of."""

    @classmethod
    def open(cls, config: CaptionerConfig) -> Self:
        """A client of `config.server`. The key in OPENAI_API_KEY, where that is set, goes to this server only.

        Raises:
            UserError: openai is not installed, or the address is none.
        """
        server = str(config.server)
        options = client_options(server, "captioner.server")
        import openai
        client = openai.OpenAI(
            **options, max_retries=MAX_RETRIES, timeout=openai.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT),
            http_client=openai.DefaultHttpxClient(follow_redirects=False))  # a redirect would take the key elsewhere
        return cls(client, server, config.model)

    def preprocess(self, images: list[Image.Image]) -> list[str]:
        """RGB images → data URLs. Of one that is too long for a model its middle."""
        return [_data_url(middle(image)) for image in images]

    def encode(self, pixels: list[str]) -> list[str]:
        """The same: the server encodes."""
        return pixels

    def caption(self, features: list[str], style: Style) -> list[Caption]:
        """Captions in the order of the images; a request for each, some of them at a time.

        One that is refused for its image, or answered with what can't be read, has no text and has not ended.

        Raises:
            UserError: the style asks for what a server can't do; or it can't be reached, answers an error that no image
                can be the cause of, or refuses too many in a row.
        """
        if style.num_beams > 1 or style.no_repeat_ngram_size:
            raise UserError("styles: a server decodes greedily: leave num_beams and no_repeat_ngram_size out, or name "
                            "the model itself instead of captioner.server")
        is_over = threading.Event()

        def ask(url: str, place: int) -> Caption:
            if is_over.is_set():  # nobody will come to this answer: one that was begun before it has failed
                raise CancelledError
            try:
                return self._ask(url, style, place)
            except BaseException:
                is_over.set()
                raise

        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            try:
                return list(pool.map(ask, features, range(len(features))))
            finally:
                is_over.set()

    def _ask(self, url: str, style: Style, place: int) -> Caption:
        try:
            caption = self._send(url, style, place)
        except Refused as refused:
            return self._give_up(refused)
        with self.lock:
            self.num_refused, self.ever_answered = 0, True
        return caption

    def _send(self, url: str, style: Style, place: int) -> Caption:
        import openai
        lot = {"temperature": style.temperature, "seed": style.seeds[place]} if isinstance(style, Draw) else {
            "temperature": 0}
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": style.prompt}]
        try:
            with self.client.chat.completions.with_streaming_response.create(
                    model=self.model, messages=[{"role": "user", "content": content}], **lot,
                    max_tokens=style.max_new_tokens, extra_headers=request_headers()) as response:
                return _caption(_read(response), style)
        except openai.APIStatusError as error:
            if error.status_code in OF_ONE_IMAGE:
                raise Refused(f"answered {error.status_code}", error.message) from None
            raise self._failure(f"answered {error.status_code}: {error.message}",
                                f"check that it serves {self.model}, and images") from None
        except (openai.APIConnectionError, OSError) as error:
            raise self._failure(f"can't be reached, or does not answer: {error}", "check that it runs there") from None
        except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise Refused("gives no chat completion", str(error)) from None
        except Exception as error:  # the HTTP library's own, while the answer is read; it has changed its name before
            if not type(error).__module__.startswith("http"):
                raise
            raise self._failure(f"broke off: {error}", "run the same command again") from None

    def _give_up(self, refused: Refused) -> Caption:
        """No caption of one image, unless it is all images that are refused."""
        with self.lock:
            self.num_refused += 1
            is_hopeless = self.num_refused >= (MAX_REFUSED_LATER if self.ever_answered else MAX_REFUSED)
            is_new = refused.kind not in self.told
            self.told.add(refused.kind)
        if is_hopeless:
            raise self._failure(str(refused), f"that was request {self.num_refused} in a row that it did not caption: "
                                              f"check captioner.server, and that it serves {self.model}, and images")
        if is_new:
            progress.warn(f"{self._said(str(refused))}; that image has no caption, and others that fare so have none")
        return Caption("", False)

    def _failure(self, what: str, advice: str) -> UserError:
        return UserError(f"{self._said(what)}; {advice}")

    def _said(self, what: str) -> str:
        return f"captioner.server: {self.server} {visible(without_key(what))[:300]}"


def _data_url(image: Image.Image) -> str:
    kind = "JPEG" if max(image.size) <= JPEG_MAX_SIDE else "PNG"
    file = io.BytesIO()
    image.convert("RGB").save(file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _read(response: Any) -> dict[str, Any]:
    """The first choice of an answer of bounded size and time."""
    body, deadline = b"", time.monotonic() + TIMEOUT
    for part in response.iter_bytes():
        body += part
        if len(body) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
            raise ValueError("its answer does not end")
    choice: dict[str, Any] = json.loads(body)["choices"][0]
    return choice


def _caption(choice: dict[str, Any], style: Style) -> Caption:
    if choice.get("finish_reason") == "content_filter":
        raise Refused("filters what it says")
    said = choice["message"].get("content") or ""
    limit = style.max_new_tokens * MAX_LETTERS_PER_TOKEN
    return Caption(visible(str(said)[:limit]), choice.get("finish_reason") == "stop" and len(said) <= limit)
