"""Counter-based random numbers: the same for any sharding, and random enough."""

import math

import pytest
import torch

from tinygn_dist.maths.counter_rng import hash64, key_of, uniform

MASK = (1 << 64) - 1


def splitmix64(counter: int) -> int:
    """Steele et al. 2014, in plain integers: output of state `counter` after its increment was added."""
    z = counter & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("key", [0, 1, key_of(3, "a.weight"), MASK])
def test_hash_is_splitmix64(key: int):
    index = torch.tensor([0, 1, 2, 12345, (1 << 33) + 5])
    wanted = [splitmix64(i * 0x9E3779B97F4A7C15 + key) for i in index.tolist()]
    assert [value & MASK for value in hash64(index, key).tolist()] == wanted


def test_published_first_values_of_splitmix64():
    """Seed 1234567 of the reference implementation (Vigna): 6457827717110365317, 3203168211198807973, ..."""
    gamma = 0x9E3779B97F4A7C15
    found = hash64(torch.arange(1, 4), 1234567)
    assert [v & MASK for v in found.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(gamma + 1234567) == 6457827717110365317


@pytest.mark.parametrize("cuts", [(0, 1000), (1, 999), (333, 334, 700), (500,)])
def test_the_same_whatever_the_shard_boundaries(cuts: tuple[int, ...]):
    key, edges = key_of(0, "w"), [0, *cuts, 1000]
    parts = [uniform(a, b, key) for a, b in zip(edges, edges[1:], strict=False)]
    assert torch.equal(torch.cat(parts), uniform(0, 1000, key))


def test_keys_differ_by_seed_and_by_name():
    keys = {key_of(seed, name) for seed in range(50) for name in ("a", "b", "model.layers.0.w", "1/a")}
    assert len(keys) == 200


def test_uniform_is_uniform_balanced_and_uncorrelated():
    """z-tests at 5 sigma over 200 000 elements: mean, variance, 16 bins, sign balance, neighbours, other streams."""
    n = 200_000
    one, other = uniform(0, n, key_of(0, "a")).double(), uniform(0, n, key_of(0, "b")).double()
    assert one.min() >= 0 and one.max() < 1
    z = [(float(one.mean()) - 0.5) * math.sqrt(12 * n), (float(one.var()) - 1 / 12) * math.sqrt(180 * n)]
    bins = torch.bincount((one * 16).long(), minlength=16).double()
    z += ((bins - n / 16) / math.sqrt(n * 15 / 256)).tolist()
    signs, others = torch.where(one < 0.5, -1.0, 1.0), torch.where(other < 0.5, -1.0, 1.0)
    z.append(float(signs.sum()) / math.sqrt(n))
    for lag in (1, 2, 64, 4096):
        z.append(float((signs[lag:] * signs[:-lag]).sum()) / math.sqrt(n - lag))
    z.append(float((signs * others).sum()) / math.sqrt(n))
    assert max(map(abs, z)) < 5, z


def test_nearby_seeds_give_unrelated_streams():
    streams = torch.stack([uniform(0, 20_000, key_of(seed, "w")).double() - 0.5 for seed in range(8)])
    correlation = (streams @ streams.t()) * 12 / 20_000
    assert (correlation - torch.eye(8)).abs().max() < 5 / math.sqrt(20_000) * 1.5
