"""What every backend promises, in the same words: one test file, run once per backend.

The numbers themselves are judged by the conformance suite, against an independent oracle; here it is behaviour.
"""

import inspect
from typing import ClassVar

import numpy as np
import pytest

from tests.helpers.models import CONFIG, ENCODER, ENCODER_MASK, HEAD_MASK, IDS, LEFT, RIGHT, SAME, changed
from xglm_core import open_checkpoint
from xglm_core.errors import InputError
from xglm_core.outputs import CausalLMOutputWithCrossAttentions

# The documented positional order.
FIRST = [
    "input_ids",
    "attention_mask",
    "position_ids",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "head_mask",
    "cross_attn_head_mask",
    "past_key_values",
    "inputs_embeds",
]
SWITCHES = ["use_cache", "output_attentions", "output_hidden_states", "return_dict"]


class TestOutputs:
    def test_logits_alone_by_default_fields(self, fw, model):
        outputs = fw.call(model, IDS, use_cache=False)
        assert outputs.keys() == ("logits",)
        assert outputs[0] is outputs.logits is outputs["logits"]
        (logits,) = outputs
        assert logits.shape == (2, 11, 131)
        assert outputs.past_key_values is outputs.loss is None
        with pytest.raises(KeyError):
            outputs["loss"]

    def test_all_fields_in_the_documented_order(self, fw, cross_model):
        options = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
        outputs = fw.call(cross_model, IDS, labels=IDS, encoder_hidden_states=ENCODER, **options)
        assert outputs.keys() == CausalLMOutputWithCrossAttentions.names

    def test_a_tuple_if_asked_for(self, fw, model, folder):
        options = {"use_cache": True, "output_hidden_states": True}
        outputs = fw.call(model, IDS, labels=IDS, **options)
        values = fw.call(model, IDS, labels=IDS, return_dict=False, **options)
        assert type(values) is tuple
        assert len(values) == 4
        assert np.array_equal(fw.numpy(values[1]), fw.numpy(outputs.logits))
        assert len(fw.call(fw.decoder.from_pretrained(folder), IDS, return_dict=False, **options)) == 3

    def test_hidden_states_are_layer_inputs_and_the_final_state(self, fw, model, folder):
        states = fw.call(model, IDS, output_hidden_states=True).hidden_states
        assert len(states) == CONFIG.num_layers + 1
        decoder = fw.decoder.from_pretrained(folder)
        last = fw.call(decoder, IDS).last_hidden_state
        np.testing.assert_allclose(fw.numpy(states[-1]), fw.numpy(last), **SAME)
        assert abs(fw.numpy(states[0]) - fw.numpy(states[1])).max() > 0.1

    def test_attentions_are_probabilities(self, fw, cross_model):
        arguments = {"encoder_hidden_states": ENCODER, "encoder_attention_mask": ENCODER_MASK}
        outputs = fw.call(cross_model, IDS, LEFT, output_attentions=True, **arguments)
        plain = fw.call(cross_model, IDS, LEFT, **arguments)
        assert plain.attentions is plain.cross_attentions is None
        np.testing.assert_allclose(fw.numpy(outputs.logits)[:, 3:], fw.numpy(plain.logits)[:, 3:], **SAME)
        assert len(outputs.attentions) == len(outputs.cross_attentions) == 3
        for own, cross in zip(outputs.attentions, outputs.cross_attentions, strict=True):
            own, cross = fw.numpy(own), fw.numpy(cross)
            assert own.shape == (2, 5, 11, 11)
            assert cross.shape == (2, 5, 11, 7)
            np.testing.assert_allclose(own.sum(-1), 1, **SAME)
            np.testing.assert_allclose(cross.sum(-1), 1, **SAME)
            assert not own[1][:, np.triu_indices(11, 1)[0], np.triu_indices(11, 1)[1]].any()
            assert not own[0, :, 3:, :3].any()
            assert not cross[1, :, :, 5:].any()
            assert own.std() > 0.05

    def test_attentions_over_cached_positions(self, fw, model):
        past = fw.call(model, IDS[:, :6], use_cache=True).past_key_values
        step = fw.call(model, IDS[:, 6:], past_key_values=past, output_attentions=True).attentions
        full = fw.call(model, IDS, output_attentions=True).attentions
        for ours, theirs in zip(step, full, strict=True):
            np.testing.assert_allclose(fw.numpy(ours), fw.numpy(theirs)[:, :, 6:], **SAME)

    def test_cache_is_returned_as_the_configuration_says(self, fw, model):
        assert fw.call(model, IDS).past_key_values is not None
        assert fw.call(model, IDS, use_cache=True).past_key_values is not None

    def test_logits_to_keep(self, fw, model):
        full = fw.logits(model, IDS)
        np.testing.assert_allclose(fw.logits(model, IDS, logits_to_keep=3), full[:, -3:], **SAME)
        np.testing.assert_allclose(fw.logits(model, IDS, logits_to_keep=50), full, **SAME)
        positions = np.array([9, 0, 4])
        np.testing.assert_allclose(fw.logits(model, IDS, logits_to_keep=positions), full[:, positions], **SAME)

    def test_the_loss_is_of_all_positions_whatever_is_kept(self, fw, model):
        kept = fw.call(model, IDS, labels=IDS, logits_to_keep=2)
        assert kept.logits.shape == (2, 2, 131)
        assert float(kept.loss) == pytest.approx(float(fw.call(model, IDS, labels=IDS).loss), rel=1e-6)

    def test_two_calls_give_the_same(self, fw, model):
        assert np.array_equal(fw.logits(model, IDS, LEFT), fw.logits(model, IDS, LEFT))


