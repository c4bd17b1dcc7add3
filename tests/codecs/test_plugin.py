"""Real processors of every family read real files through the plug-in, and find transformers as it was afterwards."""

from __future__ import annotations

import importlib.util
import io
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import HEIGHT, JITTER, WIDTH, number_in
from transformers import video_processing_utils, video_utils
from transformers.video_utils import VideoMetadata

from mmaccel.codecs import VideoWarning, load_video, plugin, register, registered, unregister
from mmaccel.errors import ConflictError, NotApplicableError, VideoError
from mmaccel.tiny.families import FAMILIES

Clip = Callable[[str], Path]
VIDEO_FAMILIES = {name: family for name, family in FAMILIES.items() if "video" in family.modalities}
HOME = next(cls for cls in video_processing_utils.BaseVideoProcessor.__mro__ if "fetch_videos" in vars(cls))
COUNT, FPS = 60, 8
each_family = pytest.mark.parametrize("name", VIDEO_FAMILIES)


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    decoders, method = dict(video_utils.VIDEO_DECODERS), vars(HOME)["fetch_videos"]
    yield
    unregister()
    assert decoders == video_utils.VIDEO_DECODERS
    assert vars(HOME)["fetch_videos"] is method


def processor_of(name: str) -> Any:
    processor = VIDEO_FAMILIES[name].processor()
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'video' %}"
        + VIDEO_FAMILIES[name].marker["video"]
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    return processor


def ask(*videos: dict[str, Any]) -> list[dict[str, Any]]:
    content = [*({"type": "video", **video} for video in videos), {"type": "text", "text": "what moves?"}]
    return [{"role": "user", "content": content}]


def facts(frames_indices: Any = None) -> VideoMetadata:
    """What every 60-frame clip is known to be, written down without reading it."""
    return VideoMetadata(
        total_num_frames=COUNT, fps=FPS, width=WIDTH, height=HEIGHT, duration=COUNT / FPS, frames_indices=frames_indices
    )


def numbers(frames: torch.Tensor) -> list[int]:
    return [number_in(image) for image in frames.permute(0, 2, 3, 1).numpy()]


def same(found: Any, wanted: Any) -> None:
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        if key == "video_metadata":
            continue
        for one, other in zip(found[key], value, strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), key


@each_family
@pytest.mark.parametrize("sampling", [{"num_frames": 6}, {"fps": 1.5}, {}], ids=["num_frames", "fps", "every"])
def test_a_conversation_with_a_file_is_one_with_its_decoded_frames(
    clip: Clip, name: str, sampling: dict[str, Any]
) -> None:
    processor, path = processor_of(name), clip("b-frames.mp4")
    if name == "qwen3-vl" and "num_frames" in sampling:
        processor.video_processor.fps = None  # this processor wants either, and sets one itself
    chosen: Any = list(range(COUNT))
    if sampling:
        chosen = [int(n) for n in processor.video_processor.sample_frames(metadata=facts(), **sampling)]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    wanted = processor.apply_chat_template(
        ask({"video": load_video(path, indices=chosen).frames}),
        **options,
        do_sample_frames=False,
        video_metadata=[facts(list(chosen))],
    )
    with registered():
        found = processor.apply_chat_template(ask({"path": str(path)}), **options, **sampling)
    same(found, wanted)


@each_family
def test_frames_and_facts_that_a_processor_is_given(clip: Clip, name: str) -> None:
    processor, path = processor_of(name).video_processor, clip("b-frames.mp4")
    seen: list[Any] = []

    def choose(metadata: VideoMetadata) -> Any:
        seen.append({**metadata})
        return processor.sample_frames(metadata=metadata, num_frames=4, fps=None)

    if name == "qwen3-vl":
        processor.fps = None
    wanted = [int(n) for n in processor.sample_frames(metadata=facts(), num_frames=4)]
    with registered():
        frames, metadata = processor.fetch_videos(str(path), sample_indices_fn=choose)
    assert torch.equal(frames, load_video(path, indices=wanted).frames)
    assert numbers(frames) == wanted
    assert seen == [{**facts(), "video_backend": "mmaccel"}]
    assert metadata.frames_indices.tolist() == wanted
    assert {**metadata, "frames_indices": None} == seen[0]
    assert metadata.timestamps == [n / FPS for n in wanted]
    assert metadata.sampled_fps == pytest.approx(4 / 7.5)


def test_the_times_in_the_prompt_of_qwen3_vl(clip: Clip) -> None:
    processor = processor_of("qwen3-vl")
    with registered():
        found = processor(
            text=[VIDEO_FAMILIES["qwen3-vl"].marker["video"]],
            videos=[str(clip("b-frames.mp4"))],
            do_sample_frames=True,
            fps=0.5,
            return_metadata=True,
        )
    # 0.5 a second of 7.5 seconds are 3 frames, at least 4 here: 0, 20, 39, 59 in groups of two, and the mean time.
    assert found["video_metadata"][0].frames_indices.tolist() == [0, 20, 39, 59]
    text = processor.tokenizer.decode(found["input_ids"][0])
    assert f"<{10 / FPS:.1f} seconds>" in text
    assert f"<{49 / FPS:.1f} seconds>" in text


