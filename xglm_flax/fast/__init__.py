"""What exists only for speed on some hardware, each beside its plain form; `XGLM_PLAIN=1` takes the plain forms."""
