"""Bytes and where they come from: the table of checkpoints, finding, verifying, and the embedded ones.

Imports none of our other packages and, to be usable before anything heavy is loaded, no torch. What the
numbers in a file mean is known only to `pipelines`.
"""
