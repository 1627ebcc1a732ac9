"""Which samples a run trains on, and in which order: random numbers, species, buckets."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from shards import encode, index_of, index_of_shard, noise_image, sample, write_shard

import sdxl_data

# ---- random numbers


def test_streams_never_change_silently():
    assert int(sdxl_data.hash64(1, 2, 3)) == 5246500226706903259
    assert sdxl_data.hash64(0, 7, np.array([1, 2])).tolist() == [1473136314426907213, 10621916401575875798]
    assert float(sdxl_data.uniform(1, 2, 3)) == 0.2844133471870658
    assert sdxl_data.torch_seed(7, 1, 5) == 2311715695230501050
    assert sdxl_data.hash_text("a") == 3405396810240292928
    purposes = "ORDER ACCEPT LABEL CROP FLIP REPLACE SUBSET SAMPLE DROPOUT_MASK".split()
    assert [getattr(sdxl_data, name) for name in purposes] == list(range(9))


def test_uniform_is_uniform_and_its_streams_are_independent():
    n = 100_000
    streams = [sdxl_data.uniform(purpose, seed, np.arange(n)) for purpose in (0, 1) for seed in (0, 1)]
    for u in streams:
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * n)
        counts = np.bincount((u * 100).astype(int), minlength=100)
        assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * np.sqrt(2 * 99)  # chi-square, 99 degrees
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / np.sqrt(n)
    correlations = np.corrcoef(streams)[np.triu_indices(len(streams), 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(n)


# ---- species and plan


SPECIES = 12


def long_tailed_labels():
    """One or two labels a row, the commonest species 40 times the rarest."""
    counts = [round(400 * 0.715**s) for s in range(SPECIES)]
    first = [s for s, count in enumerate(counts) for _ in range(count)]
    return [[f"species {s}"] + [f"species {(s * 5 + 3) % SPECIES}"] * (i % 4 == 0) for i, s in enumerate(first)]


def test_one_of_several_labels_is_drawn_anew_in_every_epoch():
    index = index_of([["mew", "pichu"]] * 30)
    mix = sdxl_data.ClassMix(index, "random")
    plan = sdxl_data.SamplePlan(index, mix, "random", seed=0, global_batch=4)
    drawn = {row: set() for row in range(30)}
    for epoch in range(20):
        rows, labels, _ = plan.begin_epoch(0, epoch)
        for row, label in zip(rows, labels):
            drawn[row].add(int(label))
    assert all(labels == {0, 1} for labels in drawn.values())


def distribution(labels, choice):
    """How often each label would be drawn if every row arrived once."""
    shares = Counter()
    for row in labels:
        for label in row[:1] if choice == "first" else row:
            shares[label] += 1 if choice == "first" else 1 / len(row)
    return {label: share / sum(shares.values()) for label, share in shares.items()}


def mixture(shares, m):
    return {label: (1 - m) / len(shares) + m * share for label, share in shares.items()}


def deliver(plan, steps):
    """Counter of the names of the labels delivered; every one must belong to its row."""
    index, counts = plan.index, Counter()
    for _ in range(steps):
        for row, label in zip(*plan.next_batch()):
            own = index.label_codes[index.label_starts[row] : index.label_starts[row + 1]].tolist()
            assert label in (own[:1] if plan.choice == "first" else own) or (label == -1 and not own)
            counts[index.label_names[label] if label >= 0 else None] += 1
    return counts


def is_distributed_as(counts, expected):
    """Every count within 4.5 binomial standard deviations."""
    n = sum(counts.values())
    assert set(counts) <= set(expected)
    return all(abs(counts[name] - n * p) < 4.5 * np.sqrt(n * p * (1 - p)) for name, p in expected.items())


@pytest.mark.parametrize("choice", ["first", "random"])
@pytest.mark.parametrize("m", [0.2, 0.6, 0.95])
def test_the_delivered_species_follow_the_target(choice, m):
    labels = long_tailed_labels()
    index = index_of(labels)
    mix = sdxl_data.ClassMix(index, choice, start=m, end=m)
    counts = deliver(sdxl_data.SamplePlan(index, mix, choice, seed=5, global_batch=50), 300)
    shares = distribution(labels, choice)
    assert is_distributed_as(counts, mixture(shares, m))
    assert not is_distributed_as(counts, mixture(shares, m - 0.1))


def test_the_two_choices_of_a_label_differ_on_rows_with_two():
    labels = long_tailed_labels()
    index = index_of(labels)
    mix = sdxl_data.ClassMix(index, "random", start=0.95, end=0.95)
    counts = deliver(sdxl_data.SamplePlan(index, mix, "random", seed=5, global_batch=50), 300)
    assert not is_distributed_as(counts, mixture(distribution(labels, "first"), 0.95))


def test_the_csv_is_delivered_even_when_the_data_differ():
    labels = long_tailed_labels()
    index = index_of(labels)
    csv = {f"species {s}": 1.0 + s for s in range(SPECIES)}  # the rarest is to be the commonest
    mix = sdxl_data.ClassMix(index, "random", csv | {"absent": 50.0}, start=0.8, end=0.8)
    counts = deliver(sdxl_data.SamplePlan(index, mix, "random", seed=5, global_batch=50), 200)
    shares = {name: count / sum(csv.values()) for name, count in csv.items()}
    assert is_distributed_as(counts, mixture(shares, 0.8))
    assert not is_distributed_as(counts, mixture(distribution(labels, "random"), 0.8))
    assert mix.absent == ["absent"]


def test_a_csv_without_any_of_the_species_is_an_error_that_names_the_flag():
    with pytest.raises(sdxl_data.InputError, match="--class_csv"):
        sdxl_data.ClassMix(index_of([["mew"], ["pichu"]]), "random", {"nidoran♀": 3.0})


def test_the_mixture_moves_with_the_step_in_which_a_sample_is_used():
    labels, steps = long_tailed_labels(), 300
    index = index_of(labels)
    mix = sdxl_data.ClassMix(index, "random", start=0.0, end=1.0, steps=steps)
    plan = sdxl_data.SamplePlan(index, mix, "random", seed=5, global_batch=50)
    thirds = [deliver(plan, steps // 3) for _ in range(3)]
    shares = distribution(labels, "random")
    for i, counts in enumerate(thirds):  # a linear m has its mean in the middle of the third
        assert is_distributed_as(counts, mixture(shares, (i + 0.5) / 3))
        assert not is_distributed_as(counts, mixture(shares, i / 3))


def test_the_mixture_starts_and_ends_as_told():
    index = index_of([["a"], ["b"]])
    linear = sdxl_data.ClassMix(index, "random", start=0.2, end=0.95, steps=6000)
    cosine = sdxl_data.ClassMix(index, "random", start=0.2, end=0.95, steps=6000, schedule="cosine")
    steps = (0, 1500, 3000, 6000, 9000)
    assert [linear.weight_of_data(s) for s in steps] == pytest.approx([0.2, 0.3875, 0.575, 0.95, 0.95])
    assert [cosine.weight_of_data(s) for s in steps] == pytest.approx([0.2, 0.309835, 0.575, 0.95, 0.95], abs=1e-6)
    assert sdxl_data.ClassMix(index, "random", start=0.2, end=0.95, steps=0).weight_of_data(0) == 0.95


@pytest.mark.parametrize("choice", ["first", "random"])
def test_acceptance_is_a_probability_and_as_high_as_can_be(choice):
    mix = sdxl_data.ClassMix(index_of(long_tailed_labels()), choice, start=0.0, end=1.0, steps=100)
    for step in (0, 30, 100):
        acceptance = mix.acceptance(step)
        assert acceptance.shape == (SPECIES + 1,)
        assert acceptance.min() >= 0 and acceptance.max() == 1
    assert mix.acceptance(100)[:-1] == pytest.approx(np.ones(SPECIES))


def test_a_label_that_never_comes_first_is_no_target_of_the_first_choice():
    index = index_of([["a", "c"], ["b", "c"]])
    mix = sdxl_data.ClassMix(index, "first", start=0.2, end=0.2)
    assert mix.target(0) == pytest.approx([0.5, 0.5, 0.0])
    assert sdxl_data.ClassMix(index, "random", start=0.0, end=0.0).target(0) == pytest.approx([1 / 3] * 3)


def test_unlabelled_images_are_taken_at_the_constant_rate():
    labels = [["a"]] * 300 + [[]] * 300
    index = index_of(labels)
    plan = sdxl_data.SamplePlan(index, sdxl_data.ClassMix(index, "random"), "random", seed=1, global_batch=33)
    counts = deliver(plan, 300)
    arrived = counts["a"]  # one species only: every labelled image is taken, so as many unlabelled ones arrived
    expected = sdxl_data.UNLABELLED_ACCEPTANCE * arrived
    assert abs(counts[None] - expected) < 5 * np.sqrt(expected)


def test_without_labels_each_image_comes_once_per_pass_in_a_new_order():
    index = index_of([[]] * 37)
    plan = sdxl_data.SamplePlan(index, sdxl_data.ClassMix(index, "random"), "random", seed=3, global_batch=5)
    rows = [int(row) for _ in range(15) for row in plan.next_batch()[0]]
    first, second = rows[:37], rows[37:74]
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second and first != sorted(first)


def test_a_plan_depends_on_the_seed_and_not_on_the_order_of_the_shards():
    ids, labels = [f"image {i}" for i in range(200)], [["ab"[i % 2]] for i in range(200)]

    def delivered(seed, reverse=False):
        step = -1 if reverse else 1
        index = index_of(labels[::step], ids[::step])
        plan = sdxl_data.SamplePlan(index, sdxl_data.ClassMix(index, "random"), "random", seed, global_batch=8)
        return [index.row(row)["image_id"] for _ in range(40) for row in plan.next_batch()[0]]

    assert delivered(1) == delivered(1, reverse=True)
    assert delivered(1) != delivered(2)


def micro_batches(index, batch_size=4, rank=0, world=1, accumulation=1, last_step=30, **position):
    mix = sdxl_data.ClassMix(index, "random", start=0.0, end=1.0, steps=20)
    plan = sdxl_data.SamplePlan(index, mix, "random", 9, batch_size * accumulation * world, **position)
    return sdxl_data.MicroBatches(plan, last_step, batch_size, rank, world)


def test_a_plan_restarted_from_its_state_continues_identically():
    index = index_of(long_tailed_labels()[::10])
    whole = micro_batches(index)
    batches = list(whole)
    assert whole.states[30][0][0] > 2
    for step in (1, 7, 19, 29):
        again = micro_batches(index, step=step, cursors=whole.states[step])
        assert list(again) == batches[step:]


@pytest.mark.parametrize("batch_size, world, accumulation", [(4, 2, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4)])
def test_at_equal_global_batch_every_layout_sees_the_same_samples(batch_size, world, accumulation):
    index = index_of(long_tailed_labels()[::10])
    alone = list(micro_batches(index, batch_size=8))
    ranks = [list(micro_batches(index, batch_size, rank, world, accumulation)) for rank in range(world)]
    assert [len(batches) for batches in ranks] == [30 * accumulation] * world
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    for step, whole in enumerate(alone):
        parts = [r for own in ranks for batch in own[step * accumulation : (step + 1) * accumulation] for r in batch]
        assert sorted(parts) == sorted(whole)
        assert {request[2] for request in parts} == {step}
    positions = [request[3] for batch in alone for request in batch]
    assert positions == list(range(240))


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_the_species_that_the_loader_delivers_follow_a_moving_mixture(tmp_path, workers, world):
    """4,000 draws of two species, 95 to 5: an m off by 0.1 shifts the share by 0.045, 5.7 standard errors or more.

    With the limit at 3.5 the chance to miss such an m is P(Z > 2.2) = 1.4 %, of a false alarm 0.05 %.
    """
    picture = encode(noise_image(1))
    samples = [sample(f"{i:03}", ["rare" if i % 20 == 0 else "common"], png=picture) for i in range(400)]
    index, steps = index_of_shard(write_shard(tmp_path / "a.tar", samples)), 250
    expected = sum(16 * (0.5 * (1 - step / steps) + 0.05 * step / steps) for step in range(steps))

    def deviation(shift):
        """Standard errors between what arrives and what is expected, with m off by `shift`."""
        mix, rare = sdxl_data.ClassMix(index, "random", start=shift, end=1 + shift, steps=steps), 0
        for rank in range(world):
            plan = sdxl_data.SamplePlan(index, mix, "random", 5, 16)
            batches = sdxl_data.MicroBatches(plan, steps, 16 // world, rank, world)
            dataset = sdxl_data.ImageDataset(index, 5, 8, "center", False, "box")
            for batch in sdxl_data.make_loader(dataset, batches, workers, pin_memory=False):
                rare += batch["species"].count("rare")
        return abs(rare - expected) / np.sqrt(16 * steps * 0.25)

    assert deviation(0) < 3.5 < deviation(-0.1)


# ---- buckets


def bucketed_index(labels):
    """Rows in three buckets, each species with its own share of them: the commonest are wide, the rarest tall."""
    index, rng = index_of(labels), np.random.default_rng(4)
    names = [int(row[0].split()[-1]) if row else 0 for row in labels]
    shares = [(0.05 + 0.85 * s / SPECIES, 0.1, 0.85 - 0.85 * s / SPECIES) for s in names]
    buckets = np.array([rng.choice(3, p=p) for p in shares])
    return replace(index, bucket_sizes=[(256, 128), (192, 192), (128, 256)], buckets=buckets)


@pytest.mark.parametrize("choice", ["first", "random"])
@pytest.mark.parametrize("m", [0.2, 0.9])
def test_the_delivered_species_follow_the_target_over_the_buckets_together(choice, m, monkeypatch):
    labels = long_tailed_labels()
    index = bucketed_index(labels)
    mix, shares = sdxl_data.ClassMix(index, choice, start=m, end=m), distribution(labels, choice)

    def clusters(weights=None):
        """Mean and standard error of every species' share over batches of one bucket each."""
        if weights is not None:
            monkeypatch.setattr(sdxl_data.SamplePlan, "bucket_weights", lambda plan, step: weights)
        plan, batches = sdxl_data.SamplePlan(index, mix, choice, seed=5, global_batch=10), []
        for _ in range(3000):
            rows, chosen = plan.next_batch()
            assert len(set(index.buckets[rows].tolist())) == 1
            batches.append(np.bincount(chosen, minlength=len(index.label_names)) / 10)
        return np.mean(batches, axis=0), np.std(batches, axis=0) / np.sqrt(len(batches))

    def distance(result, m):
        expected = np.array([mixture(shares, m)[name] for name in index.label_names])
        return np.abs((result[0] - expected) / result[1]).max()

    delivered = clusters()
    assert distance(delivered, m) < 4.5 < distance(delivered, m - 0.1)
    if m < 0.5:  # far from the data: buckets as often as they have images, as other trainers do, are off
        assert distance(clusters(np.bincount(index.buckets) / len(index)), m) > 4.5


def test_a_bucketed_plan_restarted_from_its_state_continues_identically():
    index = bucketed_index(long_tailed_labels()[::10])
    whole = micro_batches(index)
    batches = list(whole)
    assert all(pass_ > 0 for pass_, _ in whole.states[30])
    for step in (1, 7, 29):
        assert (
            list(micro_batches(index, step=step, cursors=json.loads(json.dumps(whole.states[step])))) == batches[step:]
        )


def test_unlabelled_images_come_at_their_constant_rate_over_the_buckets_too():
    index = index_of([["a"]] * 300 + [[]] * 300)
    index = replace(index, bucket_sizes=[(256, 128), (128, 256)], buckets=np.repeat([0, 1, 1, 1], 150))
    plan = sdxl_data.SamplePlan(index, sdxl_data.ClassMix(index, "random"), "random", seed=1, global_batch=1)
    counts = deliver(plan, 6000)
    expected = 6000 * sdxl_data.UNLABELLED_ACCEPTANCE / (1 + sdxl_data.UNLABELLED_ACCEPTANCE)
    assert abs(counts[None] - expected) < 5 * np.sqrt(expected)
