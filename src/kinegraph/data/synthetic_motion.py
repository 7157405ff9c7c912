"""What the people of the motion generator do: standing, sitting, the ways between them, walking and jumping."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from kinegraph.data.synthetic_body import SIDE, Array, Body, Motion, reach_height, roll_foot

GRAVITY = 9810.0  # mm/s^2


@dataclass(frozen=True)
class Style:
    """Habits of one person; lengths as fractions of stature, angles in radians."""

    lean: float  # trunk pitch in standing
    slouch: float  # backward tilt of the pelvis on a chair
    sitting_lean: float  # trunk pitch on a chair
    rising_lean: float  # how far the trunk leans to get on and off a chair
    seat: float  # hip height on the chair over knee height
    foot_reach: float  # ankles in front of the knees on a chair
    half_width: float  # half distance of the feet beyond the hips
    toe_out: float
    step: float  # long slow steps above 1, short quick ones below
    arm_swing: float
    elbow: float
    abduction: float
    restless: float  # size of everything that moves without a purpose


def draw_style(rng: np.random.Generator) -> Style:
    return Style(
        lean=rng.normal(0.03, 0.05),
        slouch=rng.uniform(0.0, 0.4),
        sitting_lean=rng.normal(0.02, 0.12),
        rising_lean=rng.uniform(0.35, 0.85),
        seat=rng.uniform(0.90, 1.25),
        foot_reach=rng.uniform(-0.05, 0.07),
        half_width=rng.uniform(-0.015, 0.035),
        toe_out=rng.uniform(0.0, 0.3),
        step=rng.uniform(0.75, 1.25),
        arm_swing=rng.uniform(0.1, 1.3),
        elbow=rng.uniform(0.1, 0.6),
        abduction=rng.uniform(0.05, 0.25),
        restless=rng.uniform(0.4, 1.4),
    )


def ease(progress: Array) -> Array:
    """The minimum-jerk curve from 0 to 1 (Flash and Hogan 1985), level outside 0..1."""
    x = np.clip(progress, 0.0, 1.0)
    return np.asarray(x**3 * (10.0 - 15.0 * x + 6.0 * x**2))


def swell(times: Array, start: float, duration: float) -> Array:
    """0, up to 1 half way through the duration, and back to 0."""
    return np.asarray(np.sin(np.pi * np.clip((times - start) / duration, 0.0, 1.0)) ** 2)


def drift(rng: np.random.Generator, times: Array, size: tuple[int, ...] = (), fastest: float = 0.9) -> Array:
    """Smooth wandering (T, *size) of about unit size: three sinusoids with periods from `fastest` to 6 s."""
    periods = np.exp(rng.uniform(np.log(fastest), np.log(6.0), (3, *size)))
    phases = rng.uniform(0.0, 2.0 * np.pi, (3, *size))
    clock = times.reshape(-1, *([1] * (len(size) + 1)))
    return np.asarray(np.sin(2.0 * np.pi * clock / periods + phases).sum(axis=1) / np.sqrt(1.5) / 1.4)


def idle(body: Body, style: Style, rng: np.random.Generator, times: Array) -> Motion:
    """Upright, feet on the floor, and the small movements that nobody is without."""
    num_frames, small = len(times), style.restless
    ankle = np.zeros((num_frames, 2, 3))
    ankle[..., 0] = SIDE * (body.half_hip + style.half_width * body.stature)
    ankle[..., 1] = body.ankle_height
    ankle[..., 2] = SIDE * rng.normal(0.0, 0.012) * body.stature
    pelvis = np.zeros((num_frames, 3))
    pelvis[:, 0] = 10.0 * small * drift(rng, times)
    pelvis[:, 2] = 0.012 * body.stature + 8.0 * small * drift(rng, times)
    hips = 0.02 * small * drift(rng, times, (3,))
    trunk = hips + 0.03 * small * drift(rng, times, (3,)) + (style.lean, 0.0, 0.0)
    gaze = rng.normal((0.05, 0.0, 0.0), (0.12, 0.25, 0.03))
    head = gaze + (0.5, 1.0, 0.5) * trunk + small * (drift(rng, times, (3,)) * (0.06, 0.15, 0.04))
    foot = np.zeros((num_frames, 2, 2))
    foot[..., 1] = style.toe_out + rng.normal(0.0, 0.06, 2)
    arm = np.zeros((num_frames, 2, 5))
    arm[:] = (0.05, style.abduction, 0.25, style.elbow, 0.5)
    arm += rng.normal(0.0, 0.05, (2, 5)) + 0.05 * small * drift(rng, times, (2, 5))
    splay = np.full((num_frames, 2), 0.8 * style.toe_out)
    return Motion(np.zeros(num_frames), pelvis, hips, trunk, head, ankle, foot, splay, arm)


def gesture(rng: np.random.Generator, times: Array, motion: Motion, amount: float) -> None:
    """Add a movement of one or both arms: a raised hand, a wave, talking with the hands."""
    duration = rng.uniform(0.8, 3.0)
    raised = swell(times, rng.uniform(times[0] - 0.3, times[-1] - 0.5 * duration), duration)
    target = np.array([rng.uniform(0.2, 2.2), rng.uniform(-0.1, 0.8), rng.uniform(-0.2, 0.5),
                       rng.uniform(0.2, 1.6), rng.uniform(-0.4, 0.6)])  # fmt: skip
    sides = ([0], [1], [0, 1])[rng.integers(3)]
    wave = 0.25 * np.sin(2 * np.pi * rng.uniform(0.8, 2.2) * times + rng.uniform(0, 6.3))[:, None]
    for side in sides:
        motion.arm[:, side] += amount * raised[:, None] * (target + wave * rng.normal(0.0, 1.0, 5))


def sit_and_stand(
    body: Body, style: Style, rng: np.random.Generator, times: Array, seated: Array, lean_forward: Array | float = 0.0
) -> Motion:
    """Between standing (seated = 0) and sitting on a chair (seated = 1), with planted feet.

    lean_forward (T,) leans the trunk as far as for getting up, without getting up.
    """
    motion = idle(body, style, rng, times)
    stature, down = body.stature, ease(seated)
    reach = (style.foot_reach + rng.normal(0.0, 0.015)) * stature
    knee_height = body.ankle_height + np.sqrt(body.shank**2 - reach**2)
    seat = style.seat * knee_height
    behind = np.sqrt(body.thigh**2 - (knee_height - seat) ** 2) + reach
    standing = reach_height(body, motion.pelvis, motion.ankle, 0.995)
    stillness = 1.0 - 0.8 * seated
    back, lower = seated**0.85, seated**1.2
    motion.pelvis[:, 0] *= stillness
    motion.pelvis[:, 2] = motion.pelvis[:, 2] * stillness - back * behind
    wanted = standing + lower * (seat - standing)
    motion.pelvis[:, 1] = np.minimum(wanted, reach_height(body, motion.pelvis, motion.ankle, 0.998))
    bow = style.rising_lean * (np.sin(np.pi * np.clip(seated, 0, 1) ** 1.3) + lean_forward)
    motion.hips[:, 0] += 0.6 * bow - style.slouch * seated
    motion.trunk[:, 0] += bow + (style.sitting_lean - style.lean) * seated
    motion.head[:, 0] += 0.4 * bow
    motion.splay += seated[:, None] * rng.uniform(-0.1, 0.3)
    resting = (rng.uniform(0.15, 0.55), rng.uniform(0.1, 0.35), rng.uniform(0.1, 0.5), rng.uniform(0.6, 1.2), 1.2)
    motion.arm += down[:, None, None] * (np.array(resting) - motion.arm.mean(axis=0))
    help_arms = (rng.uniform(-0.5, 1.5), 0.1, 0.0, rng.uniform(-0.3, 0.5), 0.0)
    motion.arm += np.sin(np.pi * np.clip(seated, 0, 1))[:, None, None] * rng.choice([0.0, 0.4, 1.0]) * help_arms
    return motion


def fidget(body: Body, style: Style, rng: np.random.Generator, times: Array, motion: Motion) -> None:
    """Feet that slide, tap or stretch and a trunk that turns, on a chair."""
    side = int(rng.integers(2))
    stretch = swell(times, rng.uniform(times[0] - 0.5, times[-1]), rng.uniform(0.6, 2.5)) * style.restless
    motion.ankle[:, side, 2] += rng.uniform(-60.0, 140.0) * stretch
    motion.ankle[:, side, 1] += rng.uniform(0.0, 60.0) * stretch
    motion.foot[:, side, 0] += rng.uniform(-0.4, 0.5) * stretch
    motion.ankle[:, side] = roll_foot(body, motion.ankle[:, side], motion.foot[:, side, 0])
    motion.trunk += style.restless * (drift(rng, times, (3,)) * (0.12, 0.25, 0.1))


def shift_weight(
    body: Body, rng: np.random.Generator, times: Array, motion: Motion, amount: float, bob: Array | float = 0.0
) -> None:
    """Lean on one leg after the other, lift a foot a little; bob (T,) bends the knees by millimetres."""
    side = drift(rng, times, fastest=1.5)
    motion.pelvis[:, 0] += 35.0 * amount * side
    motion.hips[:, 2] += 0.05 * amount * side
    lifted = int(rng.integers(2))
    lift = swell(times, rng.uniform(times[0] - 0.3, times[-1]), rng.uniform(0.4, 0.9)) * max(amount - 0.5, 0.0)
    motion.ankle[:, lifted, 1] += 70.0 * lift
    motion.ankle[:, lifted, 2] += rng.uniform(-80.0, 100.0) * lift
    motion.foot[:, lifted, 0] += 0.5 * lift
    motion.ankle[:, lifted] = roll_foot(body, motion.ankle[:, lifted], motion.foot[:, lifted, 0])
    planted = motion.ankle.copy()
    planted[..., 1] = body.ankle_height
    motion.pelvis[:, 1] = reach_height(body, motion.pelvis, planted, 0.995) - bob


# A step cycle from heel strike: foot pitch, as shares of the way from heel strike to toe-off and of the swing.
_STANCE_KEYS, _STANCE_PITCH = (0.0, 0.15, 0.55, 0.8, 1.0), (-0.32, 0.0, 0.0, 0.28, 1.0)
_SWING_KEYS, _SWING_PITCH = (0.0, 0.3, 0.6, 1.0), (1.0, 0.35, -0.15, -0.32)


def walk(
    body: Body, style: Style, rng: np.random.Generator, times: Array, going: Array, speed: float, lift: float = 1.0
) -> Motion:
    """Walking at `speed` (mm/s) where going (T,) is 1, standing where it is 0; a small lift drags the feet."""
    motion = idle(body, style, rng, times)
    small_steps = np.clip(speed / 1000.0, 0.25, 1.0)
    cadence = np.sqrt(speed / 390.0) / np.sqrt(style.step)  # steps/s at the usual ratio of step length to cadence
    stride = 2.0 * speed / cadence
    seconds = np.concatenate([[0.0], np.cumsum(0.5 * (going[1:] + going[:-1]) * np.diff(times))])
    motion.travel = speed * seconds
    cycle = 0.5 * cadence * seconds + rng.uniform()
    stance = float(np.clip(0.70 - 0.07 * speed / 1000.0, 0.56, 0.70))
    share = (cycle[:, None] + (0.0, 0.5)) % 1.0
    on_floor = share < stance
    stand_share, swing_share = share / stance, (share - stance) / (1.0 - stance)
    amount = going[:, None]
    # A foot lands less far ahead of the hips than it leaves the floor behind them.
    ahead = np.where(on_floor, 0.5 - stand_share, ease(swing_share) - 0.5) * stride * stance - 0.08 * stride
    pitch = np.where(on_floor, np.interp(stand_share, _STANCE_KEYS, _STANCE_PITCH),
                     np.interp(swing_share, _SWING_KEYS, _SWING_PITCH))  # fmt: skip
    motion.foot[..., 0] = 0.9 * pitch * small_steps * lift * amount
    motion.ankle[..., 2] = motion.ankle[..., 2] * (1 - amount) + ahead * amount
    motion.ankle[..., 0] -= SIDE * 0.012 * body.stature * amount
    rise = np.where(on_floor, 0.0, np.sin(np.pi * np.clip(swing_share, 0.0, 1.0) ** 0.8))
    motion.ankle[..., 1] += rise * amount * lift * body.stature * (0.012 + 0.035 * small_steps)
    motion.ankle = roll_foot(body, motion.ankle, motion.foot[..., 0])

    beat = 2.0 * np.pi * cycle
    swing = np.cos(beat) * going * small_steps  # 1 when the left foot strikes
    motion.pelvis[:, 0] += 22.0 * np.sin(beat) * going
    motion.hips[:, 1] += -0.12 * swing
    motion.hips[:, 2] += 0.05 * np.sin(beat) * going * small_steps
    motion.trunk[:, 1] += 0.10 * swing
    motion.trunk[:, 0] += 0.05 * small_steps * going
    arms = SIDE * -swing[:, None] * 0.45 * style.arm_swing * rng.choice([1.0, 1.0, 1.0, 0.2], 2)
    motion.arm[..., 0] += arms
    motion.arm[..., 3] += 0.5 * np.maximum(arms, 0.0) + 0.15 * small_steps
    bounce = 14.0 * small_steps * -np.cos(2.0 * beat) * going
    loaded = np.where(on_floor[..., None], motion.ankle, motion.ankle[:, ::-1])
    room = reach_height(body, motion.pelvis, loaded, 0.995) - bounce
    still = going < 0.5
    height = np.where(still, room, room[~still].min() if (~still).any() else room.min())
    motion.pelvis[:, 1] = np.minimum(_smooth(height, 5) + bounce, room + bounce)
    return motion


def _smooth(values: Array, width: int) -> Array:
    """A moving mean of odd width, the ends held."""
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.full(width, 1.0 / width), mode="valid")


def _join(times: Array, knots: list[tuple[float, float, float]]) -> Array:
    """A cubic Hermite curve through (time, value, slope), level outside: constant acceleration comes out exact."""
    at, value, slope = (np.array(column) for column in zip(*knots, strict=True))
    left = np.clip(np.searchsorted(at, times, side="right") - 1, 0, len(at) - 2)
    width = at[left + 1] - at[left]
    x = np.clip((times - at[left]) / width, 0.0, 1.0)
    return np.asarray(
        (1 + 2 * x) * (1 - x) ** 2 * value[left] + x * (1 - x) ** 2 * width * slope[left]
        + x**2 * (3 - 2 * x) * value[left + 1] - x**2 * (1 - x) * width * slope[left + 1]
    )  # fmt: skip


def jump(
    body: Body, style: Style, rng: np.random.Generator, times: Array, apexes: list[float], height: float, crouch: float
) -> Motion:
    """Jumps of `height` mm with the highest points at `apexes` (s), each with crouch (mm), flight and landing.

    apexes must be far enough apart for a landing and the next push-off: see jump_period.
    """
    motion = idle(body, style, rng, times)
    tiptoe = 0.55 * min(1.0, 0.3 + height / 200.0)
    rise = float(roll_foot(body, np.zeros(3), np.array(tiptoe))[1])
    speed = float(np.sqrt(2.0 * GRAVITY * height))
    half = speed / GRAVITY
    push = 2.0 * (crouch + rise) / speed
    dip = rng.uniform(0.28, 0.5)
    lift, flight, pitch, lean, arm = [], [], [], [], []
    first, last = apexes[0] - half - push, apexes[-1] + half + push
    for apex in apexes:
        off, on = apex - half, apex + half
        lift += [(off - push, -crouch, 0.0), (off, rise, speed), (on, rise, -speed)]
        flight += [(off - 1e-3, 0.0, 0.0), (off, 0.0, speed), (on, 0.0, -speed), (on + 1e-3, 0.0, 0.0)]
        pitch += [(off - push, 0.0, 0.0), (off, tiptoe, 0.0), (on, tiptoe, 0.0)]
        lean += [(off - push, 1.0, 0.0), (off, 0.1, 0.0), (on, 0.1, 0.0)]
        arm += [(off - push, -0.4, 0.0), (apex, 1.0, 0.0)]
    recover = rng.uniform(0.35, 0.7)
    lift = [(first - dip, 0.0, 0.0), *lift, (last, -crouch, 0.0), (last + recover, 0.0, 0.0)]
    pitch = [*pitch, (last, 0.0, 0.0)]
    lean = [(first - dip, 0.0, 0.0), *lean, (last, 0.8, 0.0), (last + recover, 0.0, 0.0)]
    arm = [(first - dip, 0.0, 0.0), *arm, (last, 0.1, 0.0), (last + recover, 0.0, 0.0)]

    motion.foot[..., 0] = _join(times, pitch)[:, None]
    motion.pelvis[:, 1] = reach_height(body, motion.pelvis, motion.ankle, 0.995) + _join(times, lift)
    in_air = _join(times, flight)
    tuck = rng.uniform(0.0, 0.35) * in_air
    motion.ankle[..., 1] += (in_air + tuck)[:, None] + rng.normal(0.0, 0.05, 2) * in_air[:, None]
    motion.ankle[..., 2] -= tuck[:, None] * 0.8
    motion.ankle = roll_foot(body, motion.ankle, motion.foot[..., 0])
    bow = _join(times, lean) * min(0.9, crouch / 350.0 + 0.1) * rng.uniform(0.7, 1.3)
    motion.pelvis[:, 2] -= 0.25 * crouch * _join(times, lean)
    motion.hips[:, 0] += 0.6 * bow
    motion.trunk[:, 0] += bow
    motion.head[:, 0] += 0.3 * bow
    swing = _join(times, arm) * rng.choice([0.15, 0.6, 1.0])
    motion.arm[..., 0] += swing[:, None] * rng.uniform(0.8, 2.2)
    motion.arm[..., 3] += np.abs(swing)[:, None] * rng.uniform(0.0, 0.8)
    return motion


def jump_period(body: Body, height: float, crouch: float) -> float:
    """The shortest time (s) between the highest points of two jumps in a row."""
    speed = float(np.sqrt(2.0 * GRAVITY * height))
    return 2.0 * speed / GRAVITY + 4.0 * (crouch + 0.08 * body.stature) / speed + 0.05


def blend(first: Motion, second: Motion, times: Array, seconds: float = 0.5) -> Motion:
    """The second motion, entered from the last frame of the first: the step between them fades out over `seconds`."""
    fade = 1.0 - ease((times - times[0]) / seconds)
    channels = {}
    for field in fields(Motion):
        before, after = getattr(first, field.name), getattr(second, field.name)
        step = (before[-1] - after[0]) * (0.0 if field.name == "travel" else 1.0)
        channels[field.name] = after + fade.reshape(-1, *([1] * (after.ndim - 1))) * step
    return Motion(**channels)
