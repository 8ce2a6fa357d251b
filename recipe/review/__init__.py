"""The verbs on a recipe: check, verify, diff, watch, reproduce.

The pipeline does not import this package; `train.py`, a script, hands `watch` to training as a function.
"""
