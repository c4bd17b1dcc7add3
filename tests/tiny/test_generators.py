"""The embedded generators: real pipelines of diffusers, training that resumes, read-back that tells good from bad."""

from __future__ import annotations

import json
import math

import diffusers
import numpy as np
import pytest
import torch

from mmaccel import tiny
from mmaccel.errors import NotApplicableError
from mmaccel.tiny import CLASS_TO_IMAGE_FOLDER, TEXT_TO_VIDEO_FOLDER, VIDEO_CALL, video_qa
from mmaccel.tiny.autoencoder_training import normalise, prepare
from mmaccel.tiny.flow_training import Average, Draw, noise_levels, train_flow
from mmaccel.tiny.generation_scoring import generate_clips, generate_images, image_scores, image_story
from mmaccel.tiny.generators import (
    IMAGE_LABELS,
    TEXT_LENGTH,
    image_pipeline,
    image_transformer,
    image_vae,
    prompt_tokenizer,
    text_encoder,
    video_pipeline,
    video_transformer,
    video_vae,
)
from mmaccel.tiny.progress import export_pipeline
from mmaccel.tiny.prompt_training import embed, word_targets
from mmaccel.tiny.read_back import feature_distance, psnr, read_back
from mmaccel.tiny.stories import parse, render_story, sample_story, stage
from mmaccel.tiny.train_class_to_image import fold_scale
from mmaccel.tiny.train_text_to_video import COLUMNS, PaddedText

torch.set_num_threads(1)

PROMPTS = ["a red ring moves left", "a blue cross stays still , then a white square moves up"]


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    vae, transformer = video_vae(), video_transformer()
    prepare(vae)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.05)
    torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.05)
    pipe = video_pipeline(vae.eval(), prompt_tokenizer(), text_encoder().eval(), transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_parts_make_a_wan_pipeline_that_repeats_itself(untrained):
    assert type(untrained) is diffusers.WanPipeline
    both = generate_clips(untrained, PROMPTS, [0, 1], num_inference_steps=2)
    assert both.shape == (2, 21, 64, 64, 3)
    assert np.array_equal(both, generate_clips(untrained, PROMPTS, [0, 1], num_inference_steps=2))
    alone = generate_clips(untrained, PROMPTS[1:], [1], num_inference_steps=2)
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1


def test_a_clip_is_384_tokens(untrained):
    seen = []
    hook = untrained.transformer.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape))
    generate_clips(untrained, PROMPTS[:1], [0], num_inference_steps=1)
    hook.remove()
    assert seen == [(1, 384, 128)] * 2
    assert len(untrained.transformer.blocks) >= 8


def test_export_and_load_keep_the_pipeline(untrained, tmp_path):
    export_pipeline(untrained, tmp_path / "pipe", {"seed": 3}, "# card")
    twin = diffusers.WanPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.float32)
    twin.set_progress_bar_config(disable=True)
    assert {p.dtype for p in twin.transformer.parameters()} == {torch.float32}
    assert {p.dtype for p in untrained.transformer.parameters()} == {torch.float32}
    for name, weight in untrained.transformer.state_dict().items():
        torch.testing.assert_close(twin.transformer.state_dict()[name], weight.half().float(), msg=name)
    twin.save_pretrained(tmp_path / "again")
    third = diffusers.WanPipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.float32)
    third.set_progress_bar_config(disable=True)
    first, second = (generate_clips(p, PROMPTS[:1], [0], num_inference_steps=2) for p in (twin, third))
    assert np.abs(first.astype(int) - second).max() <= 1
    assert json.loads((tmp_path / "pipe" / "scores.json").read_text()) == {"seed": 3}
    assert (tmp_path / "pipe" / "README.md").read_text() == "# card"


def test_training_embeddings_are_those_of_the_pipeline(untrained):
    found, lengths = embed(untrained.text_encoder, untrained.tokenizer, [*PROMPTS, ""], COLUMNS)
    expected, empty = untrained.encode_prompt(PROMPTS, "", max_sequence_length=TEXT_LENGTH)
    torch.testing.assert_close(found[:2], expected[:, :COLUMNS])
    torch.testing.assert_close(found[2], empty[0, :COLUMNS])
    assert lengths.tolist() == [6, 13, 1]


