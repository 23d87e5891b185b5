"""Makes task `dreambooth`: Stable Diffusion XL learns the subject of a few photos.

    python train.py --method dora --task dreambooth --model SDXL_FOLDER --data-dir PHOTOS \\
        --subject "a photo of a zib cat" --dtype bf16 --grad-checkpointing
All photos have one caption, --subject, and there are no prior pictures: so LoRA-Dash's authors
train (DreamBooth: Ruiz et al. 2022, arXiv 2208.12242). A photo z, which the VAE has encoded,
becomes noise at time t (Ho et al. 2020, arXiv 2006.11239), with a_t from the folder's scheduler:
    z_t = sqrt(a_t) z + sqrt(1 - a_t) e            e from N(0, 1)
    loss = mean (target - UNet(z_t, t, caption))^2
The target is e, or the velocity sqrt(a_t) e - sqrt(1 - a_t) z if the scheduler says so. The VAE
and the text encoders run once. score() is this loss on fixed noises: it says nothing on pictures of
the subject elsewhere, which eye or CLIP must judge.
"""
import hashlib
import shlex
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.sheets import save_sheet
from data.task import PictureTask, Scores, Setup, device_of, scoring
from support.errors import UserError, require
from support.files import open_regular
from support.processes import is_main, joined, process_count, process_number

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NOISES = {"train": 10_000, "valid": 16, "test": 32}     # each split's examples
BATCH = 4                   # examples that are scored at once, at most


class Shot(NamedTuple):
    """Names a photo by its place in the folder, and the number of the noise that it gets."""
    photo: int
    noise: int


def splits(n: int) -> dict[str, list[Shot]]:
    """Makes the examples from n photos; no noise is there twice."""
    made, first = {}, 0
    for split, size in NOISES.items():
        made[split] = [Shot(i % n, first + i) for i in range(size)]
        first += size
    return made


def read_photos(folder: Path, side: int) -> tuple[Tensor, Tensor]:
    """Reads all photos of a folder as middle squares -> (n, 3, side, side) uint8, and ids (n, 6).

    The ids tell the UNet how the photo was cut, as SDXL has them. Raises UserError if there are no
    photos, or one is no picture or smaller than the model draws: enlarged, it would teach blur.
    """
    from PIL import Image, ImageOps  # here, since only pictures need it
    if not folder.is_dir():
        raise UserError(f"--data-dir {folder}: not a folder")
    photos, ids = [], []
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in KINDS):
        try:
            with open_regular(file) as stream:
                photo = ImageOps.exif_transpose(Image.open(stream)).convert("RGB")
        except UserError:
            raise
        except Exception as error:          # a broken file can break its reader in any way
            raise UserError(f"{file}: not a picture: {str(error)[:200]}") from None
        wide, high = photo.size
        if min(wide, high) < side:
            raise UserError(f"{file}: has {wide} x {high} points, the model draws {side} x {side}: "
                            "give photos of at least this size")
        scale = side / min(wide, high)
        square = ImageOps.fit(photo, (side, side), Image.Resampling.LANCZOS)
        points = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        photos.append(points.view(side, side, 3).permute(2, 0, 1))
        ids.append([high, wide, *(round((scale * length - side) / 2) for length in (high, wide)),
                    side, side])
    if not photos:
        raise UserError(f"--data-dir {folder}: holds no pictures ({', '.join(KINDS)})")
    return torch.stack(photos), torch.tensor(ids)


