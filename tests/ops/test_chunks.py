"""Loops are whole, but for a model of memory, in which their tensors' peak is the same."""

import pytest

from sana.ops.chunks import every, few


@pytest.mark.parametrize("count", range(8))
def test_few_keep_the_first_three_and_the_last(count):
    chunks = list(range(count))
    assert every(chunks) == chunks
    with few():
        assert every(chunks) == ([*chunks[:3], chunks[-1]] if count > 3 else chunks)
    assert every(chunks) == chunks


def test_a_loop_is_whole_again_after_an_error():
    with pytest.raises(KeyError), few():
        raise KeyError
    assert every(range(9)) == range(9)
