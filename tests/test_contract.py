"""What every backend promises, in the same words: one test file, run once per backend.

The numbers themselves are judged by the conformance suite, against an independent oracle; here it is behaviour.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from conformance.random_weights import write_checkpoint
from tests.frameworks import Framework, backends_under_test
from xglm_core import XGLMConfig, open_checkpoint
from xglm_core.errors import CheckpointError, InputError
from xglm_core.weight_names import num_parameters

# Pairwise different primes where the architecture allows it: a swapped axis cannot pass.
CONFIG = XGLMConfig(vocab_size=131, max_position_embeddings=61, d_model=35, ffn_dim=53, num_layers=3, attention_heads=5)
IDS = np.random.RandomState(0).randint(4, CONFIG.vocab_size, (2, 11))
LEFT = np.array([[0, 0, 0] + [1] * 8, [1] * 11])
RIGHT = LEFT[:, ::-1].copy()

# Two orders of the same float32 sums differ by rounding alone: a few units in the last place per layer.
SAME = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=backends_under_test())
def fw(request):
    return Framework(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, CONFIG, seed=1)
    return path


@pytest.fixture(scope="module")
def model(fw, folder):
    return fw.causal_lm.from_pretrained(folder)


class TestOutputs:
    def test_logits_alone_by_default_fields(self, fw, model):
        outputs = fw.call(model, IDS, use_cache=False)
        assert outputs.keys() == ("logits",)
        assert outputs[0] is outputs.logits is outputs["logits"]
        (logits,) = outputs
        assert logits.shape == (2, 11, 131)
        assert outputs.past_key_values is None
        with pytest.raises(KeyError):
            outputs["loss"]

    def test_hidden_states_are_layer_inputs_and_the_final_state(self, fw, model, folder):
        states = fw.call(model, IDS, output_hidden_states=True).hidden_states
        assert len(states) == CONFIG.num_layers + 1
        decoder = fw.decoder.from_pretrained(folder)
        last = fw.call(decoder, IDS).last_hidden_state
        np.testing.assert_allclose(fw.numpy(states[-1]), fw.numpy(last), **SAME)
        assert abs(fw.numpy(states[0]) - fw.numpy(states[1])).max() > 0.1

    def test_cache_is_returned_as_the_configuration_says(self, fw, model):
        assert fw.call(model, IDS).past_key_values is not None
        assert fw.call(model, IDS, use_cache=True).past_key_values is not None

    def test_logits_to_keep(self, fw, model):
        full = fw.logits(model, IDS)
        np.testing.assert_allclose(fw.logits(model, IDS, logits_to_keep=3), full[:, -3:], **SAME)

    def test_two_calls_give_the_same(self, fw, model):
        assert np.array_equal(fw.logits(model, IDS, LEFT), fw.logits(model, IDS, LEFT))


class TestPadding:
    @pytest.mark.parametrize(("mask", "tokens"), [(LEFT, slice(3, None)), (RIGHT, slice(None, -3))])
    def test_a_padded_row_gives_what_it_gives_alone(self, fw, model, mask, tokens):
        padded = fw.logits(model, IDS, mask)
        alone = fw.logits(model, IDS[:1, tokens])
        np.testing.assert_allclose(padded[:1, tokens], alone, **SAME)

    def test_padding_ids_do_not_matter(self, fw, model):
        other = np.where(LEFT == 0, 77, IDS)
        np.testing.assert_allclose(fw.logits(model, other, LEFT)[:, 3:], fw.logits(model, IDS, LEFT)[:, 3:], **SAME)

    def test_explicit_positions_win(self, fw, model):
        counted = np.maximum(LEFT.cumsum(1) - 1, 0)
        np.testing.assert_allclose(
            fw.logits(model, IDS, LEFT, position_ids=counted)[:, 3:], fw.logits(model, IDS, LEFT)[:, 3:], **SAME
        )
        shifted = fw.logits(model, IDS, position_ids=np.arange(11)[None].repeat(2, 0) + 7)
        assert abs(shifted - fw.logits(model, IDS)).max() > 0.1

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_rows_without_tokens_are_finite(self, fw, folder, dtype):
        model = fw.causal_lm.from_pretrained(folder, dtype=dtype)
        mask = LEFT.copy()
        mask[0] = 0
        assert np.isfinite(fw.logits(model, IDS, mask)).all()


class TestCache:
    @pytest.mark.parametrize("mask", [None, LEFT, RIGHT])
    @pytest.mark.parametrize("chunks", [(4, 7), (1,) * 11, (5, 1, 1, 4)])
    def test_chunks_equal_the_full_pass(self, fw, model, mask, chunks):
        whole = np.ones_like(IDS) if mask is None else mask
        past, begin, parts = None, 0, []
        for length in chunks:
            end = begin + length
            outputs = fw.call(
                model,
                IDS[:, begin:end],
                None if mask is None else mask[:, :end],
                past_key_values=past,
                use_cache=True,
            )
            parts.append(fw.numpy(outputs.logits))
            past, begin = outputs.past_key_values, end
        real = whole.astype(bool)
        np.testing.assert_allclose(np.concatenate(parts, 1)[real], fw.logits(model, IDS, mask)[real], **SAME)

    def test_without_a_mask_the_cache_remembers_its_padding(self, fw, model):
        past = fw.call(model, IDS[:, :6], LEFT[:, :6], use_cache=True).past_key_values
        step = fw.logits(model, IDS[:, 6:], past_key_values=past)
        np.testing.assert_allclose(step, fw.logits(model, IDS, LEFT)[:, 6:], **SAME)

    def test_a_cache_can_be_continued_in_several_ways(self, fw, model):
        past = fw.call(model, IDS[:, :6], use_cache=True).past_key_values
        first = fw.call(model, IDS[:, 6:7], past_key_values=past, use_cache=True)
        other = fw.logits(model, np.full((2, 1), 99), past_key_values=past)
        again = fw.logits(model, IDS[:, 6:7], past_key_values=past)
        assert np.array_equal(fw.numpy(first.logits), again)
        assert abs(other - again).max() > 0.1
        on = fw.logits(model, IDS[:, 7:], past_key_values=first.past_key_values)
        np.testing.assert_allclose(on, fw.logits(model, IDS)[:, 7:], **SAME)

    def test_reads_as_a_tuple_of_keys_and_values(self, fw, model):
        past = fw.call(model, IDS[:, :6], use_cache=True).past_key_values
        assert len(past) == CONFIG.num_layers
        for key, value in past:
            assert tuple(key.shape) == tuple(value.shape) == (2, 5, 6, 7)
        longer = fw.call(model, IDS[:, 6:], past_key_values=past, use_cache=True).past_key_values
        assert np.array_equal(fw.numpy(longer[2][0])[:, :, :6], fw.numpy(past[2][0]))

    def test_grows_past_its_first_block(self, fw, folder):
        # More positions than any backend allocates at first.
        config = XGLMConfig.from_dict({**CONFIG.to_dict(), "max_position_embeddings": 211})
        write_checkpoint(folder / "long", config, seed=1)
        model = fw.causal_lm.from_pretrained(folder / "long")
        ids = np.random.RandomState(1).randint(4, 131, (1, 199))
        past = fw.call(model, ids[:, :61], use_cache=True).past_key_values
        past = fw.call(model, ids[:, 61:67], past_key_values=past, use_cache=True).past_key_values
        np.testing.assert_allclose(
            fw.logits(model, ids[:, 67:], past_key_values=past), fw.logits(model, ids)[:, 67:], **SAME
        )


class TestGenerate:
    def test_is_repeated_argmax(self, fw, model):
        ids = IDS
        for _ in range(19):
            ids = np.concatenate([ids, fw.logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
        got = fw.generate(model, IDS, max_new_tokens=19, stop_at_eos=False)
        assert got.dtype.kind == "i"
        assert np.array_equal(got, ids)

    @pytest.mark.parametrize(("mask", "tokens"), [(LEFT, slice(3, None)), (RIGHT, slice(None, -3))])
    def test_rows_do_not_depend_on_neighbours_or_padding(self, fw, model, mask, tokens):
        together = fw.generate(model, IDS, mask, max_new_tokens=17, stop_at_eos=False)
        alone = fw.generate(model, IDS[:1, tokens], max_new_tokens=17, stop_at_eos=False)
        assert np.array_equal(together[0, 11:], alone[0, 8:])
        assert np.array_equal(together[:, :11], IDS)

    def test_ends_at_eos(self, fw, model, tmp_path):
        free = fw.generate(model, IDS, max_new_tokens=9, stop_at_eos=False)
        eos = int(free[0, 13])
        config = XGLMConfig.from_dict({**CONFIG.to_dict(), "eos_token_id": eos})
        write_checkpoint(tmp_path, config, seed=1)
        ended = fw.generate(fw.causal_lm.from_pretrained(tmp_path), IDS, max_new_tokens=9)
        for row, full in zip(ended, free, strict=True):
            stop = list(full[11:]).index(eos) + 12 if eos in full[11:] else len(full)
            assert np.array_equal(row[:stop], full[:stop])
            assert (row[stop:] == config.pad_token_id).all()

    def test_past_the_limit_is_refused_before_computing(self, fw, model):
        with pytest.raises(InputError, match=r"position 61 is past the limit of 61 tokens; shorten"):
            fw.generate(model, IDS, max_new_tokens=51)
        assert fw.generate(model, IDS, max_new_tokens=50, stop_at_eos=False).shape == (2, 61)

    @pytest.mark.parametrize("count", [0, -1, 2.5, True])
    def test_number_of_tokens(self, fw, model, count):
        with pytest.raises(InputError, match=r"max_new_tokens is .* expected a positive integer"):
            fw.generate(model, IDS, max_new_tokens=count)


class TestBadInput:
    @pytest.mark.parametrize("bad", [-1, 131])
    def test_ids_outside_the_vocabulary(self, fw, model, bad):
        ids = IDS.copy()
        ids[1, 4] = bad
        for call in (fw.call, fw.generate):
            with pytest.raises(InputError, match=rf"input_ids\[1, 4\] is {bad}, expected 0 to 130"):
                call(model, ids)

    def test_mask_of_another_shape(self, fw, model):
        with pytest.raises(InputError, match=r"attention_mask is \[2, 10\], expected \[2, 11\]$"):
            fw.call(model, IDS, LEFT[:, 1:])
        past = fw.call(model, IDS[:, :6], use_cache=True).past_key_values
        with pytest.raises(InputError, match=r"is \[2, 5\], expected \[2, 11\] \(6 cached and 5 new\)"):
            fw.call(model, IDS[:, 6:], LEFT[:, 6:], past_key_values=past)

    def test_too_long(self, fw, model):
        with pytest.raises(InputError, match="position 61 is past the limit of 61 tokens"):
            fw.call(model, np.full((1, 62), 5))
        past = fw.call(model, np.full((1, 61), 5), use_cache=True).past_key_values
        with pytest.raises(InputError, match="position 61 is past the limit"):
            fw.call(model, np.full((1, 1), 5), past_key_values=past)
        # Padding takes no position.
        padded = np.concatenate([np.zeros((1, 9)), np.ones((1, 61))], axis=1).astype(int)
        assert np.isfinite(fw.logits(model, np.full((1, 70), 5), padded)).all()

    def test_negative_positions(self, fw, model):
        with pytest.raises(InputError, match="position_ids hold -1, expected 0 or more"):
            fw.call(model, IDS, position_ids=np.arange(-1, 10)[None].repeat(2, 0))


class TestCheckpoints:
    def test_round_trip_is_exact(self, fw, model, folder, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="9KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        ours, theirs = open_checkpoint(tmp_path), open_checkpoint(folder)
        assert ours.config == theirs.config
        assert ours.names == theirs.names
        for name in ours.names:
            assert np.array_equal(ours.read(name), theirs.read(name)), name
        assert np.array_equal(fw.logits(fw.causal_lm.from_pretrained(tmp_path), IDS), fw.logits(model, IDS))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_files_load_as_float32_unless_asked(self, fw, model, tmp_path, dtype):
        model.save_pretrained(tmp_path, dtype=dtype)
        stored = open_checkpoint(tmp_path)
        assert {stored.info(name).dtype.name for name in stored.names} == {dtype}
        assert fw.call(fw.causal_lm.from_pretrained(tmp_path), IDS).logits.dtype == fw.call(model, IDS).logits.dtype
        # Flax's `dtype` is the type of the computation; `param_dtype` is the parameters'.
        kept = fw.causal_lm.from_pretrained(tmp_path, **{"param_dtype" if fw.name == "flax" else "dtype": "auto"})
        kept.save_pretrained(tmp_path / "again")
        again = open_checkpoint(tmp_path / "again")
        for name in stored.names:
            assert again.info(name).dtype.name == dtype
            assert np.array_equal(again.read(name), stored.read(name)), name

    def test_untied_head(self, fw, model, tmp_path):
        config = XGLMConfig.from_dict({**CONFIG.to_dict(), "tie_word_embeddings": False})
        write_checkpoint(tmp_path, config, seed=1)
        untied = fw.causal_lm.from_pretrained(tmp_path)
        assert untied.num_parameters() == num_parameters(config) == num_parameters(CONFIG) + 131 * 35
        assert abs(fw.logits(untied, IDS) - fw.logits(model, IDS)).max() > 0.1
        values = json.loads((tmp_path / "config.json").read_text())
        values["tie_word_embeddings"] = True
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.warns(UserWarning, match=r"lm_head.weight differs from model.embed_tokens.weight"):
            warned = fw.causal_lm.from_pretrained(tmp_path)
        assert warned.config.tie_word_embeddings is False
        assert np.array_equal(fw.logits(warned, IDS), fw.logits(untied, IDS))

    def test_number_of_parameters(self, fw, model, folder):
        assert model.num_parameters() == num_parameters(CONFIG)
        assert fw.decoder.from_pretrained(folder).num_parameters() == num_parameters(CONFIG)

    def test_decoder_and_causal_lm_read_each_others_folders(self, fw, model, folder, tmp_path):
        fw.decoder.from_pretrained(folder).save_pretrained(tmp_path)
        assert np.array_equal(fw.logits(fw.causal_lm.from_pretrained(tmp_path), IDS), fw.logits(model, IDS))

    def test_fresh_models_can_be_saved_and_differ_from_zero(self, fw, tmp_path):
        fresh = fw.causal_lm(CONFIG)
        fresh.save_pretrained(tmp_path)
        stored = open_checkpoint(tmp_path)
        table = stored.read("model.embed_tokens.weight")
        assert not table[CONFIG.pad_token_id].any()
        assert table.std() == pytest.approx(CONFIG.init_std, rel=0.1)  # 4,585 draws: 1% is one standard error.
        for name in stored.names:
            if name.endswith("bias"):
                assert not stored.read(name).any(), name
        assert np.isfinite(fw.logits(fw.causal_lm.from_pretrained(tmp_path), IDS)).all()

    def test_all_misfits_are_named_at_once(self, fw, tmp_path):
        write_checkpoint(tmp_path, CONFIG, seed=1)
        XGLMConfig.from_dict({**CONFIG.to_dict(), "ffn_dim": 59, "num_layers": 4}).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError) as caught:
            fw.causal_lm.from_pretrained(tmp_path)
        message = str(caught.value)
        assert "\n" not in message
        assert "missing: model.layers.3.self_attn.k_proj.weight, " in message
        for layer in range(3):
            assert f"model.layers.{layer}.fc1.weight is [53, 35], expected [59, 35]" in message

    def test_no_checkpoint(self, fw, tmp_path):
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(CheckpointError, match=r"no checkpoint here; expected config.json and .* found notes.txt"):
            fw.causal_lm.from_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="no such folder"):
            fw.causal_lm.from_pretrained(Path(tmp_path) / "absent")