class TestArguments:
    @pytest.mark.parametrize("kind", ["decoder", "causal_lm"])
    def test_positional_order_is_the_documented_one(self, fw, kind):
        model_class = getattr(fw, kind)
        call = {"torch": "forward", "tf": "call", "flax": "__call__"}[fw.name]
        parameters = inspect.signature(getattr(model_class, call)).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        labels = ["labels"] if kind == "causal_lm" else []
        if fw.name == "flax":
            assert names == ["self", *FIRST[:5], *SWITCHES[1:], "train", "params", "past_key_values", "dropout_rng"]
        else:
            training = ["training"] if fw.name == "tf" else []
            assert names == ["self", *FIRST, *labels, *SWITCHES, *training]

    def test_positional_arguments(self, fw, model):
        positions = np.maximum(LEFT.cumsum(1) - 1, 0)
        outputs = model(*map(fw.tensor, (IDS, LEFT, positions)))
        assert np.array_equal(fw.numpy(outputs.logits), fw.logits(model, IDS, LEFT, position_ids=positions))

    def test_one_row_of_positions_serves_all(self, fw, model):
        one = np.arange(11)[None] + 3
        np.testing.assert_allclose(
            fw.logits(model, IDS, position_ids=one), fw.logits(model, IDS, position_ids=one.repeat(2, 0)), **SAME
        )

    def test_inputs_embeds_stand_in_for_ids(self, fw, model):
        embeddings = fw.embedded(model, IDS)
        expected = fw.logits(model, IDS, LEFT)
        np.testing.assert_allclose(
            fw.logits(model, None, LEFT, inputs_embeds=embeddings)[:, 3:], expected[:, 3:], **SAME
        )
        # With a cache, and in turn with ids.
        past = fw.call(model, None, LEFT[:, :6], inputs_embeds=embeddings[:, :6], use_cache=True).past_key_values
        step = fw.call(model, IDS[:, 6:9], LEFT[:, :9], past_key_values=past, use_cache=True)
        np.testing.assert_allclose(fw.numpy(step.logits), expected[:, 6:9], **SAME)
        last = fw.logits(model, None, LEFT, inputs_embeds=embeddings[:, 9:], past_key_values=step.past_key_values)
        np.testing.assert_allclose(last, expected[:, 9:], **SAME)

    def test_a_masked_head_adds_nothing(self, fw, model):
        ones, plain = np.ones((3, 5), np.float32), fw.logits(model, IDS)
        np.testing.assert_allclose(fw.logits(model, IDS, head_mask=ones), plain, **SAME)
        assert abs(fw.logits(model, IDS, head_mask=HEAD_MASK) - plain).max() > 0.1
        masked = fw.call(model, IDS, head_mask=HEAD_MASK, output_attentions=True)
        np.testing.assert_allclose(fw.numpy(masked.logits), fw.logits(model, IDS, head_mask=HEAD_MASK), **SAME)
        sums = np.stack([fw.numpy(layer).sum(-1)[0, :, 4] for layer in masked.attentions])
        np.testing.assert_allclose(sums, HEAD_MASK, **SAME)

    def test_a_masked_head_of_cross_attention(self, fw, cross_model):
        options = {"encoder_hidden_states": ENCODER}
        zeros = np.zeros((3, 5), np.float32)
        plain = fw.logits(cross_model, IDS, **options)
        assert abs(fw.logits(cross_model, IDS, cross_attn_head_mask=HEAD_MASK, **options) - plain).max() > 0.1
        # Without any head, what the encoder says does not matter.
        np.testing.assert_allclose(
            fw.logits(cross_model, IDS, cross_attn_head_mask=zeros, encoder_hidden_states=-ENCODER),
            fw.logits(cross_model, IDS, cross_attn_head_mask=zeros, **options),
            **SAME,
        )

    def test_arguments_are_left_as_they_are(self, fw, cross_model):
        first = fw.call(cross_model, IDS[:, :6], encoder_hidden_states=ENCODER, use_cache=True)
        past = tuple(tuple(fw.tensor(fw.numpy(t)) for t in layer) for layer in first.past_key_values)
        arguments = {
            "input_ids": IDS[:, 6:],
            "attention_mask": LEFT,
            "position_ids": np.arange(6, 11)[None].repeat(2, 0),
            "encoder_hidden_states": ENCODER,
            "encoder_attention_mask": ENCODER_MASK,
            "head_mask": HEAD_MASK,
            "cross_attn_head_mask": HEAD_MASK,
            "labels": IDS[:, 6:],
        }
        tensors = {name: fw.tensor(value) for name, value in arguments.items()}
        before = [fw.numpy(t).copy() for layer in past for t in layer]
        cross_model(**tensors, past_key_values=past, use_cache=True)
        for name, value in arguments.items():
            assert np.array_equal(fw.numpy(tensors[name]), value), name
        for old, new in zip(before, (t for layer in past for t in layer), strict=True):
            assert np.array_equal(old, fw.numpy(new))


