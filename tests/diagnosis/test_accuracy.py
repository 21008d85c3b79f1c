"""Labels judge what the output means, or are refused."""

import pytest
import torch

import normfix
from normfix.diagnosis.accuracy import Labels
from normfix.errors import NormfixError

CLASSES = torch.arange(16).reshape(4, 4) % 3


def test_class_numbers_do_not_judge_several_masks():
    """Pooled over channels they gave a Dice of 0.25 to a network of 0.92."""
    with pytest.raises(NormfixError) as caught:
        Labels.of(CLASSES, (4, 4), "logits", None, channels=3)
    assert caught.value.code == "NF604"
    assert "scores" in caught.value.message


@pytest.mark.parametrize(
    ("labels", "kind", "channels"),
    [
        (CLASSES, "scores", 3),
        (CLASSES > 0, "logits", 1),
        (torch.stack([n == CLASSES for n in range(3)]), "logits", 3),
    ],
)
def test_labels_that_fit_the_output_judge_it(labels, kind, channels):
    """A prediction that is the labels has a Dice of one."""
    truth = Labels.of(labels, (4, 4), kind, None, channels=channels)
    score = torch.stack([n == CLASSES for n in range(3)]).float()[None] * 2 - 1
    score = score if channels == 3 else (CLASSES > 0)[None, None].float() * 2 - 1
    assert truth.row("perfect", score).dice == 1


def test_a_kind_that_is_none_is_refused():
    """A slip would be read as numbers without a Dice."""
    with pytest.raises(NormfixError, match="NF580"):
        normfix.diagnose(torch.nn.Conv2d(1, 1, 3), torch.rand(1, 1, 32, 32), 16, kind="loggits")
