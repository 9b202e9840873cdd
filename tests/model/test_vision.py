"""Pictures in a policy: encoding, the proof at loading, saving; every family."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from sapo.data import Prompt
from sapo.data.picture_files import decode_picture
from sapo.errors import ModelError, TaskError
from sapo.model.adapters import add_adapter
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.rollout.prompting import PromptFormat
from support.pictures import picture
from support.policies import make_policy
from support.vision_cases import (
    FAMILY_NAMES,
    SMALL,
    SQUARE,
    WIDE,
    OwnForward,
    make_vision_model,
    make_vision_policy,
    mixed_prompts,
    save_vision_model,
    shown,
)

TEMPLATE = (
    "{%- for m in messages %}{{ m.role }}\n{%- if m.content is string %}{{ m.content }}{%- else %}"
    "{%- for part in m.content %}{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else %}{{ part.text }}{%- endif %}{%- endfor %}{%- endif %}\n{%- endfor %}"
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_vision_policy()


# ------------------------------------------------------------------------------------------------------- encoding


def test_a_picture_becomes_as_many_tokens_as_its_cells_between_its_marks(policy):
    prompt = shown(policy, "1+<image>=<image>?", WIDE, SQUARE)
    # 48 x 32 and 32 x 32 pixels in cells of 16: 3 x 2 and 2 x 2.
    marks = {name: policy.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    first, second = (
        [marks["vision_start"], *[policy.vision.family.image_token_id] * n, marks["vision_end"]] for n in (6, 4)
    )
    one, plus, equals, question = policy.encode("1+=?")
    assert list(prompt.token_ids) == [one, plus, *first, equals, *second, question]
    assert prompt.picture_tokens.places == ((3, 4, 5, 6, 7, 8), (12, 13, 14, 15))


def test_positions_go_by_rows_and_columns_and_a_response_goes_on_behind_the_largest(policy):
    prompt = shown(policy, "1<image>?", WIDE)
    time, height, width = prompt.picture_tokens.positions
    # 1 and <|vision_start|> at 0 and 1; the picture from 2, two rows of three; then one past the largest, 4.
    assert time == (0, 1, 2, 2, 2, 2, 2, 2, 5, 6)
    assert height == (0, 1, 2, 2, 2, 3, 3, 3, 5, 6)
    assert width == (0, 1, 2, 3, 4, 2, 3, 4, 5, 6)
    assert prompt.next_position == 7 != len(prompt.token_ids)


def test_pictures_without_markers_come_before_the_question(policy):
    plain = PromptFormat(style="plain", template="Q {prompt}".replace("Q", "a"))
    prompt = Prompt(0, "t", "12", pictures=(SMALL,))
    (first,) = plain.encode(policy, [prompt])
    (marked,) = plain.encode(policy, [replace(prompt, text="<image>12")])
    assert first.token_ids == marked.token_ids
    assert policy.show(first.token_ids).startswith("a <|vision_start|><|image_pad|>")


@pytest.mark.parametrize(("text", "pictures", "markers"), [("<image><image>?", 1, 2), ("<image>?", 2, 1)])
def test_fewer_or_more_pictures_than_markers_are_refused_with_both_counts(policy, text, pictures, markers):
    with pytest.raises(TaskError, match=f"got {markers} markers and {pictures} pictures in a prompt of task 'test'"):
        shown(policy, text, *(picture(i) for i in range(pictures)))


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
@pytest.mark.parametrize("pictures", [(), (SMALL,)])
def test_a_question_with_the_text_of_a_picture_token_is_refused(policy, mark, pictures):
    with pytest.raises(ModelError, match="a question must not have"):
        shown(policy, f"1{mark}2", *pictures)


def test_pictures_for_a_model_of_text_are_refused():
    with pytest.raises(ModelError, match="task 'test' shows pictures, and Qwen3ForCausalLM takes text alone"):
        shown(make_policy("qwen3"), "1", SMALL)


@pytest.mark.parametrize("lists", [True, False])
def test_a_chat_has_its_pictures_where_its_markers_are(policy, lists, monkeypatch):
    """By templates that take lists of parts, and by those that take text alone."""
    template = TEMPLATE if lists else "{%- for m in messages %}{{ m.role }}\n{{ m.content.strip() }}\n{%- endfor %}"
    template = template.replace("{{ m.role }}\n", "")
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    messages = [{"role": "user", "content": "1<image>2"}, {"role": "assistant", "content": "3"}]
    rows = Prompt(0, "t", "", metadata={"messages": messages}, pictures=(SQUARE,))
    (prompt,) = PromptFormat(style="chat").encode(policy, [rows])
    picture_text = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert policy.show(prompt.token_ids).split() == [f"1{picture_text}2", "3"] or (
        policy.show(prompt.token_ids).replace("\n", "") == f"1{picture_text}23"
    )
    (first,) = PromptFormat(style="chat").encode(policy, [Prompt(0, "t", "12", pictures=(SQUARE,))])
    assert policy.show(first.token_ids).strip() == f"{picture_text}12"


def test_a_template_that_writes_no_picture_is_refused(policy, monkeypatch):
    monkeypatch.setattr(policy.tokenizer, "chat_template", "{{ '12' }}")
    with pytest.raises(ModelError, match=r"one placeholder \(<\|image_pad\|>\) for each picture; got 0 for 1 pictures"):
        PromptFormat(style="chat").encode(policy, [Prompt(0, "t", "12", pictures=(SQUARE,))])


# --------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(40, 24), (17, 90), (200, 31), (16, 16), (5, 7)])
def test_a_picture_is_scaled_as_the_image_processor_would(policy, size):
    image = decode_picture(picture(7, *size))
    theirs = policy.vision.family.processor(images=[image], return_tensors="pt")
    ours = policy.vision.pixels(picture(7, *size))
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_no_picture_has_more_tokens_than_the_limit():
    model, family = make_vision_model("qwen3_vl")
    family.limit(8)
    policy = Policy(model, family.tokenizer)
    assert policy.max_length == 512
    for size in ((200, 200), (400, 30), (64, 32), (16, 16)):
        assert len(family.expansion(size)) <= 8
        assert int(family.pixels(Image.new("RGB", size))["image_grid_thw"].prod()) // 4 == len(family.expansion(size))


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "internvl"])
def test_tiles_are_left_out_to_keep_a_picture_within_the_limit(name):
    for most in (4, 8, 20, 40, 100):
        _, family = make_vision_model(name)
        family.limit(most)
        for size in ((64, 32), (32, 32), (16, 64), (100, 100)):
            ids = family.expansion(size)
            assert 4 <= ids.count(family.image_token_id) <= most


@pytest.mark.parametrize("name", ["smolvlm", "internvl", "llava"])
def test_a_limit_below_the_smallest_picture_is_refused(name):
    _, family = make_vision_model(name)
    with pytest.raises(ModelError, match=r"set it to (4|16) or more"):
        family.limit(3)


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("size", [(48, 32), (20, 64), (16, 16)])
def test_the_tower_gives_a_feature_for_every_token_of_a_picture(name, size):
    policy = make_vision_policy(name)
    one, other = picture(1, *size), picture(2, 32, 32)
    prompt = shown(policy, "<image>1<image>", one, other)
    found = policy.vision.features([one, other, one])
    assert [len(f.tokens_IH) for f in found] == [*map(len, prompt.picture_tokens.places), len(found[0].tokens_IH)]
    assert found[0] is found[2]


# ------------------------------------------------------------------------------------------------ the model's own


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_is_proven_with_a_picture_and_loaded_from_a_directory(name, tmp_path):
    save_vision_model(name, tmp_path / "model")
    policy = load_policy(tmp_path / "model", max_tokens_per_picture=64)
    assert policy.vision is not None
    assert policy.max_length == 512
    assert policy.logit_softcap is None
    policy.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "preprocessor_config.json").is_file()
    again = load_policy(tmp_path / "saved")
    assert again.fingerprint() == policy.fingerprint()
    prompt, copy = (shown(p, "1<image>?", WIDE) for p in (policy, again))
    assert prompt == copy
    # Outside of ours, by the names that a model card gives: the same logits.
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("1?")["input_ids"] == list(policy.encode("1?"))
    ids = torch.tensor([[*prompt.token_ids, *policy.encode("12")]])
    image = decode_picture(WIDE)
    nested = name in ("smolvlm", "idefics3")
    options = {"crop_to_patches": True} if name == "internvl" else {}
    inputs = dict(processor(images=[[image]] if nested else [image], return_tensors="pt", **options))
    for extra in ("num_patches", "rows", "cols"):
        inputs.pop(extra, None)
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False, **inputs, **policy.vision.family.own_inputs(ids)).logits[0, -3:]
        ours = OwnForward(policy).logits(prompt, policy.encode("12"))
    torch.testing.assert_close(ours, theirs[:2], rtol=0, atol=2e-5)


def test_gemma_3_is_refused_by_the_proof_with_a_picture(tmp_path):
    save_vision_model("gemma3", tmp_path)
    with pytest.raises(ModelError, match="does something with pictures that the packed forward does not"):
        load_policy(tmp_path)


def test_a_directory_without_an_image_processor_is_refused(tmp_path):
    save_vision_model("qwen3_vl", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="has no image processor"):
        load_policy(tmp_path)


def test_an_image_processor_within_processor_config_is_found(tmp_path):
    """As transformers 5 writes it."""
    save_vision_model("qwen3_vl", tmp_path)
    own = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    assert load_policy(tmp_path).vision.family.processor.patch_size == 8


# --------------------------------------------------------------------------------------------------- what is trained


def test_only_what_is_asked_for_of_the_vision_part_is_trained():
    policy = make_vision_policy()
    merger, tower = (dict(policy.vision.parameters(part)) for part in ("merger", "tower"))
    assert any("deepstack_merger_list" in name for name in merger)
    assert all("merger" not in name for name in tower)
    rest = set(dict(policy.model.named_parameters())) - merger.keys() - tower.keys()
    for part, expected in (
        ("none", rest),
        ("merger", rest | merger.keys()),
        ("tower", rest | merger.keys() | tower.keys()),
    ):
        policy.vision.train(part)
        assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == expected
        assert policy.vision.frozen == (part == "none")


@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "smolvlm"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_an_adapter_leaves_the_tower_alone_unless_asked(name, targets):
    def adapted(train):
        policy = make_vision_policy(name)
        add_adapter(policy, rank=2, alpha=4, targets=targets, seed=0, vision=train)
        names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
        assert names
        inside = {part: {n for n, _ in policy.vision.parameters(part)} for part in ("merger", "tower")}
        return {part: sum(n in of for n in names) for part, of in inside.items()}

    assert adapted("none") == {"merger": 0, "tower": 0}
    if targets == "all-linear":
        assert adapted("merger")["merger"] > 0 == adapted("merger")["tower"]
        assert adapted("tower")["tower"] > 0


def test_features_of_a_frozen_tower_are_kept_and_do_not_depend_on_their_company():
    policy = make_vision_policy()
    policy.vision.train("none")
    alone = policy.vision.features([WIDE])[0]
    assert policy.vision.features([SQUARE, WIDE])[1] is alone
    other = make_vision_policy()
    other.vision.train("none")
    together = other.vision.features([SMALL, SQUARE, WIDE])[2]
    assert torch.equal(together.tokens_IH, alone.tokens_IH)
    with torch.no_grad():  # as when a checkpoint is loaded
        policy.vision.parameters("tower")[0][1].add_(0.5)
    assert not torch.equal(policy.vision.features([WIDE])[0].tokens_IH, alone.tokens_IH)


def test_pixels_of_a_picture_are_prepared_once(policy, monkeypatch):
    shown_picture = picture(11, 32, 16)
    calls = []
    prepare = policy.vision.family.pixels
    monkeypatch.setattr(policy.vision.family, "pixels", lambda image: calls.append(image) or prepare(image))
    for _ in range(3):
        policy.vision.pixels(shown_picture)
    assert len(calls) == 1


def test_text_alone_is_encoded_and_computed_as_by_a_model_of_text(policy):
    prompt = shown(policy, "12+3=")
    assert prompt.token_ids == policy.encode("12+3=")
    assert prompt.picture_tokens is None
    assert prompt.next_position == len(prompt.token_ids)
    assert np.isfinite(OwnForward(policy).logits(mixed_prompts(policy)[1], (1, 2)).detach().numpy()).all()


def test_token_ids_are_those_of_the_processor_class_of_transformers(policy):
    """Two pictures within text: the expansion, without the class and without torchvision."""
    pytest.importorskip("torchvision")
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    family = policy.vision.family
    processor = Qwen3VLProcessor(family.processor, family.tokenizer, Qwen3VLVideoProcessor())
    text = "1+<image>=<image>?"
    images = [decode_picture(p) for p in (WIDE, SQUARE)]
    theirs = processor(text=[text.replace("<image>", family.placeholder)], images=[images])
    ours = shown(policy, text, WIDE, SQUARE)
    assert list(ours.token_ids) == theirs["input_ids"][0]
    grids = [[1, *reversed([side // 8 for side in family.resized_size(image.size)])] for image in images]
    assert theirs["image_grid_thw"].tolist() == grids
