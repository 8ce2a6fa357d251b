"""What a reader does with a recipe: test it, compare it, follow it, run it again.

Nothing in the pipeline imports this package; its verbs are listed in `recipe/__main__.py`. `train.py`, a script, hands
`watch` to training as a function that looks at the run.
"""
