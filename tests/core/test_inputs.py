import numpy as np
import pytest

from xglm_core import XGLMConfig
from xglm_core.errors import InputError, XGLMError
from xglm_core.inputs import (
    check_attention_mask,
    check_cache,
    check_cache_batch,
    check_input_ids,
    check_labels,
    check_labels_shape,
    check_logits_to_keep,
    check_past_key_values,
    check_positions,
    check_positions_of,
    check_shapes,
)

CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=61, d_model=35, attention_heads=5, num_layers=3)
CROSS = XGLMConfig.from_dict({**CONFIG.to_dict(), "add_cross_attention": True})


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


class TestPositionsOfACall:
    """The table has 61 rows."""

    ROW = np.array([[0] * 9 + [1] * 61])
    SHORT = np.array([[0] * 10 + [1] * 60])

    @pytest.mark.parametrize(
        ("position_ids", "attention_mask", "length", "held", "seen"),
        [
            (np.array([[0, 60]]), None, 2, None, 0),
            (None, None, 61, None, 0),
            (None, ROW, 70, None, 0),  # Padding does not count.
            (None, None, 1, SHORT, 70),
            (None, None, 99, None, None),  # Unknown, while a framework traces.
            (None, "hidden", 99, None, 0),
        ],
    )
    def test_all_of_the_table(self, position_ids, attention_mask, length, held, seen):
        check_positions_of(CONFIG, self.look, position_ids, attention_mask, length, held, seen)

    @pytest.mark.parametrize(
        ("position_ids", "attention_mask", "length", "held", "seen", "position"),
        [
            (np.array([[0, 61]]), None, 2, None, 0, 61),
            (None, None, 62, None, 0, 61),
            (None, np.ones((1, 70)), 70, None, 0, 69),
            (None, None, 2, SHORT, 70, 61),
            (None, None, 3, None, 60, 62),
        ],
    )
    def test_past_the_limit(self, position_ids, attention_mask, length, held, seen, position):
        with pytest.raises(InputError, match=f"position {position} is past the limit of 61 tokens"):
            check_positions_of(CONFIG, self.look, position_ids, attention_mask, length, held, seen)

    @staticmethod
    def look(array):
        return None if isinstance(array, str) else array


class TestCache:
    def test_full(self):
        check_cache(3, 5, 8)

    def test_overflow(self):
        with pytest.raises(InputError) as error:
            check_cache(3, 6, 8)
        assert str(error.value) == (
            "the cache holds 3 of at most 8 positions, and 6 more do not fit; create it with max_length=9 or more"
        )


class TestShapes:
    """The backends' contract tests cover the messages; here it is what passes, and what only compiled code meets."""

    ALL = {  # noqa: RUF012
        "input_ids": (2, 11),
        "attention_mask": (2, 17),
        "position_ids": (2, 11),
        "encoder_hidden_states": (2, 7, 35),
        "encoder_attention_mask": (2, 7),
        "head_mask": (3, 5),
        "cross_attn_head_mask": (3, 5),
    }

    def test_everything_at_once(self):
        check_shapes(CROSS, self.ALL, past=6)
        check_shapes(CROSS, {**self.ALL, "inputs_embeds": None, "position_ids": (1, 11)}, past=6, encoder_length=7)
        check_shapes(CROSS, {"inputs_embeds": (2, 11, 35)})

    @pytest.mark.parametrize("unknown", [(None, None), (2, None), (None, 11)])
    def test_unknown_sizes_pass(self, unknown):
        check_shapes(CROSS, {**self.ALL, "input_ids": unknown}, past=6)
        check_shapes(CROSS, {name: (None,) * len(shape) for name, shape in self.ALL.items()})
        check_shapes(CROSS, {**self.ALL, "attention_mask": (2, 99)}, past=None)

    @pytest.mark.parametrize("name", [name for name in ALL if name != "input_ids"])
    def test_each_size_counts(self, name):
        shape = self.ALL[name]
        for axis in range(len(shape)):
            wrong = {**self.ALL, name: (*shape[:axis], shape[axis] + 2, *shape[axis + 1 :])}
            # Encoder states of another length are right, and their mask is not.
            blamed = "encoder_attention_mask" if (name, axis) == ("encoder_hidden_states", 1) else name
            with pytest.raises(InputError, match=rf"{blamed} is \["):
                check_shapes(CROSS, wrong, past=6)
        with pytest.raises(InputError, match=rf"{name} is \[2\]"):
            check_shapes(CROSS, {**self.ALL, name: (2,)}, past=6)

    @pytest.mark.parametrize("shape", [(2,), (2, 3, 4), (0, 3), (2, 0), ()])
    def test_ids_of_another_shape(self, shape):
        with pytest.raises(InputError, match=r"input_ids is \[.*\], expected integers \[batch, length\], neither 0"):
            check_shapes(CONFIG, {"input_ids": shape})


