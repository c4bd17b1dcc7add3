"""mmaccel calibrate: a file that generate takes, and everything that can be wrong."""

from __future__ import annotations

import json

import pytest
import torch

import mmaccel
from mmaccel.tiny import CLASS_TO_IMAGE_FOLDER, VIDEO_CALL, text_to_video
from mmaccel.tiny.pipelines import tiny_wan_pipeline

PROMPT = "a red ring moves left"
LITTLE = ("--frames", 5, "--steps", 6, "-m", "fewer-steps", "-m", "taylorseer:interval=3;warmup=1")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_calibration_of_the_embedded_model_and_generate_with_it(document, cli, tmp_path):
    path, clip = tmp_path / "c.json", tmp_path / "clip.mp4"
    found = document("calibrate", "-p", PROMPT, "--seed", 2, "--out", path, *LITTLE)
    expected = mmaccel.calibrate(
        text_to_video(), [PROMPT], 0.5, ["fewer-steps", "taylorseer:interval=3;warmup=1"], 6, 2,
        **{k: v for k, v in VIDEO_CALL.items() if k != "num_inference_steps"} | {"num_frames": 5},
    )  # fmt: skip
    loaded = mmaccel.Calibration.load(path)
    assert loaded.method == expected.method
    assert loaded.best.distance == pytest.approx(expected.best.distance, rel=1e-6)
    assert found["file"] == str(path)
    assert found["prompts"] == [PROMPT]
    assert found["method"]["name"] == expected.method.info.name
    made = document("generate", PROMPT, "--frames", 5, "--steps", 6, "-m", path, "--out", clip)
    assert made["methods"] == [expected.method.spec]
    # for another number of steps it says so, and works
    code, _, err = cli("generate", PROMPT, "--frames", 5, "--steps", 5, "-m", path, "--out", clip)
    assert code == 0
    assert "warning" in err
    assert "5 steps, not 6" in err


def test_prompts_come_from_files_as_well_and_people_see_a_table(cli, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"{PROMPT}\n\na blue cross stays still\n")
    code, out, err = cli("calibrate", "--prompts", lines, "--out", tmp_path / "c.json", "--all", *LITTLE)
    assert code == 0, err
    assert json.loads((tmp_path / "c.json").read_text())["subject"]["prompts"] == 2
    for piece in ("<- best", "fewer-steps", "taylorseer", "distance to dense", "Written", "mmaccel generate"):
        assert piece in out


def test_classes_and_folders(document, refused, cli, tmp_path):
    path = tmp_path / "c.json"
    words = ["calibrate", "--model", CLASS_TO_IMAGE_FOLDER, "--steps", 6, "-m", "fewer-steps", "--out"]
    found = document(*words, path, "-p", "red ring")
    assert found["subject"]["pipeline"] == "DiTPipeline"
    assert "knows no class" in refused(1, *words, tmp_path / "d.json", "-p", "mauve ring")
    assert "no prompts" in refused(1, *words, tmp_path / "d.json")
    wan = tmp_path / "wan"
    tiny_wan_pipeline().save_pretrained(wan)
    little = ["--height", 32, "--width", 48, "--frames", 5, "--steps", 6, "--out", tmp_path / "clip.mp4"]
    code, _, err = cli("generate", "a word", "--model", wan, "-m", path, *little)
    assert code == 0
    assert "WanPipeline, not DiTPipeline" in err
    path.write_text(path.read_text().replace("{", "", 1))
    assert "cannot be read" in refused(1, "generate", "a word", "--model", wan, "-m", path, *little)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--runtime", 0), "outside (0, 1]"),
        (("--runtime", 1.5), "outside (0, 1]"),
        (("--steps", 4), "does not pay"),
        (("-m", "hsaa"), "did you mean 'hsa'"),
        (("-m", "holitom"), "does not work on diffusion"),
        (("-p", " "), "a prompt is empty"),
        (("-p", "a mauve ring"), "mauve"),
        (("-p", "nowhere.txt"), "no such file"),
        (("--out", "somewhere/c.json"), "no folder"),
        (("--out", "c.txt"), ".json"),
        (("--out", "."), "is a folder"),
        (("--model", "nowhere/at-all", "-p", "a"), "nowhere/at-all"),
        (("--size", "65", "--frames", 5, "--steps", 6, "-m", "fewer-steps"), "refuses this request"),
        (("--steps", 6, "--frames", 5, "--runtime", 0.01, "-m", "fewer-steps"), "fewer-steps: 0.167 at least"),
    ],
)
def test_wrong_use(refused, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    assert reason in refused(1, "calibrate", *words)
    assert not (tmp_path / "calibration.json").exists()


def test_a_file_of_prompts_that_holds_none_or_no_text(refused, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    assert "holds no prompt" in refused(1, "calibrate", "-p", tmp_path / "empty", "--out", tmp_path / "c.json")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x81")
    assert "as text" in refused(1, "calibrate", "-p", tmp_path / "bytes", "--out", tmp_path / "c.json")
