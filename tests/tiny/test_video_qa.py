"""The embedded video-QA model: real classes, closed vocabulary, padding-proof, right on unseen clips."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from mmaccel.errors import VocabularyError
from mmaccel.tiny import VIDEO_QA_FOLDER, video_qa
from mmaccel.tiny.corpus import question_rows
from mmaccel.tiny.encoder_training import AttentionReceived, pixels
from mmaccel.tiny.language_training import Thinning, pack, project, thin
from mmaccel.tiny.processing import SPECIAL_TOKENS, WORDS, build_tokenizer, check_vocabulary
from mmaccel.tiny.scoring import answers, prompt, score_folder
from mmaccel.tiny.train_video_qa import main
from mmaccel.tiny.world import frame_times, questions, render, sample_clip


@pytest.fixture(scope="module")
def loaded():
    return video_qa()


def inputs_for(processor, clip, asked):
    text = [processor.apply_chat_template(prompt(question), add_generation_prompt=True) for question in asked]
    return processor(text=text, videos=[render(clip)] * len(asked), padding=True, return_tensors="pt")


def test_folder_loads_with_the_real_classes(loaded):
    model, processor = loaded
    assert type(model) is LlavaOnevisionForConditionalGeneration
    assert type(processor) is LlavaOnevisionProcessor
    assert type(AutoProcessor.from_pretrained(VIDEO_QA_FOLDER)) is LlavaOnevisionProcessor
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (VIDEO_QA_FOLDER / "model.safetensors").stat().st_size < 8_000_000


def test_other_dtype():
    model, _ = video_qa(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_eight_frames_make_513_visual_tokens(loaded):
    model, processor = loaded
    inputs = inputs_for(processor, sample_clip(0), ["how many objects are there ?"])
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 513
    assert inputs["pixel_values_videos"].shape == (1, 8, 3, 128, 128)


def test_processor_pixels_are_the_training_pixels(loaded):
    _, processor = loaded
    clip = sample_clip(1)
    inputs = inputs_for(processor, clip, ["how many objects are there ?"])
    torch.testing.assert_close(inputs["pixel_values_videos"][0], pixels(torch.from_numpy(render(clip))))


def test_vocabulary_is_closed_under_questions_and_answers():
    tokenizer = build_tokenizer()
    unknown = tokenizer.unk_token_id
    for index in range(60):
        for question in questions(sample_clip(index)):
            check_vocabulary(question.text)
            assert question.answer in WORDS
            assert unknown not in tokenizer(f"{question.text} {question.answer}")["input_ids"]
            check_vocabulary(question.text.upper().replace(" ?", "?"))


def test_every_word_is_one_token():
    tokenizer = build_tokenizer()
    for word in (*WORDS, *SPECIAL_TOKENS):
        assert len(tokenizer(word)["input_ids"]) == 1, word


def test_unknown_words_are_named_with_what_is_known():
    with pytest.raises(VocabularyError, match=r"'zebra', 'dance'.*square"):
        check_vocabulary("does the Zebra dance?")
    with pytest.raises(VocabularyError, match="color"):
        check_vocabulary("what colour is the ring ?")


def test_batch_of_two_equals_single_items(loaded):
    model, processor = loaded
    clip = sample_clip(4)
    asked = ["how many objects are there ?", "which came first , the red or the blue object ?"]
    with torch.no_grad():
        both = model(**inputs_for(processor, clip, asked)).logits[:, -1]
        for row, question in zip(both, asked, strict=True):
            alone = model(**inputs_for(processor, clip, [question])).logits[0, -1]
            torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)


def test_packed_questions_equal_separate_prompts(loaded):
    model, processor = loaded
    tokenizer = processor.tokenizer
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    rows, _ = question_rows("held-out", 9, tokenizer, sampled=True)
    rows = torch.from_numpy(rows)[None].long()
    clip = sample_clip(9)
    with torch.no_grad():
        visual = model.model.get_video_features(pixels(torch.from_numpy(render(clip)))[None]).pooler_output[:, :-1]
        packed, positions, mask = pack(model, visual, torch.arange(512)[None], rows, user, end_place=512)
        states = model.model.language_model(
            inputs_embeds=packed, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        for n, row in enumerate(rows[0]):
            turn = int((row == assistant).nonzero()[0])
            text = tokenizer.decode(row[:turn], skip_special_tokens=True)
            alone = model(**inputs_for(processor, clip, [text])).logits[0, -1]
            torch.testing.assert_close(
                model.lm_head(states[0, 514 + n * rows.shape[2] + turn]), alone, atol=1e-4, rtol=1e-4
            )


def test_cached_projection_equals_the_models_pooling(loaded):
    model, _ = loaded
    values = pixels(torch.from_numpy(render(sample_clip(5))))
    with torch.no_grad():
        hidden = model.model.vision_tower(values, output_hidden_states=True).hidden_states[-1]
        cells = hidden.view(8, 8, 2, 8, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(1, 8, 64, 4, -1)
        expected = model.model.get_video_features(values[None]).pooler_output[:, :-1]
        torch.testing.assert_close(project(model, cells).flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_thinning_keeps_the_asked_count_in_order(loaded):
    model, _ = loaded
    features = torch.randn(3, 8, 64, 4, 96)
    attention = torch.rand(3, 8, 64)
    for merge in (False, True):
        plan = Thinning(keep=0.25, by_attention=True, merge=merge)
        with torch.no_grad():
            visual, place = thin(
                model, features, attention, plan, np.random.default_rng(0), torch.Generator().manual_seed(0)
            )
        assert visual.shape == (3, 128, 128)
        assert all(len(set(row.tolist())) == 128 for row in place)
        if not merge:
            assert (place.diff(dim=1) > 0).all()
            torch.testing.assert_close(visual[1], project(model, features[1].flatten(0, 1)[place[1]]))


def test_attention_received_is_the_mean_of_the_eager_map(loaded):
    model, _ = loaded
    tower = model.model.vision_tower
    values = pixels(torch.from_numpy(render(sample_clip(6))))
    received = AttentionReceived(tower)
    with torch.no_grad():
        tower(values)
        streamed = received()
        received.close()
        tower.set_attn_implementation("eager")
        maps = tower(values, output_attentions=True).attentions[-1]
        tower.set_attn_implementation("sdpa")
    torch.testing.assert_close(streamed, maps.mean(dim=(1, 2)), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("frames", [4, 5, 12])
def test_other_frame_counts_run(loaded, frames):
    model, processor = loaded
    reply = answers(model, processor, render(sample_clip(2), frame_times(frames)), ["how many objects are there ?"])
    assert reply[0] in WORDS


def test_second_turn_continues(loaded):
    model, processor = loaded
    chat = prompt("how many objects are there ?")
    chat += [
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "what color is the object that appeared last ?"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[text], videos=[render(sample_clip(8))], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() in WORDS


@pytest.mark.slow
def test_fresh_held_out_clips_are_answered():
    # Clips that neither training, nor validation, nor the committed scores have used.
    result = score_folder(VIDEO_QA_FOLDER, "held-out", 60, first=900_000)
    assert result["questions"] > 250
    assert result["accuracy"] >= 0.85


def test_committed_scores_are_about_this_folder():
    facts = json.loads((VIDEO_QA_FOLDER / "scores.json").read_text(encoding="utf-8"))
    scores = facts["held-out"]
    hits = sum(round(kind["accuracy"] * kind["questions"]) for kind in scores["by_kind"].values())
    assert sum(kind["questions"] for kind in scores["by_kind"].values()) == scores["questions"]
    assert hits / scores["questions"] == pytest.approx(scores["accuracy"])
    assert scores["accuracy"] >= 0.9


@pytest.mark.slow
def test_training_script_runs_end_to_end_and_resumes(tmp_path):
    sizes = [
        "--clips",
        "6",
        "--watch-clips",
        "2",
        "--encoder-steps",
        "1",
        "--focus-steps",
        "1",
        "--language-steps",
        "1",
    ]
    command = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--score-clips", "1", "--threads", "1"]
    main([*command, *sizes])
    first = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert set(first["seconds"]) == {"render", "encoder", "features", "focus", "language"}
    assert first["held-out"]["clips"] == 1
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == 1_386_912
    main([*command, *sizes])
    again = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert set(again["seconds"]) == {"features", "language"}
    twin = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)