class TestConfiguration:
    """What the configuration says when the call does not."""

    @pytest.mark.parametrize(
        ("switch", "field"), [("output_attentions", "attentions"), ("output_hidden_states", "hidden_states")]
    )
    def test_output_switches(self, fw, load, switch, field):
        model = load(changed(CONFIG, **{switch: True}))
        assert fw.call(model, IDS)[field] is not None
        assert field not in fw.call(model, IDS, **{switch: False})
        setattr(model.config, switch, False)
        assert field not in fw.call(model, IDS)

    def test_tuples_and_no_cache(self, fw, load):
        model = load(changed(CONFIG, return_dict=False, use_cache=False))
        values = fw.call(model, IDS)
        assert type(values) is tuple
        assert len(values) == 1
        assert fw.call(model, IDS, return_dict=True, use_cache=True).keys() == ("logits", "past_key_values")

    def test_unscaled_embeddings(self, fw, load):
        unscaled = load(changed(CONFIG, scale_embedding=False))
        table = fw.embedding_matrix(unscaled)
        np.testing.assert_allclose(fw.embedded(unscaled, IDS), table[IDS], **SAME)
        np.testing.assert_allclose(fw.embedded(load(CONFIG), IDS), table[IDS] * np.sqrt(35), **SAME)

    def test_a_callable_activation(self, fw):
        function = {
            "torch": lambda x: x.clamp(min=0),
            "tf": lambda x: (x + abs(x)) / 2,
            "flax": lambda x: (x + abs(x)) / 2,
        }[fw.name]
        ours = fw.fresh(changed(CONFIG, activation_function=function))
        named = fw.fresh(changed(CONFIG, activation_function="relu"))
        np.testing.assert_allclose(fw.logits(ours, IDS), fw.logits(named, IDS), **SAME)
        assert abs(fw.logits(ours, IDS) - fw.logits(fw.fresh(CONFIG), IDS)).max() > 1e-4


