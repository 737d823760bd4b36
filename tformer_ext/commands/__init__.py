"""Commands of `python -m tformer_ext`: each module has main(argv), imported when its command is called."""
