"""The options of transformers' `generate`: offered, harmless, or refused in one line."""

import numpy as np
import pytest

from xglm_core import GenerationConfig
from xglm_core.errors import InputError
from xglm_core.generation.config import NOT_OFFERED, WITHOUT_EFFECT


class TestRefused:
    @pytest.mark.parametrize("name", NOT_OFFERED)
    def test_by_name_with_the_way_round(self, name):
        off, instead = NOT_OFFERED[name]
        with pytest.raises(InputError) as error:
            GenerationConfig().updated({name: np.full((2, 3), 5)})
        assert str(error.value) == f"{name} is not offered here; {instead}"
        for value in (None, False, off, None if off is None else np.float32(off)):
            assert GenerationConfig().updated({name: value}) == GenerationConfig()

    @pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
    def test_how_to_compute_is_ours_to_say(self, name):
        assert GenerationConfig().updated({name: 5, "max_new_tokens": 3}).max_new_tokens == 3
