"""The model tests, TensorFlow."""

from __future__ import annotations

import unittest

import numpy as np
import tensorflow as tf
import transformers
from hf_tests.test_configuration_common import ConfigTester
from hf_tests.test_modeling_tf_common import TFModelTesterMixin

from conformance.hf_suite.tester import ModelTester


class TFXGLMModelTest(TFModelTesterMixin, unittest.TestCase):
    all_model_classes = (transformers.TFXGLMModel, transformers.TFXGLMForCausalLM)
    all_generative_model_classes = (transformers.TFXGLMForCausalLM,)
    test_onnx = False
    test_missing_keys = False

    def setUp(self):
        self.model_tester = ModelTester(transformers.XGLMConfig, lambda ids: tf.constant(ids.astype(np.int32)))
        self.config_tester = ConfigTester(self, config_class=transformers.XGLMConfig, d_model=32, attention_heads=4)

    def test_config(self):
        self.config_tester.run_common_tests()
