"""Rows that round the vocabulary up: ids that the tokenizer does not know are never generated."""

import numpy as np
import pytest

from tests.helpers.models import CONFIG, IDS, LEFT, ONE_BLOCK, core_decides
from xglm_core import GenerationConfig, XGLMConfig
from xglm_core.errors import ConfigError
from xglm_core.resizing import resized_config

MANY = {"max_new_tokens": 12, "stop_at_eos": False}


@pytest.fixture
def padded(fw, load):
    """A model whose padding rows 131 to 135 are by far the likeliest."""
    model = load(ONE_BLOCK)
    model.resize_token_embeddings(None, 8)
    put_rows(fw, model, slice(131, 136), 40 * fw.embedding_matrix(model)[:5])
    return model


def put_rows(fw, model, rows, values):
    matrix = fw.embedding_matrix(model).copy()
    matrix[rows] = values
    if fw.name == "torch":
        model.get_input_embeddings().weight.data[:] = fw.tensor(matrix)
    else:
        model.set_input_embeddings(fw.tensor(matrix))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "top_k": 0}, {"num_beams": 3}], ids=str)
def test_are_never_generated(fw, padded, options):
    if options:
        core_decides(fw)
    assert (fw.logits(padded, IDS)[:, -1].argmax(-1) >= 131).any()
    assert fw.generate(padded, IDS, LEFT, **MANY, **options)[:, 11:].max() < 131
    # Nor where the call names what else is not generated.
    got = fw.generate(padded, IDS, LEFT, suppress_tokens=[7, 9], **MANY, **options)[:, 11:]
    assert got.max() < 131
    assert not np.isin(got, [7, 9]).any()


def test_stay_so_after_saving(fw, padded, tmp_path):
    padded.save_pretrained(tmp_path)
    again = fw.causal_lm.from_pretrained(tmp_path)
    assert again.config.padding_rows == 5
    if fw.name != "torch":
        return  # The core decides the rest.
    assert np.array_equal(fw.generate(again, IDS, **MANY), fw.generate(padded, IDS, **MANY))


def test_become_tokens_when_the_tokenizer_has_grown(fw, padded):
    likeliest = int(fw.logits(padded, IDS)[0, -1].argmax())
    padded.resize_token_embeddings(136)
    assert padded.config.padding_rows == 0
    if fw.name != "torch":
        return  # The core decides the rest.
    assert fw.generate(padded, IDS, max_new_tokens=1)[0, -1] == likeliest >= 131


class TestNumber:
    @pytest.mark.parametrize(
        ("steps", "expected"),
        [
            ([(None, 8)], (136, 5)),
            ([(137, 8)], (144, 7)),
            ([(136, 8)], (136, 0)),
            ([(None, 8), (None, 16)], (144, 13)),  # Still those of 131 tokens.
            ([(None, 8), (None, None)], (136, 5)),
            ([(None, 8), (133, 8)], (136, 3)),
            ([(None, 8), (None, 2)], (136, 5)),  # None keeps the rows.
            ([(None, 8), (133, None)], (133, 0)),
            ([(None, 64), (100, 8)], (104, 4)),
        ],
    )
    def test_follows_the_last_resizing(self, steps, expected):
        config = CONFIG
        for arguments in steps:
            config = resized_config(config, *arguments)
        assert (config.vocab_size, config.padding_rows) == expected

    def test_of_the_published_vocabulary(self):
        config = resized_config(XGLMConfig.from_preset("564M"), None, 64)
        assert (config.vocab_size, config.padding_rows) == (256_064, 56)
        assert GenerationConfig.from_model(config).suppress_tokens == [*range(256_001, 256_008)]

    @pytest.mark.parametrize("value", [-1, 131, 2.0, True, None])
    def test_impossible(self, value):
        with pytest.raises(ConfigError, match=r"config: padding_rows is .*, expected fewer than vocab_size=131"):
            XGLMConfig.from_dict({**CONFIG.to_dict(), "padding_rows": value})
