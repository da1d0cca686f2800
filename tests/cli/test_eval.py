"""`xglm eval`: the real harness on small local tasks in every backend, and the paper's tasks on made-up examples."""

import importlib.util
import json
import logging
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.commands import ROOT, run_xglm
from tests.helpers.frameworks import backends_under_test, needs_a_backend
from tests.helpers.models import changed
from xglm_core import XGLMConfig, XGLMTokenizer, open_checkpoint
from xglm_core.cli import eval as command
from xglm_core.cli import main
from xglm_core.compare.oracle import checkpoint_reader, forward
from xglm_core.errors import BackendError, InputError
from xglm_core.evaluation import adapter, harness, register
from xglm_core.evaluation.__main__ import main as harness_main
from xglm_core.scoring import score_texts
from xglm_core.scoring.continuations import score_continuations

CHECKPOINT = ROOT / "examples" / "tiny_model" / "checkpoint"
CORPUS = ROOT / "examples" / "tiny_model" / "corpus"
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install 'xglm[eval]'"
)

COPA = [
    ("The little dog", "found a fish near the river this morning.", "reads a book at school.", 0),
    ("После школы девочка", "рыба рыба автобус.", "кормит кошку и садится делать уроки.", 1),
    ("Treni ya mjini", "nyumba samaki.", "imejaa watu wanaosoma na wanaolala.", 1),
    ("子どもたちは", "バスに乗って学校へ行きます。", "川で 本を 食べ", 1),  # The label is wrong.
]
TEXTS = ["The little dog found a fish near the river this morning.", "Treni ya mjini", "каждое утро"]
PROMPTS = [("The little dog", "found a fish near the river this morning"), ("Treni ya", "mjini imejaa watu")]

