"""Labels judge what the output means, or are refused."""

import numpy as np
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


@pytest.mark.parametrize("kind", ["logits", "scores"])
def test_fractions_and_nan_are_no_labels(kind):
    """All above 0 was foreground; controls: whole numbers of a float, no Dice asked, the caller's own metric."""
    for odd in (0.25, torch.nan):
        labels = CLASSES.float().clone()
        labels[0, 0] = odd
        with pytest.raises(NormfixError, match=r"NF604 .*labels > 0\.5"):
            Labels.of(labels, (4, 4), kind, None, channels=1)
        assert Labels.of(labels, (4, 4), "regression", None).values.shape == (1, 4, 4)
        assert Labels.of(labels, (4, 4), kind, lambda a, b: 1.0).values.shape == (1, 4, 4)
    assert Labels.of(CLASSES.double() * 255, (4, 4), kind, None).values.max() == 510


def test_a_kind_that_is_none_is_refused():
    """A slip would be read as numbers without a Dice."""
    with pytest.raises(NormfixError, match="NF580"):
        normfix.diagnose(torch.nn.Conv2d(1, 1, 3), torch.rand(1, 1, 32, 32), 16, kind="loggits")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, ">i2", ">f4", bool])
@pytest.mark.parametrize("kind", ["logits", "labels"])
def test_labels_of_every_type_of_number_judge(dtype, kind):
    """Instance labels are unsigned integers of 16 bits and more, which torch does not compare."""
    values = (CLASSES.numpy() > 0).astype(dtype)
    if dtype == np.uint64:
        values[0, 1] = 2**64 - 1 if kind == "logits" else 1
    truth = Labels.of(values, (4, 4), kind, None)
    perfect = (CLASSES > 0)[None, None]
    assert truth.row("perfect", perfect.long() if kind == "labels" else perfect * 2.0 - 1).dice == 1


@pytest.mark.parametrize("labels", [CLASSES.to_sparse(), CLASSES.to("meta")], ids=["sparse", "meta"])
def test_labels_that_are_no_array_are_refused(labels):
    """Tensors without values that lie there one by one are named as such."""
    with pytest.raises(NormfixError, match="NF604 labels: labels are an array"):
        Labels.of(labels, (4, 4), "logits", None)


def test_labels_that_are_no_numbers_are_refused():
    """Names of classes are no class numbers."""
    with pytest.raises(NormfixError, match=r"NF604 labels: .*U1"):
        Labels.of(np.full((4, 4), "a"), (4, 4), "scores", None)


def _missing(prediction, labels):
    raise KeyError("k")


@pytest.mark.parametrize(
    ("metric", "reason"),
    [(_missing, "KeyError"), (lambda p, t: p, "failed"), (lambda p, t: float("nan"), "gave nan")],
)
def test_a_metric_without_a_number_is_named(metric, reason):
    """What the caller's function raises, or returns in place of a number."""
    truth = Labels.of(CLASSES, (4, 4), "regression", metric)
    with pytest.raises(NormfixError, match=rf"NF557 metric .*{reason}"):
        truth.row("any", torch.rand(1, 1, 4, 4))


def test_a_metric_may_change_its_arguments():
    """Other predictions are judged by the labels, and judged again, so it gets copies."""

    def metric(prediction, labels):
        prediction *= 0
        labels *= 0
        return 1

    given, prediction = CLASSES.clone(), torch.ones(1, 1, 4, 4)
    Labels.of(given, (4, 4), "regression", metric).row("any", prediction)
    assert torch.equal(given, CLASSES)
    assert bool((prediction == 1).all())
