"""The toy world and what learns from it: scenes, solids, words, pictures, the judge, and the training
tasks of the embedded weights. Nothing here is needed to draw with any weights."""
