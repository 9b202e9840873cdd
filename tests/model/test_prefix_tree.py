"""Common beginnings of prompts that show pictures: the token ids of all pictures are alike, the pictures are not."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data import Picture
from sapo.model.prefix_tree import common_beginning, prefix_keys, prompt_tree
from support.pictures import IMAGE, picture, pictured

QUESTION = (7, 8, 9)
CAT, DOG = picture(1), picture(2)


def test_two_prompts_with_the_same_ids_and_other_pictures_share_nothing_of_the_pictures():
    cat, dog = pictured((1, 2, CAT, *QUESTION)), pictured((1, 2, DOG, *QUESTION))
    assert cat.token_ids == dog.token_ids
    assert common_beginning([cat, dog], min_preamble=1) == 2
    tree = prompt_tree([cat, dog], min_preamble=1)
    assert [p.sha256 for p in tree.tokens.pictures] == [CAT.sha256, DOG.sha256]
    assert [places.tolist() for places in tree.tokens.places] == [[2, 3, 4, 5], [9, 10, 11, 12]]


def test_the_same_picture_in_three_prompts_is_there_once():
    prompts = [pictured((1, CAT, *QUESTION, last), grid=True) for last in (3, 4, 5)]
    tree = prompt_tree(prompts, min_preamble=1)
    assert tree.preamble == 8  # 1, four of the picture, the question
    assert [p.sha256 for p in tree.tokens.pictures] == [CAT.sha256]
    assert [places.tolist() for places in tree.tokens.places] == [[1, 2, 3, 4]]
    # 1 at 0; the picture at 1 on two axes and 1 .. 4 on the third; the question from 5; then each prompt's last token.
    assert tree.position_ids.tolist()[0] == [0, 1, 1, 1, 1, 5, 6, 7, 8, 8, 8]
    assert tree.position_ids.tolist()[2] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8]


def test_a_common_beginning_never_ends_within_a_picture():
    short, long = pictured((1, 2, CAT)), pictured((1, 2, CAT, DOG))
    assert common_beginning([short, long], min_preamble=1) == 2


def test_a_text_prompt_beside_pictures_has_its_place_on_all_three_axes():
    tree = prompt_tree([pictured((CAT, 5), grid=True), pictured((5, 6, 7))])
    assert tree.position_ids.tolist() == [[0, 0, 0, 0, 4, 0, 1, 2], [0, 0, 0, 0, 4, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2]]


def test_a_token_of_the_vocabulary_is_never_taken_for_a_picture():
    typed, shown = pictured((1, IMAGE, IMAGE, IMAGE, IMAGE, 9)), pictured((1, CAT, 9))
    assert typed.token_ids == shown.token_ids
    assert common_beginning([typed, shown], min_preamble=1) == 1


PARTS = st.lists(st.sampled_from([1, 2, CAT, DOG, picture(3)]), min_size=1, max_size=6).map(tuple)


@settings(deadline=None, max_examples=200)
@given(st.lists(PARTS, min_size=1, max_size=4), st.integers(1, 4))
def test_a_prefix_tree_never_merges_different_pictures(parts, tokens):
    """Each prompt read from the root of the tree to its leaf is the prompt: ids, positions and pictures."""
    prompts = [pictured(p, tokens=tokens, grid=any(isinstance(x, Picture) for x in p)) for p in parts]
    tree = prompt_tree(prompts, min_preamble=1)
    packed = [None] * len(tree.token_ids)
    for shown, places in zip(tree.tokens.pictures, tree.tokens.places, strict=True):
        for place in places:
            packed[place] = shown.sha256
    for prompt, leaf in zip(prompts, tree.leaves, strict=True):
        segment = tree.segments[leaf]
        path = [*range(tree.preamble), *range(segment.start, segment.stop)]
        assert tree.token_ids[path].tolist() == list(prompt.token_ids)
        own = [None] * len(prompt.token_ids)
        for shown, places in zip(prompt.pictures, prompt.picture_tokens.places if prompt.pictures else (), strict=True):
            for place in places:
                own[place] = shown.sha256
        assert [packed[i] for i in path] == own
        axes = prompt.picture_tokens.positions if prompt.pictures else (range(len(path)),) * 3
        found = tree.position_ids if tree.position_ids.ndim == 2 else [tree.position_ids] * 3
        assert [list(axis[path]) for axis in found] == [list(axis) for axis in axes]
    keys = [tuple(k) for k in prefix_keys(prompts)]
    assert len(set(keys)) == len({(p.token_ids, p.identity, str(p.picture_tokens)) for p in prompts})
