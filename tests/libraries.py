"""timm, torchvision and transformers, which the tests compare with, made importable beside a CPU build of PyTorch."""

from vitfast.bench import libraries

libraries.load("torchvision")  # the other two import it
