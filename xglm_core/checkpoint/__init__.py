"""Reading and writing checkpoint folders, without any framework."""

from xglm_core.checkpoint.dtypes import DTYPES, FloatType
from xglm_core.checkpoint.folder import Checkpoint, open_checkpoint
from xglm_core.checkpoint.loading import LoadPlan, plan_loading
from xglm_core.checkpoint.writing import save_checkpoint

__all__ = [
    "DTYPES",
    "Checkpoint",
    "FloatType",
    "LoadPlan",
    "open_checkpoint",
    "plan_loading",
    "save_checkpoint",
]
