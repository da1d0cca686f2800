"""The oracle itself: against transformers' numbers, against arithmetic by hand, and against what must hold."""

import math

import numpy as np
import pytest

from conformance.cases import CASES, Case
from conformance.golden import GREEDY_CASE, NEW_TOKENS, case_digest, load_golden
from conformance.random_weights import random_weights, write_checkpoint
from xglm_core import XGLMConfig, open_checkpoint
from xglm_core.compare import oracle
from xglm_core.compare.report import load_tolerances
from xglm_core.positions import position_table

BY_NAME = {case.name: case for case in CASES}


def run(case: Case, weights=None, **options) -> oracle.OracleOutput:
    weights = weights or random_weights(case.config, case.seed)
    return oracle.forward(case.config, weights.__getitem__, case.input_ids, case.attention_mask, **options)


def real_positions(case: Case) -> np.ndarray:
    return np.ones(case.input_ids.shape, bool) if case.attention_mask is None else case.attention_mask != 0


def golden_error(case: Case) -> float:
    """Largest difference from the golden logits over the real positions, relative to the largest logit."""
    golden = load_golden(case)
    expected = golden.logits[real_positions(case)[:, golden.positions]]
    ours = run(case).logits[:, golden.positions][:, :, golden.columns][real_positions(case)[:, golden.positions]]
    return np.abs(ours - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_transformers(case):
    golden = load_golden(case)
    assert golden.digest == case_digest(case), "the case has changed since its golden numbers were made: make golden"
    # One unit in the last place: the frequencies agree, so no tolerance has to make room for another position table.
    assert golden.table_error <= 2**-24
    assert golden_error(case) < load_tolerances().golden


@pytest.mark.parametrize("name", ["all_positions", "all_positions_padded", "raised_limit"])
def test_golden_numbers_tell_a_float64_position_table_from_ours(name, monkeypatch):
    def in_float64(config, position_ids):
        half = config.d_model // 2
        angles = (position_ids + 2)[..., None] * 10000 ** (-np.arange(half) / (half - 1))
        table = np.zeros((*position_ids.shape, config.d_model))
        table[..., :half], table[..., half : 2 * half] = np.sin(angles), np.cos(angles)
        return table

    monkeypatch.setattr(oracle, "position_embeddings", in_float64)
    assert golden_error(BY_NAME[name]) > load_tolerances().golden


def test_greedy_text_is_that_of_transformers():
    case, golden = BY_NAME[GREEDY_CASE], load_golden(BY_NAME[GREEDY_CASE])
    config, weights = case.config, random_weights(case.config, case.seed)
    ids, mask, ended = case.input_ids, case.attention_mask, np.zeros(len(case.input_ids), bool)
    for _ in range(NEW_TOKENS):
        logits = oracle.forward(config, weights.__getitem__, ids, mask).logits[:, -1]
        best, second = np.sort(logits)[:, :-3:-1].T
        # No tie that float32 could decide either way: the tokens are a fair demand on every backend.
        assert (best - second)[~ended].min() > 100 * load_tolerances().logits * np.abs(logits).max()
        token = np.where(ended, config.pad_token_id, logits.argmax(axis=1))
        ended |= token == config.eos_token_id
        ids, mask = np.c_[ids, token], np.c_[mask, np.ones(len(ids), np.int64)]
    np.testing.assert_array_equal(ids, golden.greedy)
    assert 0 < ended.sum() < len(ended)  # The case shows both a row that ends and one that does not.


CONFIGS = [*(case.config for case in CASES), *(XGLMConfig(d_model=width) for width in (1024, 2048, 4096))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.d_model}-{config.pad_token_id}")
def test_position_tables_are_equal(config):
    ours = oracle.position_embeddings(config, np.arange(config.max_position_embeddings))
    np.testing.assert_array_equal(ours, position_table(config)[2:])


def test_two_tokens_by_hand():
    # Position 0 reads row 2 of the table, which is zero for pad_token_id 2: the tokens stand alone.
    config = XGLMConfig(
        vocab_size=3, d_model=4, attention_heads=2, ffn_dim=2, num_layers=1, pad_token_id=2, tie_word_embeddings=False
    )
    identity, zeros, ones = np.eye(4), np.zeros(4), np.ones(4)
    layer = "model.layers.0"
    weights = {
        "model.embed_tokens.weight": np.array([[1, -1, 1, -1], [1, 1, -1, -1], [9, 9, 9, 9]]) / 2,
        **{f"{layer}.self_attn.{name}_proj.weight": identity for name in ("q", "k", "v", "out")},
        **{f"{layer}.self_attn.{name}_proj.bias": zeros for name in ("q", "k", "v", "out")},
        **{f"{norm}.weight": ones for norm in (f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm")},
        **{f"{norm}.bias": zeros for norm in (f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm")},
        f"{layer}.fc1.weight": np.array([[1, 0, 0, 0], [0, 0, 0, 1]]),
        f"{layer}.fc1.bias": np.zeros(2),
        f"{layer}.fc2.weight": np.array([[0, 0], [1, 0], [0, 1], [0, 0]]),
        f"{layer}.fc2.bias": zeros,
        "model.layer_norm.weight": 2 * ones,
        "model.layer_norm.bias": 3 * ones,
        "lm_head.weight": identity[:3],
    }
    output = oracle.forward(config, weights.__getitem__, np.array([[0, 1]]), position_ids=np.array([[0, 0]]))

    # The scale sqrt(4) undoes the halves: states (1, -1, 1, -1) and (1, 1, -1, -1), of mean 0 and variance 1.
    np.testing.assert_array_equal(output.hidden_states[0], [[[1, -1, 1, -1], [1, 1, -1, -1]]])
    norm = 1 / math.sqrt(1 + 1e-5)
    # In both heads the second query scores 0 with the first key and 2 norm^2 / sqrt(2) with its own; the two weights
    # are the logistic function of the difference and the rest, so where the tokens differ they leave a tanh.
    mixed = math.tanh(norm**2 / math.sqrt(2))
    a, b = 1 + norm, 1 + norm * mixed  # The state is now (a, b, -b, -a).
    n = a / math.sqrt((a**2 + b**2) / 2 + 1e-5)
    gelu, gelu_of_minus = n * (1 + math.erf(n / math.sqrt(2))) / 2, -n * (1 - math.erf(n / math.sqrt(2))) / 2
    state = [a, b + gelu, gelu_of_minus - b, -a]
    mean = sum(state) / 4
    variance = sum((x - mean) ** 2 for x in state) / 4
    expected = [2 * (x - mean) / math.sqrt(variance + 1e-5) + 3 for x in state[:3]]
    # A few float64 roundings.
    np.testing.assert_allclose(output.logits[0, 1], expected, rtol=1e-14)


@pytest.mark.parametrize("name", ["left_padding", "right_padding", "mixed_padding", "other_pad", "no_pad"])
def test_a_padded_row_is_the_row_alone(name):
    case = BY_NAME[name]
    weights = random_weights(case.config, case.seed)
    together = run(case)
    for row, mask in enumerate(case.attention_mask != 0):
        alone = oracle.forward(case.config, weights.__getitem__, case.input_ids[row : row + 1, mask])
        # float64 roundings in sums of another order.
        np.testing.assert_allclose(together.logits[row, mask], alone.logits[0], rtol=0, atol=1e-13)
        assert np.isfinite(together.logits[row]).all()


def test_a_row_of_padding_alone_is_finite():
    case = BY_NAME["plain"]
    weights = random_weights(case.config, case.seed)
    output = oracle.forward(case.config, weights.__getitem__, case.input_ids, np.zeros_like(case.input_ids))
    assert all(np.isfinite(array).all() for array in (*output.hidden_states, output.logits))


def test_only_the_key_biases_leave_the_logits_alone():
    case = BY_NAME["untied_head"]
    weights, expected = random_weights(case.config, case.seed), run(case).logits[real_positions(case)]
    for name, weight in weights.items():
        changed = run(case, {**weights, name: 0 * weight}).logits[real_positions(case)]
        error = np.abs(changed - expected).max() / np.abs(expected).max()
        if name.endswith("k_proj.bias"):
            assert error < 1e-14, name  # It adds the same to all scores of a query, and softmax takes that out.
        else:
            assert error > 100 * load_tolerances().logits, name


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_checkpoints_of_each_type(dtype, unit, tmp_path):
    case = BY_NAME["plain"]
    write_checkpoint(tmp_path, case.config, case.seed, dtype)
    read = oracle.checkpoint_reader(open_checkpoint(tmp_path))
    weights = random_weights(case.config, case.seed)
    smallest = 2.0**-24 if dtype == "float16" else 0  # float16 has few numbers near 0, at equal distances.
    for name, weight in weights.items():
        assert np.all(np.abs(read(name) - weight) <= unit * np.abs(weight) + smallest / 2), name
    rounded = {name: np.asarray(read(name), np.float32) for name in weights}
    output = oracle.forward(case.config, read, case.input_ids)
    np.testing.assert_array_equal(output.logits, run(case, rounded).logits)


def test_without_logits():
    output = run(BY_NAME["plain"], logits=False)
    assert output.logits.shape == (2, 11, 0)
    assert len(output.hidden_states) == 4


def test_attentions_are_shares_of_the_visible_keys():
    case = BY_NAME["mixed_padding"]
    output = run(case, attentions=True)
    assert len(output.attentions) == 3
    assert output.cross_attentions == []
    visible = np.tri(17, dtype=bool) & (case.attention_mask != 0)[:, None, :]
    for weights in output.attentions:
        assert weights.shape == (6, 5, 17, 17)
        np.testing.assert_array_equal(weights > 0, np.broadcast_to(visible[:, None], weights.shape))
        # Up to 17 float64 roundings.
        np.testing.assert_allclose(weights.sum(axis=-1), np.tile(visible.any(axis=-1)[:, None], (5, 1)), atol=1e-14)


def test_embeddings_in_place_of_ids():
    case = BY_NAME["left_padding"]
    weights = random_weights(case.config, case.seed)
    embeddings = weights["model.embed_tokens.weight"][case.input_ids].astype(np.float64) * math.sqrt(35)
    output = oracle.forward(
        case.config, weights.__getitem__, attention_mask=case.attention_mask, inputs_embeds=embeddings
    )
    np.testing.assert_array_equal(output.logits, run(case).logits)


class TestCrossAttention:
    """A model whose blocks also attend to encoder states."""

    config = XGLMConfig(vocab_size=19, d_model=12, attention_heads=3, ffn_dim=7, num_layers=2, add_cross_attention=True)
    weights = random_weights(config, 6)
    ids = np.array([[3, 14, 15, 9, 2], [6, 5, 3, 5, 8]])
    states = np.random.RandomState(6).standard_normal((2, 4, 12))

    def run(self, weights=None, **arguments):
        return oracle.forward(
            self.config, (weights or self.weights).__getitem__, self.ids, attentions=True, **arguments
        )

    def test_it_is_skipped_without_encoder_states(self):
        decoder = XGLMConfig.from_dict({**self.config.to_dict(), "add_cross_attention": False})
        own = {name: weight for name, weight in self.weights.items() if "encoder_attn" not in name}
        expected = oracle.forward(decoder, own.__getitem__, self.ids)
        np.testing.assert_array_equal(self.run().logits, expected.logits)

    def test_a_single_state_gets_all_attention(self):
        # Every position then adds the projection of that one state, whatever it asks for.
        state = self.states[:, :1]
        weights = {name: 0 * weight if "fc2" in name else weight for name, weight in self.weights.items()}
        output = self.run(weights, encoder_hidden_states=state)
        assert all((weight == 1).all() for weight in output.cross_attentions)
        layer = "model.layers.0.encoder_attn"
        value = state @ weights[f"{layer}.v_proj.weight"].T + weights[f"{layer}.v_proj.bias"]
        added = value @ weights[f"{layer}.out_proj.weight"].T + weights[f"{layer}.out_proj.bias"]
        difference = output.hidden_states[1] - self.run(weights).hidden_states[1]
        # float64 roundings of numbers of order 1.
        np.testing.assert_allclose(difference, np.broadcast_to(added, (2, 5, 12)), rtol=0, atol=1e-14)

    def test_hidden_states_of_the_encoder_are_as_absent(self):
        mask = np.array([[1, 1, 1, 1], [0, 1, 0, 1]])
        output = self.run(encoder_hidden_states=self.states, encoder_attention_mask=mask)
        cut = self.run(encoder_hidden_states=self.states[:, 1::2])
        whole = self.run(encoder_hidden_states=self.states)
        # float64 roundings in sums of another order.
        np.testing.assert_allclose(output.logits[0], whole.logits[0], rtol=0, atol=1e-13)
        np.testing.assert_allclose(output.logits[1], cut.logits[1], rtol=0, atol=1e-13)
        assert output.cross_attentions[1].shape == (2, 3, 5, 4)
        assert not output.cross_attentions[1][1, :, :, [0, 2]].any()

    def test_an_encoder_of_padding_alone_is_finite(self):
        mask = np.zeros((2, 4), np.int64)
        output = self.run(encoder_hidden_states=self.states, encoder_attention_mask=mask)
        assert np.isfinite(output.logits).all()

    @pytest.mark.parametrize(
        ("argument", "part", "attentions"),
        [("head_mask", "self_attn", "attentions"), ("cross_attn_head_mask", "encoder_attn", "cross_attentions")],
    )
    def test_a_head_mask_scales_what_the_projection_takes_from_a_head(self, argument, part, attentions):
        mask = np.array([[1, 0, 0.5], [0.25, 1, 2]])
        masked = self.run(encoder_hidden_states=self.states, **{argument: mask})
        names = {f"model.layers.{i}.{part}.out_proj.weight": np.repeat(mask[i], 4) for i in range(2)}
        scaled = self.run(
            {name: weight * names.get(name, 1) for name, weight in self.weights.items()},
            encoder_hidden_states=self.states,
        )
        # float64 roundings in another order.
        np.testing.assert_allclose(masked.logits, scaled.logits, rtol=0, atol=1e-13)
        for i, factors in enumerate(mask):
            expected = getattr(scaled, attentions)[i] * factors[:, None, None]
            np.testing.assert_allclose(getattr(masked, attentions)[i], expected, rtol=0, atol=1e-14)


class TestLoss:
    """Three positions over two ids, of which the first can be predicted by nothing and the last predicts nothing."""

    # Probabilities 1/4, 1/2 and, of what must not be looked at, 1/1001.
    logits = np.log([[[3.0, 1.0], [5.0, 5.0], [1000.0, 1.0]]])

    def test_position_t_predicts_the_next_label(self):
        # A few float64 roundings, here and below.
        assert oracle.loss(self.logits, np.array([[0, 1, 0]])) == pytest.approx(math.log(4 * 2) / 2, rel=1e-15)

    def test_ignored_labels_do_not_count(self):
        assert oracle.loss(self.logits, np.array([[1, 1, -100]])) == pytest.approx(math.log(4), rel=1e-15)

    def test_padding_predicts_nothing(self):
        mask = np.array([[0, 1, 1]])
        assert oracle.loss(self.logits, np.array([[0, 1, 0]]), attention_mask=mask) == pytest.approx(math.log(2))

    def test_the_number_of_items_may_be_given(self):
        assert oracle.loss(self.logits, np.array([[0, 1, 0]]), 10) == pytest.approx(math.log(8) / 10, rel=1e-15)

    def test_nothing_to_predict(self):
        assert oracle.loss(self.logits, np.array([[0, -100, -100]])) == 0

    def test_large_logits(self):
        assert oracle.loss(1e6 * np.array([[[1.0, 0.0], [0.0, 0.0]]]), np.array([[0, 1]])) == 1e6
