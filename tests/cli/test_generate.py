"""mmaccel generate and mmaccel demo generate: files read back, times, and everything that can be wrong."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mmaccel import accelerate
from mmaccel.cli import demo_generate, generate
from mmaccel.codecs import load_video
from mmaccel.errors import MMAccelError
from mmaccel.measure.generation import STAGES, pipeline_stages
from mmaccel.tiny import CLASS_TO_IMAGE_FOLDER, class_to_image, text_to_video
from mmaccel.tiny.generation_scoring import generate_clips, generate_images
from mmaccel.tiny.pipelines import tiny_wan_pipeline
from mmaccel.tiny.read_back import psnr

PROMPT = "a red ring moves left , then a blue cross stays still"
STEPS, SEED, METHOD = 4, 5, "fewer-steps:keep=0.5"
LITTLE = ("--height", 32, "--width", 48, "--frames", 5, "--steps", 2)
CODEC_LOSS = 30.0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected():
    """Dense and accelerated clips, uint8 [21, 64, 64, 3] each, from the library's pipeline itself."""
    pipe = text_to_video()
    dense = generate_clips(pipe, [PROMPT], [SEED], num_inference_steps=STEPS)[0]
    with accelerate(pipe, METHOD):
        fast = generate_clips(pipe, [PROMPT], [SEED], num_inference_steps=STEPS)[0]
    return dense, fast


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The folder of a pipeline with random weights."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


def test_compare_writes_dense_left_and_accelerated_right(document, tmp_path, expected):
    path = tmp_path / "clip.mp4"
    found = document(
        "generate", PROMPT, "--steps", STEPS, "--seed", SEED, "-m", METHOD, "--compare", "--out", path, "--fps", 12,
        "--device", "cpu",
    )  # fmt: skip
    dense, fast = expected
    video = load_video(path, frames=21)
    frames = video.numpy()
    assert frames.shape == (21, 64, 128, 3)
    assert video.duration == pytest.approx(21 / 12, rel=0.05)
    left, right = frames[:, :, :64], frames[:, :, 64:]
    assert psnr(left, dense) > CODEC_LOSS
    assert psnr(right, fast) > CODEC_LOSS
    # so far apart that a wrong side would be seen
    assert psnr(left, fast) < psnr(left, dense) - 3
    assert psnr(right, dense) < psnr(right, fast) - 3
    error = np.mean((dense.astype(float) - fast.astype(float)) ** 2)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    assert found["identical"] is False
    assert found["file"] == str(path)
    assert found["from_left"] == ["dense", "fewer-steps"]
    assert found["methods"] == ["fewer-steps"]
    slow, quick = found["runs"]
    for one in (slow, quick):
        assert set(one["stages"]) == set(STAGES)
        assert sum(one["stages"].values()) == pytest.approx(one["seconds"])
        assert min(one["stages"].values()) > 0
        assert one["peak_bytes"] > one["growth_bytes"] > 0
    assert slow["report"] is None
    assert quick["report"]["events"] == {"steps": f"2 of {STEPS}"}


def test_one_clip_without_compare(document, tmp_path, expected):
    for words, clip, name in (([], expected[0], "dense"), (["-m", METHOD], expected[1], "fewer-steps")):
        path = tmp_path / f"{name}.mp4"
        found = document("generate", PROMPT, "--steps", STEPS, "--seed", SEED, "--out", path, *words)
        assert psnr(load_video(path, frames=21).numpy(), clip) > CODEC_LOSS
        assert found["from_left"] == [name]
        assert found["psnr"] is None


def test_prompts_are_read_without_case_and_a_neutral_method_changes_nothing(document, tmp_path):
    found = document(
        "generate", "A red ring moves LEFT,then a blue cross stays still", "--steps", 2, "--compare", "-m",
        "first-block-cache:threshold=0", "--out", tmp_path / "clip.mp4",
    )  # fmt: skip
    assert found["prompt"] == PROMPT
    assert (found["identical"], found["psnr"]) == (True, None)


def test_compare_without_a_method_takes_hsa(document, tmp_path):
    found = document("generate", PROMPT, "--steps", 12, "--frames", 5, "--compare", "--out", tmp_path / "clip.mp4")
    assert found["methods"] == ["hsa"]
    assert found["runs"][1]["report"]["tokens"][0]["kept"] == pytest.approx(0.5, abs=0.05)


def test_for_people(cli, tmp_path):
    code, out, err = cli("generate", PROMPT, "--steps", 3, "-m", METHOD, "--compare", "--out", tmp_path / "clip.mp4")
    assert code == 0, err
    for piece in (
        PROMPT,
        "dense",
        "text encoder",
        "transformer",
        "vae",
        "peak memory",
        "PSNR",
        "from the left",
        "steps",
    ):
        assert piece in out


