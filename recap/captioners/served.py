"""A vision-language model behind an OpenAI-compatible server (vLLM, SGLang, `transformers serve`, …), for relabelling.

What such a server answers is text from elsewhere: it is read up to a limit, and shown on one line.
"""

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from PIL import Image

from recap.captioners import Captioner
from recap.captioners.text import Caption
from recap.config import Draw, Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.errors import UserError
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


class Served(Captioner):
    """Captions in the words of a model that is served elsewhere. Features are the encoded pictures themselves."""

    def __init__(self, client: Any, server: str, model: str) -> None:
        self.client, self.server, self.model = client, server, model

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
        """RGB images → data URLs."""
        return [_data_url(image) for image in images]

    def encode(self, pixels: list[str]) -> list[str]:
        """The same: the server encodes."""
        return pixels

    def caption(self, features: list[str], style: Style) -> list[Caption]:
        """Captions in the order of the images; a request for each, some of them at a time.

        Raises:
            UserError: the style asks for what a server can't do; or it can't be reached, or answers an error.
        """
        if style.num_beams > 1 or style.no_repeat_ngram_size:
            raise UserError("styles: a server decodes greedily: leave num_beams and no_repeat_ngram_size out, or name "
                            "the model itself instead of captioner.server")
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            answers = [pool.submit(self._ask, url, style) for url in features]
            try:
                return [answer.result() for answer in answers]
            finally:  # after an error, none of those that wait is sent
                for answer in answers:
                    answer.cancel()

    def _ask(self, url: str, style: Style) -> Caption:
        import openai
        lot = {"temperature": style.temperature, "seed": style.seed} if isinstance(style, Draw) else {"temperature": 0}
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": style.prompt}]
        try:
            with self.client.chat.completions.with_streaming_response.create(
                    model=self.model, messages=[{"role": "user", "content": content}], **lot,
                    max_tokens=style.max_new_tokens, extra_headers=request_headers()) as response:
                return _caption(_read(response), style)
        except openai.APIStatusError as error:
            raise self._failure(f"answered {error.status_code}: {error.message}",
                                f"check that it serves {self.model}, and images") from None
        except (openai.APIConnectionError, OSError) as error:
            raise self._failure(f"can't be reached, or does not answer: {error}", "check that it runs there") from None
        except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._failure(f"gives no chat completion: {error}", "check captioner.server") from None
        except Exception as error:  # the HTTP library's own, while the answer is read; it has changed its name before
            if not type(error).__module__.startswith("http"):
                raise
            raise self._failure(f"broke off: {error}", "run the same command again") from None

    def _failure(self, what: str, advice: str) -> UserError:
        said = visible(without_key(what))[:300]
        return UserError(f"captioner.server: {self.server} {said}; {advice}")


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
    said = choice["message"].get("content") or ""
    limit = style.max_new_tokens * MAX_LETTERS_PER_TOKEN
    return Caption(visible(str(said)[:limit]), choice.get("finish_reason") == "stop" and len(said) <= limit)
