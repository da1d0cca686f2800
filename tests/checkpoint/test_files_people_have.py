"""Checkpoint files as people have them: from wrappers, with buffers of their own, half downloaded, or not at all."""

import json

import numpy as np
import pytest

from conformance.random_weights import random_weights, write_checkpoint
from tests.helpers.checkpoint_files import library, tensors, write_shards, write_torch
from tests.helpers.models import CONFIG, IDS
from xglm_core import XGLMConfig, XGLMTokenizer, convert_checkpoint, open_checkpoint
from xglm_core.checkpoint import plan_loading
from xglm_core.checkpoint.formats import FORMATS
from xglm_core.errors import CheckpointError
from xglm_core.weight_names import EMBEDDING, HEAD, stored_prefix

WEIGHTS = random_weights(CONFIG, seed=1)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1860920\n"


def write(folder, state):
    """`pytorch_model.bin` of anything, beside the configuration; returns the folder."""
    CONFIG.save_pretrained(folder)
    library("torch").save(state, folder / "pytorch_model.bin")
    return folder


def read(folder):
    return plan_loading(open_checkpoint(folder), with_head=True)


class TestPrefixes:
    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model.", "model."])
    def test_a_wrapped_model_with_a_tied_head(self, tmp_path, prefix):
        """As of `DistributedDataParallel`, `torch.compile`, peft and trainers."""
        state = tensors(WEIGHTS)
        state[HEAD] = state[EMBEDDING]
        plan = read(write(tmp_path, {f"{prefix}{name}": tensor for name, tensor in state.items()}))
        assert plan.config.tie_word_embeddings
        for spec in plan.specs:
            np.testing.assert_array_equal(plan.read(spec), WEIGHTS[spec.name])

    def test_a_wrapped_decoder(self, tmp_path):
        bare = {f"module.{name.removeprefix('model.')}": tensor for name, tensor in tensors(WEIGHTS).items()}
        assert open_checkpoint(write(tmp_path, bare)).names == WEIGHTS.keys()

    def test_prefixes_in_shards(self, tmp_path):
        CONFIG.save_pretrained(tmp_path)
        names = [f"module.{name}" for name in WEIGHTS]
        weights = dict(zip(names, WEIGHTS.values(), strict=True))
        write_shards(tmp_path, "pytorch_model.bin", weights, write_torch, [names[:9], names[9:]])
        assert open_checkpoint(tmp_path).names == WEIGHTS.keys()

    def test_converted_names_are_the_published_ones(self, tmp_path):
        source = write(tmp_path, {f"module.{name}": tensor for name, tensor in tensors(WEIGHTS).items()})
        convert_checkpoint(source, tmp_path / "new", to="torch")
        assert open_checkpoint(tmp_path / "new").names == WEIGHTS.keys()
        assert library("torch").load(tmp_path / "new" / "pytorch_model.bin").keys() == WEIGHTS.keys()

    def test_two_prefixes_are_listed(self, tmp_path):
        state = {f"{'a' if 'fc1' in name else 'b'}.{name}": tensor for name, tensor in tensors(WEIGHTS).items()}
        with pytest.raises(CheckpointError, match=rf"missing: {EMBEDDING}.*unexpected: a\.model\.layers\.0\.fc1\.bias"):
            read(write(tmp_path, state))

    @pytest.mark.parametrize(
        ("names", "prefix"),
        [
            ([EMBEDDING], ""),
            (["embed_tokens.weight", "layer_norm.bias"], ""),
            (["mymodel.embed_tokens.weight", "mymodel.layer_norm.bias"], "mymodel."),
            (["a.model.embed_tokens.weight", "a.lm_head.weight"], "a."),
            (["a.model.embed_tokens.weight", "lm_head.weight"], ""),
            (["my_embed_tokens.weight"], ""),
            ([], ""),
        ],
    )
    def test_rule(self, names, prefix):
        assert stored_prefix(names) == prefix


