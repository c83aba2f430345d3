"""The embedded world: its physics, and what is read back out of its frames."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from cfpp.data import arena
from cfpp.errors import UserError

KNOWN_AGENT = [[17, 7], [15, 7], [17, 7], [17, 5], [17, 7]]
KNOWN_BALLS = [[22, 20], [52, 47]]
PLACES = np.arange(arena.BALL_LOW, arena.BALL_HIGH + 1)


def play(seed: int, frames: int = 64) -> arena.Episode:
    return arena.simulate(seed, arena.random_actions(np.random.default_rng(seed), frames))


@pytest.fixture(scope="module")
def episodes() -> list[arena.Episode]:
    return [play(seed) for seed in range(30)]


def stack(episodes: list[arena.Episode], name: str) -> np.ndarray:
    return np.stack([episode["states"][name] for episode in episodes])


def every_ball_place() -> tuple[np.ndarray, np.ndarray]:
    """Agents and balls of frames in which each ball takes all of its places."""
    places = np.stack(np.meshgrid(PLACES, PLACES, indexing="ij"), -1).reshape(-1, 2)
    agents = np.stack(np.divmod(np.arange(len(places)) % 28**2, 28), -1)
    return agents, np.stack([places, places[::-1]], 1)


# --- physics


def test_same_seed_and_actions_give_the_same_bits_and_other_seeds_do_not():
    first, again, other = play(3), play(3), arena.simulate(4, play(3)["actions"])
    np.testing.assert_array_equal(first["video"], again["video"])
    for name in first["states"]:
        np.testing.assert_array_equal(first["states"][name], again["states"][name])
    assert (first["states"]["balls"] != other["states"]["balls"]).any()


def test_a_known_episode_stays_what_it_was():
    """Pins the stream of random numbers: recorded data and reports depend on it."""
    states = arena.simulate(0, np.array([0, 1, 2, 3, 4]))["states"]
    assert states["agent"].tolist() == KNOWN_AGENT
    assert states["balls"][-1].tolist() == KNOWN_BALLS


def test_the_future_of_an_episode_does_not_change_its_past():
    actions = play(5)["actions"]
    changed = np.where(np.arange(64) < 40, actions, 0)
    whole, other = arena.simulate(5, actions), arena.simulate(5, changed)
    np.testing.assert_array_equal(whole["video"][:40], other["video"][:40])
    np.testing.assert_array_equal(whole["states"]["balls"], other["states"]["balls"])


def test_shapes_types_and_bounds(episodes):
    episode = episodes[0]
    assert episode["video"].shape == (64, 32, 32, 3) and episode["video"].dtype == np.uint8
    assert episode["actions"].dtype == np.int32
    assert {name: value.shape for name, value in episode["states"].items()} == {
        "agent": (64, 2),
        "balls": (64, 2, 2),
        "velocities": (64, 2, 2),
        "kicks": (64, 2),
    }
    assert all(value.dtype == np.int32 for value in episode["states"].values())
    balls, agent = stack(episodes, "balls"), stack(episodes, "agent")
    assert balls.min() == arena.BALL_LOW and balls.max() == arena.BALL_HIGH
    assert agent.min() == 0 and agent.max() == 32 - 5
    assert (np.abs(stack(episodes, "velocities")) == 3).all()


def test_actions_move_the_agent_by_two_pixels_until_a_wall():
    actions = np.repeat([1, 3, 2, 4, 0], 20)
    agent = arena.simulate(1, actions)["states"]["agent"]
    assert agent[39].tolist() == [0, 0] and agent[79].tolist() == [27, 27]
    assert (agent[80:] == 27).all()
    assert np.diff(agent[40:50], axis=0).tolist() == [[2, 0]] * 9


def test_without_kicks_a_ball_flies_straight_and_bounces():
    balls, velocities = np.array([10, 55]), np.array([-3, 3])
    track = []
    for _ in range(4):
        balls, velocities = arena.move_balls(balls, velocities, np.array(0))
        track.append(balls.tolist())
    # 10, 7, 4 -> 9 - 4 = 5; 55, 58 -> 115 - 58 = 57 and back.
    assert track == [[7, 57], [5, 54], [8, 51], [11, 48]]
    assert velocities.tolist() == [3, -3]


@pytest.mark.parametrize("kick", [0, 1, 2])
def test_a_step_permutes_the_states_so_the_uniform_law_is_stationary(kick):
    """All (position, velocity) of an axis, with the other axis at rest in one place."""
    states = list(itertools.product(PLACES.tolist(), [-3, 3]))
    rows = np.array(states)
    balls = np.stack([rows[:, 0], np.full(len(rows), 30)], -1)
    velocities = np.stack([rows[:, 1], np.full(len(rows), 3)], -1)
    moved, turned = arena.move_balls(balls, velocities, np.full(len(rows), kick))
    image = list(zip(moved[:, 0].tolist(), turned[:, 0].tolist(), strict=True))
    assert sorted(image) == sorted(states)


def test_kicks_are_as_frequent_as_stated():
    kicks = arena.simulate(7, np.zeros(4000, int))["states"]["kicks"]
    share = np.bincount(kicks.ravel(), minlength=3) / kicks.size
    # Standard error of a share of 0.015 among 8000: 0.0014.
    np.testing.assert_allclose(share, [0.97, 0.015, 0.015], atol=0.006)


def test_successors_are_distinct_sum_to_one_and_contain_what_happens(episodes):
    for episode in episodes[:10]:
        states = episode["states"]
        following, probabilities = arena.successors(
            states["agent"][:-1],
            states["balls"][:-1],
            states["velocities"][:-1],
            episode["actions"][1:],
        )
        assert following["balls"].shape == (63, 9, 2, 2)
        np.testing.assert_allclose(probabilities.sum(), 1)
        flat = np.concatenate(
            [following[name].reshape(63, 9, -1) for name in ("balls", "velocities")], -1
        )
        assert all(len(np.unique(nine, axis=0)) == 9 for nine in flat)
        same = np.ones((63, 9), bool)
        for name in states:
            now = states[name][1:, None]
            same &= (following[name] == now).reshape(63, 9, -1).all(-1)
        assert (same.sum(1) == 1).all()


def test_successor_probabilities_are_those_of_independent_kicks():
    _, probabilities = arena.successors(
        np.array([3, 3]), np.full((2, 2), 30), np.full((2, 2), 3), np.array(0)
    )
    expected = np.outer([0.97, 0.015, 0.015], [0.97, 0.015, 0.015]).ravel()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), frames=st.integers(1, 40))
def test_any_episode_obeys_the_physics(seed, frames):
    states = play(seed, frames)["states"]
    moved, turned = arena.move_balls(
        states["balls"][:-1], states["velocities"][:-1], states["kicks"][1:]
    )
    np.testing.assert_array_equal(moved, states["balls"][1:])
    np.testing.assert_array_equal(turned, states["velocities"][1:])


def test_random_actions_are_held_for_one_to_six_frames():
    actions = arena.random_actions(np.random.default_rng(0), 5000)
    assert actions.dtype == np.int32 and set(actions.tolist()) == {0, 1, 2, 3, 4}
    # A hold ends with another action in 4 of 5 cases: (1 / 3.5) * 4/5 changes a frame.
    assert np.mean(np.diff(actions) != 0) == pytest.approx(0.8 / 3.5, abs=0.02)
    np.testing.assert_array_equal(
        actions[:50], arena.random_actions(np.random.default_rng(0), 5000)[:50]
    )


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0, 1, 5], "action 5 at frame 2 is out of range"),
        ([-1], "action -1 at frame 0"),
        ([], "at least one frame"),
        ([0.5], "float64"),
        ([[0, 1]], "int64 [1, 2]"),
    ],
)
def test_wrong_actions_are_named(actions, message):
    with pytest.raises(UserError) as caught:
        arena.simulate(0, np.array(actions))
    assert message in str(caught.value)


# --- reading frames


def test_every_true_frame_is_read_exactly_and_intact():
    agents, balls = every_ball_place()
    reading = arena.read(arena.render(agents, balls))
    np.testing.assert_allclose(reading.balls, balls / 2, atol=1e-4)
    np.testing.assert_allclose(reading.agent, agents + 2, atol=1e-4)
    assert reading.agent_intact.all() and reading.intact.all()


def test_objects_that_overlap_are_read_exactly():
    agents, balls = every_ball_place()
    balls[:, 1] = balls[:, 0]
    agents = np.clip(balls[:, 0] // 2 - 2, 0, 27)
    reading = arena.read(arena.render(agents, balls))
    np.testing.assert_allclose(reading.balls, balls / 2, atol=1e-4)
    assert reading.agent_intact.all() and reading.intact.all()


def test_slight_blur_and_noise_leave_objects_intact():
    agents, balls = every_ball_place()
    video = arena.render(agents, balls).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 8, video.shape)
    video = np.clip(ndimage.gaussian_filter(video, (0, 0.6, 0.6, 0)) + noise, 0, 255)
    reading = arena.read(np.rint(video).astype(np.uint8))
    assert reading.intact.mean() > 0.999 and reading.agent_intact.mean() > 0.999
    assert np.abs(reading.balls - balls / 2).max() < 0.25


def fade(channel):
    return arena.GROUND + (channel - arena.GROUND) // 2


def double(channel):
    return np.maximum(channel, np.roll(channel, 9, axis=-1))


def smear(channel):
    """The same brightness spread over twice the diameter: four times the area."""
    return np.rint(arena.GROUND + ndimage.zoom(channel - float(arena.GROUND), 2, order=1) / 4)


def enlarge(channel):
    return ndimage.zoom(channel.astype(float), 2, order=0)


def stretch(channel):
    """Twice as long, half as bright."""
    return np.rint((channel + np.roll(channel.astype(int), 5, axis=-1)) / 2)


def remove(channel):
    return np.full_like(channel, arena.GROUND)


def halve(channel):
    cut = channel.copy()
    cut[:, :16] = arena.GROUND
    return cut


@pytest.mark.parametrize("damage", [fade, double, smear, enlarge, stretch, remove, halve])
def test_damaged_objects_are_not_intact_and_the_others_are(damage):
    centre = np.array([[32, 32], [32, 32]])
    video = arena.render(np.array([14, 14]), centre)
    for index, channel in enumerate([1, 0, 2]):
        damaged = video.copy()
        wrong = damage(video[..., channel])
        start = (wrong.shape[0] - 32) // 2
        damaged[..., channel] = wrong[start : start + 32, start : start + 32]
        reading = arena.read(damaged)
        intact = [reading.agent_intact.item(), *reading.intact.tolist()]
        assert intact == [i != index for i in range(3)]


def test_a_missing_object_has_a_finite_place():
    reading = arena.read(np.full((4, 32, 32, 3), arena.GROUND, np.uint8))
    assert (reading.balls == 15.5).all() and not reading.intact.any()


def test_a_stray_blot_does_not_move_an_object():
    video = arena.render(np.array([4, 4]), np.array([[20, 20], [40, 40]]))
    video[28:30, 28:30, 0] = arena.PEAK
    np.testing.assert_allclose(arena.read(video).balls, [[10, 10], [20, 20]], atol=1e-4)


# --- what may happen next


def test_true_transitions_are_allowed(episodes):
    balls = stack(episodes, "balls") / 2
    before, now, after = balls[:, :-2], balls[:, 1:-1], balls[:, 2:]
    assert arena.transition_allowed(before, now, after).all()
    assert arena.transition_allowed(None, now, after).all()
    noisy = balls + np.random.default_rng(0).uniform(-0.2, 0.2, balls.shape)
    assert arena.transition_allowed(noisy[:, :-2], noisy[:, 1:-1], noisy[:, 2:]).all()


def test_allowed_transitions_are_exactly_those_of_successors_in_mid_air():
    before, now = np.array([14.5, 14.5]), np.array([16.0, 16.0])  # moves by (+1.5, +1.5)
    steps = 1.5 * np.array([[1, 1], [-1, 1], [1, -1]])
    assert arena.transition_allowed(before, now, now + steps).all()
    refused = np.array([[-1.5, -1.5], [0, 0], [3, 3], [1.5, 0], [0.9, 0.9]])
    assert not arena.transition_allowed(before, now, now + refused).any()
    assert arena.transition_allowed(None, now, now + refused[:1]).all()
    assert arena.transition_allowed(before, now, now + refused[-1:], tolerance=0.9).all()


def test_allowed_transitions_count_reflections():
    # Column 28.5 is the last place: from 27.5 with +1.5 the ball comes to 28.5, turned.
    before, now = np.array([10.0, 27.5]), np.array([11.5, 28.5])
    assert arena.transition_allowed(before, now, np.array([13.0, 27.0]))
    assert not arena.transition_allowed(before, now, np.array([13.0, 30.0]))


def test_after_an_impossible_step_the_nearest_velocity_counts():
    before, now = np.array([10.0, 10.0]), np.array([15.0, 15.0])
    assert arena.transition_allowed(before, now, now + 1.5)
    assert not arena.transition_allowed(before, now, now - 1.5)
