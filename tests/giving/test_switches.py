"""Arguments that switch a factory's norms are found by its signature, in the style that they are written in."""

import pytest

from normfix.giving.switches import batch_word, switched


@pytest.mark.parametrize(
    ("word", "batch"),
    [
        ("instance", "batch"),
        ("INSTANCE_NVFUSER", "BATCH"),
        ("GroupNorm", "BatchNorm"),
        ("instance_norm", "batch_norm"),
        ("gn", "bn"),
        ("IN", "BN"),
        ("torch.nn.modules.instancenorm.InstanceNorm2d", "torch.nn.modules.batchnorm.BatchNorm2d"),
        ("layer", None),
        ("inner", None),
    ],
)
def test_a_word_keeps_its_style(word, batch):
    """A word for an instance or group norm becomes the same library's word for a BatchNorm; others stay."""
    assert batch_word(word) == batch


def two(encoder_norm="instance", decoder_norm="instance", width=4):
    """Has two arguments for norms."""


def test_all_arguments_are_switched_together_first():
    """A network with two kinds of norm is asked for with both as BatchNorm before each alone."""
    first, second, *_ = switched(two, {})
    assert first == {"encoder_norm": "batch", "decoder_norm": "batch"}
    assert second == {"encoder_norm": "batch"}


def test_a_name_that_says_nothing_counts_by_its_value():
    """An argument whose value names a norm is found whatever it is called."""

    def unet(flavour="GroupNorm", activation="relu"):
        """Has no argument that is called a norm."""

    assert list(switched(unet, {})) == [{"flavour": "BatchNorm"}]


def test_a_name_that_says_norm_is_tried_with_the_usual_words():
    """An argument whose value tells nothing is tried with what libraries call a BatchNorm."""

    def unet(norm=None):
        """Has a norm that is not named."""

    assert {"norm": "batch"} in list(switched(unet, {}))


def test_arguments_are_not_modified():
    """What was given stays, also within."""
    args = {"settings": {"norm_op": "InstanceNorm2d"}}
    assert list(switched(dict, args)) == [{"settings": {"norm_op": "BatchNorm2d"}}]
    assert args == {"settings": {"norm_op": "InstanceNorm2d"}}
