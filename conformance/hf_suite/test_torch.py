"""The model tests, PyTorch."""

from __future__ import annotations

import unittest

import torch
import transformers
from hf_tests.test_configuration_common import ConfigTester
from hf_tests.test_modeling_common import ModelTesterMixin

from conformance.hf_suite.tester import ModelTester


class XGLMModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (transformers.XGLMModel, transformers.XGLMForCausalLM)
    test_pruning = False
    test_missing_keys = False

    def setUp(self):
        self.model_tester = ModelTester(transformers.XGLMConfig, torch.from_numpy)
        self.config_tester = ConfigTester(self, config_class=transformers.XGLMConfig, d_model=32, attention_heads=4)

    def test_config(self):
        self.config_tester.run_common_tests()
