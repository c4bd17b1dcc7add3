"""All that is to be done on a machine with a GPU: `python benchmarks/gpu.py --out FOLDER [--quick]`.

First the kernel tests, compiled instead of interpreted; only if they pass, decoding by every hardware decoder that is
there, compared with FFmpeg's software, then the speeds of the kernels and of the published configurations with random
weights, of video language models and of diffusion transformers. Rows go to FOLDER as JSON lines, as `mmaccel bench`
writes them. `--quick` takes one model and one length.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from mmaccel.codecs.backends import probe
from mmaccel.codecs.backends.cuda import CudaDecoder
from mmaccel.codecs.backends.pynvvideocodec import NvDecoder
from mmaccel.codecs.priority import kept_priority
from mmaccel.measure import append_rows, environment

ROOT = Path(__file__).parents[1]
_DECODERS = {"cuda": CudaDecoder, "pynvvideocodec": NvDecoder}
_CLIPS = {"h264.mp4": "libx264", "hevc.mp4": "libx265", "vp9.webm": "libvpx-vp9", "av1.mkv": "libsvtav1"}


def write_clip(path: Path, codec: str, size: tuple[int, int], frames: int) -> None:
    """Write a moving pattern with noise, a keyframe every 30 frames."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(-20, 20, (height, width, 3))
    options = {"g": "30", "preset": "12" if codec == "libsvtav1" else "veryfast", "deadline": "realtime"}
    if codec == "libx265":
        options["x265-params"] = "keyint=30:open-gop=0:log-level=none"
    with kept_priority(), av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            wave = np.stack([np.sin((x + 3 * number) / 40 + c) * np.cos((y + number) / 30) for c in range(3)], -1)
            image = np.clip(128 + 90 * wave + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode(None))


def by_software(path: Path, size: tuple[int, int], step: int) -> dict[int, torch.Tensor]:
    """Every step-th frame by its pts: decoded by FFmpeg, made RGB by libswscale, then each colour resized by it."""
    found, scaler, resizer = {}, VideoReformatter(), VideoReformatter()
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % step:
                continue
            native = scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
            colours = []
            for colour in range(3):
                gray = av.VideoFrame.from_ndarray(np.ascontiguousarray(native[..., colour]), format="gray")
                resized = resizer.reformat(gray, size[1], size[0], "gray", interpolation="BICUBIC", threads=1)
                colours.append(torch.from_numpy(resized.to_ndarray().copy()))
            found[frame.pts] = torch.stack(colours)
    return found


def decode_row(path: Path, backend: str, device: int | str, size: tuple[int, int], step: int = 10) -> dict[str, Any]:
    """Decode a clip by a hardware decoder and draw every step-th frame: its speed, and how far off its levels are.

    `differing` is the share of levels that differ, `largest` by how much at most, `seconds` of the second of two runs.
    """
    want = by_software(path, size, step)
    out = torch.zeros(len(want), 3, *size, dtype=torch.uint8, device=f"cuda:{device}" if device != "cpu" else "cpu")
    rows = {pts: row for row, pts in enumerate(want)}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        starts = [place for place, packet in enumerate(packets) if packet.is_keyframe]
        groups = [packets[a:b] for a, b in zip(starts, [*starts[1:], len(packets)], strict=True)]
        session, seconds = _DECODERS[backend](stream, device), 0.0
        for _ in range(2):
            began = time.perf_counter()
            for group in groups:
                for pts, picture in session.decode(group, [packet.pts for packet in group if packet.pts in rows]):
                    picture.draw(out, [rows[pts]])
            seconds = time.perf_counter() - began
        decoded = session.decoded // 2
        session.close()
    difference = (out.cpu().int() - torch.stack(list(want.values())).int()).abs()
    return {
        "benchmark": "gpu/decode",
        "clip": path.name,
        "backend": backend,
        "drawn": len(want),
        "decoded": decoded,
        "seconds": seconds,
        "differing": float(difference.gt(0).float().mean()),
        "largest": int(difference.max()),
    }


def decode(folder: Path, quick: bool) -> int:
    """Decode clips of every codec by every backend that is there; 1 if one gives other frames than software."""
    wrong = 0
    for name, codec in list(_CLIPS.items())[: 1 if quick else None]:
        path = folder / name
        write_clip(path, codec, (1080, 1920), 60 if quick else 300)
        for backend in _DECODERS:
            reason = probe(backend)
            row = {"benchmark": "gpu/decode", "clip": name, "backend": backend, "missing": reason}
            if reason is None:
                row |= decode_row(path, backend, 0, (392, 700))
                wrong += row["largest"] > 0
                print(f"{name}, {backend}: {row['decoded']} frames in {row['seconds']:.2f} s, off by {row['largest']}")
            else:
                print(f"{name}, {backend}: not run, {reason}")
            append_rows(folder / "decode.jsonl", [{**row, **environment()}])
    return min(wrong, 1)


def main(arguments: list[str] | None = None) -> int:
    """Run the tests, then the scenarios; the first failure ends it with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    bench = [sys.executable, "-c", "import sys; from mmaccel.cli import main; sys.exit(main(sys.argv[1:]))", "bench"]
    kernels = [*bench, "kernels/speed", "--out", str(chosen.out / "kernels.jsonl"), "--set", "device=cuda"]
    models = [*bench, "video_lm/speed_published", "--out", str(chosen.out / "speed.jsonl"), "--set", "device=cuda"]
    generators = [*bench, "diffusion/speed", "--out", str(chosen.out / "generation.jsonl")]
    for option in ("device=cuda", "dtype=bfloat16", "full=true", "layers=[0]", "steps=0"):
        generators += ["--set", option]
    if chosen.quick:
        generators += ["--set", 'models=["wan-2.1-1.3b"]']
        models += ["--set", 'models=["llava-onevision-7b"]', "--set", "frames=[32]"]
    else:
        kernels += ["--set", 'sizes=["small", "full", "video"]']
    tests = [sys.executable, "-m", "pytest", "-n", "0", "tests/kernels"]
    if code := _run(tests):
        return code
    if decode(chosen.out, chosen.quick):
        print("a hardware decoder gives other frames than FFmpeg's software; nothing after it was run.")
        return 1
    return _run(kernels) or _run(models) or _run(generators)


def _run(command: list[str]) -> int:
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "MMACCEL_REQUIRE_GPU": "1"}, check=False).returncode
    if code:
        print(f"{' '.join(command[-4:])} ended with {code}; nothing after it was run.")
    return code


if __name__ == "__main__":
    sys.exit(main())
