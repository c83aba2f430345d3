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
            "num_actions": 5,
            "video_feature": "video",
            "action_feature": "actions",
            "workers": 0,
            "episodes": 12,
            "episode_frames": 16,
            **fields,
        }
    )
