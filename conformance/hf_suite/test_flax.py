"""The model tests, Flax."""

from __future__ import annotations

import unittest

import numpy as np
import transformers
from hf_tests.test_modeling_flax_common import FlaxModelTesterMixin

from conformance.hf_suite.tester import ModelTester


class FlaxXGLMModelTest(FlaxModelTesterMixin, unittest.TestCase):
    all_model_classes = (transformers.FlaxXGLMModel, transformers.FlaxXGLMForCausalLM)

    def setUp(self):
        self.model_tester = ModelTester(transformers.XGLMConfig, lambda ids: ids.astype(np.int32), use_cache=False)
