"""Tables, plots, TensorBoard and the files of a run: takes results, computes nothing."""
