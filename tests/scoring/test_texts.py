"""Scoring of texts, with a model made of numpy: encoding, pairs, windows, batches, words."""

import math
from itertools import pairwise

import numpy as np
import pytest

from conformance.random_weights import random_weights
from tests.helpers.commands import ROOT
from tests.helpers.models import CONFIG, changed
from xglm_core import XGLMTokenizer
from xglm_core.compare.oracle import forward
from xglm_core.errors import InputError
from xglm_core.scoring import score_texts
from xglm_core.scoring.engine import score
from xglm_core.scoring.windows import Window, batches, windows

BEGIN = 2


@pytest.fixture(scope="module")
def tokenizer():
    return XGLMTokenizer.from_pretrained(ROOT / "examples" / "tiny_model" / "checkpoint")


class Bigrams:
    """A model whose log-probability of a token says which token it is and how much came before it."""

    def __init__(self, limit=2048, vocab_size=2600):
        self.config = changed(CONFIG, vocab_size=vocab_size, max_position_embeddings=limit)
        self.shapes = []

    def score(self, input_ids, attention_mask):
        return score(self, input_ids, attention_mask, self.config)[0]

    bucket = 1

    def log_probabilities(self, input_ids, attention_mask, sources, targets):
        self.shapes.append(input_ids.shape)
        return -(targets + sources % input_ids.shape[1] / 1000), targets


class Oracle:
    """The float64 oracle with random weights and a short context."""

    def __init__(self, tokenizer, limit):
        self.config = changed(CONFIG, vocab_size=len(tokenizer), max_position_embeddings=limit)
        self._weights = random_weights(self.config, seed=1)
        self.bucket = 1

    def score(self, input_ids, attention_mask):
        return score(self, input_ids, attention_mask, self.config)[0]

    def log_probabilities(self, input_ids, attention_mask, sources, targets):
        logits = forward(self.config, self._weights.__getitem__, input_ids, attention_mask).logits
        logits = logits.reshape(-1, logits.shape[-1])[sources]
        scores = logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(axis=-1))
        return scores, logits.argmax(axis=-1)


class TestTexts:
    TEXTS = ("The little dog found a fish.", "كل صباح", "子どもたちはバスに乗って学校へ行きます。", "a")

    def test_every_token_given_the_begin_of_the_text(self, tokenizer):
        for text, found in zip(self.TEXTS, score_texts(Bigrams(), tokenizer, self.TEXTS), strict=True):
            assert found.text == text
            assert [BEGIN, *found.ids] == tokenizer.encode(text)
            assert found.tokens == tokenizer.tokenize(text)
            assert found.count == len(found.ids)
            expected = [-(number + place / 1000) for place, number in enumerate(found.ids)]
            assert found.log_probabilities == pytest.approx(expected, rel=1e-6)
            assert found.sum == pytest.approx(sum(expected), rel=1e-6)
            assert found.offsets[-1][1] == len(text)

    def test_perplexity(self, tokenizer):
        model = Bigrams()
        model.log_probabilities = lambda ids, mask, sources, targets: (np.full(len(targets), math.log(0.25)), targets)
        (found,) = score_texts(model, tokenizer, ["The dog runs."])
        assert found.perplexity == pytest.approx(4)
        model.log_probabilities = lambda ids, mask, sources, targets: (np.full(len(targets), -1000), targets)
        assert score_texts(model, tokenizer, ["The dog"])[0].perplexity == math.inf

    def test_order_and_batches(self, tokenizer):
        """The longest come first, the results in the order of the texts, batches within their limit."""
        texts = ["dog " * count for count in (3, 40, 1, 17, 2, 90, 5, 4, 4)]
        model = Bigrams()
        found = score_texts(model, tokenizer, texts, batch_tokens=100)
        assert [each.text for each in found] == texts
        assert [length for _, length in model.shapes] == sorted((s[1] for s in model.shapes), reverse=True)
        assert all(rows * length <= 100 or rows == 1 for rows, length in model.shapes)
        assert sum(rows for rows, _ in model.shapes) == len(texts)
        alone = [score_texts(Bigrams(), tokenizer, [text])[0] for text in texts]
        assert found == alone

    def test_line_breaks(self, tokenizer):
        as_space, as_eos = (
            score_texts(Bigrams(), tokenizer, ["a dog\na fish"], newline=n)[0] for n in ("space", "eos")
        )
        assert "</s>" not in as_space.tokens
        assert as_eos.tokens.count("</s>") == 1
        assert as_eos.offsets[as_eos.tokens.index("</s>")] == (5, 6)


