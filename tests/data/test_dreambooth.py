"""Task dreambooth on a tiny random SDXL: its loss, its photos, whole runs, and what is refused."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import assert_eval_repeats, refused, result_of, setup_of, train_until
from safetensors.torch import load_file

import convert
import eval as evaluation
import train
from data import dreambooth, labels_for, load_task
from data.dreambooth import Shot, read_photos, splits
from diffusion import PictureConfig
from formats import sdxl as sdxl_files
from formats.checkpoint import load_pretrained
from formats.diffusers_files import LORA_FILE
from methods import METHODS
from support.errors import UserError

pytest.importorskip("diffusers")


def save_photo(path, wide, high):
    """Writes a photo whose red tells the column and whose green tells the row."""
    from PIL import Image
    photo = Image.new("RGB", (wide, high))
    photo.putdata([(x * 255 // wide, y * 255 // high, 60) for y in range(high)
                   for x in range(wide)])
    photo.save(path)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, *size in (("b.jpg", 64, 32), ("a.png", 16, 16), ("c.webp", 24, 40)):
        save_photo(folder / name, *size)
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture
def task(sdxl, photos):
    model, tokenizer = load_pretrained(sdxl)
    made = load_task("dreambooth", setup_of(model, tokenizer), data_dir=str(photos),
                     subject="a photo of a zib cat")
    made.begin(model)
    return made, model.eval()


# ---- data
def test_photos_become_middle_squares_and_tell_how_they_were_cut(photos):
    found, ids = read_photos(photos, 16)
    assert found.shape == (3, 3, 16, 16) and found.dtype == torch.uint8
    assert ids.tolist() == [[16, 16, 0, 0, 16, 16],          # a.png, as it is
                            [32, 64, 0, 8, 16, 16],          # b.jpg, halved, loses left and right
                            [40, 24, 5, 0, 16, 16]]          # c.webp loses above and below
    red, green = found[1, 0, 8].int(), found[1, 1, :, 8].int()
    assert 60 < red[0] < 76 and 180 < red[-1] < 196          # a quarter is cut on each side
    assert green[0] < 16 and green[-1] > 232
    assert torch.equal(found[0, 0, 0], (torch.arange(16) * 255 // 16).byte())


def test_a_photo_that_lies_on_its_side_is_turned(photos):
    from PIL import Image
    photo = Image.open(photos / "b.jpg")
    exif = photo.getexif()
    exif[0x0112] = 6                                         # turn by 90 degrees
    photo.save(photos / "b.jpg", exif=exif)
    assert read_photos(photos, 16)[1][1].tolist() == [64, 32, 8, 0, 16, 16]


def test_every_example_has_a_noise_of_its_own():
    made = splits(3)
    shots = [shot for split in made.values() for shot in split]
    assert len({shot.noise for shot in shots}) == len(shots)
    assert {shot.photo for shot in made["train"]} == {0, 1, 2}


# ---- loss
def by_hand(task, model, shot, velocity=False):
    """Computes an example's loss with diffusers' DDPM scheduler."""
    from diffusers import DDPMScheduler
    scheduler = DDPMScheduler.from_config(model.pipeline.scheduler.config)
    own = torch.Generator().manual_seed(shot.noise)
    t = torch.randint(1000, (1,), generator=own)
    spread, e = (torch.randn(1, 4, 8, 8, generator=own) for _ in range(2))
    mean, std, text, pooled, ids = task.given
    z = mean[shot.photo] + std[shot.photo] * spread
    noisy = scheduler.add_noise(z, e, t)
    out = model.unet(noisy, t, text, added_cond_kwargs=dict(
        text_embeds=pooled, time_ids=ids[shot.photo, None])).sample
    target = scheduler.get_velocity(z, e, t) if velocity else e
    return (out - target).square().mean()


def test_the_loss_is_that_of_the_written_definition(task):
    made, model = task
    for shot in (Shot(0, 3), Shot(2, 77)):
        assert torch.allclose(made.loss(model, [shot]), by_hand(made, model, shot), rtol=1e-5)
    model.pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    for shot in (Shot(0, 3), Shot(2, 77)):
        velocity = by_hand(made, model, shot, velocity=True)
        assert torch.allclose(made.loss(model, [shot]), velocity, rtol=1e-5)
        assert not torch.allclose(velocity, by_hand(made, model, shot), rtol=1e-2)


def test_the_loss_of_a_batch_is_the_sum_of_its_examples(task):
    made, model = task
    shots = made.train[3:8]
    alone = sum(made.loss(model, [shot]) for shot in shots)
    assert torch.allclose(made.loss(model, shots), alone, rtol=1e-5) and made.size(shots) == 5
    scores = made.score(model, shots)
    assert scores.values["loss"] == pytest.approx(alone.item() / 5, rel=1e-5)
    assert made.mean_loss(model, shots) == pytest.approx(scores.values["loss"], rel=1e-5)
    json.dumps(scores.predictions)


def test_photos_and_caption_are_encoded_once(task, monkeypatch):
    made, model = task
    for name in ("encode", "read"):
        monkeypatch.setattr(type(model), name, None)
    assert made.loss(model, made.train[:2]).isfinite()
    assert made.losses(model, made.train[:2]).shape == (2,)


def test_another_photo_or_caption_has_another_fingerprint(sdxl, photos, task):
    model, tokenizer = load_pretrained(sdxl)

    def fingerprint(caption):
        return load_task("dreambooth", setup_of(model, tokenizer), data_dir=str(photos),
                         subject=caption).fingerprint()
    first = fingerprint("a photo of a zib cat")
    assert first == task[0].fingerprint() != fingerprint("a zib cat")
    save_photo(photos / "a.png", 17, 16)
    assert fingerprint("a photo of a zib cat") != first


# ---- runs
@pytest.fixture
def flags(sdxl, photos, tmp_path, monkeypatch):
    """Makes scores and pictures short; returns the flags of a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sdxl_files, "STEPS", 2)
    monkeypatch.setattr(dreambooth, "NOISES", {"train": 60, "valid": 2, "test": 4})
    return ["--task", "dreambooth", "--model", str(sdxl), "--data-dir", str(photos), "--subject",
            "a photo of a zib cat", "--steps", "4", "--save-every", "2", "--lr", "1e-2"]


