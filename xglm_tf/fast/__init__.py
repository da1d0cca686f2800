"""What exists only for speed or memory on some hardware, each beside its plain form; see `xglm_core.plain`."""
