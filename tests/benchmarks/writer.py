"""Captions a minute of the server writer, as a share of what its rate limit allows, by a server of 100 ms latency.

    python tests/benchmarks/writer.py [--limits 600 3000 6000 12000] [--seconds 10]

The server is a process of its own on loopback. Writer and server share the machine's cores.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recap.config.stitch import Llm
from recap.facts import Facts, Object
from recap.llm import Scene
from recap.llm.server import ServerWriter

LATENCY = 0.1
CAPTIONS = {"short": "A dog.", "long": "A dog stands in the middle of the picture.",
            "rich": "A dog stands in the middle of the picture, and there is nothing else to be seen in it."}


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection."""
    content = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": json.dumps(CAPTIONS)}}],
                          "usage": {"prompt_tokens": 500, "completion_tokens": 50}}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    try:
        while headers := await reader.readuntil(b"\r\n\r\n"):
            length = next(int(line[15:]) for line in headers.lower().split(b"\r\n") if line[:15] == b"content-length:")
            await reader.readexactly(length)
            await asyncio.sleep(LATENCY)
            writer.write(head + content)
    except asyncio.IncompleteReadError:
        writer.close()


async def serve() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def measure(url: str, limit: float, seconds: float, folder: Path) -> float:
    """Requests a minute, over the allowed."""
    num_scenes = round(limit / 60 * seconds)
    scenes = [Scene(Facts([Object("dog", round(index / num_scenes, 6), (0, 0, 50, 50)),
                           Object(f"thing {index}", 0.9, (0, 0, 9, 9))]), 100, 100) for index in range(num_scenes)]
    config = Llm(model="tiny", server=url, requests_per_minute=limit, concurrency=max(8, round(limit / 60 * 0.5)))
    writer = ServerWriter(config, list(CAPTIONS), folder / f"{limit}.sqlite")
    started = time.perf_counter()
    took = writer.prepare(scenes, num_scenes)
    spent = time.perf_counter() - started
    if took["requests"] != num_scenes or took["possible_double_payments"]:
        raise SystemExit(f"not what was to be measured: {took}")
    return num_scenes / spent * 60 / limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limits", type=float, nargs="+", default=[600, 3000, 6000, 12000])
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
    os.environ.pop("OPENAI_API_KEY", None)
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        try:
            with tempfile.TemporaryDirectory() as folder:
                measure(url, 60, 1, Path(folder))  # what is imported once takes a second
                found = [(limit, measure(url, limit, options.seconds, Path(folder))) for limit in options.limits]
        finally:
            server.terminate()
    for limit, share in found:
        print(f"{limit:7.0f} requests a minute allowed: {100 * share:5.1f} % of it reached")


if __name__ == "__main__":
    main()
