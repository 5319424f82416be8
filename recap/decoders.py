"""Images are decoded in processes of their own, with a time and a memory limit: the web's bytes can hang or crash them.

This file is also the program of such a process: `python -m recap.decoders SECONDS`. It imports no more than Pillow.
"""

import json
import os
import queue
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Self

from PIL import Image

from recap.errors import BadSample
from recap.sample import decode_image

MAX_MEMORY = 6 * 2**30
"""Bytes of address space that a process may have: an image of MAX_IMAGE_PIXELS takes up to 15 bytes a pixel."""
LENGTH = struct.Struct(">Q")


class Decoders:
    """Processes that decode images, each one at a time. Threads may share them; one waits where none is free."""

    def __init__(self, num_processes: int, timeout: float = 60) -> None:
        """Start no process yet: each is started when it is first needed.

        Args:
            num_processes: at a time.
            timeout: seconds for one image.
        """
        self.timeout = timeout
        self._is_closed = False
        self._free: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(num_processes):
            self._free.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes that are free; one at work ends with its image. No thread waits for one any more."""
        self._is_closed = True
        free = []
        with suppress(queue.Empty):
            while True:
                free.append(self._free.get_nowait())
        for process in free:
            if process:
                _end(process)
            self._free.put(None)

    def decode(self, data: bytes, min_side: int | None = None) -> Image.Image:
        """As `decode_image`.

        Raises:
            BadSample: as there; or `decode_timeout`, `decoder_crashed`.
        """
        answer = self._ask(data, min_side)
        if answer == -signal.SIGKILL:  # the kernel's, for want of memory, which others may have taken
            answer = self._ask(data, min_side)
        if isinstance(answer, int):
            raise self._reason(answer)
        said, pixels = answer
        if "size" not in said:
            raise BadSample(**said)
        return Image.frombytes("RGB", said["size"], pixels)

    def _ask(self, data: bytes, min_side: int | None) -> tuple[dict[str, Any], bytes] | int:
        """What a process says of an image, and the pixels; or the status with which it has ended."""
        with self._process() as process:
            try:
                _send(process.stdin, json.dumps(min_side).encode(), data)
                said = json.loads(_receive(process.stdout))
                return said, _receive(process.stdout) if "size" in said else b""
            except (EOFError, BrokenPipeError):
                return int(process.wait())

    @contextmanager
    def _process(self) -> Iterator[Any]:
        process = self._free.get()
        try:
            if self._is_closed:
                raise RuntimeError("these decoders are closed")
            if process and process.poll() is not None:  # killed while it had nothing to do
                _end(process)
                process = None
            if process is None:
                process = self._start()
            yield process
        finally:
            if process and (self._is_closed or process.poll() is not None):
                _end(process)
                process = None
            self._free.put(process)

    def _start(self) -> Any:
        here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen([sys.executable, "-m", "recap.decoders", str(self.timeout)], env=here,  # noqa: S603
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                pipesize=2**20)  # an image is megabytes

    def _reason(self, status: int) -> BadSample:
        if status == -signal.SIGALRM:
            return BadSample("decode_timeout", f"not decoded after {self.timeout:g} s")
        return BadSample("decoder_crashed", signal.Signals(-status).name if status < 0 else f"status {status}")


def _end(process: Any) -> None:
    process.stdout.close()
    with suppress(BrokenPipeError):
        process.stdin.close()  # at which it ends
    process.wait()


def _send(file: IO[bytes], *parts: bytes) -> None:
    for part in parts:
        file.write(LENGTH.pack(len(part)))
        file.write(part)
    file.flush()


def _receive(file: IO[bytes]) -> bytes:
    """What was sent; EOFError where the other side has ended."""
    length = LENGTH.unpack(_read(file, LENGTH.size))[0]
    return _read(file, length)


def _read(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data


def serve(requests: IO[bytes], answers: IO[bytes], timeout: float) -> None:
    """Decode images until there are no more requests. The kernel ends this process where one takes too long."""
    while True:
        try:
            min_side, data = json.loads(_receive(requests)), _receive(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            image = decode_image(data, min_side)
            said, pixels = json.dumps({"size": image.size}), image.tobytes()
        except BadSample as error:
            said, pixels = json.dumps({"reason": error.reason, "detail": error.detail}), None
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, said.encode(), *([] if pixels is None else [pixels]))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for all its processes: who asks for images ends us
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
