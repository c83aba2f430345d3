"""The data part of a configuration, for small datasets."""

import ml_collections


def make_config(directory, **fields) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "name": "arena",
            "directory": str(directory),
            "frames": 8,
            "height": 32,
            "width": 32,
            "channels": 3,
            "latents": False,
            "num_actions": 5,
            "text_tokens": 0,
            "text_dim": 0,
            "video_feature": "video",
            "action_feature": "actions",
            "text_feature": "text",
            "workers": 0,
            "episodes": 12,
            "episode_frames": 16,
            **fields,
        }
    )
