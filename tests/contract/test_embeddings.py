"""Embeddings, heads and their sizes, in every backend."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, LEFT, ONE_BLOCK, SAME, changed
from xglm_core.errors import ConfigError, InputError
from xglm_core.weight_names import num_parameters

UNTIED = changed(ONE_BLOCK, tie_word_embeddings=False)


def head_matrix(fw, model):
    """The head's weight [vocab_size, d_model], or None."""
    head = model.get_output_embeddings()
    if head is None or fw.name == "flax":
        return None if head is None else fw.numpy(head)
    if fw.name == "torch":
        return fw.numpy(head.weight)
    # Keras holds a head of its own as a Dense kernel, and a tied one as the embedding.
    return fw.numpy(head.kernel).T if hasattr(head, "kernel") else fw.numpy(head.embeddings)


class TestAccess:
    def test_head_is_the_embedding_if_tied(self, fw, load):
        tied, untied = load(ONE_BLOCK), load(UNTIED)
        assert fw.embedding_matrix(tied).shape == (131, 35)
        assert np.array_equal(head_matrix(fw, tied), fw.embedding_matrix(tied))
        assert not np.array_equal(head_matrix(fw, untied), fw.embedding_matrix(untied))

    def test_bare_decoder_has_no_head(self, fw, folder):
        decoder = fw.decoder.from_pretrained(folder)
        assert fw.embedding_matrix(decoder).shape == (131, 35)
        assert decoder.get_output_embeddings() is None

    def test_a_new_embedding_takes_a_tied_head_with_it(self, fw, load):
        model, other = load(ONE_BLOCK), load(UNTIED)
        model.set_input_embeddings(other.get_output_embeddings())
        assert np.array_equal(fw.embedding_matrix(model), head_matrix(fw, other))
        assert np.array_equal(head_matrix(fw, model), head_matrix(fw, other))
        states = fw.numpy(fw.call(model, IDS, output_hidden_states=True).hidden_states[-1])
        np.testing.assert_allclose(fw.logits(model, IDS), states @ head_matrix(fw, other).T, **SAME)

    def test_a_new_embedding_leaves_another_head_alone(self, fw, load):
        model, other = load(UNTIED), load(ONE_BLOCK)
        before = head_matrix(fw, model)
        model.set_input_embeddings(model.get_output_embeddings())
        assert np.array_equal(fw.embedding_matrix(model), before)
        model.set_input_embeddings(other.get_input_embeddings())
        assert np.array_equal(head_matrix(fw, model), before)

    def test_a_new_head_unties(self, fw, load, tmp_path):
        model, other = load(ONE_BLOCK), load(UNTIED)
        embedding = fw.embedding_matrix(model)
        model.set_output_embeddings(other.get_output_embeddings())
        assert model.config.tie_word_embeddings is False
        assert np.array_equal(fw.embedding_matrix(model), embedding)
        np.testing.assert_allclose(fw.logits(model, IDS), fw.logits(other, IDS), **SAME)
        model.save_pretrained(tmp_path / "untied")
        again = fw.causal_lm.from_pretrained(tmp_path / "untied")
        assert np.array_equal(fw.logits(again, IDS), fw.logits(model, IDS))

    def test_tie_weights(self, fw, load):
        model = load(UNTIED)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        np.testing.assert_allclose(fw.logits(model, IDS), fw.logits(load(ONE_BLOCK), IDS), **SAME)
        assert model.num_parameters() == num_parameters(ONE_BLOCK)

    def test_of_another_shape(self, fw, load):
        model, other = load(ONE_BLOCK), load(changed(ONE_BLOCK, vocab_size=137))
        for put in (model.set_input_embeddings, model.set_output_embeddings):
            with pytest.raises(InputError, match=r"embedding is \[137, 35\], expected \[131, 35\] .* resize_token_emb"):
                put(other.get_input_embeddings())