def test_indices_do_not_change_when_a_processor_pads_its_times(clip: Clip) -> None:
    with registered():
        found = processor_of("qwen3-vl")(
            text=[VIDEO_FAMILIES["qwen3-vl"].marker["video"]],
            videos=[str(clip("b-frames.mp4"))],
            do_sample_frames=True,
            fps=5 / 7.5,
            return_metadata=True,
        )
    assert found["video_metadata"][0].frames_indices.tolist() == [0, 15, 30, 44, 59]


@pytest.mark.parametrize("key", ["path", "url", "video"])
def test_every_key_of_a_conversation_and_batches(clip: Clip, key: str) -> None:
    processor = processor_of("llava-onevision")
    one, two = clip("b-frames.mp4"), clip("jitter.mkv")
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "num_frames": 3}
    with registered():
        found = processor.apply_chat_template([ask({key: str(one)}), ask({key: str(two)})], **options)
    frames = [load_video(path, indices=[0, 20, 40]).frames for path in (one, two)]
    wanted = processor.video_processor(frames, do_sample_frames=False, return_tensors="pt")
    assert torch.equal(found["pixel_values_videos"], wanted["pixel_values_videos"])


def test_lists_and_nested_lists(clip: Clip) -> None:
    processor = processor_of("llava-onevision").video_processor
    one, two = str(clip("b-frames.mp4")), str(clip("jitter.mkv"))
    pick = partial(processor.sample_frames, num_frames=2)
    with registered():
        frames, metadata = processor.fetch_videos([one, two], sample_indices_fn=pick)
        nested = processor([[one], [two, one]], num_frames=2, do_sample_frames=True)["pixel_values_videos"]
        alone = processor(one, num_frames=2, do_sample_frames=True)["pixel_values_videos"]
    assert [numbers(video) for video in frames] == [[0, 30], [0, 30]]
    assert [facts.total_num_frames for facts in metadata] == [COUNT, COUNT]
    assert metadata[1].duration > JITTER[-1] / 1000 - JITTER[0] / 1000
    assert len(nested) == 3
    assert torch.equal(torch.as_tensor(nested[0]), torch.as_tensor(nested[2]))
    assert torch.equal(torch.as_tensor(nested[0]), torch.as_tensor(alone[0]))
    assert not torch.equal(torch.as_tensor(nested[0]), torch.as_tensor(nested[1]))


def test_decoded_frames_pass_untouched(clip: Clip) -> None:
    processor = processor_of("llava-onevision").video_processor
    video = load_video(clip("b-frames.mp4"), frames=4)
    given = [[video.frames], [video.numpy()], list(video.numpy()), [list(video.numpy())]]
    before = [processor(one, return_tensors="pt")["pixel_values_videos"] for one in given]
    with registered():
        after = [processor(one, return_tensors="pt")["pixel_values_videos"] for one in given]
        frames, metadata = processor.fetch_videos([str(clip("b-frames.mp4")), video.frames])
        with pytest.raises(VideoError, match=r"\[T, 3, H, W\]"):
            processor.fetch_videos([str(clip("b-frames.mp4")), video.numpy()])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert frames[1] is video.frames
    assert (metadata[1].total_num_frames, metadata[1].fps) == (4, None)
    assert metadata[1].frames_indices.tolist() == [0, 1, 2, 3]