class TestCrossAttention:
    ARGUMENTS: ClassVar = {"encoder_hidden_states": ENCODER, "encoder_attention_mask": ENCODER_MASK}

    def test_padding_is_not_attended_to(self, fw, cross_model):
        other = np.where(ENCODER_MASK[:, :, None] == 0, 77, ENCODER).astype(np.float32)
        np.testing.assert_allclose(
            fw.logits(cross_model, IDS, encoder_hidden_states=other, encoder_attention_mask=ENCODER_MASK),
            fw.logits(cross_model, IDS, **self.ARGUMENTS),
            **SAME,
        )
        alone = fw.logits(cross_model, IDS[1:], encoder_hidden_states=ENCODER[1:, :5])
        np.testing.assert_allclose(fw.logits(cross_model, IDS, **self.ARGUMENTS)[1:], alone, **SAME)

    def test_encoder_rows_without_positions_are_finite(self, fw, cross_model):
        mask = np.zeros_like(ENCODER_MASK)
        assert np.isfinite(
            fw.logits(cross_model, IDS, encoder_hidden_states=ENCODER, encoder_attention_mask=mask)
        ).all()

    @pytest.mark.parametrize("again", [False, True])
    def test_the_cache_remembers_the_encoder(self, fw, cross_model, again):
        expected = fw.logits(cross_model, IDS, LEFT, **self.ARGUMENTS)
        first = fw.call(cross_model, IDS[:, :6], LEFT[:, :6], use_cache=True, **self.ARGUMENTS)
        past = first.past_key_values
        assert all(len(layer) == 4 for layer in past)
        assert tuple(past[1][2].shape) == tuple(past[1][3].shape) == (2, 5, 7, 7)
        options = self.ARGUMENTS if again else {}
        second = fw.call(cross_model, IDS[:, 6:8], LEFT[:, :8], past_key_values=past, use_cache=True, **options)
        third = fw.call(cross_model, IDS[:, 8:], LEFT, past_key_values=second.past_key_values, **options)
        logits = np.concatenate([fw.numpy(part.logits) for part in (first, second, third)], 1)
        np.testing.assert_allclose(logits[:, 3:], expected[:, 3:], **SAME)

    def test_without_an_encoder_it_is_a_language_model(self, fw, model, cross_model):
        np.testing.assert_allclose(fw.logits(cross_model, IDS, LEFT)[:, 3:], fw.logits(model, IDS, LEFT)[:, 3:], **SAME)
        assert fw.call(cross_model, IDS, output_attentions=True).cross_attentions is None

    def test_checkpoints(self, fw, cross_model, tmp_path):
        cross_model.save_pretrained(tmp_path)
        assert "model.layers.2.encoder_attn.q_proj.weight" in open_checkpoint(tmp_path).names
        again = fw.causal_lm.from_pretrained(tmp_path)
        assert np.array_equal(fw.logits(again, IDS, **self.ARGUMENTS), fw.logits(cross_model, IDS, **self.ARGUMENTS))


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

    def test_grows_past_its_first_block(self, fw, load):
        # More positions than any backend allocates at first.
        model = load(changed(CONFIG, max_position_embeddings=211))
        ids = np.random.RandomState(1).randint(4, 131, (1, 199))
        past = fw.call(model, ids[:, :61], use_cache=True).past_key_values
        past = fw.call(model, ids[:, 61:67], past_key_values=past, use_cache=True).past_key_values
        np.testing.assert_allclose(
            fw.logits(model, ids[:, 67:], past_key_values=past), fw.logits(model, ids)[:, 67:], **SAME
        )


