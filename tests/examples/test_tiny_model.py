"""The bundled model: what its files hold, and that it continues texts in their own language."""

import json
import unicodedata

import numpy as np
import pytest

from tests.helpers.commands import ROOT
from tests.helpers.frameworks import Framework, backends_under_test
from xglm_core import XGLMTokenizer, open_checkpoint
from xglm_core.weight_names import HEAD, weight_specs

CHECKPOINT = ROOT / "examples" / "tiny_model" / "checkpoint"
# In the model's own spelling: its tokenizer normalises texts to NFKC.
CORPUS = {
    path.stem: unicodedata.normalize("NFKC", path.read_text(encoding="utf-8"))
    for path in sorted((CHECKPOINT.parent / "corpus").glob("*.txt"))
}
WITHOUT_SPACES = ("ja", "th", "zh")


def samples():
    """The rows `| code | prompt | continuation |` of the model card."""
    lines = (CHECKPOINT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] in CORPUS]


def words(language, text):
    return set(text.replace(" ", "") if language in WITHOUT_SPACES else text.split())


def scripts(text):
    """The first words of the Unicode names of the letters in a text: LATIN, CYRILLIC, ..."""
    return {unicodedata.name(character).split()[0] for character in set(text) if character.isalpha()}


def test_the_corpus_is_multilingual():
    assert len(CORPUS) >= 12
    assert len(set().union(*map(scripts, CORPUS.values()))) >= 6
    for language, text in CORPUS.items():
        lines = text.splitlines()
        assert len(set(lines)) == len(lines) > 50, language
        assert all(line == " ".join(line.split()) for line in lines), language


def test_weights_of_the_tiny_model():
    checkpoint = open_checkpoint(CHECKPOINT)
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 2_000_000
    assert checkpoint.config.tie_word_embeddings
    assert HEAD not in checkpoint.names
    assert {spec.name: spec.shape for spec in weight_specs(checkpoint.config, with_head=False)} == {
        name: checkpoint.info(name).shape for name in checkpoint.names
    }
    assert {checkpoint.info(name).dtype.name for name in checkpoint.names} == {"float16"}
    assert all(np.isfinite(checkpoint.read(name)).all() for name in checkpoint.names)


def test_tokenizer_and_model_agree():
    config = open_checkpoint(CHECKPOINT).config
    tokenizer = XGLMTokenizer.from_pretrained(CHECKPOINT)
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.pad_token_id == config.pad_token_id
    assert config.eos_token_ids == (tokenizer.eos_token_id,)


def test_the_card_has_a_sample_of_each_language():
    assert {language for language, _, _ in samples()} == CORPUS.keys()


@pytest.mark.parametrize("name", backends_under_test())
def test_continuations_are_those_of_the_card_and_stay_in_the_language(name):
    fw = Framework(name)
    tokenizer = XGLMTokenizer.from_pretrained(CHECKPOINT)
    prompts = tokenizer([prompt for _, prompt, _ in samples()], padding=True, padding_side="left", return_tensors="np")
    model = fw.causal_lm.from_pretrained(CHECKPOINT)
    ids = fw.generate(model, prompts.input_ids, prompts.attention_mask, max_new_tokens=40)
    new = ids[:, prompts.input_ids.shape[1] :]
    assert (new == tokenizer.eos_token_id).any(axis=1).all()
    for row, (language, prompt, continuation) in zip(ids, samples(), strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert text == (prompt + continuation if language in WITHOUT_SPACES else f"{prompt} {continuation}")
        assert words(language, text) <= words(language, CORPUS[language])


def test_the_configuration_has_the_published_keys():
    published = """
        activation_dropout activation_function architectures attention_dropout attention_heads bos_token_id d_model
        decoder_start_token_id dropout eos_token_id ffn_dim init_std layerdrop max_position_embeddings model_type
        num_layers pad_token_id scale_embedding use_cache vocab_size
    """
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert set(published.split()) <= config.keys()