@pytest.mark.parametrize("padded", [24, 100, 512])
def test_one_biased_column_stands_for_many_padded_ones(untrained, padded):
    full, _ = untrained.encode_prompt(PROMPTS, "", max_sequence_length=padded)
    short, lengths = embed(untrained.text_encoder, untrained.tokenizer, PROMPTS, COLUMNS)
    states, sigma = torch.randn(2, 16, 2, 8, 8), torch.tensor([300.0, 900.0])
    block = untrained.transformer.blocks[3]
    with torch.no_grad():
        expected = untrained.transformer(states, sigma, full, return_dict=False)[0]
        processor = PaddedText()
        copies = (padded - lengths).float() / (COLUMNS - lengths)
        processor.bias = ((torch.arange(COLUMNS) >= lengths[:, None]) * copies.log()[:, None])[:, None, None]
        kept = [block.attn2.processor for block in untrained.transformer.blocks]
        for block in untrained.transformer.blocks:
            block.attn2.set_processor(processor)
        found = untrained.transformer(states, sigma, short, return_dict=False)[0]
        for block, old in zip(untrained.transformer.blocks, kept, strict=True):
            block.attn2.set_processor(old)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_words_name_the_traits_of_their_own_clause():
    rows = word_targets(parse(PROMPTS[1])).tolist()
    assert len(rows) == len(PROMPTS[1].split())
    assert rows[:5] == [[2, 3, 4, 2]] * 5
    assert rows[5:7] == [[-100] * 4] * 2
    assert rows[7:] == [[5, 1, 2, 3]] * 5


def test_image_parts_make_a_dit_pipeline(tmp_path):
    torch.manual_seed(0)
    vae, transformer = image_vae(), image_transformer()
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.05)
    export_pipeline(image_pipeline(vae, transformer), tmp_path / "pipe", {}, "")
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.get_label_ids(["red ring", "white cross"]) == [0, 23]
    assert len(IMAGE_LABELS) == 24
    images = generate_images(pipe, [0, 23], [0, 1], num_inference_steps=2)
    assert images.shape == (2, 64, 64, 3)
    assert np.array_equal(images, generate_images(pipe, [0, 23], [0, 1], num_inference_steps=2))


