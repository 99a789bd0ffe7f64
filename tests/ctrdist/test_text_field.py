import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ctrdist import text_field
from ctrdist.text_field import FuseConfig, TextField, moments

WIDTH, D = 6, 4


@pytest.fixture
def table() -> np.ndarray:
    """Vectors along few directions and far from the origin, padding and an item without text among them."""
    draws = np.random.default_rng(0)
    table = draws.normal(size=(500, WIDTH)) * (5, 3, 2, 1, 0.8, 0.7) @ np.linalg.qr(draws.normal(size=(6, 6)))[0] + 7
    table[[0, 1, 30]] = 0
    return table.astype(np.float16)


def field(table: np.ndarray, whiten: bool = True, **options) -> TextField:
    torch.manual_seed(0)
    made = TextField(WIDTH, D, FuseConfig(dropout=0.0, whiten=whiten, **options)).double()
    made.measure(table)
    return made


def test_mean_and_covariance_are_numpys_whatever_the_chunks(table, monkeypatch):
    rows = table[table.any(1)].astype(np.float64)
    for chunk in (1, 7, 10_000):
        monkeypatch.setattr(text_field, "CHUNK", chunk)
        mean, covariance = moments(table)
        np.testing.assert_allclose(mean, rows.mean(0))
        np.testing.assert_allclose(covariance, np.cov(rows.T, bias=True), atol=1e-10)
    monkeypatch.setattr(text_field, "SAMPLE", 100)
    sample = table[::5]
    np.testing.assert_allclose(moments(table)[0], sample[sample.any(1)].astype(np.float64).mean(0))


def test_a_whitened_field_is_the_mlp_of_whitened_vectors(table):
    made, text = field(table), torch.from_numpy(table[:40].astype(np.float64))
    rows = table[table.any(1)].astype(np.float64)
    white = (text.numpy() - rows.mean(0)) @ np.linalg.inv(sqrtm(np.cov(rows.T, bias=True)).real)
    white[~table[:40].any(1)] = 0
    assert np.abs(np.cov(white.T)).max() < 3, "the test's own whitening"
    plain = field(table, whiten=False)
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if k not in ("mean", "whitening")})
    found, expected = made(text), plain(torch.from_numpy(white))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # what is measured is kept in float32
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weights).sum(), list(one.parameters())) for out, one in
                 ((found, made), (expected, plain))]  # fmt: skip
    for mine, others in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, others, rtol=1e-3, atol=1e-4)


def test_without_whitening_the_first_layer_reads_the_vectors_as_they_are(table):
    made = field(table, whiten=False)
    text = torch.from_numpy(table[:9].astype(np.float64))
    torch.testing.assert_close(made(text), made.norm(made.mlp(text)))
    assert {"mean", "whitening"}.isdisjoint(made.state_dict())


@pytest.mark.parametrize("items", [0, 1, 3])
def test_fewer_items_than_dimensions(table, items):
    """What no item has to tell is left out: vectors that differ in it alone are alike."""
    made, others = field(table[: 2 + items]), torch.from_numpy(table[31:50].astype(np.float64))
    assert made(others).isfinite().all()
    seen = np.vstack([table[2 : 2 + items].astype(np.float64), np.zeros((int(items == 0), WIDTH))])
    along = np.linalg.svd(seen - seen.mean(0), full_matrices=True)[2]
    unseen = torch.from_numpy(along[max(items - 1, 0) :])
    torch.testing.assert_close(made(others + 50 * unseen[0]), made(others), rtol=1e-3, atol=1e-3)


def test_a_single_layer_in_bfloat16_takes_means_off_in_full(table):
    made = field(table, hidden=()).float()
    text = torch.from_numpy(table[2:].astype(np.float32))
    with torch.autocast("cpu", torch.bfloat16):
        rough = made(text)
    torch.testing.assert_close(rough, made(text))
