"""peft's soft prompts, and other replacements of `prepare_inputs_for_generation`, act in `generate` as in a call."""

import peft
import pytest
import torch
import transformers

from conformance.random_weights import write_checkpoint
from tests.helpers import models
from tests.helpers.models import CONFIG, changed
from xglm_core.errors import InputError
from xglm_torch import XGLMForCausalLM

IDS, LEFT, RIGHT = (torch.from_numpy(array) for array in (models.IDS, models.LEFT, models.RIGHT))
NEW = 6

_SIZES = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": 35, "num_layers": 3, "num_attention_heads": 5}
CONFIGS = {
    "prompt": lambda: peft.PromptTuningConfig(**_SIZES),
    "prefix": lambda: peft.PrefixTuningConfig(**_SIZES),
    "projected prefix": lambda: peft.PrefixTuningConfig(**_SIZES, prefix_projection=True, encoder_hidden_size=7),
    "p-tuning": lambda: peft.PromptEncoderConfig(**_SIZES, encoder_hidden_size=7),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(**_SIZES, num_tasks=3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft") / "model"
    write_checkpoint(folder, changed(CONFIG, dropout=0.0, attention_dropout=0.0), seed=1)
    return XGLMForCausalLM.from_pretrained(folder)


@pytest.fixture(params=CONFIGS)
def adapted(request, base):
    """A model with a soft prompt that is far from nothing."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, CONFIGS[request.param]()).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 1)
    return model


def tasks(model):
    """What a prompt of several tasks is told: each row has its own."""
    return {"task_ids": torch.tensor([2, 0])} if model.active_peft_config.peft_type == "MULTITASK_PROMPT_TUNING" else {}


def greedy(model, ids, mask=None, steps=NEW, **tasks):
    """The likeliest tokens by calls of the model alone, which read the whole text each time."""
    new = []
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=ids, attention_mask=mask, **tasks).logits
            new.append(logits[:, -1].argmax(dim=-1))
            ids = torch.cat([ids, new[-1][:, None]], dim=1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(new, dim=1)


def new_tokens(model, ids, mask=None, **options):
    options = {"max_new_tokens": NEW, "stop_at_eos": False, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


class TestSoftPrompts:
    def test_generate_is_a_loop_of_calls(self, adapted, base):
        expected = greedy(adapted, IDS, **tasks(adapted))
        assert torch.equal(new_tokens(adapted, IDS, **tasks(adapted)), expected)
        assert not torch.equal(new_tokens(base, IDS), expected)

    def test_left_padding(self, adapted):
        expected = greedy(adapted, IDS, LEFT, **tasks(adapted))
        assert torch.equal(new_tokens(adapted, IDS, LEFT, **tasks(adapted)), expected)

    def test_a_padded_row_is_the_row_alone(self, adapted):
        alone = {name: value[:1] for name, value in tasks(adapted).items()}
        for mask, ids in ((LEFT, IDS[:1, 3:]), (RIGHT, IDS[:1, :8])):
            row = new_tokens(adapted, IDS, mask, **tasks(adapted))[:1]
            assert torch.equal(row, new_tokens(adapted, ids, **alone))

    def test_one_prompt_shorter_than_the_soft_one(self, adapted):
        ids, alone = IDS[:1, :1], {name: value[:1] for name, value in tasks(adapted).items()}
        assert torch.equal(new_tokens(adapted, ids, **alone), greedy(adapted, ids, **alone))

    def test_beams(self, adapted):
        """The best of as many beams as there are continuations of two tokens is the best of all of them."""
        out = adapted.generate(
            input_ids=IDS[:1], num_beams=131, max_new_tokens=2, stop_at_eos=False,
            return_dict_in_generate=True, **{name: value[:1] for name, value in tasks(adapted).items()},
        )  # fmt: skip
        texts = torch.cat([IDS[:1].expand(131, -1), torch.arange(131)[:, None]], dim=1)
        all_tasks = {name: value[:1].expand(131) for name, value in tasks(adapted).items()}
        with torch.no_grad():
            logits = adapted(input_ids=texts, **all_tasks).logits[:, -2:].log_softmax(dim=-1)
        totals = logits[0, 0][:, None] + logits[:, 1]
        best = divmod(int(totals.argmax()), 131)
        assert out.sequences[0, -2:].tolist() == list(best)
        torch.testing.assert_close(out.sequences_scores[0] * 2, totals.max(), rtol=0, atol=1e-4)

    def test_sampling(self, adapted):
        """Of one likely token, samples are the greedy choice, whatever the seed; and each copy has its own noise."""
        drawn = new_tokens(adapted, IDS, LEFT, do_sample=True, top_k=1, seed=3, **tasks(adapted))
        assert torch.equal(drawn, greedy(adapted, IDS, LEFT, **tasks(adapted)))
        copies = {"do_sample": True, "num_return_sequences": 3, "seed": 3}
        assert len(set(map(tuple, new_tokens(adapted, IDS, LEFT, **copies, **tasks(adapted)).tolist()))) == 6

    def test_training(self, adapted):
        adapted.train()
        optimizer, losses = torch.optim.AdamW(adapted.prompt_encoder.parameters(), lr=1e-2), []
        for _ in range(5):
            loss = adapted(input_ids=IDS, attention_mask=LEFT, labels=IDS, **tasks(adapted)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    def test_saved_and_loaded(self, adapted, base, tmp_path):
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        expected = greedy(adapted, IDS, LEFT, **tasks(adapted))
        assert torch.equal(new_tokens(again, IDS, LEFT, **tasks(adapted)), expected)

    def test_the_model_itself_is_as_before(self, adapted, base):
        before = new_tokens(base, IDS, LEFT)
        new_tokens(adapted, IDS, LEFT, **tasks(adapted))
        assert torch.equal(new_tokens(base, IDS, LEFT), before)


class Shifted(XGLMForCausalLM):
    """Counts positions from 5 on, and notes what it is asked."""

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, cache_position=None, step=1, **options):
        self.asked.append((input_ids.tolist(), cache_position.tolist(), step))
        found = super().prepare_inputs_for_generation(input_ids, past_key_values, **options)
        positions = found["attention_mask"].cumsum(dim=1) - 1
        return {**found, "position_ids": positions[:, -found["input_ids"].shape[1] :] + 5, "cache_position": None}


class TestOverridden:
    @pytest.fixture
    def shifted(self, base):
        model = Shifted(base.config).eval()
        model.load_state_dict(base.state_dict())
        model.asked = []
        return model

    def test_a_subclass_is_asked(self, base, shifted):
        ids, expected = IDS, []
        for _ in range(NEW):
            positions = torch.arange(5, 5 + ids.shape[1])[None]
            expected.append(base(ids, position_ids=positions).logits[:, -1].argmax(dim=-1))
            ids = torch.cat([ids, expected[-1][:, None]], dim=1)
        assert torch.equal(new_tokens(shifted, IDS, step=3), torch.stack(expected, dim=1))
        texts, positions, steps = zip(*shifted.asked, strict=True)
        assert list(texts) == [ids[:, :length].tolist() for length in range(11, 11 + NEW)]
        assert list(positions) == [list(range(11)), *([place] for place in range(11, 10 + NEW))]
        assert steps == (3,) * NEW
        assert next(iter(shifted.stream(IDS))).tolist() == expected[0].tolist()

    def test_what_a_cache_holds_is_part_of_the_text(self, shifted):
        cache = shifted(IDS[:, :6], position_ids=torch.arange(5, 11)[None]).past_key_values
        assert torch.equal(new_tokens(shifted, IDS, past_key_values=cache), new_tokens(shifted, IDS))
        assert shifted.asked[0] == (IDS.tolist(), list(range(6, 11)), 1)

    def test_embeddings(self, shifted):
        shifted.prepare_inputs_for_generation = lambda ids, **options: XGLMForCausalLM.prepare_inputs_for_generation(
            shifted, ids, **options
        )
        embeds = shifted.get_input_embeddings()(IDS).detach()
        out = shifted.generate(inputs_embeds=embeds, attention_mask=LEFT, max_new_tokens=NEW, stop_at_eos=False)
        del shifted.prepare_inputs_for_generation
        plain = XGLMForCausalLM.generate.__get__(shifted)
        shifted.__class__ = XGLMForCausalLM
        assert torch.equal(out, plain(inputs_embeds=embeds, attention_mask=LEFT, max_new_tokens=NEW, stop_at_eos=False))

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            ({"input_ids": IDS, "speed": 3}, "prepare_inputs_for_generation gives speed, which the model's call"),
            (None, "prepare_inputs_for_generation gives a NoneType, expected a dictionary"),
        ],
    )
    def test_what_cannot_be_called_is_refused(self, shifted, found, message):
        shifted.prepare_inputs_for_generation = lambda ids, **options: found
        with pytest.raises(InputError, match=message):
            shifted.generate(IDS)


class TestCacheOfTransformers:
    def test_it_is_read_and_written(self, base):
        cache = transformers.DynamicCache()
        expected = base(IDS).logits
        first = base(IDS[:, :6], past_key_values=cache)
        assert cache.get_seq_length() == first.past_key_values.get_seq_length() == 6
        second = base(IDS[:, 6:9], past_key_values=cache)
        third = base(IDS[:, 9:], past_key_values=cache)
        both = torch.cat([first.logits, second.logits, third.logits], dim=1)
        torch.testing.assert_close(both, expected, **models.SAME)
        for (key, value), ours in zip(((layer.keys, layer.values) for layer in cache.layers), third[1], strict=True):
            assert torch.equal(key, ours[0])
            assert torch.equal(value, ours[1])

    def test_of_fixed_length(self, base):
        sizes = transformers.XGLMConfig(d_model=35, num_layers=3, attention_heads=5)
        cache = transformers.StaticCache(config=sizes, max_cache_len=16)
        first, second = (base(part, past_key_values=cache) for part in IDS.split([6, 5], dim=1))
        torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), base(IDS).logits, **models.SAME)

    def test_generate_goes_on_from_it(self, base):
        cache = transformers.DynamicCache()
        base(IDS[:, :6], past_key_values=cache)
        assert torch.equal(new_tokens(base, IDS, past_key_values=cache), new_tokens(base, IDS))

    def test_of_another_model(self, base):
        cache = transformers.DynamicCache()
        cache.update(torch.zeros(2, 5, 6, 7), torch.zeros(2, 5, 6, 7), 0)
        with pytest.raises(InputError, match="past_key_values has 1 layers, expected 3"):
            base(IDS, past_key_values=cache)