def adapters_of(folder):
    return load_file(Path(folder, "adapter.safetensors"))


def difference(a, b):
    """Returns the mean difference of two runs' adapters, as a share of their mean size.

    Adam's first steps are the gradient's sign, which rounding turns over where it is near 0.
    """
    a, b = adapters_of(a), adapters_of(b)
    assert a.keys() == b.keys()
    a, b = (torch.cat([t.flatten().double() for t in tensors.values()]) for tensors in (a, b))
    return ((a - b).abs().mean() / a.abs().mean()).item()


def test_a_run_learns_draws_and_gives_its_adapters_to_diffusers(flags, capsys):
    from PIL import Image
    train.main(["--method", "dash", *flags, "--steps", "30", "--out", "run"])
    printed, result = capsys.readouterr().out, result_of("run")
    assert "to_q,to_k,to_v,to_out.0; rank 4" in printed and "picture.png" in printed
    assert result["after"]["loss"] < result["before"]["loss"]
    assert Image.open("run/picture.png").size[0] > 16
    assert_eval_repeats(capsys)
    evaluation.main(["--run", "run", "--prompt", "zib cat on the beach"])
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path == Path("run/prompt-zib-cat-on-the-beach.png") and path.read_bytes()[:4] == b"\x89PNG"
    convert.main(["--run", "run", "--peft", "out"])
    assert [file.name for file in Path("out").iterdir()] == [LORA_FILE]
    convert.main(["--run", "run", "--to", "merged"])
    sdxl = flags[flags.index("--model") + 1]
    convert.main(["--from-peft", "out", "--model", sdxl, "--to", "again"])
    one, two = (load_file(Path(folder, "unet/diffusion_pytorch_model.safetensors"))
                for folder in ("merged", "again"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    train.main(["--from-peft", "out", *flags, "--out", "second"])
    assert result_of("second")["before"]["loss"] == pytest.approx(result["after"]["loss"], rel=1e-4)
    merged = flags[:flags.index("--model") + 1] + ["merged"] + flags[flags.index("--model") + 2:]
    train.main(["--method", "lora", *merged, "--steps", "1", "--out", "third"])
    assert result_of("third")["before"]["loss"] == pytest.approx(result["after"]["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(flags, method):
    flags = ["--method", method, *flags, "--skip-before", "--eval-every", "9"]
    train.main([*flags, "--out", "whole"])
    train_until(2, [*flags, "--out", "run"])
    train.main([*flags, "--out", "run", "--resume"])
    assert difference("whole", "run") == 0
    assert result_of("run")["after"] == result_of("whole")["after"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_and_checkpointing_train_the_same(flags, method):
    flags = ["--method", method, *flags, "--skip-before", "--eval-every", "9"]
    train.main([*flags, "--out", "one"])
    train.main([*flags, "--grad-accum", "2", "--grad-checkpointing", "--out", "two"])
    assert difference("one", "two") < 1e-3


@pytest.mark.slow
def test_two_processes_train_as_one(flags):
    flags = ["--method", "lora", *flags, "--skip-before", "--eval-every", "9"]
    train.main([*flags, "--out", "one"])
    Path("driver.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from data import dreambooth
from formats import sdxl
sdxl.STEPS, dreambooth.NOISES = 2, {dreambooth.NOISES}
train.main({[*flags, "--out", "two"]!r})
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "--standalone", "driver.py"], text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference("one", "two") < 1e-3
    assert result_of("two")["after"]["loss"] == pytest.approx(result_of("one")["after"]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bf16_trains(flags, method):
    train.main(["--method", method, *flags, "--dtype", "bf16", "--grad-checkpointing",
                "--out", "run"])
    assert all(t.dtype == torch.float32 for t in adapters_of("run").values()
               if t.is_floating_point()) and Path("run/picture.png").exists()


# ---- wrong input
def test_wrong_photos_end_with_one_line(flags, photos, capsys):
    flags = ["--method", "lora", *flags]
    save_photo(photos / "d.png", 15, 30)
    assert "d.png: has 15 x 30 points, the model draws 16 x 16" in refused(capsys, *flags)
    (photos / "d.png").write_text("not a picture")
    assert "d.png: not a picture" in refused(capsys, *flags)
    (photos / "d.png").write_bytes((photos / "a.png").read_bytes()[:60])
    assert "d.png: not a picture" in refused(capsys, *flags)
    for file in photos.iterdir():
        file.unlink()
    assert "photos: holds no pictures (.png, .jpg" in refused(capsys, *flags)
    photos.rmdir()
    assert "photos: not a folder" in refused(capsys, *flags)


def test_wrong_flags_end_with_one_line(flags, sdxl, capsys, monkeypatch):
    def changed(name, *value):
        at = flags.index(name)
        return ["--method", "lora", *flags[:at], *value, *flags[at + 2:]]

    assert "--task dreambooth needs --subject" in refused(capsys, *changed("--subject"))
    assert "--task dreambooth needs --data-dir" in refused(capsys, *changed("--data-dir"))
    wanted = "dreambooth: needs a model that draws pictures, a diffusers folder of SDXL"
    assert wanted in refused(capsys, *changed("--model"))
    with pytest.raises(UserError, match=wanted):
        labels_for("dreambooth", None, PictureConfig(n_words=3))
    with pytest.raises(UserError, match="pictures, such as data/pictures"):
        labels_for("subject", None, load_pretrained(sdxl)[0].config)
    assert "this one draws pictures" in refused(capsys, "--method", "lora", "--model", str(sdxl))
    long = refused(capsys, *changed("--subject", "--subject", "cat " * 80))
    assert "tokens, the model reads 77" in long
    whole = ["--method", "lora", *flags]
    assert "dreambooth trains on whole pictures" in refused(capsys, *whole, "--loss-on", "answer")
    assert "no nn.Linear is named q:" in refused(capsys, *whole, "--targets", "q")
    shutil.copytree(sdxl, "model", ignore=shutil.ignore_patterns("vae"))
    assert "model: vae is missing" in refused(capsys, *changed("--model", "--model", "model"))
    monkeypatch.setattr("support.errors.find_spec", lambda name: name != "diffusers" or None)
    assert "the package diffusers is missing: pip install" in refused(capsys, *whole)


def test_without_pillow_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("support.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match="package PIL is missing"):
        dreambooth.load(setup_of(), "photos", "cat")