def test_a_folder_of_a_pipeline(document, wan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = document("generate", "a word", "--model", wan, *LITTLE, "--dtype", "float32", "--guidance", 1.0)
    assert found["model"] == str(wan)
    assert (found["frames"], found["height"], found["width"], found["fps"]) == (5, 32, 48, 16)
    pipe = tiny_wan_pipeline()
    torch_frames = pipe(
        "a word", height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=1.0, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames[0]  # fmt: skip
    frames = load_video(tmp_path / "mmaccel-generated.mp4", frames=5).numpy()
    assert psnr(frames, np.round(torch_frames * 255).astype(np.uint8)) > 20  # noise is hard on a codec


def test_images_of_classes_are_written_as_png(document, refused, tmp_path):
    folder, path = CLASS_TO_IMAGE_FOLDER, tmp_path / "image.png"
    pipe = class_to_image()
    words = ["generate", "red ring", "--model", folder, "--steps", 6, "--guidance", 3, "--out"]
    found = document(*words, path, "--compare", "-m", METHOD)
    assert (found["kind"], found["fps"]) == ("image", None)
    picture = np.asarray(Image.open(path))
    label = pipe.get_label_ids(["red ring"])
    assert picture.shape == (64, 128, 3)
    dense = generate_images(pipe, label, [0], num_inference_steps=6, guidance_scale=3)[0]
    np.testing.assert_array_equal(picture[:, :64], dense)
    assert (picture[:, 64:] != dense).any()
    assert "name a .png file" in refused(1, *words, tmp_path / "image.mp4")
    assert "knows no class 'mauve ring'; it knows blue cross, " in refused(
        1, "generate", "mauve ring", "--model", folder
    )
    assert "--frames" in refused(1, *words, path, "--frames", 5)
    pipe.save_pretrained(tmp_path / "unnamed")  # the library does not save the names
    assert "has no names of classes" in refused(1, "generate", "red ring", "--model", tmp_path / "unnamed")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["a zebra dances"], "was not taught 'a zebra dances'"),
        ([" "], "prompt is empty"),
        ([PROMPT, "-m", "fewer-step"], "'fewer-steps'"),
        ([PROMPT, "--guidance", "nan"], "no number to scale by"),
        ([PROMPT, "-m", "fewer-steps:kep=0.5"], "no knob 'kep'"),
        ([PROMPT, "-m", "holitom"], "diffusion"),
        ([PROMPT, "-m", "first-block-cache+taylorseer"], "exclude each other"),
        ([PROMPT, "-m", METHOD, "-m", METHOD], "is on this model already"),
        ([PROMPT, "--steps", "2", "-m", "hsa:runtime=0.1"], "runtime"),
        ([PROMPT, "--size", "big"], "HEIGHTxWIDTH"),
        ([PROMPT, "--size", "0x64"], "HEIGHTxWIDTH"),
        ([PROMPT, "--size", "64", "--height", "64"], "one or the other"),
        ([PROMPT, "--size", "63x64"], "refuses this request"),
        ([PROMPT, "--dtype", "int3"], "float32, bfloat16, float16"),
        ([PROMPT, "--device", "warp"], "--device warp"),
        ([PROMPT, "--out", "clip.gif"], "name a .mp4 file"),
        ([PROMPT, "--out", "no-such-folder/clip.mp4"], "no-such-folder"),
        (["a word", "--model", "./no-such-folder"], "no-such-folder"),
        (["a word", "--model", "nobody/nothing"], "nobody/nothing"),
    ],
)
def test_requests_that_will_not_do(refused, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    assert reason in refused(1, "generate", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [[], [PROMPT, "--steps", "0"], [PROMPT, "--seed", "-1"], [PROMPT, "--fps", "0"]])
def test_wrong_usage(refused, words):
    assert "mmaccel --help" in refused(2, "generate", *words)


def test_folders_that_will_not_do(refused, wan, tmp_path):
    assert str(tmp_path) in refused(1, "generate", "a word", "--model", tmp_path)
    index = json.loads((wan / "model_index.json").read_text())
    # all that a U-Net pipeline has to say to be refused
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]})
    )
    assert "without a transformer" in refused(1, "generate", "a word", "--model", tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "cannot be loaded" in refused(1, "generate", "a word", "--model", tmp_path)
    (tmp_path / "model_index.json").write_text("{ no json")
    assert "cannot be loaded" in refused(1, "generate", "a word", "--model", tmp_path)


def test_pipelines_that_need_a_picture_are_refused(refused, wan, tmp_path):
    for entry in wan.iterdir():
        if entry.name != "model_index.json":
            (tmp_path / entry.name).symlink_to(entry)
    index = json.loads((wan / "model_index.json").read_text())
    index |= {"_class_name": "WanImageToVideoPipeline", "image_encoder": [None, None], "image_processor": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "more than a prompt: image" in refused(1, "generate", "a word", "--model", tmp_path)


def test_size():
    assert generate.size("480x832", None, None) == (480, 832)
    assert generate.size("64", None, None) == (64, 64)
    assert generate.size(None, 32, None) == (32, None)
    with pytest.raises(MMAccelError, match="one or the other"):
        generate.size("64", None, 32)


def test_time_is_put_down_to_the_stage_that_takes_it():
    pipe = tiny_wan_pipeline()
    decode, sleeps = pipe.vae.decode, {"text encoder": 0.15, "transformer": 0.1, "vae": 0.3}

    def slow_decode(*args, **kwargs):
        time.sleep(sleeps["vae"])
        return decode(*args, **kwargs)

    pipe.vae.decode = slow_decode
    pipe.text_encoder.register_forward_pre_hook(lambda *_: time.sleep(sleeps["text encoder"]))
    pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(sleeps["transformer"]))

    def call():
        return pipe("a", height=32, width=32, num_frames=1, num_inference_steps=3, guidance_scale=1.0)

    call()
    before = [len(part._forward_pre_hooks) for part in (pipe.text_encoder, pipe.transformer)]
    start = time.perf_counter()
    _, stages = pipeline_stages(pipe, call)
    whole = time.perf_counter() - start
    assert tuple(stages) == STAGES
    slept = {**sleeps, "transformer": 3 * sleeps["transformer"]}
    for name, seconds in slept.items():
        assert seconds <= stages[name] < whole - sum(slept.values()) + seconds
    assert sum(stages.values()) == pytest.approx(whole, abs=0.05)
    assert [len(part._forward_pre_hooks) for part in (pipe.text_encoder, pipe.transformer)] == before
    assert pipe.vae.decode is slow_decode


def test_a_call_that_raises_leaves_the_pipeline_as_it_was():
    pipe = tiny_wan_pipeline()
    with pytest.raises(ValueError, match="divisible"):
        pipeline_stages(pipe, lambda: pipe("a", height=33, width=32))
    assert "decode" not in vars(pipe.vae)
    assert not pipe.transformer._forward_hooks


def test_demo(document, tmp_path):
    found = document(
        "demo", "generate", "--clips", 1, "--steps", STEPS, "-m", METHOD, "-m", "first-block-cache:threshold=0",
        "--out", tmp_path,
    )  # fmt: skip
    dense, fast, same = found["rows"]
    assert [row["setting"] for row in found["rows"]] == ["dense", "fewer-steps", "first-block-cache:threshold=0"]
    assert (dense["ratio"], dense["psnr"], dense["report"]) == (1, None, None)
    assert fast["report"]["events"] == {"steps": f"2 of {STEPS}"}
    assert fast["transformer_ratio"] == pytest.approx(fast["stages"]["transformer"] / dense["stages"]["transformer"])
    assert fast["psnr"] > 5
    assert fast["feature_distance"] > 0
    assert same["identical"] == 1
    assert same["feature_distance"] == pytest.approx(0, abs=1e-9)
    assert (same["answers"], same["whole"]) == (dense["answers"], dense["whole"])
    assert found["settings"]["steps"] == STEPS
    (path,) = found["clips"]
    frames = load_video(path, frames=21).numpy()
    assert frames.shape == (21, 64 * 3 + 14, 3 * 64 * 3, 3)
    assert psnr(frames[:, 14:, :192], frames[:, 14:, 384:]) > CODEC_LOSS
    assert psnr(frames[:, 14:, :192], frames[:, 14:, 192:384]) < CODEC_LOSS


def test_demo_for_people_takes_the_methods_that_there_are(cli, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_generate, "SPECS", ("not-written-yet:keep=1", METHOD))
    code, out, err = cli("demo", "generate", "--clips", 1, "--steps", 2, "--out", tmp_path)
    assert code == 0, err
    for piece in ("dense", "fewer-steps", "read-back", "feature distance", "generated-000.mp4"):
        assert piece in out
    assert "not-written-yet" not in out
    # what does not work is said, and not left out
    monkeypatch.setattr(demo_generate, "SPECS", ("hsa:runtime=0.1",))
    assert "runtime" in refused(1, "demo", "generate", "--clips", 1, "--steps", 2, "--out", tmp_path)
    assert "not-written-yet" in refused(1, "demo", "generate", "-m", "not-written-yet", "--out", tmp_path)


def test_the_demo_chooses_specs_that_can_be_read():
    from mmaccel.method import parse

    assert "hsa:runtime=0.5" in demo_generate.settings()
    assert len({parse(spec)[0].spec for spec in demo_generate.settings()}) == len(demo_generate.SPECS)


def test_panels():
    clips = [np.full((2, 4, 8, 3), value, dtype=np.uint8) for value in range(10, 70, 10)]
    found = demo_generate.panels(["", *"abcde"], clips)
    assert found.shape == (2, 2 * (3 * 4 + 14), 5 * 3 * 8, 3)
    assert (found[:, 14:26, 24:48] == 20).all()
    assert (found[:, 26 + 14 :, :24] == 60).all()
    assert (found[:, 26:, 24:] == 255).all()
    assert (found[:, :14, :24] == 255).all()
    assert (found[:, :14, 24:48] < 255).any()


@pytest.mark.parametrize("words", [["methods", "--steps", "3"], ["generate", "--max-tokens", "9"]])
def test_wrong_usage_of_demo(refused, words):
    assert "belongs to 'mmaccel demo" in refused(2, "demo", *words)