class TestPastAsTuple:
    """The keys and values that a caller holds, makes or changes, as plain tuples."""

    def test_continues_like_the_cache(self, fw, model):
        past = fw.call(model, IDS[:, :6], use_cache=True).past_key_values
        plain = tuple(tuple(fw.tensor(fw.numpy(t)) for t in layer) for layer in past)
        ours = fw.call(model, IDS[:, 6:8], past_key_values=plain, use_cache=True)
        theirs = fw.call(model, IDS[:, 6:8], past_key_values=past, use_cache=True)
        np.testing.assert_allclose(fw.numpy(ours.logits), fw.numpy(theirs.logits), **SAME)
        on = fw.logits(model, IDS[:, 8:], past_key_values=ours.past_key_values)
        np.testing.assert_allclose(on, fw.logits(model, IDS)[:, 8:], **SAME)

    def test_with_a_mask_for_all_of_it(self, fw, model):
        past = fw.call(model, IDS[:, :6], LEFT[:, :6], use_cache=True).past_key_values
        plain = tuple(tuple(fw.tensor(fw.numpy(t)) for t in layer) for layer in past)
        step = fw.logits(model, IDS[:, 6:], LEFT, past_key_values=plain)
        np.testing.assert_allclose(step, fw.logits(model, IDS, LEFT)[:, 6:], **SAME)

    def test_with_those_over_an_encoder(self, fw, cross_model):
        past = fw.call(cross_model, IDS[:, :6], encoder_hidden_states=ENCODER, use_cache=True).past_key_values
        plain = tuple(tuple(fw.tensor(fw.numpy(t)) for t in layer) for layer in past)
        assert {len(layer) for layer in plain} == {4}
        step = fw.logits(cross_model, IDS[:, 6:], past_key_values=plain)
        np.testing.assert_allclose(step, fw.logits(cross_model, IDS, encoder_hidden_states=ENCODER)[:, 6:], **SAME)


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

    def test_ids_and_embeddings(self, fw, model):
        embeddings = np.zeros((2, 11, 35), np.float32)
        with pytest.raises(InputError, match="input_ids and inputs_embeds are both given, expected one of the two"):
            fw.call(model, IDS, inputs_embeds=embeddings)
        with pytest.raises(InputError, match="neither input_ids nor inputs_embeds is given, expected one of the two"):
            fw.call(model)
        with pytest.raises(
            InputError, match=r"inputs_embeds is \[2, 11, 36\], expected \[batch, length, 35\], neither"
        ):
            fw.call(model, inputs_embeds=np.zeros((2, 11, 36), np.float32))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"position_ids": np.zeros((3, 11), int)}, r"position_ids is \[3, 11\], expected \[2, 11\] "),
            ({"position_ids": np.zeros((1, 10), int)}, r"position_ids is \[1, 10\], expected \[1, 11\] "),
            (
                {"head_mask": np.ones((2, 5))},
                r"head_mask is \[2, 5\], expected \[3, 5\] \(\[num_layers, attention_heads",
            ),
            ({"head_mask": np.ones(5)}, r"head_mask is \[5\], expected \[3, 5\] "),
            ({"labels": IDS[:, 1:]}, r"labels is \[2, 10\], expected \[2, 11\] \(\[batch, length\], not shifted\)"),
            (
                {"labels": np.where(IDS[1, 4] == IDS, 131, IDS)},
                r"labels\[.*\] is 131, expected 0 to 130 .* or -100 where",
            ),
            (
                {"labels": np.where(IDS[1, 4] == IDS, -1, IDS)},
                r"labels\[.*\] is -1, expected 0 to 130 .* or -100 where",
            ),
            (
                {"logits_to_keep": -1},
                r"logits_to_keep is -1, expected how many of the last positions to keep, 0 for all",
            ),
            ({"logits_to_keep": np.array([3, 11])}, r"logits_to_keep is \[3, 11\], expected .* from 0 to 11 - 1"),
            ({"encoder_hidden_states": ENCODER}, r"encoder_hidden_states is given, but .* add_cross_attention=True"),
            ({"encoder_attention_mask": ENCODER_MASK}, r"encoder_attention_mask is given, but the model has no cross"),
            (
                {"cross_attn_head_mask": HEAD_MASK},
                r"cross_attn_head_mask is given, but the model has no cross-attention",
            ),
            ({"past_key_values": 3}, r"past_key_values is a int, expected the cache of an earlier call, or a tuple of"),
            ({"past_key_values": ()}, r"past_key_values has 0 layers, expected 3"),
        ],
    )
    def test_shapes_and_values(self, fw, model, arguments, message):
        with pytest.raises(InputError, match=message):
            fw.call(model, IDS, **arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"encoder_attention_mask": ENCODER_MASK}, "encoder_attention_mask is given without encoder_hidden_states"),
            (
                {"encoder_hidden_states": ENCODER[:1]},
                r"encoder_hidden_states is \[1, 7, 35\], expected \[2, any, 35\] \(\[batch, encoder length",
            ),
            (
                {"encoder_hidden_states": ENCODER, "encoder_attention_mask": ENCODER_MASK[:, 1:]},
                r"encoder_attention_mask is \[2, 6\], expected \[2, 7\] ",
            ),
            (
                {"encoder_hidden_states": ENCODER, "cross_attn_head_mask": HEAD_MASK[1:]},
                r"cross_attn_head_mask is \[2, 5\], expected \[3, 5\] ",
            ),
        ],
    )
    def test_encoder(self, fw, cross_model, arguments, message):
        with pytest.raises(InputError, match=message):
            fw.call(cross_model, IDS, **arguments)

    def test_another_encoder_than_the_cached_one(self, fw, cross_model):
        past = fw.call(cross_model, IDS, encoder_hidden_states=ENCODER, use_cache=True).past_key_values
        with pytest.raises(InputError, match=r"encoder_hidden_states is \[2, 5, 35\], expected \[2, 7, 35\] "):
            fw.call(cross_model, IDS, past_key_values=past, encoder_hidden_states=ENCODER[:, :5])

    def test_malformed_past(self, fw, model):
        past = fw.call(model, IDS[:, :6], use_cache=True).past_key_values
        rows = [tuple(fw.tensor(fw.numpy(t)) for t in layer) for layer in past]
        with pytest.raises(InputError, match="past_key_values has 2 layers, expected 3"):
            fw.call(model, IDS[:, 6:], past_key_values=tuple(rows[:2]))
        with pytest.raises(
            InputError, match=r"past_key_values has \[2, 3\] tensors in a layer, expected 2 \(key, value\)"
        ):
            fw.call(model, IDS[:, 6:], past_key_values=(rows[0], rows[1], (*rows[2], rows[2][0])))
        short = (rows[1][0], rows[1][1][:, :, :5])
        with pytest.raises(
            InputError, match=r"past_key_values\[1\]\[1\] is \[2, 5, 5, 7\], expected \[2, 5, 6, 7\] \(\[batch"
        ):
            fw.call(model, IDS[:, 6:], past_key_values=(rows[0], short, rows[2]))
        with pytest.raises(InputError, match="past_key_values holds 2 rows, expected 1, as many as the input has"):
            fw.call(model, IDS[:1, 6:], past_key_values=past)
