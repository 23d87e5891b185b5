"""Statistics by hand, and which validation score stands for a test score."""
import math

import pytest

from experiments.results import (difference, mean_and_interval, on_validation, read_runs,
                                 within_noise)
from support.errors import UserError


def test_a_validation_score_stands_for_the_test_s_by_name_average_or_without_its_group():
    result = {"valid": {"loss": 1.0, "accuracy/train": 0.3, "accuracy/Avg. of 1": 0.4,
                        "f1": 0.5}, "after": {}}
    for metric, value in (("loss", 1.0), ("accuracy/Avg. of 7", 0.4), ("accuracy/PIQA", 0.4),
                          ("f1_matched", 0.5)):
        assert on_validation(result, metric) == value
    with pytest.raises(ValueError, match="bleu"):
        on_validation(result, "bleu")


def test_an_interval_of_a_mean_is_student_s():
    mean, sd, half = mean_and_interval([1.0, 2.0, 3.0])
    assert (mean, sd) == (2.0, 1.0) and half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert mean_and_interval([0.5]) == (0.5, None, None)


def test_a_difference_is_welch_s():
    mean, low, high = difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])      # 4 degrees of freedom
    assert mean == -1 and high == pytest.approx(-1 + 2.7764 * math.sqrt(2 / 3), abs=1e-4)
    assert low + high == pytest.approx(-2)
    assert within_noise([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert not within_noise([1.0, 1.1, 0.9], [2.0, 2.1, 1.9])
    assert within_noise([1.0, 1.0], [1.0, 1.0]) and not within_noise([1.0, 1.0], [0.9, 0.9])
    assert within_noise([1.0], [0.0, 0.1])                      # one seed tells nothing


def test_a_run_s_own_folder_is_read_like_the_folder_above_it(plain, tmp_path):
    run = plain("lora")
    assert [found.folder for found in read_runs(run)] == [run]
    assert [found.result for found in read_runs(run.parent)] == [read_runs(run)[0].result]
    with pytest.raises(UserError, match="neither the folder of a finished run"):
        read_runs(tmp_path)
