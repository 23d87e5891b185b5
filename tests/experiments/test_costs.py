"""The formulas of costs.py against what torch counts and what autograd keeps."""
import pytest
import torch

from experiments import contenders, costs
from experiments.contenders import RANK, TARGETS, llama, one_layer, one_model
from experiments.profiling import addresses, flops, kept_for_backward, peak_bytes
from methods import count, inject
from support.errors import UserError

NAMES = [name for name in ["frozen", *contenders.OURS] if name in costs.MAPPED]


@pytest.mark.parametrize("name", NAMES)
def test_one_layer(name):
    contender = one_layer(name, 300, 500, 700)
    contender.step()
    frozen = 2 * 2 * 700 * 300 * 500
    work = flops(contender.forward_backward) / frozen
    assert work == pytest.approx(costs.work(name, 300, 500, 700, RANK), rel=1e-4)
    kept = kept_for_backward(contender.forward, contender.owned) / 4
    assert kept == pytest.approx(costs.kept(name, 300, 500, 700, RANK), rel=0.005)
    count = sum(p.numel() for p in contender.trainable)
    assert count == costs.parameters(name, 300, 500, RANK)


def test_dual_lora_holds_no_matrix_of_the_weights_size_not_even_for_a_moment():
    """A layer of 8192 x 64 and two tokens: blocks of 1024 rows, and thin gradients."""
    def peak(name, n_out):
        contender = one_layer(name, 64, n_out, 2)
        for p in contender.trainable:                       # there from the start, as in training
            p.grad = torch.zeros_like(p)
        owned = contender.owned | {p.grad.data_ptr() for p in contender.trainable}
        return peak_bytes(contender.forward_backward, owned, "cpu") / (4 * 64 * n_out)

    assert peak("dual", 8192) < 1 and peak("dual, naive", 8192) > 4


@pytest.fixture
def small(monkeypatch):
    shape = dict(vocab_size=500, d_model=128, n_layers=4, n_heads=4, d_ff=352)
    monkeypatch.setitem(contenders.SIZES, "small", shape)
    return llama("small")


@pytest.mark.parametrize("targets", [
    TARGETS, *(pytest.param(names, marks=pytest.mark.slow) for names in (["q", "o"],
                                                                         ["v", "gate"]))],
    ids=" ".join)
@pytest.mark.parametrize("name", NAMES)
def test_a_model(name, targets, small, monkeypatch):
    monkeypatch.setattr(contenders, "TARGETS", targets)
    tokens = torch.randint(3, 400, (2, 97))                 # 96 of them have a next one
    contender = one_model(small, name, tokens)
    contender.step()
    on = [] if name == "frozen" else targets
    counted = flops(contender.forward_backward) / 192
    expected = costs.flops_per_token(small.config, name, on, RANK, 96, sequences=2)
    # The formula lets gradients pass through all blocks. Under an adapter they end in the first.
    assert 0.95 * expected < counted <= 1.0001 * expected
    kept = kept_for_backward(contender.forward, contender.owned) / 192
    assert kept == pytest.approx(costs.kept_by_model(small.config, name, on, RANK), rel=0.03)
    count = sum(p.numel() for p in contender.trainable)
    assert count == costs.trainable(small.config, name, on, RANK)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_memory_of_a_model_in_bf16(name, checkpointing, monkeypatch):
    shape = dict(vocab_size=2000, d_model=128, n_layers=8, n_heads=2, d_ff=344)
    monkeypatch.setitem(contenders.SIZES, "small", shape)
    small = llama("small").bfloat16()
    contender = one_model(small, name, torch.randint(3, 400, (2, 257)), bf16=True)
    contender.model.checkpointing = checkpointing
    contender.step()
    for p in contender.trainable:
        p.grad = torch.zeros_like(p)                        # there already: not counted
    owned = contender.owned | addresses(contender.model, *(p.grad for p in contender.trainable))
    peak = peak_bytes(contender.forward_backward, owned, "cpu")
    expected = costs.memory(small.config, name, TARGETS, RANK, 512, checkpointing)
    autocasts = name == "full" and not checkpointing
    copies = 2 * costs.model_numbers(small.config) * autocasts
    assert peak == pytest.approx(expected["activations"] + copies, rel=0.1)
    if not checkpointing:
        kept = kept_for_backward(contender.forward, contender.owned)
        formula = costs.kept_by_model(small.config, name, TARGETS, RANK, bf16=True)
        assert kept == pytest.approx(512 * formula + copies, rel=0.05)


def test_the_large_models_have_the_sizes_in_their_names():
    assert costs.model_numbers(costs.LLAMA_7B) == 6_738_415_616
    assert costs.model_numbers(costs.LLAMA_70B) == 68_976_648_192


def test_memory_of_7b_by_hand():
    """LoRA of rank 8 on q and v: 32 layers x 2 x 8 x (4096 + 4096) numbers, 16 bytes each."""
    memory = costs.memory(costs.LLAMA_7B, "lora", ["q", "v"], 8, tokens=1000)
    assert memory["weights"] == 2 * 6_738_415_616
    assert memory["training"] == 16 * 32 * 2 * 8 * 8192
    block = 4 * (2 * 4096 + 32) + 2 * (4 * 4096 + 3 * 11008 + 4096 + 2 * 8)
    loss = 4 * 4096 + 3 * 4 * 32000
    assert memory["activations"] == 1000 * (32 * block + loss)
    checkpointed = costs.memory(costs.LLAMA_7B, "lora", ["q", "v"], 8, 1000, checkpointing=True)
    assert checkpointed["activations"] == 1000 * (32 * 2 * 4096 + loss)


def test_a_method_without_formulas_is_refused_by_name():
    for cost in (lambda: costs.parameters("vera", 8, 8, 2), lambda: costs.work("vera", 8, 8, 3, 2),
                 lambda: costs.kept("vera", 8, 8, 3, 2),
                 lambda: costs.memory(costs.LLAMA_7B, "vera", ["q"], 8, 1000)):
        with pytest.raises(UserError, match="vera: its costs are not mapped"):
            cost()


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "dual", "loha", "hira"])
def test_sdxl(method):
    """Compares with SDXL's UNet, built without memory for its weights."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
    assert sum(p.numel() for p in unet.parameters()) == costs.SDXL["unet"]
    inject(unet, method, ["to_q", "to_k", "to_v", "to_out.0"], RANK)
    assert count(unet)["trainable"] == costs.sdxl_trainable(method, RANK)
    assert costs.sdxl_memory("lora", 8)["training"] == 16 * 11_612_160
