"""True physics scores as it should, damaged clips badly; the statistics have their closed forms."""

import numpy as np
import pytest
from scipy import linalg

from cfpp.data import arena
from cfpp.evaluate import features, metrics

EPISODES, FRAMES = 24, 13


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    episodes = [
        arena.simulate(seed, arena.random_actions(rng, FRAMES)) for seed in range(3 * EPISODES)
    ]
    return {
        "video": np.stack([episode["video"] for episode in episodes]),
        "actions": np.stack([episode["actions"] for episode in episodes]),
        "agent": np.stack([episode["states"]["agent"] for episode in episodes]),
        "balls": np.stack([episode["states"]["balls"] for episode in episodes]),
        "kicks": np.stack([episode["states"]["kicks"] for episode in episodes]),
    }


def lose_balls(video, frame):
    video = video.copy()
    video[:, frame:, ..., arena.BALL_CHANNELS] = arena.GROUND
    return video


# ------------------------------------------------------------------------------ standard errors


def test_average_is_mean_and_standard_error():
    figure = metrics.average([1.0, 2.0, 3.0, 6.0])
    assert figure.mean == 3.0
    assert figure.error == pytest.approx(np.sqrt(14 / 3 / 4))
    assert np.isnan(metrics.average([1.0]).error)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=30)
    figure = metrics.jackknife(lambda kept: values[kept].mean(), 30)
    expected = metrics.average(values)
    assert figure.mean == pytest.approx(expected.mean)
    assert figure.error == pytest.approx(expected.error)


def test_jackknife_error_of_a_variance_is_that_of_repeated_samples():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(2000, 40))
    spread = samples.var(1).std()
    errors = [metrics.jackknife(lambda kept, x=x: x[kept].var(), 40).error for x in samples[:200]]
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)


def test_difference_of_the_same_episodes_is_paired():
    values = np.random.default_rng(0).normal(size=20)
    first, second = metrics.average(values + 1), metrics.average(values)
    assert metrics.difference(first, second).mean == pytest.approx(1)
    assert metrics.difference(first, second).error == pytest.approx(0, abs=1e-12)
    unpaired = metrics.difference(metrics.Figure(2, 0.3), metrics.Figure(1.5, 0.4))
    assert unpaired[:2] == pytest.approx((0.5, 0.5))


# ---------------------------------------------------------------------------- physics of the arena


def test_true_clips_obey(clips):
    reading = arena.read(clips["video"])
    assert metrics.agent_error(reading, clips["agent"]).max() < 0.05
    assert reading.intact.mean() == 1
    assert metrics.allowed_transitions(reading, clips["actions"]).all()


def test_balls_turn_where_they_are_kicked(clips):
    """Read from pictures, against the world's own states."""
    turned, known = metrics.turns(arena.read(clips["video"]))
    kicked = clips["kicks"][:, 2:] != 0
    np.testing.assert_array_equal(turned, known & kicked)
    assert known.mean() > 0.3 and turned.any()
    figure = metrics.share(turned, known)
    assert figure.mean == turned.sum() / known.sum() and 0 < figure.error < figure.mean
    assert metrics.share(known[:1], known[:1]) is None  # of one episode


def test_agent_error_is_the_distance(clips):
    agent = np.clip(clips["agent"], 0, 20)
    moved = arena.render(agent + np.array([3, 4]), clips["balls"])
    error = metrics.agent_error(arena.read(moved), agent)
    np.testing.assert_allclose(error, 5, atol=0.05)


def test_wrong_actions_are_not_allowed(clips):
    other = (clips["actions"] + 1) % arena.NUM_ACTIONS
    allowed = metrics.allowed_transitions(arena.read(clips["video"]), other)
    # The agent can only obey both actions where walls stop it.
    assert allowed.mean() < 0.15


def test_damaged_balls_are_not_allowed(clips):
    balls, actions = clips["balls"], clips["actions"]

    def allowed(balls):
        return metrics.allowed_transitions(arena.read(arena.render(clips["agent"], balls)), actions)

    still = np.concatenate([balls[:, :6], np.repeat(balls[:, 5:6], FRAMES - 6, 1)], 1)
    assert allowed(still)[:, :5].all() and not allowed(still)[:, 5:].any()

    lost = metrics.allowed_transitions(arena.read(lose_balls(clips["video"], 6)), actions)
    assert lost[:, :5].all() and not lost[:, 5:].any()

    # Time turned at frame 6: every ball goes straight back, which no kick can do.
    back = np.concatenate([balls[:, :7], balls[:, 5::-1]], 1)
    away = metrics.away_from_walls(balls[:, 5:8]).all(1)
    assert away.any() and not allowed(back)[away, 6].any()
    assert allowed(back)[away, 5].all()


# ------------------------------------------------------------------------- directions of the balls


def sample_steps(rng, balls, samples):
    """Frames after one step of the true world from `balls` `[S, 2, 2]`: `[S, N, 32, 32, 3]`."""
    shape = (len(balls), samples, arena.NUM_BALLS)
    velocities = arena.BALL_SPEED * arena.DIAGONALS[rng.integers(4, size=shape)]
    kicks = rng.choice(3, size=shape, p=arena.KICK_LAW)
    places, _ = arena.move_balls(balls[:, None], velocities, kicks)
    return arena.render(np.full((*shape[:2], 2), 10), places)


