"""A network run stage by stage over blocks of images of any size."""
