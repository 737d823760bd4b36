"""What `python -m tformer_ext demo` shows: a search with a pretrained model, a training run, a plot of both."""