class TestResize:
    @pytest.mark.parametrize("config", [ONE_BLOCK, UNTIED], ids=["tied", "untied"])
    @pytest.mark.parametrize(("arguments", "rows"), [((137,), 137), ((101,), 101), ((None, 8), 136), ((137, 64), 192)])
    def test_keeps_the_old_rows_and_the_tie(self, fw, load, tmp_path, config, arguments, rows):
        model = load(config)
        ids = np.minimum(IDS, 100)
        table, head, logits = fw.embedding_matrix(model), head_matrix(fw, model), fw.logits(model, ids, LEFT)
        model.resize_token_embeddings(*arguments)
        kept = min(rows, 131)
        assert model.config.vocab_size == rows
        assert model.config.tie_word_embeddings is config.tie_word_embeddings
        for old, new in ((table, fw.embedding_matrix(model)), (head, head_matrix(fw, model))):
            assert new.shape == (rows, 35)
            assert np.array_equal(new[:kept], old[:kept])
        # The new rows are 0.02 times standard normal numbers: 35 x 5 of them or more.
        assert rows <= 131 or fw.embedding_matrix(model)[131:].std() == pytest.approx(0.02, rel=0.2)
        np.testing.assert_allclose(fw.logits(model, ids, LEFT)[:, 3:, :kept], logits[:, 3:, :kept], **SAME)
        assert model.num_parameters() == num_parameters(model.config)
        model.save_pretrained(tmp_path / "resized")
        again = fw.causal_lm.from_pretrained(tmp_path / "resized")
        assert np.array_equal(fw.logits(again, ids), fw.logits(model, ids))

    def test_new_words_can_be_used_and_trained(self, fw, load):
        model = load(ONE_BLOCK)
        model.resize_token_embeddings(140)
        ids = np.full((1, 5), 139)
        loss, gradients = fw.loss_and_gradients(model, input_ids=ids, labels=ids)
        assert np.isfinite(loss)
        assert gradients["model.embed_tokens.weight"].shape == (140, 35)
        assert abs(gradients["model.embed_tokens.weight"][139]).max() > 1e-3

    def test_bare_decoder(self, fw, folder):
        decoder = fw.decoder.from_pretrained(folder)
        decoder.resize_token_embeddings(140)
        assert fw.embedding_matrix(decoder).shape == (140, 35)
        assert np.isfinite(fw.numpy(fw.call(decoder, np.full((1, 3), 139)).last_hidden_state)).all()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, fw, folder, dtype):
        argument = {"dtype": dtype, "param_dtype": dtype} if fw.name == "flax" else {"dtype": dtype}
        model = fw.causal_lm.from_pretrained(folder, **argument)
        old = fw.embedding_matrix(model)
        model.resize_token_embeddings(140)
        assert np.array_equal(fw.embedding_matrix(model)[:131], old)
        assert np.isfinite(fw.logits(model, IDS)).all()

    @pytest.mark.parametrize("arguments", [(0,), (-3,), (2.5,), (True,), (None, 0)])
    def test_impossible_sizes(self, fw, load, arguments):
        with pytest.raises(InputError, match=r"(new_num_tokens|pad_to_multiple_of) is .*, expected a positive integer"):
            load(ONE_BLOCK).resize_token_embeddings(*arguments)

    def test_too_small_for_the_padding_id(self, fw, load):
        model = load(ONE_BLOCK)
        with pytest.raises(ConfigError, match="pad_token_id is 1, expected an id below vocab_size=1"):
            model.resize_token_embeddings(1)
        assert model.config.vocab_size == 131


class TestPrune:
    PRUNED = {0: [1, 4], 2: [0]}  # noqa: RUF012
    MASK = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], np.float32)

    def test_equals_masking(self, fw, load):
        model = load(CONFIG)
        expected = fw.logits(model, IDS, LEFT, head_mask=self.MASK)
        model.prune_heads(self.PRUNED)
        np.testing.assert_allclose(fw.logits(model, IDS, LEFT)[:, 3:], expected[:, 3:], **SAME)
        assert model.config.pruned_heads == self.PRUNED
        assert model.num_parameters() == num_parameters(model.config) == num_parameters(CONFIG) - 3 * (4 * 35 * 7 + 21)

    def test_in_two_steps_with_a_cache_and_a_mask(self, fw, load):
        model = load(CONFIG)
        other = np.array([[1, 1, 0.5, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 0.5, 1]], np.float32)
        expected = fw.logits(model, IDS, head_mask=self.MASK * other)
        model.prune_heads({0: [4]})
        model.prune_heads({0: [1], 2: [0]})
        past = fw.call(model, IDS[:, :6], head_mask=other, use_cache=True).past_key_values
        assert [layer[0].shape[1] for layer in past] == [3, 5, 4]
        step = fw.call(model, IDS[:, 6:], head_mask=other, past_key_values=past, output_attentions=True)
        np.testing.assert_allclose(fw.numpy(step.logits), expected[:, 6:], **SAME)
        assert [layer.shape[1] for layer in step.attentions] == [3, 5, 4]

    def test_checkpoints(self, fw, load, tmp_path):
        model = load(CONFIG)
        model.prune_heads(self.PRUNED)
        model.save_pretrained(tmp_path / "pruned")
        again = fw.causal_lm.from_pretrained(tmp_path / "pruned")
        assert again.config.pruned_heads == self.PRUNED
        assert np.array_equal(fw.logits(again, IDS), fw.logits(model, IDS))
        prompt = IDS[:1, :5]
        assert np.array_equal(
            fw.generate(again, prompt, max_new_tokens=7, stop_at_eos=False),
            fw.generate(model, prompt, max_new_tokens=7, stop_at_eos=False),
        )

    def test_impossible_heads(self, fw, load):
        model = load(CONFIG)
        with pytest.raises(ConfigError, match=r"pruned_heads of block 1 is \[5\], expected some of 0 to 4"):
            model.prune_heads({1: [5]})
        with pytest.raises(ConfigError, match="pruned_heads names block 3, expected 0 to 2"):
            model.prune_heads({3: [0]})
        assert model.config.pruned_heads == {}
        assert model.num_parameters() == num_parameters(CONFIG)
