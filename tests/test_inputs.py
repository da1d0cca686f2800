import numpy as np
import pytest

from xglm_core import XGLMConfig
from xglm_core.errors import InputError, XGLMError
from xglm_core.inputs import check_attention_mask, check_cache, check_input_ids, check_positions

CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=61)


class TestInputIds:
    @pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, np.uint16, np.uint64])
    def test_all_of_the_vocabulary(self, dtype):
        ids = np.array([[0, 1, 127]] if dtype is np.int8 else [[0, 1, 130]], dtype)
        check_input_ids(ids, CONFIG)

    @pytest.mark.parametrize(
        ("ids", "place", "value"),
        [
            ([[5, 6], [7, 131]], "1, 1", 131),
            ([[5, 6], [-1, 3]], "1, 0", -1),
            ([[5, -100, 200]], "0, 1", -100),
            ([[131, 131]], "0, 0", 131),
        ],
    )
    def test_outside_the_vocabulary(self, ids, place, value):
        with pytest.raises(InputError) as error:
            check_input_ids(np.array(ids), CONFIG)
        assert str(error.value) == (
            f"input_ids[{place}] is {value}, expected 0 to 130 (vocab_size=131); "
            "does the tokenizer belong to this checkpoint?"
        )

    def test_large_unsigned(self):
        with pytest.raises(InputError, match=r"input_ids\[0, 0\] is 18446744073709551615, expected 0 to 130"):
            check_input_ids(np.array([[2**64 - 1]], np.uint64), CONFIG)

    @pytest.mark.parametrize(
        ("ids", "found"),
        [
            (np.zeros((2, 3)), r"float64 \[2, 3\]"),
            (np.zeros((2, 3), bool), r"bool \[2, 3\]"),
            (np.zeros(3, int), r"int64 \[3\]"),
            (np.array(3), r"int64 \[\]"),
            (np.zeros((1, 2, 3), int), r"int64 \[1, 2, 3\]"),
            (np.zeros((0, 3), int), r"int64 \[0, 3\]"),
            (np.zeros((2, 0), int), r"int64 \[2, 0\]"),
        ],
    )
    def test_no_integer_matrix(self, ids, found):
        with pytest.raises(InputError, match=rf"input_ids is {found}, expected integers \[batch, length\], neither 0"):
            check_input_ids(ids, CONFIG)


class TestAttentionMask:
    def test_covers_past_and_new(self):
        check_attention_mask((2, 5), 2, 0, 5)
        check_attention_mask((2, 8), 2, 3, 5)
        check_attention_mask([2, 8], 2, 3, 5)

    @pytest.mark.parametrize("shape", [(2, 5), (1, 8), (8,), (2, 8, 1), ()])
    def test_other_shapes(self, shape):
        with pytest.raises(InputError) as error:
            check_attention_mask(shape, 2, 3, 5)
        assert str(error.value) == f"attention_mask is {list(shape)}, expected [2, 8] (3 cached and 5 new)"

    def test_without_a_cache_none_is_mentioned(self):
        with pytest.raises(InputError, match=r"attention_mask is \[2, 4\], expected \[2, 5\]$"):
            check_attention_mask((2, 4), 2, 0, 5)


class TestPositions:
    def test_all_of_the_table(self):
        check_positions(0, 60, CONFIG)

    def test_past_the_end(self):
        with pytest.raises(InputError, match=r"position 61 is past the limit of 61 tokens; .* to 62 or more"):
            check_positions(0, 61, CONFIG)

    def test_before_the_start(self):
        """It would silently read the padding row, or one from the other end."""
        with pytest.raises(InputError, match="position_ids hold -1, expected 0 or more"):
            check_positions(-1, 5, CONFIG)


class TestCache:
    def test_full(self):
        check_cache(3, 5, 8)

    def test_overflow(self):
        with pytest.raises(InputError) as error:
            check_cache(3, 6, 8)
        assert str(error.value) == (
            "the cache holds 3 of at most 8 positions, and 6 more do not fit; create it with max_length=9 or more"
        )


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, XGLMError)
    assert issubclass(InputError, ValueError)
