"""diffusion.py: the line from picture to noise, the sampler, guidance, and what the model reads."""
import pytest
import torch
from torch import nn

from diffusion import PictureConfig, PictureModel, flow_loss, sample, waves

TINY = PictureConfig(n_words=5, caption=3, side=8, patch=4, d_model=16, n_layers=2, n_heads=2,
                     d_ff=24, smooth=4)


def model(spread=0.3):
    made = PictureModel(TINY).init_weights()
    for p in made.parameters():
        nn.init.normal_(p, std=spread)
    return made


class Known(nn.Module):
    """Knows the velocity of each caption: that of the picture with the word's number / 10."""

    def forward(self, z, t, words):
        picture = words[:, 0].float()[:, None, None, None] / 10
        return (z - picture) / t[:, None, None, None]           # (e - x), since z = x + t (e - x)


def test_walking_back_along_the_true_velocity_ends_at_the_picture():
    noise = torch.randn(2, 3, 8, 8)
    drawn = sample(Known(), torch.tensor([[3, 0], [4, 0]]), noise, steps=5, guidance=1.0)
    assert torch.allclose(drawn[0], torch.tensor(0.3), atol=1e-6)
    assert torch.allclose(drawn[1], torch.tensor(0.4), atol=1e-6)


def test_guidance_goes_beyond_what_the_caption_changes():
    """By hand: one step from e, v = e - 0 + g (e - .3 - e) = e - .3 g."""
    drawn = sample(Known(), torch.tensor([[3, 0]]), torch.randn(1, 3, 8, 8), steps=1, guidance=2.0)
    assert torch.allclose(drawn, torch.tensor(0.6), atol=1e-6)


def test_a_drawing_stays_in_the_range_of_pictures():
    drawn = sample(Known(), torch.tensor([[4, 0]]), torch.randn(1, 3, 8, 8), 1, guidance=9.0)
    assert torch.equal(drawn, torch.ones_like(drawn))


def test_the_loss_is_the_mean_square_of_the_velocity_s_error():
    class Zero(nn.Module):
        def forward(self, z, t, words):
            self.seen = z
            return torch.zeros_like(z)

    x, e = torch.full((2, 3, 8, 8), -1.0), torch.full((2, 3, 8, 8), 2.0)
    zero = Zero()
    loss = flow_loss(zero, x, torch.zeros(2, 3, dtype=torch.long), torch.tensor([0.25, 1.0]), e)
    assert loss.tolist() == [9, 9]                              # (2 + 1)^2
    assert zero.seen[:, 0, 0, 0].tolist() == [-0.25, 2]         # .75 * -1 + .25 * 2, and e


def test_before_training_the_velocity_is_zero_and_its_gradient_is_not():
    made = PictureModel(TINY).init_weights(torch.Generator().manual_seed(0))
    z, t, words = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([[1, 2, 0], [3, 0, 0]])
    assert not made(z, t, words).any()
    (made(z, t, words) - z).square().sum().backward()
    assert made.smooth.weight.grad.any()


@pytest.mark.parametrize("what", ["word", "order", "time", "far point"])
def test_every_input_reaches_every_point(what):
    made, z, t = model(), torch.randn(1, 3, 8, 8), torch.tensor([0.4])
    words, changed = torch.tensor([[1, 2, 0]]), [z, t, torch.tensor([[1, 2, 0]])]
    if what == "word":
        changed[2] = torch.tensor([[1, 3, 0]])
    elif what == "order":
        changed[2] = torch.tensor([[2, 1, 0]])
    elif what == "time":
        changed[1] = torch.tensor([0.5])
    else:
        changed[0] = z.clone()
        changed[0][0, 0, 0, 0] += 1
    moved = (made(*changed) - made(z, t, words)).abs()
    assert moved.amax(1).min() > 0


def test_pictures_of_a_batch_do_not_see_each_other():
    made, z, t = model(), torch.randn(3, 3, 8, 8), torch.rand(3)
    words = torch.randint(5, (3, 3))
    alone = torch.cat([made(z[i:i + 1], t[i:i + 1], words[i:i + 1]) for i in range(3)])
    assert torch.allclose(made(z, t, words), alone, atol=1e-4)


def test_waves_of_near_times_are_near_and_tell_far_times_apart():
    a, b, c = waves(torch.tensor([0.5, 0.5001, 0.9]), 64)
    assert (a - b).norm() < 0.3 and (a - c).norm() > 3
    assert torch.allclose(waves(torch.zeros(1), 4), torch.tensor([[1.0, 1, 0, 0]]))


def test_it_learns_two_pictures_by_their_words():
    torch.manual_seed(1)
    made = PictureModel(TINY).init_weights()
    pictures = torch.stack([torch.full((3, 8, 8), -0.8), torch.full((3, 8, 8), 0.8)])
    words = torch.tensor([[1, 0, 0], [2, 0, 0]])
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(150):
        which = torch.randint(2, (16,))
        loss = flow_loss(made, pictures[which], words[which], torch.rand(16),
                         torch.randn(16, 3, 8, 8)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = sample(made, words, torch.randn(2, 3, 8, 8), guidance=1.0)
    assert drawn[0].mean() < -0.3 and drawn[1].mean() > 0.3