class TestLabels:
    def test_all_of_the_vocabulary_and_none(self):
        check_labels(np.array([[0, 130, -100]]), CONFIG)
        check_labels_shape((2, 3), (2, 3, 35))
        check_labels_shape((None, 3), (2, 3))

    @pytest.mark.parametrize("value", [131, -1, -99, -101])
    def test_others(self, value):
        with pytest.raises(InputError) as error:
            check_labels(np.array([[5, 6], [7, value]]), CONFIG)
        assert str(error.value) == (
            f"labels[1, 1] is {value}, expected 0 to 130 (vocab_size=131), or -100 where it does not count"
        )

    def test_no_integers(self):
        with pytest.raises(InputError, match=r"labels is float64, expected integers \[batch, length\]"):
            check_labels(np.zeros((2, 3)), CONFIG)


class TestLogitsToKeep:
    @pytest.mark.parametrize("value", [0, 1, 99, [0], [4, 0, 4], np.array([3], np.int32)])
    def test_counts_and_positions(self, value):
        check_logits_to_keep(value, 5)
        check_logits_to_keep(value, None)

    @pytest.mark.parametrize("value", [-1, True, 1.5, "3", None, [], [5], [-1], [[1]], [0.5]])
    def test_others(self, value):
        with pytest.raises(
            InputError, match=r"logits_to_keep is .*, expected how many of the last positions to keep, "
        ):
            check_logits_to_keep(value, 5)


class Shaped:
    def __init__(self, *shape):
        self.shape = shape


class TestPastKeyValues:
    PAIR = (Shaped(2, 5, 6, 7), Shaped(2, 5, 6, 7))
    FOUR = (*PAIR, Shaped(2, 5, 9, 7), Shaped(2, 5, 9, 7))

    def test_what_fits(self):
        check_past_key_values(CONFIG, (self.PAIR,) * 3)
        check_past_key_values(CROSS, [list(self.FOUR)] * 3)
        check_past_key_values(CROSS, (self.PAIR,) * 3)
        pruned = XGLMConfig.from_dict({**CONFIG.to_dict(), "pruned_heads": {1: [0, 3]}})
        check_past_key_values(pruned, (self.PAIR, (Shaped(2, 3, 6, 7),) * 2, self.PAIR))
        check_cache_batch(2, 2)
        check_cache_batch(None, 2)

    @pytest.mark.parametrize(
        ("past", "message"),
        [
            (3, "past_key_values is a int, expected the cache of an earlier call, or a tuple of"),
            ((PAIR,) * 2, "past_key_values has 2 layers, expected 3"),
            ((FOUR,) * 3, r"has \[4\] tensors in a layer, expected 2 \(key, value\) in each"),
            ((PAIR, PAIR, (Shaped(2, 4, 6, 7),) * 2), r"\[2\]\[0\] is \[2, 4, 6, 7\], expected \[2, 5, 6, 7\] "),
            ((PAIR, PAIR, (Shaped(3, 5, 6, 7),) * 2), r"\[2\]\[0\] is \[3, 5, 6, 7\], expected \[2, 5, 6, 7\] "),
            ((PAIR, (PAIR[0], Shaped(2, 5, 8, 7)), PAIR), r"\[1\]\[1\] is \[2, 5, 8, 7\], expected \[2, 5, 6, 7\] "),
            (((Shaped(2, 5, 6), PAIR[1]), PAIR, PAIR), r"\[0\]\[0\] is \[2, 5, 6\], expected "),
        ],
    )
    def test_others(self, past, message):
        with pytest.raises(InputError, match=message):
            check_past_key_values(CONFIG, past)

    def test_pairs_and_fours(self):
        with pytest.raises(InputError, match=r"has \[2, 4\] tensors in a layer, expected 2 .* or 4 \(and those over"):
            check_past_key_values(CROSS, (self.PAIR, self.FOUR, self.FOUR))

    def test_rows(self):
        with pytest.raises(InputError, match="past_key_values holds 3 rows, expected 2, as many as the input has"):
            check_cache_batch(3, 2)


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, XGLMError)
    assert issubclass(InputError, ValueError)
