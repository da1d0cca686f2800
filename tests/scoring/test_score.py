"""`score` in every backend: log-probabilities of given tokens, in tiles of the logits."""

import numpy as np
import pytest

from conformance.random_weights import write_checkpoint
from tests.helpers.models import CONFIG, IDS, LEFT, RIGHT, SAME, changed
from tests.helpers.programs import computed_shapes, shapes_in
from tests.helpers.traces import traces_of_jax, traces_of_tf
from xglm_core import open_checkpoint
from xglm_core.compare.oracle import checkpoint_reader, forward
from xglm_core.errors import InputError
from xglm_core.scoring import engine

SHALLOW = changed(CONFIG, num_layers=1)  # Where each test has something of its own to compile.


def scores(fw, model, ids, mask=None, **kwargs):
    return fw.numpy(model.score(fw.tensor(ids), None if mask is None else fw.tensor(mask), **kwargs))


def log_softmax(logits):
    logits = logits.astype(np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))


def of_targets(logits, ids):
    """The log-probability of each next token, from all logits."""
    return np.take_along_axis(log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]


def expected(folder, ids):
    """By the float64 oracle."""
    checkpoint = open_checkpoint(folder)
    return of_targets(forward(checkpoint.config, checkpoint_reader(checkpoint), ids).logits, ids)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several chunks of positions and several blocks of the vocabulary, the last of both not full."""
    monkeypatch.setattr(engine, "TILE_POSITIONS", 7)
    monkeypatch.setattr(engine, "TILE_VOCABULARY", 16)


class TestNumbers:
    def test_oracle(self, fw, model, folder):
        found = scores(fw, model, IDS)
        assert (found.dtype, found.shape) == (np.float32, (2, 10))
        np.testing.assert_allclose(found, expected(folder, IDS), rtol=0, atol=1e-5)

    def test_own_logits(self, fw, model):
        np.testing.assert_allclose(scores(fw, model, IDS), of_targets(fw.logits(model, IDS), IDS), **SAME)

    @pytest.mark.parametrize("tied", [True, False])
    def test_tiles(self, fw, small_tiles, tied, tmp_path):
        """The ids at both ends of each block; also of an untied head, which Keras and Flax hold transposed."""
        write_checkpoint(tmp_path, changed(SHALLOW, tie_word_embeddings=tied), seed=1)
        model = fw.causal_lm.from_pretrained(tmp_path)
        assert model.config.tie_word_embeddings is tied
        ids = np.stack([np.arange(60), np.arange(71, 131)])
        np.testing.assert_allclose(scores(fw, model, ids), expected(tmp_path, ids), rtol=0, atol=1e-5)
        if not tied:  # Logits of some hundreds, whose exponentials overflow.
            set_head(fw, model, np.random.RandomState(2).standard_normal((131, 35)).astype(np.float32) * 40)
            logits = fw.logits(model, ids)
            assert logits.max() > 200
            np.testing.assert_allclose(scores(fw, model, ids), of_targets(logits, ids), rtol=1e-5, atol=1e-4)

    def test_bfloat16_is_summed_in_float32(self, fw, folder):
        options = {"param_dtype": "bfloat16"} if fw.name == "flax" else {}
        model = fw.causal_lm.from_pretrained(folder, dtype="bfloat16", **options)
        found = scores(fw, model, IDS)
        assert found.dtype == np.float32
        # Products differ by the last of 8 bits where their order does; sums of 131 terms in 8 bits would be far off.
        np.testing.assert_allclose(found, of_targets(fw.logits(model, IDS), IDS), rtol=0, atol=0.05)


class TestLikeliest:
    def test_argmax(self, fw, model):
        """The ids with the largest logits; -1 where there is nothing to predict."""
        found = likeliest(fw, model, IDS)
        assert (found.dtype, found.shape) == (np.int32, (2, 10))
        expected = fw.logits(model, IDS)[:, :-1].argmax(axis=-1)
        assert np.array_equal(found, expected)
        padded = likeliest(fw, model, IDS, RIGHT)
        assert np.array_equal(padded[1], expected[1])
        assert padded[0].tolist() == [*expected[0, :7], -1, -1, -1]

    def test_scores_stay_the_same(self, fw, model):
        one, both = scores(fw, model, IDS, LEFT), model.score(IDS, LEFT, return_likeliest=True)[0]
        assert np.array_equal(one, fw.numpy(both))

    def test_equals_across_blocks(self, fw, load, small_tiles):
        """The first of equal logits, wherever in its block it lies; also where a part of a block is read twice."""
        model = load(changed(SHALLOW, tie_word_embeddings=False))
        row = np.eye(35, dtype=np.float32)[4]  # With other rows, products may round equal columns in different ways.
        for first, *others in ([3, 5, 40], [15, 16], [16, 130], [120, 125, 130], [130]):
            head = np.zeros((131, 35), np.float32)
            head[[first, *others]] = row
            set_head(fw, model, head)
            # Where the logit of these is negative, id 0, whose logit is 0, is the likeliest.
            expected = np.where(fw.logits(model, IDS)[:, :-1, first] > 0, first, 0)
            assert {first} < {*expected.flat}
            assert np.array_equal(likeliest(fw, model, IDS), expected)


def likeliest(fw, model, ids, mask=None):
    return fw.numpy(model.score(ids, mask, return_likeliest=True)[1])


def set_head(fw, model, head):
    """Replaces an untied head [vocab_size, d_model]."""
    if fw.name == "torch":
        model.lm_head.weight.data = fw.tensor(head)
    elif fw.name == "tf":
        model.lm_head.kernel.assign(head.T)
    else:
        model.set_output_embeddings(fw.tensor(head))


class TestPadding:
    @pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
    def test_a_padded_row_is_the_row_alone(self, fw, model, mask):
        found = scores(fw, model, IDS, mask)
        real = mask[0] == 1
        alone = scores(fw, model, IDS[:1, real])[0]
        first = int(real.argmax())
        np.testing.assert_allclose(found[0, first : first + 7], alone, **SAME)
        assert np.count_nonzero(found[0]) == 7
        np.testing.assert_allclose(found[1], scores(fw, model, IDS[1:])[0], **SAME)

    def test_a_gap(self, fw, model):
        """The token after a gap is predicted from the one before it."""
        mask = np.array([[1] * 4 + [0] * 3 + [1] * 4])
        found = scores(fw, model, IDS[:1], mask)[0]
        alone = scores(fw, model, IDS[:1, mask[0] == 1])[0]
        np.testing.assert_allclose(found[mask[0, 1:] == 1], alone, **SAME)
        assert not found[mask[0, 1:] == 0].any()

    def test_one_token(self, fw, model):
        assert scores(fw, model, IDS[:, :1]).shape == (2, 0)
        one = np.zeros_like(LEFT)
        one[:, 5] = 1
        assert not scores(fw, model, IDS, one).any()

    def test_as_long_as_it_may_be(self, fw, model, folder):
        """61 tokens, which are less than what compiled code rounds them up to."""
        ids = np.random.RandomState(3).randint(4, 131, (1, 61))
        np.testing.assert_allclose(scores(fw, model, ids), expected(folder, ids), rtol=0, atol=1e-5)


class TestCall:
    def test_numpy_arrays(self, fw, model):
        found = np.asarray(model.score(IDS, LEFT))
        assert np.array_equal(found, scores(fw, model, IDS, LEFT))

    def test_arguments_are_left_alone(self, fw, model):
        ids, mask = IDS.copy(), LEFT.copy()
        model.score(ids, mask)
        assert np.array_equal(ids, IDS)
        assert np.array_equal(mask, LEFT)

    @pytest.mark.parametrize(
        ("ids", "mask", "message"),
        [
            (IDS + 120, None, r"input_ids\[0, \d+\] is \d+, expected 0 to 130"),
            (-IDS, None, r"input_ids\[0, \d+\] is -\d+, expected 0 to 130"),
            (IDS[0], None, r"input_ids is \[11\], expected integers \[batch, length\], neither 0"),
            (IDS[:, :0], None, r"input_ids is int64 \[2, 0\], expected integers \[batch, length\], neither 0"),
            (IDS / 2, None, r"input_ids is float64 \[2, 11\], expected integers \[batch, length\], neither 0"),
            (IDS, LEFT[:, 1:], r"attention_mask is \[2, 10\], expected \[2, 11\]"),
            (IDS, LEFT * [[1], [0]], r"attention_mask\[1\] is all 0, expected at least one token in each row"),
            (np.ones((1, 62), np.int64), None, "position 61 is past the limit of 61 tokens"),
        ],
    )
    def test_wrong_arguments_of_score(self, model, ids, mask, message):
        with pytest.raises(InputError, match=message):
            model.score(ids, mask)

    def test_without_parameters(self, fw, model):
        if fw.name != "flax":
            pytest.skip("only Flax has parameters apart from the model")
        bare = fw.causal_lm(CONFIG, _do_init=False)
        with pytest.raises(InputError, match="params is None"):
            bare.score(IDS)
        assert np.array_equal(np.asarray(bare.score(IDS, params=model.params)), np.asarray(model.score(IDS)))

    def test_after_a_change_of_the_vocabulary(self, fw, load):
        """Nothing compiled for the old head is used again."""
        model = load(SHALLOW)
        model.score(IDS)
        model.resize_token_embeddings(137)
        np.testing.assert_allclose(scores(fw, model, IDS), of_targets(fw.logits(model, IDS), IDS), **SAME)

    def test_new_lengths_are_not_compiled_anew(self, fw, model):
        model.score(IDS)
        if fw.name == "torch":
            return  # Nothing is compiled.
        traces = {"tf": traces_of_tf, "flax": traces_of_jax}[fw.name](model.compiled_scorer)
        with traces.none("a shorter text"):
            model.score(IDS[:, :7], np.ones((2, 7), np.int64))


class TestMemory:
    def test_no_array_of_all_logits(self, fw, load, small_tiles):
        """The vocabulary is a dimension of the weights alone."""
        model = load(SHALLOW)
        shapes = _SHAPES[fw.name](model)
        assert any(set(shape) >= {7, 16} for shape in shapes), "no tile of logits has been seen"
        assert {shape for shape in shapes if max(shape, default=0) >= 131} <= {(131, 35), (35, 131)}


def _torch_shapes(model):
    """The shapes of all tensors that are computed."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    shapes = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            shapes.update(tuple(leaf.shape) for leaf in tree_leaves(results) if hasattr(leaf, "shape"))
            return results

    with Recorder():
        model.score(IDS)
    return shapes


def _tf_shapes(model):
    """The shapes in what XLA is given to compile, loops included."""
    import tensorflow as tf

    zeros, positions = tf.zeros((2, 64), tf.int32), engine.in_chunks(np.zeros(0), 128)
    arguments = (zeros, zeros, tf.constant(positions), tf.constant(positions), tf.constant(1))
    return shapes_in(model.compiled_scorer.experimental_get_compiler_ir(*arguments)(stage="hlo"))


def _flax_shapes(model):
    """The shapes of all values of the traced program, loops included."""
    zeros, positions = np.zeros((2, 64), np.int32), engine.in_chunks(np.zeros(0), 128)
    return computed_shapes(model.compiled_scorer, model.params, zeros, zeros, positions, positions, 1)


_SHAPES = {"torch": _torch_shapes, "tf": _tf_shapes, "flax": _flax_shapes}
