"""The embedded default: drawn scenes with alt-text as bad as the web's, and tiny checkpoints of the real classes.

No machine can be assumed to reach a model hub; with these two, every command runs offline, with the code that runs on
the real models.
"""
