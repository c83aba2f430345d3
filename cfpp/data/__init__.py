"""Episodes of video and actions: the embedded world, recorded games, any TFDS dataset."""
