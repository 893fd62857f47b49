"""Attention masks as drawn, pads in every place, labels and their loss mask."""

import jax.numpy as jnp
import numpy as np
import pytest

from mammut.models.losses import caption_loss
from mammut.models.masks import attn_mask, caption_labels


def drawn(picture: str) -> np.ndarray:
    return np.array([[cell == "x" for cell in row.split()] for row in picture.strip().splitlines()])


def mask_of(valid, causal) -> np.ndarray:
    return np.asarray(attn_mask(np.array(valid, bool), np.array(causal, bool)))


@pytest.mark.parametrize(
    ("causal", "picture"),
    [
        ([0, 0, 0, 0], "x x x x\n x x x x\n x x x x\n x x x x"),  # contrastive pass
        ([1, 1, 1, 1], "x . . .\n x x . .\n x x x .\n x x x x"),  # caption pass
        ([0, 0, 1, 1], "x x . .\n x x . .\n x x x .\n x x x x"),  # prefix, then text
    ],
)
def test_the_three_cases_look_as_they_are_drawn(causal, picture):
    mask = mask_of([[1, 1, 1, 1]], causal)
    assert mask.shape == (1, 1, 4, 4)
    np.testing.assert_array_equal(mask[0, 0], drawn(picture))


def test_a_pad_is_attended_to_by_nobody_wherever_it_stands():
    valid = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]], bool)
    for causal in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]):
        mask, unpadded = mask_of(valid, causal), mask_of(np.ones_like(valid), causal)
        for row in range(4):
            np.testing.assert_array_equal(mask[row, 0], unpadded[row, 0] & valid[row])


def test_each_row_of_the_batch_has_its_own_pads():
    mask = mask_of([[1, 1, 0], [1, 0, 0]], [1, 1, 1])
    np.testing.assert_array_equal(mask[0, 0], drawn("x . .\n x x .\n x x ."))
    np.testing.assert_array_equal(mask[1, 0], drawn("x . .\n x . .\n x . ."))


def test_labels_are_the_tokens_one_place_to_the_left():
    tokens = np.array([[1, 7, 8, 2, 0, 0]], np.int32)
    labels, loss_mask = caption_labels(tokens, tokens > 0)
    assert labels[0, :3].tolist() == [7, 8, 2]
    assert loss_mask[0].tolist() == [True, True, True, False, False, False]


def test_the_end_token_has_no_label_and_the_token_before_it_has_the_end():
    """The loss mask follows the labels: by the inputs, the end would be asked to predict a pad."""
    tokens = np.array([[1, 5, 2, 0]], np.int32)
    labels, loss_mask = caption_labels(tokens, np.array([[True, True, True, False]]))
    assert labels[0, 1] == 2 and loss_mask[0, 1]
    assert not loss_mask[0, 2]


def test_a_caption_that_fills_every_place_has_all_labels_but_one():
    tokens = np.array([[1, 5, 6, 7]], np.int32)
    labels, loss_mask = caption_labels(tokens, np.ones((1, 4), bool))
    assert labels[0, :3].tolist() == [5, 6, 7]
    assert loss_mask[0].tolist() == [True, True, True, False]


def test_a_row_of_pads_and_a_lone_start_have_no_label():
    tokens = np.array([[0, 0, 0], [1, 0, 0]], np.int32)
    _, loss_mask = caption_labels(tokens, np.array([[False] * 3, [True, False, False]]))
    assert not np.asarray(loss_mask).any()


def test_id_0_is_a_token_like_any_other_where_it_is_valid():
    """0 is "!" in CLIP's vocabulary."""
    zeros, sevens = np.array([[1, 0, 0, 2, 0]], np.int32), np.array([[1, 7, 7, 2, 7]], np.int32)
    valid = np.array([[True, True, True, True, False]])
    labels, loss_mask = caption_labels(zeros, valid)
    assert labels[0, :3].tolist() == [0, 0, 2]
    np.testing.assert_array_equal(loss_mask, caption_labels(sevens, valid)[1])
    assert loss_mask[0].tolist() == [True, True, True, False, False]


def test_a_label_needs_a_real_input_and_a_real_label():
    """Pads on the left: nothing is learned from a pad, not even the first real token."""
    _, loss_mask = caption_labels(
        np.array([[0, 0, 1, 5, 2]], np.int32), np.array([[False, False, True, True, True]])
    )
    assert loss_mask[0].tolist() == [False, False, True, True, False]


def test_a_row_of_pads_costs_nothing():
    tokens, valid = np.array([[1, 3, 2], [0, 0, 0]], np.int32), np.array([[True] * 3, [False] * 3])
    features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    losses = caption_loss(features, jnp.ones((4, 5)), *caption_labels(tokens, valid))
    np.testing.assert_allclose(losses, [[np.log(5), np.log(5), 0], [0, 0, 0]], rtol=1e-5)