TASKS = {
    "tiny_copa": """
output_type: multiple_choice
doc_to_text: "{{premise}}"
doc_to_choice: "{{[choice1, choice2]}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_lines": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "tiny_continue": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{rest}}"
generation_kwargs: {until: ["\\n", "."], do_sample: false, temperature: 0.0, max_gen_toks: 20}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


class Model:
    """Log-probabilities that depend on a token and the one before it; every third id is the likeliest in its place."""

    config = XGLMConfig.from_pretrained(CHECKPOINT)

    def __init__(self, limit=2048):
        self.config = changed(type(self).config, max_position_embeddings=limit)
        self.read = []

    def score(self, ids, mask, *, return_likeliest=False):
        assert ids.shape[1] <= self.config.max_position_embeddings
        self.read += [row[keep].tolist() for row, keep in zip(ids, mask == 1, strict=True)]
        scores = -(1 + (7 * ids[:, 1:] + 3 * ids[:, :-1]) % 11) / 8 * mask[:, 1:]
        likeliest = np.where(ids[:, 1:] % 3 == 0, ids[:, 1:], -1)
        return (scores, likeliest) if return_likeliest else scores

    def generate(self, ids, mask, **options):
        """The last token of each row twice, and the end."""
        self.read += [(row[keep].tolist(), options) for row, keep in zip(ids, mask == 1, strict=True)]
        new = np.full((len(ids), 4), self.config.pad_token_id)
        new[:, :2] = ids[:, -1:]
        new[:, 2] = self.config.eos_token_id
        return np.concatenate([ids, new], axis=1)


@pytest.fixture(scope="module")
def tokenizer():
    return XGLMTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of the tasks above."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = {
        "tiny_copa": [dict(zip(("premise", "choice1", "choice2", "label"), row, strict=True)) for row in COPA],
        "tiny_lines": [{"text": text} for text in TEXTS],
        "tiny_continue": [{"text": text, "rest": rest} for text, rest in PROMPTS],
    }
    for name, text in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in documents[name]))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1}}\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}\n{text}"
        )
    return folder


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def request(*arguments):
    return SimpleNamespace(args=arguments)


def harness_model(model, tokenizer, **options):
    return register()(model, tokenizer, **options)


@pytest.fixture(scope="module")
def tiny(fw):
    return fw.causal_lm.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def oracle(tokenizer):
    checkpoint = open_checkpoint(CHECKPOINT)
    reader = checkpoint_reader(checkpoint)

    def oracle(context, continuation):
        """Log-probability of a continuation, and whether it is the likeliest, in float64, from all logits."""
        begin = len(tokenizer(context).input_ids)
        ids = np.array([tokenizer(context + continuation).input_ids])
        logits = forward(checkpoint.config, reader, ids).logits[0, begin - 1 : -1]
        targets = ids[0, begin:]
        scores = logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(axis=-1))
        return scores.sum(), bool((logits.argmax(axis=-1) == targets).all())

    return oracle


@needs_harness
class TestBackends:
    def test_results(self, tiny, fw, tasks, oracle, tmp_path, monkeypatch, capsys):
        """The table and the file, against the oracle and the corpus that the model has learned."""
        monkeypatch.setattr(command, "load_model", lambda *arguments: (fw.name, tiny))
        path = tmp_path / "results.json"
        arguments = [str(CHECKPOINT), "--include-path", str(tasks), "--tasks", ",".join(TASKS), "--json", str(path)]
        assert main(["eval", *arguments]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{CHECKPOINT}, {fw.name}, newline space, lm_eval ")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
        assert rows[0][0] == "Tasks"
        table = {row[0]: (row[4], float(row[6]), row[8]) for row in rows[2:]}
        results = json.loads(path.read_text())
        assert results["config"]["backend"] == fw.name
        found = results["results"]

        sums = [[oracle(premise, f" {choice}")[0] for choice in choices] for premise, *choices, _ in COPA]
        right = [int(np.argmax(row)) == label for row, (*_, label) in zip(sums, COPA, strict=True)]
        assert right == [True, True, True, False]
        assert found["tiny_copa"]["acc,none"] == 0.75
        assert table["tiny_copa"] == ("acc", 0.75, "0.25")
        words = sum(len(text.split()) for text in TEXTS)
        perplexity = math.exp(-sum(oracle("", text)[0] for text in TEXTS) / words)
        assert found["tiny_lines"]["word_perplexity,none"] == pytest.approx(perplexity, rel=1e-5)
        assert table["tiny_lines"] == ("word_perplexity", pytest.approx(perplexity, abs=1e-3), "N/A")
        assert found["tiny_continue"]["exact_match,none"] == 0.5  # The second sentence goes on.

    def test_likelihoods(self, tiny, tokenizer, oracle):
        """The number of each request, and whether it is what greedy generation would give."""
        pairs = [(premise, f" {choice}") for premise, *choices, _ in COPA for choice in choices]
        pairs += [("The little dog found ", "a fish"), ("", TEXTS[0]), ("The little dog found a", " bus")]
        lm = harness_model(tiny, tokenizer)
        answers = lm.loglikelihood([request(*pair) for pair in pairs])
        direct = score_texts(tiny, tokenizer, pairs)
        for pair, (score, greedy), other in zip(pairs, answers, direct, strict=True):
            expected, is_likeliest = oracle(*_moved(*pair))
            assert score == pytest.approx(expected, abs=1e-4)
            assert score == pytest.approx(other.sum, abs=1e-4)
            assert greedy is is_likeliest
        assert {greedy for _, greedy in answers} == {True, False}

    def test_device(self, tiny, fw, tokenizer):
        if fw.name == "torch":
            assert harness_model(tiny, tokenizer, device="cpu").get_model_info()["backend"] == "torch"
        else:
            with pytest.raises(InputError, match=f"device is 'cpu', but {fw.name} chooses its device itself"):
                harness_model(tiny, tokenizer, device="cpu")

    def test_generation(self, tiny, tokenizer):
        """Texts are cut at what ends them, and do not depend on their neighbours; copies of drawn ones differ."""
        lm = harness_model(tiny, tokenizer)
        greedy = {"until": ["\n\n", "river"], "max_gen_toks": 20}
        drawn = {"until": [], "do_sample": True, "temperature": 1.5, "max_gen_toks": 20}
        requests = [request("The little", greedy), request("Treni ya", greedy), *[request("The little", drawn)] * 3]
        first, second, *copies = lm.generate_until(requests)
        assert first == "dog found a fish near the "
        assert second == "mjini imejaa watu wanaosoma na wanaolala."
        assert len({*copies}) == 3
        assert lm.generate_until(requests[2:3]) == copies[:1]


def _moved(context, continuation):
    """The space at the end of a context before the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


@needs_harness
class TestEncoding:
    def test_begins_with_the_end_of_text_once(self, tokenizer):
        lm = harness_model(Model(), tokenizer)
        assert lm.prefix_token_id == lm.eot_token_id == 2
        ids = lm.tok_encode("The dog ")
        assert ids == tokenizer("The dog").input_ids
        assert (ids[0], ids.count(2)) == (2, 1)
        assert lm.tok_encode("The dog", add_special_tokens=False) == ids[1:]
        assert lm.tok_encode("</s> The dog") == ids
        assert lm.tok_encode("") == [2]

    def test_line_breaks(self, tokenizer):
        dog, cat = tokenizer("dog").input_ids[1:], tokenizer("cat").input_ids[1:]
        lm = harness_model(Model(), tokenizer, newline="eos")
        assert lm.tok_encode("dog\n\ncat") == [2, *dog, 2, *cat]
        assert lm.tok_encode("\ncat") == [2, *cat]
        assert lm._encode_pair("dog\n", "cat") == ([2, *dog], [2, *cat])
        assert harness_model(Model(), tokenizer).tok_encode("dog\n\ncat") == [2, *dog, *cat]

    def test_a_text_begins_with_its_parts(self, tokenizer):
        """At every space of the corpus, in all of its languages: what the harness splits by holds."""
        lm = harness_model(Model(), tokenizer)
        for path in sorted(CORPUS.glob("*.txt")):
            for text in path.read_text(encoding="utf-8").splitlines()[:5]:
                whole = lm.tok_encode(text)
                for place in [place for place, character in enumerate(text) if character == " "]:
                    begin = lm.tok_encode(text[:place])
                    assert whole[: len(begin)] == begin
                    assert len(begin) < len(whole)

    def test_few_shot_examples_end_with_the_end_of_text(self, tokenizer, tasks):
        model = Model()
        run(harness_model(model, tokenizer, newline="eos"), ["tiny_copa"], tasks, num_fewshot=2)
        assert {ids.count(2) for ids in model.read} == {3}
        model = Model()
        run(harness_model(model, tokenizer), ["tiny_copa"], tasks, num_fewshot=2)
        assert {ids.count(2) for ids in model.read} == {1}


def run(lm, names, folder, **options):
    manager, found = harness.find_tasks(names, str(folder))
    return harness.evaluate(lm, manager, found, bootstrap_iters=0, **options)


@needs_harness
class TestLikelihoods:
    def test_the_end_of_what_is_too_long(self, tokenizer):
        model = Model(limit=8)
        lm = harness_model(model, tokenizer)
        context, continuation = "dog " * 20, "the fish"
        ((score, _),) = lm.loglikelihood([request(context, continuation)])
        ids = lm.tok_encode(context + continuation)
        assert model.read == [ids[-8:]]
        count = len(ids) - len(lm.tok_encode(context))
        assert score == pytest.approx(model.score(np.array([ids[-8:]]), np.ones((1, 8)))[0, -count:].sum())

    def test_no_more_than_the_model_reads(self, tokenizer):
        lm = harness_model(Model(limit=8), tokenizer)
        message = r"the continuation 'dog dog .*' after 'The ' has 8 tokens of its own, expected 1 to 7"
        with pytest.raises(InputError, match=message):
            lm.loglikelihood([request("The ", "dog " * 8)])
        assert lm.loglikelihood([request("The ", "dog " * 7)])

    @pytest.mark.parametrize("context", ["", "dog"])
    def test_nothing_to_score(self, tokenizer, context):
        with pytest.raises(InputError, match=r"the continuation ' ' after .* tokens"):
            harness_model(Model(), tokenizer).loglikelihood([request(context, " ")])

    def test_greedy_only_if_all_are(self, tokenizer):
        pairs = [([2], [9, 12, 15]), ([2, 4], [9, 13, 15]), ([2], [9, 12, 16]), ([2, 5, 7], [10, 12]), ([2], [12])]
        found = {number: greedy for number, _, greedy in score_continuations(Model(), pairs, 8)}
        assert found == {0: True, 1: False, 2: False, 3: False, 4: True}

    def test_every_token_of_a_long_text_counts_once(self, tokenizer):
        model = Model(limit=8)
        text = "The little dog found a fish near the river this morning. " * 3
        (found,) = harness_model(model, tokenizer).loglikelihood_rolling([request(text)])
        ids = np.array([tokenizer(text).input_ids])
        assert found == pytest.approx(Model().score(ids, np.ones_like(ids)).sum())  # Which knows one token back.
        assert all(len(row) <= 8 for row in model.read)
        assert sum(len(row) == 8 for row in model.read) >= len(model.read) - 1

    def test_an_empty_text(self, tokenizer):
        assert harness_model(Model(), tokenizer).loglikelihood_rolling([request("")]) == [0]

    def test_answers_are_kept_if_asked(self, tokenizer, tasks, tmp_path):
        model = Model()
        lm, options = harness_model(model, tokenizer), {"use_cache": str(tmp_path / "answers")}
        first = run(lm, [*TASKS], tasks, **options)["results"]
        assert model.read
        model.read.clear()
        assert run(lm, [*TASKS], tasks, **options)["results"] == first
        assert not model.read


@needs_harness
class TestGeneration:
    def test_options_of_a_task(self, tokenizer):
        """What tasks write means the same to `generate`."""
        model = Model()
        lm = harness_model(model, tokenizer)
        given = {"until": ["\n", "", "  ", "Q:"], "temperature": 0.0, "do_sample": False, "max_gen_toks": 5}
        assert lm.generate_until([request("The dog", given)]) == ["dog dog"]
        ((ids, options),) = model.read
        assert ids == tokenizer("The dog").input_ids
        assert options.pop("tokenizer") is tokenizer
        assert options == {"stop_strings": ["Q:"], "do_sample": False, "max_new_tokens": 5}
        assert given["until"] == ["\n", "", "  ", "Q:"]

    def test_options_for_drawing_where_nothing_is_drawn(self, tokenizer):
        """Some tasks have them. `generate` refuses what has no effect."""
        model = Model()
        lm = harness_model(model, tokenizer)
        for given in ({"top_p": 0.9, "top_k": 5}, {"temperature": 0.0, "min_p": 0.1}, {"do_sample": False, "seed": 1}):
            assert lm.generate_until([request("The dog", {"until": [], "max_gen_toks": 5, **given})]) == ["dog dog"]
            assert {*model.read.pop()[1]} == {"do_sample", "max_new_tokens", "stop_strings", "tokenizer"}
        lm.generate_until([request("The dog", {"until": [], "do_sample": True, "top_p": 0.9})])
        assert model.read.pop()[1]["top_p"] == 0.9

    def test_lines(self, tokenizer):
        """`</s>` ends a text, or it is a line break on request."""
        lm = harness_model(Model(), tokenizer, newline="eos")
        for until, text in ([], "dog dog\n"), (["\n"], "dog dog"):
            assert lm.generate_until([request("dog", {"until": until, "stop_at_eos": False})]) == [text]
            assert lm.generate_until([request("dog", {"until": until})]) == ["dog dog"]

    def test_equal_requests(self, tokenizer):
        """Greedy ones are computed once; drawn ones have seeds of their own."""
        model = Model()
        lm = harness_model(model, tokenizer)
        greedy, drawn = {"until": []}, {"until": [], "do_sample": True, "temperature": 0.7, "seed": 5}
        texts = lm.generate_until([request("dog", greedy)] * 3 + [request("bus", drawn)] * 3)
        assert texts == ["dog dog"] * 3 + ["bus bus"] * 3
        assert [options.get("seed") for _, options in model.read] == [None, 5, 6, 7]
        assert [options["max_new_tokens"] for _, options in model.read] == [256] * 4

    def test_room(self, tokenizer):
        model = Model(limit=16)
        lm = harness_model(model, tokenizer)
        lm.generate_until([request("dog " * 20, {"until": [], "max_gen_toks": 10})])
        assert len(model.read[0][0]) == 6
        with pytest.raises(InputError, match="16 tokens to generate leave no room for a text in the 16 of the model"):
            lm.generate_until([request("dog", {"until": [], "max_gen_toks": 16})])

    def test_batches(self, tokenizer):
        """As many as fit with what they grow to, the longest first, and the answers in order."""
        model = Model()
        lm = harness_model(model, tokenizer, batch_tokens=24)
        words = ["dog bus day", "day", "dog", "dog bus", "bus"]
        texts = lm.generate_until([request(text, {"until": [], "max_gen_toks": 8}) for text in words])
        assert texts == [f"{text.split()[-1]} {text.split()[-1]}" for text in words]
        assert model.read[0][0] == tokenizer("dog bus day").input_ids

    def test_several_texts_for_one_request(self, tokenizer):
        given = {"until": [], "do_sample": True, "num_return_sequences": 2}
        with pytest.raises(InputError, match="num_return_sequences=2 is among a task's options"):
            harness_model(Model(), tokenizer).generate_until([request("dog", given)])


# Made-up documents in the form of those of the paper's tasks.
DOCUMENTS = {
    "xcopa": {"premise": "Mtoto alikula samaki.", "choice1": "Alikuwa na njaa.", "choice2": "Alilala.", "label": 0},
    "xstorycloze": {
        **{f"input_sentence_{number}": f"Sentence {number} of the story." for number in range(1, 5)},
        "sentence_quiz1": "The dog ran home.",
        "sentence_quiz2": "The bus reads fish.",
        "answer_right_ending": 2,
    },
    "xnli": {"premise": "The dog found a fish.", "hypothesis": "There is a fish.", "label": 1},
    "xwinograd": {
        "sentence": "The dog saw the cat because _ was near the river.",
        "option1": "the dog",
        "option2": "the cat",
        "answer": "2",
    },
}


@pytest.fixture(scope="module")
def manager():
    """Of those tasks as the harness defines them; reading all 14,000 definitions takes long."""
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    return harness.task_manager([str(folder / name) for name in DOCUMENTS], include_defaults=False)


@needs_harness
class TestTasks:
    @pytest.mark.parametrize("group", DOCUMENTS)
    def test_of_the_paper(self, manager, tokenizer, group, monkeypatch):
        """In all languages: found, built, and scored as `score_texts` scores the same pairs."""
        import datasets

        document = {"question": "cause", **DOCUMENTS[group]}
        data = datasets.Dataset.from_list([document] * 2)
        splits = dict.fromkeys(("train", "validation", "test", "eval"), data)
        monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: datasets.DatasetDict(splits))
        model = Model()
        lm = harness_model(model, tokenizer)
        loaded = manager.load([group])["tasks"]
        assert len(loaded) >= 6
        for task in loaded.values():
            task.build_all_requests(limit=1, rank=0, world_size=1)
            pairs = [instance.args for instance in task.instances]
            assert len(pairs) == (3 if group == "xnli" else 2)
            assert {instance.request_type for instance in task.instances} == {"loglikelihood"}
            found = [score for score, _ in lm.loglikelihood(task.instances)]
            assert found == pytest.approx([each.sum for each in score_texts(model, tokenizer, pairs)])

    def test_the_authors_prompt(self, tokenizer, tmp_path, monkeypatch):
        """The task in docs/evaluation.md decides as the authors' example, which sums over the whole text."""
        import datasets

        page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
        (tmp_path / "task.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
        premise, *choices = "The dog found a fish.", "It was near the river.", "It reads a book."
        document = {"premise": premise, "choice1": choices[0], "choice2": choices[1], "label": 0}
        data = datasets.DatasetDict({"test": datasets.Dataset.from_list([document])})
        monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: data)
        model = Model()
        lm = harness_model(model, tokenizer, newline="eos")
        manager, names = harness.find_tasks(["xcopa_sw_line"], str(tmp_path))
        (task,) = manager.load(names)["tasks"].values()
        task.build_all_requests(limit=1, rank=0, world_size=1)
        found = [score for score, _ in lm.loglikelihood(task.instances)]
        texts = [f"{premise}\n{choice}" for choice in choices]
        assert sorted(model.read) == sorted(tokenizer(text, newline="eos").input_ids for text in texts)
        assert {ids.count(2) for ids in model.read} == {2}
        wholes = [each.sum for each in score_texts(model, tokenizer, texts, newline="eos")]
        assert found[0] - found[1] == pytest.approx(wholes[0] - wholes[1])

    def test_unknown(self, manager):
        with pytest.raises(InputError, match=r"no task 'xcopa_swa'; did you mean xcopa_sw, .*\?$"):
            harness._check_names(manager, ["xcopa", "xcopa_swa"])
        with pytest.raises(InputError, match=r"no task 'ø\*'; see: python -m xglm_core\.evaluation ls tasks"):
            harness._check_names(manager, ["ø*"])

    def test_several(self, manager, tasks):
        assert harness._check_names(manager, ["xcopa_s*", "xcopa_sw"]) == ["xcopa_sw"]
        path = str(tasks / "tiny_copa.yaml")
        assert harness._check_names(manager, [path]) == [path]
        assert [*manager.load([path])["tasks"]] == ["tiny_copa"]

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (
                ConnectionError("Couldn't reach 'x' on the Hub"),
                "its data come from the Hugging Face Hub the first time",
            ),
            (ValueError("two\nlines"), "xcopa_sw: cannot be loaded: ValueError: two$"),
        ],
    )
    def test_data_that_cannot_be_had(self, manager, monkeypatch, error, message):
        import datasets

        def load(*arguments, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(InputError, match=message):
            manager.load(["xcopa_sw"])

    def test_before_the_model_is_loaded(self, tasks, monkeypatch, capsys):
        (tasks / "broken.yaml").write_text((tasks / "tiny_copa.yaml").read_text().replace("tiny_copa", "broken"))
        monkeypatch.setattr(command, "load_model", lambda *arguments: pytest.fail("loaded"))
        assert main(["eval", str(CHECKPOINT), "--include-path", str(tasks), "--tasks", "broken"]) == 2
        assert "xglm: error: broken: cannot be loaded: FileNotFoundError: " in capsys.readouterr().err

    def test_code_that_a_model_writes(self, manager, tasks):
        (tasks / "unsafe.yml").write_text((tasks / "tiny_copa.yaml").read_text() + "unsafe_code: true\n")
        with pytest.raises(
            InputError, match="task tiny_copa: runs code that the model writes; expected a task of text"
        ):
            manager.load([str(tasks / "unsafe.yml")])


@needs_harness
class TestRegistry:
    def test_by_name(self, tasks, monkeypatch):
        """`simple_evaluate(model="xglm")`, and the harness's own command line."""
        import lm_eval

        model = Model()
        monkeypatch.setattr(adapter, "load", lambda *arguments: ("torch", model))
        register()
        manager, names = harness.find_tasks(["tiny_copa"], str(tasks))
        results = lm_eval.simple_evaluate(
            model="xglm", model_args={"pretrained": str(CHECKPOINT)}, tasks=names, task_manager=manager
        )
        assert results["config"]["pretrained"] == str(CHECKPOINT)
        assert len(results["samples"]["tiny_copa"]) == 4

    def test_command_line_of_the_harness(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--help"])
        with pytest.raises(SystemExit):
            harness_main()
        assert "--model_args" in capsys.readouterr().out

    def test_arguments(self, tokenizer):
        kind = register()
        for arguments, message in (
            ({"pretrained": Model()}, "tokenizer is None, but pretrained is a loaded model"),
            ({"newline": "br"}, "newline is 'br', expected space or eos"),
            ({"batch_tokens": 0}, "batch_tokens is 0, expected 1 or more"),
            ({"device": "cuda"}, "device is 'cuda', but .* chooses its device itself"),
        ):
            with pytest.raises(InputError, match=message):
                kind(
                    **{
                        "pretrained": Model(),
                        "tokenizer": None if "pretrained" in arguments else tokenizer,
                        **arguments,
                    }
                )


class TestCommand:
    def test_without_the_harness(self, monkeypatch, capsys):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "lm_eval" else find(name))
        register.cache_clear()
        message = "evaluation needs lm_eval, not installed here; run: pip install 'xglm[eval]'"
        with pytest.raises(BackendError, match=r"run: pip install 'xglm\[eval\]'"):
            register()
        assert main(["eval", str(CHECKPOINT), "--tasks", "xcopa"]) == 2
        assert capsys.readouterr().err == f"xglm: error: {message}\n"

    @needs_harness
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--limit", "0"], "--limit is 0.0, expected a number of examples, or a share below 1"),
            (["--limit", "1.5"], "--limit is 1.5, expected"),
            (["--num-fewshot", "-1"], "--num-fewshot is -1, expected 0 or more"),
            (["--batch-tokens", "0"], "--batch-tokens is 0, expected 1 or more"),
            (["--include-path", "/absent"], "/absent: no such folder, expected one with the YAML files of tasks"),
            (["--json", "/absent/results.json"], "/absent/results.json: cannot be written: No such file"),
            (["--tasks", ","], "--tasks names no task"),
        ],
    )
    def test_bad_arguments(self, capsys, arguments, message):
        assert main(["eval", str(CHECKPOINT), "--tasks", "tiny_copa", *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err

    @needs_harness
    @needs_a_backend
    def test_as_a_user_runs_it(self, tasks):
        run = run_xglm(
            *("eval", CHECKPOINT, "--include-path", tasks, "--tasks", "tiny_copa,tiny_lines"),
            *("--backend", backends_under_test()[0], "--limit", "2", "--newline", "eos"),
        )
        assert run.returncode == 0, run.stderr
        assert "%|" not in run.stderr  # Bars are for people.
        first, _, *table = run.stdout.splitlines()
        assert first.startswith(f"{CHECKPOINT}, {backends_under_test()[0]}, newline eos, lm_eval ")
        assert first.endswith(", limit 2: for trials alone")
        assert len(table) == 4
        assert "tiny_copa" in table[2]
        assert "1.0000" in table[2]
