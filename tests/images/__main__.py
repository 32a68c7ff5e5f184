"""python -m tests.images NAME…: make the images that are missing and print their directories."""

import sys

from tests.images import catalog

for name in sys.argv[1:] or sorted(catalog.IMAGES):
    print(catalog.image(name))
