"""The fast tokenizer gives the slow one's ids, tokens, texts and offsets, and both give SentencePiece's ids."""

import math
import os
import random
import re
import time
import unicodedata
from pathlib import Path

import pytest
import sentencepiece

from tests.helpers.tokenizers import CORPUS, VOCABULARY, json_folder, piece_ids
from xglm_core import XGLMTokenizer, XGLMTokenizerFast

__all__ = ["json_folder"]  # A fixture.

LINES = [line for path in CORPUS for line in path.read_text(encoding="utf-8").splitlines()]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", *(f"<madeupword{i}>" for i in range(7))]

# Hard cases for each of the 30 languages: marks in another order or form, digits, joiners, punctuation.
HARD = {
    "en": "it’s “naïve” co-op… ﬁne; don't",
    "ru": "ёлка ё́ й и\u0306 №5 «да» т. е.",
    "zh": "繁體／简体，。！？ㄅㄆ ㊥ 〇 龘 ﹏ １２３",
    "de": "Straße ẞ Ü U\u0308 „so“ ß/ss",
    "es": "¿Qué? ¡Sí! nin\u0303o 1.º ª",
    "fr": "œuvre Œ ç c\u0327 l’été « oui »\u202f!",
    "ja": "が か\u3099 ｶﾞ ﾊﾟ パ ㍻ ㌔ 々 〆 ー゛ 𠮟る",
    "it": "perché perche\u0301 È 1ª l'ora",
    "pt": "ação ac\u0327a\u0303o à º Ã",
    "el": "ΐ ϊ\u0301 ᾳ ᾴ ς σ Σ ΅ ; ·",
    "ko": "한국 \u1112\u1161\u11ab\u1100\u116e\u11a8 각 \u1100\u1161\u11a8 ㄱ ㈎ \u1100\u1161\u11a8\u11a8 \ua97c\u1161",
    "fi": "ä a\u0308 Ö å a\u030a šakki",
    "id": "makan-makan tahun '98 ber-2",
    "tr": "İ i\u0307 I ı ş s\u0327 ğ g\u0306",
    "ar": "مُحَمَّد لا ﻻ ﷺ ـــ ٣٤ آ ا\u0653 \u0651\u064e \u064e\u0651 \u202bابج\u202c",
    "vi": "Tiếng Tie\u0302\u0301ng Tie\u0301\u0302ng Việt Vie\u0323\u0302t Vie\u0302\u0323t ơ o\u031b\u0301 đ",
    "th": "ภาษาไทย น้ำ น\u0e49\u0e33 น\u0e4d\u0e49\u0e32 ๑๒ ฯลฯ เเ แ ก็",
    "bg": "ѝ и\u0300 щъ ъ Ѣ",
    "ca": "col·lega coŀlega l\u0140 ç · Ŀ",
    "hi": "क़ क\u093c \u0958 क्ष क\u094d\u200dष क\u094d\u200cष ऽ १२ ।",
    "et": "õ o\u0303 ž z\u030c šš",
    "bn": "কো ক\u09c7\u09be ড় ড\u09bc ৎ ত\u09cd\u200d ১২ ৷",
    "ta": "கொ க\u0bc6\u0bbe ஔ ஒ\u0bd7 க்ஷ ஸ்ரீ ௧",
    "ur": "اُردُو ہے ۂ ہ\u0654 ي ی ك ک ۱۲ ۔ \u200fالف",
    "sw": "ng'ombe ng’ombe N'",
    "te": "కై క\u0c46\u0c56 జ్ఞ క్ష ౧౨",
    "eu": "ñ n\u0303 lo\u0308 baina-ta",
    "my": "မြန်မာ က\u1031 \u1031က က\u103a\u1039 ၁၂ ။ ဥ\u102e",
    "ht": "è e\u0300 òks ò",
    "qu": "ñawi ch'iki ch’iki q'uñi",
    "spaces": "  a\u00a0b \u2003 c\u3000d \u2028 e \u1680f \u200b g\u2060h \ufeff i\u205f ",
    "newlines": "\n\na\r\nb\rc\n \n\td\x0b\x0ce\x85f\u2028g\u2029 \n",
    "controls": "".join(map(chr, [*range(32), *range(127, 160)])) + "a\x00b\x1fc\x7fd\xad e\u00adf",
    "joiners": "\u200d \u200c a\u200db \u200d\u200d क\u200d \u034f a\u034fb \u180e \u2061",
    "emoji": "👩\u200d👩\u200d👧\u200d👦 👍🏽 🏳\ufe0f\u200d🌈 🇩🇪🇫 1\ufe0f\u20e3 ❤\ufe0f ☠\ufe0e",
    "special": "</s>a</s></s> <s><pad> <unk>b<madeupword6> <madeupword7> </s >< /s> <<s>> ＜/s＞ &lt;s>",
    "metaspace": "▁a▁▁b ▁ a ▁",
    "marks": "a" + "\u0301" * 30 + " \u0301 \u0316\u0301 \u0301\u0316 q\u0323\u0307 q\u0307\u0323 \u0345",
    "forms": "ﬀ ﬃ Ⅷ ⅷ ½ ⁵ ₅ ℡ ㏒ ㎏ Å Å A\u030a Ω Ω ™ ｶﾅ ＡＢＣ ﷽ 𝔘𝔫𝔦 𝟏𝟐 🄰 ㋿ ﬆ",
    "unknown": "𐍈𐍉 ᚠᚢ ꙮ 𓀀𓀁 𒀀 ⠁⠂ ᏣᎳᎩ ߒߞߏ \U0001fbf0 \ue000\uf8ff \U000f0000\U0010fffd \ufffe\uffff \ufffd",
    "runs": "aaaaaaaaaaa ------- ...... hahahahaha !!!!!!!!! we cecececececece 哈哈哈哈哈哈哈",
    "empty": "",
    "space": "   ",
}