class TestPairs:
    def counted(self, tokenizer, context, continuation, **options):
        (found,) = score_texts(Bigrams(), tokenizer, [(context, continuation)], **options)
        assert found.text == context + continuation
        whole = score_texts(Bigrams(), tokenizer, [context + continuation], **options)[0]
        assert found.log_probabilities == whole.log_probabilities[-found.count :]
        assert found.ids == whole.ids[-found.count :]
        return found.tokens

    def test_wherever_the_space_stands(self, tokenizer):
        after = self.counted(tokenizer, "The dog", " found")
        assert "".join(after) == "▁found"
        assert self.counted(tokenizer, "The dog ", "found") == after
        assert self.counted(tokenizer, "The dog  ", " found") == after

    def test_a_space_that_is_a_token_of_its_own(self, tokenizer):
        after = self.counted(tokenizer, "كل", " صباح")
        assert after == ["▁", "صباح"]
        assert self.counted(tokenizer, "كل ", "صباح") == after

    def test_a_token_across_the_boundary_counts(self, tokenizer):
        whole = tokenizer.tokenize("morning")
        assert whole == ["▁morning"]
        assert self.counted(tokenizer, "morn", "ing") == whole

    def test_no_space_is_put_in_between(self, tokenizer):
        assert "".join(self.counted(tokenizer, "The dog", "found")) == "found"

    def test_empty_context(self, tokenizer):
        assert self.counted(tokenizer, "", "The dog") == tokenizer.tokenize("The dog")

    def test_a_line_break_belongs_to_its_side(self, tokenizer):
        assert "</s>" not in self.counted(tokenizer, "a dog\n", "a fish", newline="eos")
        assert self.counted(tokenizer, "a dog", "\na fish", newline="eos")[0] == "</s>"

    def test_texts_and_pairs_together(self, tokenizer):
        found = score_texts(Bigrams(), tokenizer, ["The dog", ("The", " dog"), ["The", " dog"]])
        assert found[1] == found[2]
        assert found[0].ids[-1] == found[1].ids[-1]


