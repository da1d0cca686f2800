"""Inputs as people have them - lists, mappings, texts, other integers, numpy's numbers - in every backend."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, LEFT
from xglm_core import XGLMConfig, XGLMTokenizer
from xglm_core.errors import ConfigError, InputError
from xglm_core.tokenization.encoding import BatchEncoding

TINY = "examples/tiny_model/checkpoint"
OPTIONS = {"max_new_tokens": 3, "stop_at_eos": False}


@pytest.fixture(scope="module")
def bare(fw, folder):
    return fw.decoder.from_pretrained(folder)


@pytest.fixture(params=["call", "bare call", "generate", "score", "stream"])
def run(request, fw, model, bare):
    """Each method that takes ids, as arguments -> numpy."""

    def run(*args, **kwargs):
        if request.param == "generate":
            return fw.numpy(model.generate(*args, **kwargs, **OPTIONS))
        if request.param == "stream":
            return np.stack(list(model.stream(*args, **kwargs, **OPTIONS)), axis=1)
        if request.param == "score":
            return fw.numpy(model.score(*args, **kwargs))
        output = model(*args, **kwargs) if request.param == "call" else bare(*args, **kwargs)
        return fw.numpy(output[0])

    return run


def test_lists(run, fw):
    np.testing.assert_array_equal(run(IDS.tolist()), run(fw.tensor(IDS)))
    np.testing.assert_array_equal(
        run(input_ids=IDS.tolist(), attention_mask=LEFT.tolist()), run(fw.tensor(IDS), fw.tensor(LEFT))
    )


def test_numpy_arrays(run, fw):
    np.testing.assert_array_equal(run(IDS, LEFT), run(fw.tensor(IDS), fw.tensor(LEFT)))


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_mappings(run, fw, kind):
    encoding = kind({"input_ids": fw.tensor(IDS), "attention_mask": fw.tensor(LEFT)})
    np.testing.assert_array_equal(run(encoding), run(fw.tensor(IDS), fw.tensor(LEFT)))
    with pytest.raises(InputError, match="attention_mask is given twice"):
        run(encoding, attention_mask=fw.tensor(LEFT))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_integers_of_any_size(run, fw, dtype):
    got = run(fw.tensor(IDS.astype(dtype)))
    np.testing.assert_array_equal(got, run(fw.tensor(IDS)))


def test_what_is_no_batch_of_ids(run, fw):
    for ids, message in (
        (
            fw.tensor(IDS[0]),
            r"input_ids is \[11\], expected integers \[batch, length\], neither 0; a single row is",
        ),
        (IDS[0].tolist(), r"input_ids is \[11\], expected integers \[batch, length\], neither 0; a single row is"),
        ("Every day", r"input_ids is text, expected integers \[batch, length\]; encode it: tokenizer\(texts, padding"),
        (["Every", "day"], "input_ids is text, expected integers"),
        ([[5, 6], [7]], "input_ids has rows of different lengths, which fit no tensor; pad them: tokenizer"),
        (fw.tensor(IDS.astype(np.float32)), r"input_ids is float32 \[2, 11\], expected integers \[batch, length\]"),
        ([[0.5, 2.0]], r"input_ids is float32 \[1, 2\], expected integers"),
        (fw.tensor(IDS > 50), r"input_ids is bool \[2, 11\], expected integers"),
    ):
        with pytest.raises(InputError, match=message):
            run(ids)


def test_the_tokenizers_lists(fw, tiny_model):
    tokenizer, model = XGLMTokenizer.from_pretrained(TINY), tiny_model
    texts = ["The little dog", "Every"]
    encoding = tokenizer(texts, padding=True)
    got = fw.numpy(model.generate(encoding, max_new_tokens=2))
    tensors = tokenizer(texts, padding=True, return_tensors="np")
    np.testing.assert_array_equal(got, fw.generate(model, **tensors.data, max_new_tokens=2))


class TestNumbersOfNumpy:
    def test_in_a_call(self, fw, model):
        labels = fw.tensor(IDS)
        output = model(labels, labels=labels, logits_to_keep=np.int64(2), use_cache=np.False_)
        assert output.logits.shape == (2, 2, CONFIG.vocab_size)
        assert output.past_key_values is None
        halved = model(labels, labels=labels, num_items_in_batch=np.int64(40)).loss
        np.testing.assert_allclose(float(halved), float(output.loss) / 2, rtol=1e-6)  # 20 labels count.

    def test_labels_of_any_size_and_lists(self, fw, model):
        expected = float(model(fw.tensor(IDS), labels=fw.tensor(IDS)).loss)
        for labels in (fw.tensor(IDS.astype(np.int16)), fw.tensor(IDS.astype(np.uint8)), IDS.tolist()):
            np.testing.assert_allclose(float(model(fw.tensor(IDS), labels=labels).loss), expected, rtol=1e-6)
        ids, mask = fw.tensor(IDS), fw.tensor(LEFT)
        short = model(ids, attention_mask=mask, labels=fw.tensor(IDS.astype(np.uint8))).loss
        long = model(ids, attention_mask=mask, labels=ids).loss
        np.testing.assert_allclose(float(short), float(long), rtol=1e-6)

    def test_as_options_of_generate(self, fw, model):
        plain = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "top_k": 5, "seed": 3}
        numpys = {
            "max_new_tokens": np.int64(3),
            "do_sample": np.True_,
            "temperature": np.float32(0.5),
            "top_k": np.uint8(5),
            "seed": np.int32(3),
        }
        expected = fw.generate(model, IDS, **plain, eos_token_id=[7, 8], suppress_tokens=[9, 11])
        got = model.generate(fw.tensor(IDS), **numpys, eos_token_id=np.array([7, 8]), suppress_tokens=(9, np.int64(11)))
        np.testing.assert_array_equal(fw.numpy(got), expected)

    def test_of_sizes_and_heads(self, fw, load):
        model = load(CONFIG)
        model.resize_token_embeddings(np.int64(137), pad_to_multiple_of=np.int32(2))
        assert model.config.vocab_size == 138
        model.prune_heads({np.int64(1): np.array([0, 3])})
        assert model.config.pruned_heads == {1: [0, 3]}
        assert all(type(head) is int for head in model.config.pruned_heads[1])

    def test_in_a_configuration(self, tmp_path):
        config = XGLMConfig(
            d_model=np.int64(64), dropout=np.float32(0.5), use_cache=np.True_, eos_token_id=np.array([2, 3])
        )
        assert config == XGLMConfig(d_model=64, dropout=0.5, eos_token_id=[2, 3])
        config.save_pretrained(tmp_path)
        assert XGLMConfig.from_pretrained(tmp_path) == config
        with pytest.raises(ConfigError, match=r"d_model is 64\.0, expected a positive integer"):
            XGLMConfig(d_model=np.float32(64))

    def test_as_lengths_of_a_tokenizer(self):
        tokenizer = XGLMTokenizer.from_pretrained(TINY)
        options = {"padding": "max_length", "truncation": True, "max_length": 8}
        expected = tokenizer("The little dog found a fish in the river", **options)
        options = {"padding": "max_length", "truncation": np.True_, "max_length": np.int64(8)}
        got = tokenizer("The little dog found a fish in the river", **options)
        assert got["input_ids"] == expected["input_ids"]
        assert len(got["input_ids"]) == 8