RANGES = [
    (0x20, 0x7F),
    (0x00, 0x20),
    (0x80, 0x250),
    (0x2B0, 0x370),
    (0x370, 0x590),
    (0x590, 0x860),
    (0x900, 0x1100),
    (0x1100, 0x1200),
    (0x1200, 0x2000),
    (0x2000, 0x2070),
    (0x2070, 0x2C00),
    (0x3000, 0x3400),
    (0x4E00, 0x5000),
    (0xAC00, 0xAE00),
    (0xF900, 0x10000),
    (0x10000, 0x12000),
    (0x1D100, 0x1D800),
    (0x1F000, 0x1FB00),
    (0x20000, 0x20100),
    (0xE0000, 0xE0200),
    (0x0, 0xD800),
    (0xE000, 0x110000),
]
GLUE = [
    " ",
    "  ",
    "\n",
    "\t",
    "\u200d",
    "\u200c",
    "\ufe0f",
    "\u0301",
    "\u0323",
    "\u093c",
    "\u3099",
    "▁",
    "\xa0",
    *SPECIAL,
]


def generated(seed, count):
    """Texts of characters of all planes, of words of 16 languages in all normal forms, and of what joins them."""
    rng = random.Random(seed)
    words = " ".join(LINES).split()

    def part():
        kind = rng.randrange(6)
        if kind == 0:
            return rng.choice(GLUE) * rng.choice([1, 1, 1, 2, 5])
        if kind == 1:
            return unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), rng.choice(words))
        if kind == 2:
            return rng.choice(words)[:3] * rng.randint(2, 9)
        if kind == 3:
            return chr(rng.randrange(*rng.choice(RANGES[:-1]))) + rng.choice(GLUE[4:11])
        low, high = rng.choice(RANGES)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 8)))

    return ["".join(part() for _ in range(rng.randint(1, 12))) for _ in range(count)]


def expected_ids(processor, text):
    """SentencePiece's ids of the stretches between special tokens."""
    special = dict(zip(SPECIAL, [0, 1, 2, 3, *range(len(processor) + 1, len(processor) + 8)], strict=True))
    ids = []
    for part in re.split(f"({'|'.join(SPECIAL)})", text):
        ids += [special[part]] if part in special else piece_ids(processor, part)
    return ids


def check(slow, fast, processor, text):
    ids = expected_ids(processor, text)
    assert slow.encode(text, add_special_tokens=False) == ids
    located = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for tokenizer in (slow, fast)]
    assert located[0] == located[1]
    assert located[0].input_ids == ids
    assert fast.encode(text, add_special_tokens=False) == ids
    tokens = slow.tokenize(text)
    assert fast.tokenize(text) == tokens
    assert slow.decode(ids) == fast.decode(ids)
    assert slow.decode(ids, skip_special_tokens=True) == fast.decode(ids, skip_special_tokens=True)
    last = 0
    for token, (start, stop) in zip(tokens, located[0].offset_mapping, strict=True):
        assert last <= stop <= len(text)
        assert 0 <= start < stop, (token, start, stop)
        last = stop


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory, json_folder):
    """Pairs of tokenizers, each from its own file, with SentencePiece's processor: bundled, and trained otherwise."""
    folder = tmp_path_factory.mktemp("trained")
    trained = {}
    for name, options in {
        "bytes": {"vocab_size": 900, "byte_fallback": True, "character_coverage": 0.98, "max_sentencepiece_length": 4},
        "symbols": {"vocab_size": 1100, "user_defined_symbols": ["<n>", "ing"], "normalization_rule_name": "nfkc"},
        "identity": {"vocab_size": 1000, "normalization_rule_name": "identity", "add_dummy_prefix": False},
    }.items():
        path = folder / f"{name}.model"
        with open(path, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(LINES), model_writer=file, minloglevel=2, num_threads=1, **options
            )
        XGLMTokenizerFast(path).save_vocabulary(folder, filename_prefix=name)
        trained[name] = (path, folder / f"{name}-tokenizer.json")
    trained["bundled"] = (VOCABULARY, json_folder / "tokenizer.json")
    return {
        name: (
            XGLMTokenizer(path),
            XGLMTokenizerFast(tokenizer_file=json),
            sentencepiece.SentencePieceProcessor(model_file=str(path)),
        )
        for name, (path, json) in trained.items()
    }