def noise_of(shots: list[Shot], times: int, shape: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Draws each example's time (n,), and two noises (n, *shape), from its number.

    So an example has the same in any batch, process and run.
    """
    draws = [torch.Generator().manual_seed(shot.noise) for shot in shots]
    return (torch.cat([torch.randint(times, (1,), generator=draw) for draw in draws]),
            *(torch.stack([torch.randn(shape, generator=draw) for draw in draws])
              for _ in range(2)))


def noise_loss(model, z: Tensor, e: Tensor, t: Tensor, a: Tensor, text: Tensor, pooled: Tensor,
               ids: Tensor, velocity: bool) -> Tensor:
    """Returns each example's mean squared error: (B,). z, e: (B, 4, h, w). a: (B,), a_t above."""
    signal, noise = a.sqrt()[:, None, None, None], (1 - a).sqrt()[:, None, None, None]
    found = model(signal * z + noise * e, t, text, pooled, ids)
    target = signal * e - noise * z if velocity else e
    return (target - found.float()).square().mean((1, 2, 3))


def draw_one(model, tokenizer, caption: str) -> Tensor:
    """Draws a caption, from the same noise in every call -> (1, 3, side, side) in [0, 1]."""
    with scoring(model):
        return model.draw(caption)


class DreamBooth(PictureTask):
    """Trains on photos; loss sums noise_loss() over examples."""
    meaning = {"loss": "mean squared error on the photos, at noises that do not train"}

    def __init__(self, photos: Tensor, ids: Tensor, caption: str, setup: Setup):
        super().__init__("dreambooth", **splits(len(photos)), setup=setup._replace(
            batch_size=min(setup.batch_size, BATCH)), defaults={"steps": 500, "batch_size": 4},
            notes={"caption": caption, "photos": len(photos)})
        self.photos, self.ids, self.caption = photos, ids, caption
        self.look = f"--prompt {shlex.quote(f'{caption} on the beach')}"
        self.noise_loss = torch.compile(noise_loss) if setup.compile else noise_loss
        self.given = None                   # the encoded photos and caption, from begin()

    def begin(self, model) -> None:
        """Lets the VAE encode the photos, and the text encoders the caption."""
        self.given = (*model.encode(self.photos / 127.5 - 1), *model.read(self.caption),
                      self.ids.to(device_of(model)))

    def losses(self, model, examples: list[Shot]) -> Tensor:
        """Returns noise_loss() of each example: (B,)."""
        mean, std, text, pooled, ids = self.given
        scheduler, of = model.pipeline.scheduler, [shot.photo for shot in examples]
        t, spread, e = noise_of(examples, len(scheduler.alphas_cumprod), mean.shape[1:])
        t, spread, e, a = (part.to(mean.device) for part in (t, spread, e,
                                                             scheduler.alphas_cumprod[t]))
        return self.noise_loss(
            model, mean[of] + std[of] * spread, e, t, a, text.expand(len(of), -1, -1),
            pooled.expand(len(of), -1), ids[of],
            scheduler.config.prediction_type == "v_prediction")

    def loss(self, model, examples: list[Shot]) -> Tensor:
        return self.losses(model, examples).sum()

    def score(self, model, examples: list[Shot]) -> Scores:
        if self.given is None:              # in eval.py
            self.begin(model)
        rows = [None] * len(examples)
        with scoring(model):
            for i in range(process_number(), len(examples), process_count()):
                loss = self.losses(model, [examples[i]]).item()
                rows[i] = examples[i]._asdict() | {"loss": loss}
        rows = joined(rows)
        return Scores({"loss": sum(row["loss"] for row in rows) / len(rows)}, {}, rows)

    def show(self, model, folder: Path) -> str:
        """Draws the caption into picture.png."""
        picture = draw_one(model, self.setup.tokenizer, self.caption)
        path = folder / "picture.png"
        if is_main():
            save_sheet(path, {"": picture}, [self.caption])
        return str(path)

    def fingerprint(self) -> str:
        tokens = self.setup.tokenizer(self.caption).input_ids
        shots = self.train, self.valid, self.test
        digest = hashlib.sha256(repr((self.notes, tokens, shots, self.ids.tolist())).encode())
        digest.update(self.photos.numpy().tobytes())
        return digest.hexdigest()


def load(setup: Setup, data_dir: str, subject: str) -> DreamBooth:
    """Builds the task. Raises UserError as read_photos() does, or if Pillow is missing."""
    require("PIL")
    return DreamBooth(*read_photos(Path(data_dir), setup.config.side), subject, setup)
