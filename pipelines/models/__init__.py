"""The networks, one per file, each read from top to bottom.

dit          DiT: arXiv:2212.09748
dit3d        DiT-3D: arXiv:2307.01831
voxels       clouds of points to voxels and back, for dit3d
pixart       PixArt-alpha and PixArt-Sigma: arXiv:2310.00426, arXiv:2403.04692
t5           the encoder half of T5 1.1: arXiv:1910.10683
autoencoder  AutoencoderKL, pictures to latents and back: arXiv:2112.10752
layers       what several of them share exactly
network      configuration, loading and saving
"""