def test_folding_the_scale_changes_latents_and_not_images():
    torch.manual_seed(0)
    vae = image_vae().eval()
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        image = vae.decode(before.mode()).sample
        mean, deviation = normalise(before.mode())
        fold_scale(vae, mean, deviation)
        after = vae.encode(pixels).latent_dist
        shape = (1, -1, 1, 1)
        torch.testing.assert_close(
            after.mode(), (before.mode() - mean.view(shape)) / deviation.view(shape), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(after.std, before.std / deviation.view(shape), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vae.decode(after.mode()).sample, image, atol=1e-4, rtol=1e-4)


def test_noise_levels_are_moved_to_the_noisy_end():
    generator = torch.Generator().manual_seed(0)
    even, moved = (noise_levels(20_000, generator, shift) for shift in (1.0, 3.0))
    assert 0 < even.min() < even.max() < 1
    assert even.median().item() == pytest.approx(0.5, abs=0.02)
    assert moved.median().item() == pytest.approx(0.75, abs=0.02)


class _Line(torch.nn.Module):
    """A velocity that depends on the noise level by a matrix in a block and a bias outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.out = torch.nn.Linear(4, 4)

    def forward(self, x, sigma):
        return self.out(torch.tanh(self.blocks[0](x)) + sigma[:, None])


def test_flow_training_learns_and_resumes_as_if_it_had_not_stopped(tmp_path):
    def draw_for(model):
        def draw(_step, generator):
            return Draw(1.0 + 0.1 * torch.randn(64, 4, generator=generator), model)

        return draw

    def _stop_at(stop):
        def watch(step):
            if step == stop:
                raise KeyboardInterrupt

        return watch

    torch.manual_seed(0)
    whole = _Line()
    averaged = Average(whole)
    train_flow(whole, averaged, draw_for(whole), tmp_path / "a.pt", steps=120, seed=1, peak=0.05, every=40)
    torch.manual_seed(0)
    first = _Line()
    with pytest.raises(KeyboardInterrupt):
        train_flow(
            first,
            Average(first),
            draw_for(first),
            tmp_path / "b.pt",
            steps=120,
            seed=1,
            peak=0.05,
            every=40,
            watch=_stop_at(80),
        )
    torch.manual_seed(99)
    second = _Line()
    kept = Average(second)
    train_flow(second, kept, draw_for(second), tmp_path / "b.pt", steps=120, seed=1, peak=0.05, every=40)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, msg=name)
        torch.testing.assert_close(kept.model.state_dict()[name], averaged.model.state_dict()[name], msg=name)
    noise = torch.randn(500, 4, generator=torch.Generator().manual_seed(5))
    clean = torch.ones(500, 4)
    half = torch.full((500,), 0.5)
    error = (whole(0.5 * (noise + clean), half) - (noise - clean)).square().mean()
    assert error < 0.5 * (noise - clean).square().mean()


def test_the_video_qa_model_reads_rendered_prompts_and_not_others():
    model, processor = video_qa()
    stories = [sample_story(index) for index in range(6)]
    clips = [render_story(stage(story, 40 + n)) for n, story in enumerate(stories)]
    right = read_back(model, processor, clips, stories)
    wrong = read_back(model, processor, clips[1:] + clips[:1], stories)
    assert right["answers"] > 0.9
    assert wrong["answers"] < 0.75
    assert wrong["whole"] == 0.0
    assert sum(kind["questions"] for kind in right["by_kind"].values()) > 20


def test_distances():
    model, processor = video_qa()
    story = sample_story(4)
    frames = render_story(stage(story, 1))
    other = render_story(stage(sample_story(5), 2))
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 6, frames.shape), 0, 255).astype(np.uint8)
    assert psnr(frames, frames) == math.inf
    assert psnr(np.full((2, 2), 10, np.uint8), np.full((2, 2), 20, np.uint8)) == pytest.approx(28.13, abs=0.01)
    assert feature_distance(model, processor, frames, frames) == pytest.approx(0.0, abs=1e-6)
    near, far = (feature_distance(model, processor, clip, frames) for clip in (noisy, other))
    assert 0 < near < far < 2


def test_image_labels_are_stories():
    assert str(image_story("red ring")) == "a red ring stays still"
    assert VIDEO_CALL["max_sequence_length"] == TEXT_LENGTH


def test_missing_weights_are_named(tmp_path, monkeypatch):
    for name, load in (("text_to_video", tiny.text_to_video), ("class_to_image", tiny.class_to_image)):
        monkeypatch.setattr(tiny, f"{name.upper()}_FOLDER", tmp_path / name)
        with pytest.raises(NotApplicableError, match=f"train_{name} --out"):
            load()


@pytest.mark.slow
def test_the_shipped_video_pipeline_draws_its_prompts():
    pipe = tiny.text_to_video()
    assert type(pipe) is diffusers.WanPipeline
    facts = json.loads((TEXT_TO_VIDEO_FOLDER / "scores.json").read_text(encoding="utf-8"))["scores"]
    stories = [sample_story(20_000_000 + index) for index in range(6)]
    clips = generate_clips(pipe, list(map(str, stories)), range(6), num_inference_steps=20)
    assert np.array_equal(clips, generate_clips(pipe, list(map(str, stories)), range(6), num_inference_steps=20))
    model, processor = video_qa()
    found = read_back(model, processor, clips, stories)
    shuffled = read_back(model, processor, clips, [*stories[1:], stories[0]])
    assert found["answers"] > facts["held-out"]["answers"] - 0.2
    assert found["answers"] > shuffled["answers"] + 0.1


@pytest.mark.slow
def test_the_shipped_image_pipeline_draws_its_classes():
    pipe = tiny.class_to_image()
    assert type(pipe) is diffusers.DiTPipeline
    facts = json.loads((CLASS_TO_IMAGE_FOLDER / "scores.json").read_text(encoding="utf-8"))["scores"]
    labels = list(IMAGE_LABELS)
    found = image_scores(generate_images(pipe, labels, range(500, 524)), [IMAGE_LABELS[label] for label in labels])
    assert found["answers"] > facts["generated"]["answers"] - 0.15
    assert found["answers"] > 0.6
