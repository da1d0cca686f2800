"""What `xglm bench` runs: cases as data, a module for each engine, and the process that times a case in one of them."""
