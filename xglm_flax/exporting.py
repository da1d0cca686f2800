"""How `jax.export` serializes caches and outputs, which are our own types."""

from __future__ import annotations

import json

from jax import export

from xglm_core.outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from xglm_flax.cache import FlaxXGLMCache

for _output in (BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions):
    for _present, _kind in _output._named_tuples.items():
        export.register_namedtuple_serialization(
            _kind, serialized_name=f"xglm.{_output.__name__}({', '.join(_present)})"
        )
export.register_pytree_node_serialization(
    FlaxXGLMCache,
    serialized_name="xglm.FlaxXGLMCache",
    serialize_auxdata=lambda fixed: json.dumps(fixed).encode(),
    deserialize_auxdata=lambda written: tuple(json.loads(written)),
)