class TestWindows:
    def test_definition(self, tokenizer):
        """Each token once, given what its window holds before it, against the oracle on exactly that."""
        limit, stride = 13, 5
        model = Oracle(tokenizer, limit)
        text = "The little dog found a fish near the river this morning and ate it."
        (found,) = score_texts(model, tokenizer, [text], stride=stride)
        ids = [BEGIN, *found.ids]
        assert len(ids) > limit + 2 * stride
        for place in range(1, len(ids)):
            begin = 0 if place < limit else -(-(place + 1 - limit) // stride) * stride
            assert place - begin >= limit - stride or begin == 0
            assert place - begin < limit
            alone = model.score(np.array([ids[begin : place + 1]]), None)[0, -1]
            assert found.log_probabilities[place - 1] == pytest.approx(alone, abs=1e-6), place

    def test_what_follows_changes_nothing(self, tokenizer):
        model, text = Bigrams(limit=11), "dog fish " * 20
        short, long = score_texts(model, tokenizer, [text, text * 2], stride=3)
        assert long.log_probabilities[: short.count] == short.log_probabilities

    @pytest.mark.parametrize("limit", [2, 3, 7, 12])
    def test_each_place_once(self, limit):
        for length in range(2, 30):
            for stride in range(1, limit):
                for first in range(1, length):
                    parts = list(windows(0, length, first, limit, stride))
                    scored = [place for part in parts for place in range(part.first, part.end)]
                    assert scored == list(range(first, length))
                    for part in parts:
                        assert part.end - part.begin <= limit
                        assert part.begin % stride == 0
                        assert part.begin == 0 or part.first - part.begin >= min(limit - stride, length)

    def test_windows_of_the_context_alone_are_not_read(self, tokenizer):
        model = Bigrams(limit=16)
        score_texts(model, tokenizer, [("dog " * 200, "fish")], stride=8, batch_tokens=1)
        assert len(model.shapes) == 1

    def test_batches_are_powers_of_two(self):
        parts = [Window(number, 0, 10, 1) for number in range(21)]
        assert [len(batch) for batch in batches(parts, 95)] == [8, 8, 5]
        assert [len(batch) for batch in batches(parts, 1)] == [1] * 21


class TestWords:
    def test_bits_add_up(self, tokenizer):
        (found,) = score_texts(Bigrams(), tokenizer, ["The little dog found a fish."])
        assert [word.text for word in found.words] == ["The", "little", "dog", "found", "a", "fish."]
        for word in found.words:
            assert found.text[word.begin : word.end] == word.text
        assert sum(word.bits for word in found.words) == pytest.approx(-found.sum / math.log(2))

    def test_odd_spaces(self, tokenizer):
        (found,) = score_texts(Bigrams(), tokenizer, ["  dog \t  fish  "])
        assert [(word.text, word.begin, word.end) for word in found.words] == [("dog", 2, 5), ("fish", 9, 13)]

    def test_scripts_without_spaces(self, tokenizer):
        (found,) = score_texts(Bigrams(), tokenizer, ["子どもたちはバスに乗って学校へ行きます。"])
        assert len(found.words) == 1

    def test_line_breaks_and_unknown_characters(self, tokenizer):
        (found,) = score_texts(Bigrams(), tokenizer, ["a do\U0001f600g\n\na fish"], newline="eos")
        assert "<unk>" in found.tokens
        assert [word.text for word in found.words] == ["a", "do\U0001f600g", "", "a", "fish"]
        assert all(one.end <= other.begin for one, other in pairwise(found.words))

    def test_of_a_continuation(self, tokenizer):
        (found,) = score_texts(Bigrams(), tokenizer, [("The lit", "tle dog")])
        assert [(word.text, word.begin, word.end) for word in found.words] == [("tle", 7, 10), ("dog", 11, 14)]


class TestErrors:
    @pytest.mark.parametrize(
        ("texts", "options", "message"),
        [
            ([], {}, r"texts is \[\], expected a list of strings or pairs of strings, not empty"),
            ("The dog", {}, "texts is 'The dog', expected a list"),
            (["a", ""], {}, r"texts\[1\]: the text is empty, expected at least one token"),
            ([" \n"], {}, r"texts\[0\]: the text ' \\n' has no tokens"),
            ([("a", "")], {}, r"texts\[0\]: the continuation is empty"),
            ([("a", " ")], {}, r"texts\[0\]: the continuation ' ' has no tokens"),
            (["a", 3], {}, r"texts\[1\] is 3, expected a string, or a pair \(context, continuation\) of strings"),
            ([("a", "b", "c")], {}, r"texts\[0\] is \('a', 'b', 'c'\), expected a string, or a pair"),
            ([("a", None)], {}, r"texts\[0\] is \('a', None\), expected"),
            (["a", "\ud800"], {}, r"texts\[1\]: a text has the lone surrogate"),
            (["a"], {"stride": 0}, r"stride is 0, expected 1 to 2047 \(max_position_embeddings=2048\)"),
            (["a"], {"stride": 2048}, "stride is 2048, expected 1 to 2047"),
            (["a"], {"stride": 1.5}, "stride is 1.5, expected 1 to 2047"),
            (["a"], {"batch_tokens": 0}, "batch_tokens is 0, expected a number of tokens, 1 or more"),
            (["a"], {"newline": "br"}, "newline is 'br', expected"),
        ],
    )
    def test_before_any_computation(self, tokenizer, texts, options, message):
        model = Bigrams()
        with pytest.raises(InputError, match=message):
            score_texts(model, tokenizer, texts, **options)
        assert not model.shapes

    def test_ids_outside_the_vocabulary(self, tokenizer):
        model = Bigrams(vocab_size=503)
        with pytest.raises(InputError, match=r"texts\[1\]: input_ids\[0, \d+\] is \d+, expected 0 to 502"):
            score_texts(model, tokenizer, ["dog", "The dog found"])
        assert not model.shapes

    def test_a_tokenizer_without_a_begin_of_text(self, tokenizer):
        bare = XGLMTokenizer.from_pretrained(ROOT / "examples" / "tiny_model" / "checkpoint")
        bare.sep_token = None
        with pytest.raises(
            InputError, match=r"the first token is scored given sep_token \(</s>\), but the tokenizer has none"
        ):
            score_texts(Bigrams(), bare, ["dog"])