@pytest.fixture
def served(clip: Clip) -> Iterator[str]:
    """The URL of a server that shows the folder of the clips."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = clip("b-frames.mp4").parent
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls(clip: Clip, served: str) -> None:
    processor = processor_of("llava-onevision").video_processor
    pick = partial(processor.sample_frames, num_frames=3)
    with registered():
        found = [
            processor.fetch_videos(url, sample_indices_fn=pick)[0]
            for url in (f"{served}/b-frames.mp4", clip("b-frames.mp4").as_uri())
        ]
        by_transformers, _ = video_utils.load_video(f"{served}/b-frames.mp4", num_frames=3, backend="mmaccel")
        with pytest.raises(VideoError, match="missing"):
            processor.fetch_videos(f"{served}/missing.mp4")
    for frames in (*found, by_transformers):
        assert numbers(frames) == [0, 20, 40]


def test_youtube_stays_with_transformers() -> None:
    if importlib.util.find_spec("yt_dlp"):
        pytest.skip("would be downloaded")
    with registered(), pytest.raises(ImportError, match="yt_dlp"):
        processor_of("llava-onevision").video_processor.fetch_videos("https://www.youtube.com/watch?v=0")


def test_sources_that_a_decoder_may_be_handed(clip: Clip) -> None:
    data = clip("b-frames.mp4").read_bytes()
    reading, writing = os.pipe()
    threading.Thread(target=lambda: open(writing, "wb").write(data), daemon=True).start()  # noqa: PTH123, SIM115
    with os.fdopen(reading, "rb") as pipe:
        for source in (data, io.BytesIO(data), clip("b-frames.mp4"), pipe):
            frames, metadata = plugin.read_video(source, lambda metadata, step: range(0, 60, step), step=20)
            assert numbers(frames) == [0, 20, 40]
            assert metadata.frames_indices.tolist() == [0, 20, 40]
    frames, metadata = plugin.read_video(data)
    assert numbers(frames) == list(range(COUNT))


def test_a_damaged_video_warns(clip: Clip, tmp_path: Path) -> None:
    data = clip("b-frames.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    with registered(), pytest.warns(VideoWarning, match="lost"):
        _, metadata = video_utils.load_video(str(tmp_path / "cut.mp4"), num_frames=3, backend="mmaccel")
    assert metadata.total_num_frames < COUNT


def test_errors_are_ours(tmp_path: Path, clip: Clip) -> None:
    processor = processor_of("llava-onevision").video_processor
    (tmp_path / "text.mp4").write_text("no video at all")
    with registered():
        for wrong in (str(tmp_path / "missing.mp4"), str(tmp_path), str(tmp_path / "text.mp4"), 7):
            with pytest.raises(VideoError):
                processor.fetch_videos(wrong)
        with pytest.raises(VideoError, match="missing"):
            processor(str(tmp_path / "missing.mp4"), num_frames=3, do_sample_frames=True)
        for wrong in ([COUNT], [], [0.5]):
            with pytest.raises(VideoError):
                processor.fetch_videos(str(clip("b-frames.mp4")), sample_indices_fn=lambda metadata, n=wrong: n)


def test_on_and_off_by_identity() -> None:
    method, before = vars(HOME)["fetch_videos"], dict(video_utils.VIDEO_DECODERS)
    unregister()
    register()
    ours = vars(HOME)["fetch_videos"]
    register()
    assert vars(HOME)["fetch_videos"] is ours is not method
    assert {**before, "mmaccel": plugin.read_video} == video_utils.VIDEO_DECODERS
    unregister()
    assert vars(HOME)["fetch_videos"] is method
    assert before == video_utils.VIDEO_DECODERS
    unregister()


def test_what_had_the_name_before_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*_: object) -> None: ...

    monkeypatch.setitem(video_utils.VIDEO_DECODERS, "mmaccel", mine)
    with registered():
        assert video_utils.VIDEO_DECODERS["mmaccel"] is plugin.read_video
    assert video_utils.VIDEO_DECODERS["mmaccel"] is mine


def test_blocks_nest_overlap_and_end_with_errors() -> None:
    method = vars(HOME)["fetch_videos"]
    with registered():
        with pytest.raises(KeyError), registered():
            raise KeyError
        assert vars(HOME)["fetch_videos"] is not method
        unregister()
        assert vars(HOME)["fetch_videos"] is not method
    assert vars(HOME)["fetch_videos"] is method
    with registered():
        register()
    assert vars(HOME)["fetch_videos"] is not method
    unregister()

    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with registered():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with registered():
        thread.start()
        entered.wait(60)
    assert vars(HOME)["fetch_videos"] is not method
    leave.set()
    thread.join()
    assert vars(HOME)["fetch_videos"] is method


def test_many_threads() -> None:
    method, ours = vars(HOME)["fetch_videos"], set()

    def work() -> None:
        for _ in range(200):
            with registered():
                ours.add(vars(HOME)["fetch_videos"] is not method)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ours == {True}
    assert vars(HOME)["fetch_videos"] is method


def test_somebody_on_top_is_not_torn_off(clip: Clip) -> None:
    method = vars(HOME)["fetch_videos"]
    register()
    ours = vars(HOME)["fetch_videos"]

    def on_top(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    HOME.fetch_videos = on_top
    with pytest.raises(ConflictError, match="fetch_videos"):
        unregister()
    assert vars(HOME)["fetch_videos"] is on_top
    assert video_utils.VIDEO_DECODERS["mmaccel"] is plugin.read_video
    frames, _ = processor_of("llava-onevision").video_processor.fetch_videos(str(clip("b-frames.mp4")))
    assert len(frames) == COUNT
    HOME.fetch_videos = ours
    unregister()
    assert vars(HOME)["fetch_videos"] is method


def test_a_transformers_without_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    method = vars(HOME)["fetch_videos"]
    with monkeypatch.context() as patch:
        patch.delattr(video_utils, "VIDEO_DECODERS")
        with pytest.raises(NotApplicableError, match="VIDEO_DECODERS"):
            register()
        with pytest.raises(NotApplicableError), registered():
            pass
        assert vars(HOME)["fetch_videos"] is method
    with registered():
        assert vars(HOME)["fetch_videos"] is not method
    assert vars(HOME)["fetch_videos"] is method
