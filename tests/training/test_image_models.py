"""GAN, CycleGAN and autoencoders from data to samples, small."""

import matplotlib.image
import numpy as np
import pytest
import torch

from leedl_fast.data.images import Images, load_digits
from leedl_fast.training.checkpoint import KEY, read_checkpoint
from leedl_fast.training.engine import load_task, resumed_run, train
from leedl_fast.training.judge import precision, train_judge
from leedl_fast.training.registry import configure, task_class
from leedl_fast.training.tasks import cyclegan
from leedl_fast.training.tasks.autoencoder import area_under_roc, kmeans_error, pca_error
from leedl_fast.training.tasks.gan import captions_of

TINY = {"embed_dim": 16, "num_heads": 2, "num_layers": 1, "batch_size": 8, "steps": 4}
NAMES = ["gan", "autoencoder", "vae", "vqvae", "cyclegan"]


@pytest.fixture
def few_negatives(monkeypatch):
    """Digits in the place of MNIST, which would have to be fetched."""
    monkeypatch.setattr(cyclegan, "load_mnist", load_digits)


def run(name, variant="", **changes):
    return train(configure(name, variant, **changes), backend="cpu", quiet=True)


def write_folder(path, size=12, **subfolders):
    """Grey pictures, black to white from left to right or turned, in subfolders of so many."""
    generator = np.random.default_rng(0)
    for name, number in subfolders.items():
        folder = path / name if name != "all" else path
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(number):
            picture = np.tile(np.linspace(0, 0.8, size), (size, 1))
            picture = np.rot90(picture, sorted(subfolders).index(name))
            picture = picture + 0.2 * generator.random((size, size))
            matplotlib.image.imsave(folder / f"{i}.png", picture, cmap="gray", vmin=0, vmax=1)
    return str(path)


def test_a_conditional_gan_draws_what_it_is_asked_for():
    metrics = run("gan", steps=250).metrics
    assert metrics["judge_accuracy"] > 0.95
    assert metrics["agreement"] > 0.7
    assert metrics["effective_classes"] > 9


def test_a_wasserstein_gan_comes_near_the_digits():
    metrics = run("gan", "wgan-gp", steps=150).metrics
    assert metrics["precision"] > 0.1  # after 10 steps 0.0, of real digits 0.9
    assert metrics["effective_classes"] > 8


def test_a_gan_reads_texts(tmp_path):
    result = train(
        configure("gan", "text", **TINY | {"steps": 2}), output=tmp_path / "run", quiet=True
    )
    task = load_task(result.checkpoint, "gan")
    options = task.SampleOptions(prompt="a seven", columns=3)
    (line,) = task.sample(options, tmp_path)
    assert line == f"wrote {tmp_path / 'gan.png'}: a row of each of: a seven\n"
    assert matplotlib.image.imread(tmp_path / "gan.png").shape[:2] == (100, 300)
    with pytest.raises(ValueError, match="prompt must have 1 to 22 characters, got 'a a a"):
        list(task.sample(task.SampleOptions(prompt="a " * 20), tmp_path))
    assert captions_of("7") == [
        "7",
        "a 7",
        "the picture of a 7",
        "seven",
        "a seven",
        "the picture of a seven",
    ]
    assert captions_of("cat") == ["cat", "a cat", "the picture of a cat"]


def test_a_prompt_needs_a_model_that_reads(tmp_path):
    task = run("gan", **TINY).task.eval()
    with pytest.raises(ValueError, match='condition "text", got one with "label"'):
        list(task.sample(task.SampleOptions(prompt="a 7"), tmp_path))


@pytest.mark.parametrize("variant", ["", "one discriminator"])
def test_a_cyclegan_translates(few_negatives, variant):
    """8 x 8 digits to their negatives."""
    metrics = run(
        "cyclegan",
        variant,
        steps=250,
        learning_rate=2e-3,
        patch_size=4,
    ).metrics
    assert metrics["judge_accuracy"] > 0.9
    assert metrics["untranslated"] < 0.3
    assert metrics["recognised"] > 0.8
    assert metrics["cycle_error"] < 0.1


def test_an_autoencoder_beats_principal_components():
    metrics = run("autoencoder", steps=500).metrics
    assert metrics["pca_mse"] == pytest.approx(0.025, abs=0.003)
    assert metrics["times_better_than_pca"] > 1.2


