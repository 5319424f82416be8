"""Images are decoded elsewhere: the same pixels, the same reasons, and what hangs or crashes harms only itself."""

import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from recap import decoders
from recap.decoders import Decoders
from recap.errors import BadSample
from recap.sample import decode_image


def png(size: tuple[int, int] = (30, 20), level: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(size).point(lambda value: (value + level) % 256).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_pixels_are_those_that_would_be_decoded_here() -> None:
    with Decoders(1) as processes:
        for data in (png(), png((1, 1)), png((700, 500))):
            found = processes.decode(data)
            assert (found.mode, found.size) == ("RGB", decode_image(data).size)
            assert found.tobytes() == decode_image(data).tobytes()


def test_of_a_large_jpeg_no_more_is_decoded_than_is_asked_for() -> None:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((800, 600)).save(buffer, "JPEG")
    with Decoders(1) as processes:
        found = processes.decode(buffer.getvalue(), 120)
    assert found.size == (200, 150) and found.tobytes() == decode_image(buffer.getvalue(), 120).tobytes()


def test_the_reasons_are_those_that_would_be_given_here(shared_data: Path) -> None:
    def said(data: bytes, decode: object) -> tuple[str, str] | None:
        try:
            decode(data)  # type: ignore[operator]
        except BadSample as error:
            return error.reason, error.detail
        return None

    nasty = sorted((shared_data / "nasty_images").rglob("*.*"))[:40]
    with Decoders(1) as processes:
        for data in (b"", b"no image", png()[:-20], *(file.read_bytes() for file in nasty)):
            assert said(data, processes.decode) == said(data, decode_image)


def test_many_threads_share_a_few_processes() -> None:
    images = [png((20 + place, 20), place) for place in range(40)]
    with Decoders(2) as processes, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(processes.decode, images))
    assert [image.tobytes() for image in found] == [decode_image(data).tobytes() for data in images]


def test_a_hung_image_is_timed_out_and_the_next_one_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import time, recap.sample\n"
        "decode = recap.sample.decode_image\n"
        "recap.sample.decode_image = lambda data, _: time.sleep(60) if data == b'hang' else decode(data)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Decoders(1, timeout=0.5) as processes:
        with pytest.raises(BadSample) as error:
            processes.decode(b"hang")
        assert (error.value.reason, error.value.detail) == ("decode_timeout", "not decoded after 0.5 s")
        assert processes.decode(png()).size == (30, 20)


def test_a_process_that_is_killed_costs_one_image() -> None:
    with Decoders(1) as processes:
        processes.decode(png())
        with processes._process() as process:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert processes.decode(png()).size == (30, 20)


def test_a_process_that_is_killed_while_it_is_idle_costs_no_image() -> None:
    with Decoders(1) as processes:
        processes.decode(png())
        process = processes._free.queue[-1]
        os.kill(process.pid, signal.SIGTERM)
        process.wait()
        assert processes.decode(png()).size == (30, 20)
        assert process.stdin.closed and process.stdout.closed


@pytest.mark.parametrize(("num_kills", "name"), [(1, "KILL"), (2, "KILL"), (1, "SEGV")])
def test_an_image_is_tried_again_where_the_kernel_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        num_kills: int, name: str) -> None:
    tries = tmp_path / "tries"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, recap.sample\n"
        "decode = recap.sample.decode_image\n"
        "def decode_image(data, min_side):\n"
        f"    with open({str(tries)!r}, 'a') as file:\n"
        "        file.write('.')\n"
        f"    if os.path.getsize({str(tries)!r}) <= {num_kills}:\n"
        f"        os.kill(os.getpid(), signal.SIG{name})\n"
        "    return decode(data)\n"
        "recap.sample.decode_image = decode_image\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Decoders(1) as processes:
        if (num_kills, name) == (1, "KILL"):
            assert processes.decode(png()).size == (30, 20)
        else:
            with pytest.raises(BadSample, match=f"decoder_crashed: SIG{name}"):
                processes.decode(png())
    assert len(tries.read_text()) == (2 if name == "KILL" else 1)


def test_memory_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import recap.sample\n"
        "recap.sample.decode_image = lambda data, _: bytearray(int(data))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Decoders(1) as processes, pytest.raises(BadSample) as error:
        processes.decode(str(2 * decoders.MAX_MEMORY).encode())
    assert error.value.reason == "decoder_crashed"


def test_its_processes_end_with_it() -> None:
    with Decoders(2) as processes, ThreadPoolExecutor(2) as pool:
        list(pool.map(processes.decode, [png((900, 900))] * 4))
        started = [process for process in processes._free.queue if process]
    assert len(started) == 2 and all(process.returncode == 0 for process in started)


def test_who_comes_too_late_does_not_wait_for_ever() -> None:
    with Decoders(1) as processes:
        processes.decode(png())
    with ThreadPoolExecutor(3) as pool:
        for late in [pool.submit(processes.decode, png()) for _ in range(3)]:
            with pytest.raises(RuntimeError, match="closed"):
                late.result(timeout=10)