NAMES = ["bundled", "bytes", "symbols", "identity"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(vocabularies, name, case):
    for text in {form: unicodedata.normalize(form, HARD[case]) for form in ("NFC", "NFD", "NFKC", "NFKD")}.values():
        check(*vocabularies[name], text)
    check(*vocabularies[name], HARD[case])


@pytest.mark.parametrize("name", NAMES)
def test_generated_texts(vocabularies, name):
    for text in generated(seed=NAMES.index(name), count=3000):
        check(*vocabularies[name], text)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_both_tokenizers(vocabularies, name):
    slow, fast, processor = vocabularies[name]
    texts = generated(seed=9, count=300)
    for batch in (texts, LINES):
        rows = [[2, *expected_ids(processor, text)] for text in batch]
        assert slow(batch).input_ids == rows
        assert fast(batch).input_ids == rows


def test_long_texts(vocabularies):
    """Float32 sums are coarse here, and the three are still one."""
    slow, fast, processor = vocabularies["bundled"]
    for text in (" ".join(LINES * 4), "".join(LINES).replace(" ", "") * 2, "ha" * 50_000):
        ids = [2, *piece_ids(processor, text)]
        assert slow.encode(text) == ids
        assert fast.encode(text) == ids


@pytest.mark.parametrize("unit", ["The children ", "ha", " ", "\n", " \n", "</s>a", "<", "e\u0301", "孩子"])
def test_time_grows_linearly(vocabularies, unit):
    """Eight times the text takes less than 16 times as long, where growth with the square would take 64 times."""
    text = unit * (100_000 // len(unit))

    def seconds(tokenizer, text):
        begin = time.process_time()
        tokenizer(text, newline="eos", return_offsets_mapping=True)
        tokenizer.encode(text)
        return max(time.process_time() - begin, 1e-4)  # Below a tenth of a millisecond the clock decides.

    for tokenizer in vocabularies["bundled"][:2]:
        short = long = math.inf
        for tries in range(1, 21):  # In turn, the best of each decides: other work only adds to a time, for a while.
            short = min(short, seconds(tokenizer, text[: len(text) // 8]))
            long = min(long, seconds(tokenizer, text))
            if tries >= 3 and long < 16 * short:
                break
        assert long < 16 * short


def test_crossed_files(vocabularies, tmp_path):
    """Each tokenizer reads the other's file, and writes its own one."""
    for name, (slow, fast, processor) in vocabularies.items():
        fast.save_vocabulary(tmp_path, filename_prefix=name)
        crossed_slow = XGLMTokenizer(tmp_path / f"{name}-tokenizer.json")
        crossed_slow.save_vocabulary(tmp_path, filename_prefix=name)
        crossed_fast = XGLMTokenizerFast(tmp_path / f"{name}-sentencepiece.bpe.model")
        again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / f"{name}-sentencepiece.bpe.model"))
        for text in [*HARD.values(), *LINES[::50]]:
            check(crossed_slow, crossed_fast, processor, text)
            check(slow, fast, again, text)
        assert crossed_slow.get_vocab() == crossed_fast.get_vocab() == slow.get_vocab()


@pytest.mark.parametrize("text", ["we cecececececece", HARD["ko"], HARD["vi"]])
def test_the_tokenizers_library_divides_otherwise(vocabularies, text):
    """Why the fast tokenizer asks SentencePiece; when this fails, it may not have to any more."""
    _, fast, _ = vocabularies["bundled"]
    assert fast.backend_tokenizer.encode(text).ids != fast.encode(text)


def test_the_tokenizers_library_reads_the_file(vocabularies):
    _, fast, _ = vocabularies["bundled"]
    backend = fast.backend_tokenizer
    assert backend.get_vocab() == fast.get_vocab()
    for text in (line for line in LINES if unicodedata.is_normalized("NFKC", line)):
        assert backend.encode(text).ids == fast.encode(text)
    assert backend.encode("a", "b").ids == fast.encode("a", "b")


# The published vocabulary's ids, from the tests of transformers and from its issue 33683.
PUBLISHED = [("Hello World!", [2, 31227, 4447, 35]), ("a ", [2, 11]), ("a", [2, 11])]


@pytest.mark.skipif("XGLM_VOCAB" not in os.environ, reason="XGLM_VOCAB names no file of the published vocabulary")
@pytest.mark.parametrize("kind", [XGLMTokenizer, XGLMTokenizerFast])
def test_published_vocabulary(kind):
    tokenizer = kind(Path(os.environ["XGLM_VOCAB"]))
    for text, ids in PUBLISHED:
        assert tokenizer(text).input_ids == ids
    assert tokenizer.vocab_size == len(tokenizer) == 256_008
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 256_001, 256_007]) == [*SPECIAL[:5], SPECIAL[-1]]
