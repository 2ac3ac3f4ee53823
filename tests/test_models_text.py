"""Byte batches of real text: deterministic, resumable, targets one to the right."""

import numpy as np
import pytest

from autopar.core.errors import BadInput
from autopar.models.text import ByteDataset, standard_library


def test_standard_library_is_real_python_and_repeatable():
    text = standard_library(200_000)
    assert len(text) == 200_000 and text == standard_library(200_000)
    assert b"import " in text and b"def " in text


def test_files_come_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b.py").write_text("bb")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.py").write_text("az")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "c.py").write_text("no")
    assert standard_library(100, tmp_path) == b"azbb"
    assert standard_library(3, tmp_path) == b"azb"


def test_a_folder_without_python_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no Python source"):
        standard_library(10, tmp_path)


def test_batches_are_a_function_of_the_index():
    text = bytes(range(256)) * 4
    data = ByteDataset(text, sequence=16, batch=3, seed=1)
    first, again, other = data[7], ByteDataset(text, 16, 3, 1)[7], data[8]
    assert first["tokens"].shape == (3, 16) and first["tokens"].dtype == np.int32
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    assert not np.array_equal(first["tokens"], other["tokens"])
    assert not np.array_equal(first["tokens"], ByteDataset(text, 16, 3, 2)[7]["tokens"])
    np.testing.assert_array_equal(first["targets"], (first["tokens"] + 1) % 256)


def test_every_start_is_possible_and_none_beyond_the_end():
    data = ByteDataset(b"abcd", sequence=2, batch=64)
    assert {tuple(row) for row in data[0]["tokens"]} == {(97, 98), (98, 99)}


def test_bad_arguments_are_refused():
    with pytest.raises(BadInput, match="at least 3 bytes"):
        ByteDataset(b"ab", sequence=2, batch=1)
    with pytest.raises(IndexError, match="counts from 0"):
        ByteDataset(b"abcdef", sequence=2, batch=1)[-1]