def test_true_directions_score_what_a_perfect_sampler_does(clips):
    balls = clips["balls"][:, 0][metrics.away_from_walls(clips["balls"][:, 0])]
    samples = 32
    reading = arena.read(sample_steps(np.random.default_rng(0), balls, samples))
    counts = metrics.direction_counts(reading, balls)
    assert (counts.sum(-1) == samples).all() and not counts[..., 4].any()
    score = metrics.average(metrics.total_variation(counts, metrics.DIRECTION_LAW).mean(-1))
    expected = metrics.expected_total_variation(metrics.DIRECTION_LAW, samples)
    assert abs(score.mean - expected) < 4 * score.error


def test_directions_of_damaged_models(clips):
    balls = clips["balls"][:, 0][metrics.away_from_walls(clips["balls"][:, 0])]
    frames = sample_steps(np.random.default_rng(0), balls, 32)

    def score(frames):
        counts = metrics.direction_counts(arena.read(frames), balls)
        return metrics.total_variation(counts, metrics.DIRECTION_LAW)

    always_the_same = np.repeat(frames[:, :1], 32, 1)
    assert (score(always_the_same) == 0.75).all()
    assert (score(lose_balls(frames, 0)) == 1).all()
    at_rest = arena.render(np.full((len(balls), 32, 2), 10), balls[:, None].repeat(32, 1))
    assert (score(at_rest) == 1).all()


def test_total_variation():
    assert metrics.total_variation(np.array([5, 5, 0, 0]), np.full(4, 0.25)) == 0.5
    assert metrics.total_variation(np.array([2, 2, 2, 2, 0]), np.full(4, 0.25)) == 0
    assert metrics.total_variation(np.array([1, 1, 1, 1, 4]), np.full(4, 0.25)) == 0.5


def test_expected_total_variation_is_the_mean_over_samples():
    law, samples = np.array([0.5, 0.3, 0.2]), 10
    counts = np.random.default_rng(0).multinomial(samples, law, size=20_000)
    simulated = metrics.total_variation(counts, law).mean()
    assert metrics.expected_total_variation(law, samples) == pytest.approx(simulated, rel=0.02)
    assert metrics.expected_total_variation(np.array([0.5, 0.5]), 1) == 0.5


# -------------------------------------------------------------------------------- Frechet distance


def random_gaussian(rng, size):
    root = rng.normal(size=(size, size))
    return rng.normal(size=size), root @ root.T


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    mean, covariance = random_gaussian(rng, 5)
    assert metrics.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(
        0, abs=1e-9
    )
    shift = rng.normal(size=5)
    assert metrics.frechet_distance(mean + shift, covariance, mean, covariance) == pytest.approx(
        shift @ shift
    )
    # Covariances that commute: the sum of the squared differences of standard deviations.
    a, b = rng.uniform(0.1, 3, size=(2, 5))
    assert metrics.frechet_distance(
        np.zeros(5), np.diag(a**2), np.ones(5), np.diag(b**2)
    ) == pytest.approx(5 + np.sum((a - b) ** 2))
    # Rank one against isotropic: |u|^2 + D - 2 |u|.
    u = rng.normal(size=5)
    assert metrics.frechet_distance(mean, np.outer(u, u), mean, np.eye(5)) == pytest.approx(
        u @ u + 5 - 2 * np.linalg.norm(u)
    )


def test_frechet_distance_agrees_with_the_matrix_root():
    rng = np.random.default_rng(1)
    (mean1, covariance1), (mean2, covariance2) = (random_gaussian(rng, 6) for _ in range(2))
    root = linalg.sqrtm(covariance1 @ covariance2).real
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(covariance1 + covariance2 - 2 * root)
    distance = metrics.frechet_distance(mean1, covariance1, mean2, covariance2)
    assert distance == pytest.approx(expected)


def test_features_of_frames_of_odd_size(clips):
    """The last row and column are left out of the coarser half of the features alone."""
    video = clips["video"][:2]
    odd = features.motion_features(video[:, :, :31, :31])
    other = video[:, :, :31, :31].copy()
    other[:, :, 30, 30] = 255 - other[:, :, 30, 30]
    changed = features.motion_features(other)
    assert (odd[..., features.FILTERS :] == changed[..., features.FILTERS :]).all()
    assert (odd[..., : features.FILTERS] != changed[..., : features.FILTERS]).any()


def test_frechet_tells_damaged_clips_from_real_ones(clips):
    video, reference = clips["video"][:EPISODES], clips["video"][EPISODES:]
    scale = features.spread(reference)
    real_features = features.windows(reference, scale)

    def score(video):
        return metrics.frechet(features.windows(video, scale), real_features)

    real = score(video)
    assert 0 < real.error < real.mean
    faded = (arena.GROUND + 0.7 * (video.astype(float) - arena.GROUND)).astype(np.uint8)
    still = video.copy()
    still[..., 0] = video[:, :1, ..., 0]  # the red ball does not move
    for damaged in (lose_balls(video, 6), faded, still):
        assert score(damaged).mean > 3 * real.mean