class TestIntegers:
    @pytest.mark.parametrize("name", ["model.embed_positions.position_ids", "probe.num_batches_tracked"])
    def test_harmless_ones_are_ignored(self, tmp_path, name):
        folder = write(tmp_path, {**tensors(WEIGHTS), name: library("torch").arange(5)})
        convert_checkpoint(folder, tmp_path / "new", to="safetensors")
        assert {*open_checkpoint(tmp_path / "new").names} == {spec.name for spec in read(folder).specs}

    def test_others_are_named_with_their_type(self, tmp_path):
        state = {**tensors(WEIGHTS), "model.layers.0.mask": library("torch").ones(5, dtype=bool)}
        with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.mask \(of bool\)"):
            read(write(tmp_path, state))

    def test_weights_of_integers_are_missing(self, tmp_path):
        state = tensors(WEIGHTS)
        state["model.layers.0.fc1.weight"] = state["model.layers.0.fc1.weight"].to(library("torch").int8)
        message = r"missing: model\.layers\.0\.fc1\.weight; unexpected: model\.layers\.0\.fc1\.weight \(of int8\)"
        with pytest.raises(CheckpointError, match=message):
            read(write(tmp_path, state))

    def test_in_safetensors(self, tmp_path):
        write_checkpoint(tmp_path, CONFIG, seed=1)
        path = tmp_path / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header, numbers = json.loads(data[8 : 8 + size]), data[8 + size :]
        span = [len(numbers), len(numbers) + 16]
        header["model.position_ids"] = {"dtype": "I64", "shape": [2], "data_offsets": span}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + numbers + bytes(16))
        assert len(read(tmp_path).specs) == len(WEIGHTS)


class TestWhatIsNoCheckpoint:
    @pytest.mark.parametrize("format", FORMATS)
    def test_a_git_lfs_pointer(self, tmp_path, format):
        CONFIG.save_pretrained(tmp_path)
        (tmp_path / FORMATS[format].file).write_bytes(POINTER)
        with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, not the file .*git lfs pull") as error:
            open_checkpoint(tmp_path)
        assert str(tmp_path / FORMATS[format].file) in str(error.value)

    @pytest.mark.parametrize("file", ["sentencepiece.bpe.model", "tokenizer.json"])
    def test_a_git_lfs_pointer_for_the_vocabulary(self, tmp_path, file):
        (tmp_path / file).write_bytes(POINTER)
        with pytest.raises(CheckpointError, match=rf"{file}: is a Git LFS pointer"):
            XGLMTokenizer.from_pretrained(tmp_path)

    @pytest.mark.parametrize("kind", [XGLMConfig, XGLMTokenizer])
    def test_a_file_for_the_folder(self, tmp_path, kind):
        write_checkpoint(tmp_path, CONFIG, seed=1)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: is a file, .*; give .*[^s]$"):
            kind.from_pretrained(tmp_path / "model.safetensors")

    @pytest.mark.parametrize("to", ["safetensors", "torch", "flax"])
    @pytest.mark.parametrize("share", [0, 0.5, 0.999])
    def test_a_download_that_was_cut_short(self, tmp_path, to, share):
        write_checkpoint(tmp_path / "whole", CONFIG, seed=1)
        convert_checkpoint(tmp_path / "whole", tmp_path / "cut", to=to)
        path = tmp_path / "cut" / FORMATS[to].file
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError, match=rf"{path.name}: .*truncated"):
            open_checkpoint(tmp_path / "cut")


def test_models_of_wrapped_weights(fw, tmp_path):
    write_checkpoint(tmp_path / "plain", CONFIG, seed=1)
    folder = write(tmp_path, {f"module.{name}": tensor for name, tensor in tensors(WEIGHTS).items()})
    ours, plain = fw.causal_lm.from_pretrained(folder), fw.causal_lm.from_pretrained(tmp_path / "plain")
    np.testing.assert_array_equal(fw.logits(ours, IDS), fw.logits(plain, IDS))