def test_a_denoising_autoencoder_takes_noise_away():
    assert run("autoencoder", "denoising", steps=250).metrics["gain_db"] > 4


def test_anomalies_are_found():
    assert run("autoencoder", "anomaly", steps=150).metrics["auc"] > 0.85


def test_a_vae_uses_its_latents():
    metrics = run("vae", steps=300).metrics
    assert metrics["active_dims"] >= 8
    assert metrics["mse"] < 0.02


@pytest.mark.parametrize("variant", ["", "codebook loss"])
def test_a_vqvae_uses_its_codes(variant):
    metrics = run("vqvae", variant, steps=400).metrics
    assert metrics["perplexity"] > 32
    assert metrics["times_better_than_kmeans"] > 0.7


@pytest.mark.parametrize("name", NAMES)
def test_eager_and_fused_runs_have_one_loss_curve(few_negatives, name):
    changes = TINY | {"steps": 6, "learning_rate": 1e-3, "patch_size": 4}
    config = configure(name, **changes)
    eager = train(config, backend="eager", quiet=True)
    fused = train(config, backend="cpu", quiet=True)
    torch.testing.assert_close(
        torch.tensor(fused.losses), torch.tensor(eager.losses), atol=0, rtol=1e-3
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(few_negatives, tmp_path, name):
    changes = TINY | {"ema_decay": 0.9, "patch_size": 4, "warmup_steps": 2}
    whole = run(name, **changes)
    half = train(configure(name, **changes | {"steps": 2}), output=tmp_path, quiet=True)
    about = read_checkpoint(half.checkpoint, name)[KEY]
    rest = train(resumed_run(about, {"steps": 4}), resume=half.checkpoint, quiet=True)
    assert len(rest.losses) == 2
    # The learning rate falls over another number of steps: the first loss after it is the same.
    assert half.losses + rest.losses[:1] == whole.losses[:3]


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_pictures_that_follow_the_seed(few_negatives, tmp_path, name):
    result = train(configure(name, **TINY | {"patch_size": 4}), output=tmp_path / "run", quiet=True)
    task = load_task(result.checkpoint, name)

    def picture(seed):
        list(task.sample(task.SampleOptions(seed=seed, columns=4), tmp_path))
        assert [path.name for path in tmp_path.glob("*.png")] == [f"{name}.png"]
        return matplotlib.image.imread(tmp_path / f"{name}.png")

    first = picture(0)
    assert first.shape[1] == 400  # 4 columns of 8 pixels, 12 times as large, and a line of 4
    assert first.std() > 0.05
    assert np.array_equal(first, picture(0))
    assert not np.array_equal(first, picture(1))
    with pytest.raises(ValueError, match="output must be a folder for the pictures, got None"):
        list(task.sample(task.SampleOptions(), None))
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        list(task.sample(task.SampleOptions(columns=0), tmp_path))


def test_own_images_train_and_are_reconstructed_with_a_score(tmp_path):
    data = write_folder(tmp_path / "data", all=10)
    result = train(
        configure("autoencoder", **TINY, data=data, size=8), output=tmp_path / "run", quiet=True
    )
    task = load_task(result.checkpoint, "autoencoder")
    *scores, line = task.sample(task.SampleOptions(images=data, columns=4), tmp_path)
    assert len(scores) == 10
    assert scores[9].startswith("image 10: anomaly score 0.")
    assert line.startswith(f"wrote {tmp_path / 'autoencoder.png'}: rows of images, each above")
    picture = matplotlib.image.imread(tmp_path / "autoencoder.png")
    assert picture.shape[:2] == (600, 400)  # 3 rows of images, 3 of reconstructions
    one = write_folder(tmp_path / "one", all=1)
    assert len(list(task.sample(task.SampleOptions(images=one, columns=1), tmp_path))) == 2
    empty = write_folder(tmp_path / "empty", all=0)
    with pytest.raises(ValueError, match="with at least 1 images, got 0"):
        list(task.sample(task.SampleOptions(images=empty), tmp_path))


def test_own_images_with_and_without_labels(tmp_path):
    labelled = write_folder(tmp_path / "labelled", cat=6, dog=6)
    result = run("gan", **TINY, data=labelled, size=8)
    assert result.task.about["label_names"] == ["cat", "dog"]
    plain = write_folder(tmp_path / "plain", all=8)
    with pytest.raises(ValueError, match='a subfolder of images per label for condition "label"'):
        run("gan", **TINY, data=plain, size=8)
    assert "agreement" not in run("gan", **TINY, data=plain, size=8, condition="none").metrics


def test_two_folders_are_two_domains(tmp_path):
    options = TINY | {"patch_size": 4, "size": 12}
    data = write_folder(tmp_path / "two", summer=6, winter=5)
    result = run("cyclegan", **options, data=data)
    assert result.task.about["names"] == ["summer", "winter"]
    assert result.metrics.keys() == {"cycle_error"}
    assert len(result.task.data.y) == 5
    for number, (subfolders, message) in enumerate(
        (
            ({"a": 2, "b": 2, "c": 2}, r"two subfolders .* got the subfolders \['a', 'b', 'c'\]"),
            ({"all": 4}, "two subfolders"),
            ({"a": 4, "b": 1}, "at least 2 images per domain, got 1 in 'b'"),
            ({"all": 1}, "at least 2 images, got 1"),
        )
    ):
        folder = write_folder(tmp_path / str(number), **subfolders)
        with pytest.raises(ValueError, match=message):
            run("cyclegan", **options, data=folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_one_image_is_an_error(tmp_path, name):
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        run(name, **TINY, data=write_folder(tmp_path, all=1))


def test_a_gan_needs_neighbours_to_be_judged_by(tmp_path):
    with pytest.raises(ValueError, match="at least 4 images to train on, got 3 and 1 held out"):
        run("gan", **TINY, data=write_folder(tmp_path, a=2, b=2))
    more = write_folder(tmp_path / "more", a=3, b=2)
    assert "precision" in run("gan", **TINY, data=more).metrics


def test_the_domains_are_disjoint_and_hold_every_digit(few_negatives):
    settings = task_class("cyclegan").Settings()
    domains = cyclegan.load_domains(settings)
    digits = load_digits().images
    parts = torch.cat((domains.x, 1 - domains.y, domains.held_out)).flatten(1)
    assert len(domains.x) == pytest.approx(len(domains.y), abs=1)
    # The same pictures, each once.
    ordered = sorted(map(tuple, parts.mul(16).round().int().tolist()))
    assert ordered == sorted(map(tuple, digits.flatten(1).mul(16).round().int().tolist()))
    assert all((part.bincount(minlength=10) > 20).all() for part in domains.labels)


def test_a_normal_label_must_be_one_of_the_data():
    with pytest.raises(ValueError, match=r"normal_label must be one of \['0', .* got 'x'"):
        run("autoencoder", **TINY, normal_label="x")


def test_anomalies_need_both_kinds_held_out(tmp_path):
    with pytest.raises(ValueError, match=r"data must have images of 'a' to train on, and held out"):
        run("autoencoder", **TINY, normal_label="a", data=write_folder(tmp_path, a=4, b=1))


def test_measures_know_their_extremes():
    digits = load_digits()
    images, labels = digits.images, digits.labels
    judge = train_judge(images[:1400], labels[:1400], 10)
    assert judge.accuracy(images[1400:], labels[1400:]) > 0.9
    assert precision(images[:50], images) == 1
    assert precision(torch.rand(50, 1, 8, 8), images) == 0
    assert pca_error(images, images, 64) == pytest.approx(0, abs=1e-10)
    flat = torch.randn(3, 5)[torch.randint(3, (200,))]
    assert kmeans_error(flat, flat, 3) == pytest.approx(0, abs=1e-10)
    assert kmeans_error(flat, flat, 1) == pytest.approx(flat.var(0, correction=0).mean().item())
    scores, positive = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    assert area_under_roc(scores, positive) == pytest.approx((2 + 1.5) / 4)


def test_images_stay_with_their_labels_when_split():
    from leedl_fast.training.image_data import split_images

    images = torch.arange(10.0).view(-1, 1, 1, 1)
    data = Images(images, torch.arange(10), [str(i) for i in range(10)], "digest")
    train_part, held_out = split_images(data, 3)
    assert len(train_part.images) == 8
    for part in (train_part, held_out):
        assert torch.equal(part.images.flatten().long(), part.labels)
    assert sorted((*train_part.labels.tolist(), *held_out.labels.tolist())) == list(range(10))
