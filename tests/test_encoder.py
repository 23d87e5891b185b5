import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoder import Attention, Encoder, EncoderConfig, skewed, table_rows
from methods import adapters, inject
from support.errors import UserError

TINY = EncoderConfig(vocab_size=20, d_model=8, n_layers=2, n_heads=2, d_ff=12, max_positions=30,
                     dropout=0.0, attention_dropout=0.0, head_dropout=0.0)
V3 = replace(TINY, model_type="deberta-v2", pad=0, has_positions=False, buckets=4, reach=8,
             distance_terms=("c2p", "p2c"), norm_distances=True)
V1 = replace(V3, model_type="deberta", buckets=0, own_distance_layers=True, norm_distances=False)
KINDS = {"bert": replace(TINY, model_type="bert", pad=0, n_types=2), "roberta": TINY,
         "deberta": V1, "deberta-v3": V3}
kinds = pytest.mark.parametrize("kind", KINDS)


def model_of(config, n_labels=2, dtype=torch.float64, std=0.5):
    """Makes a model with large random weights."""
    torch.manual_seed(0)
    model = Encoder(replace(config)).init_weights().add_head(n_labels).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=std)
    return model.eval()


def texts(T=9):
    tokens = torch.randint(3, 20, (3, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, T // 2:] = False
    return tokens, mask


def test_the_rows_of_near_and_far_distances_by_hand():
    config = replace(V3, buckets=8, reach=16)           # mid 4, span 8
    # ln(r / 4) / ln(15 / 4) * 3: .506 for 5, .92 for 6, 1.27 for 7, 1.84 for 9, 2.08 for 10
    right = {0: 0, 1: 1, 4: 4, 5: 5, 6: 5, 7: 6, 9: 6, 10: 7, 15: 7}
    rows = dict(zip(range(-40, 41), table_rows(config, 41).tolist()))
    assert {r: rows[r] - 8 for r in right} == right
    assert all(rows[r] - 8 == 8 - rows[-r] for r in range(16))
    assert rows[16] == rows[40] == 15 and rows[-16] == rows[-40] == 0       # the table's ends


def test_without_buckets_a_distance_has_its_own_row_up_to_the_reach():
    assert table_rows(replace(V1, reach=3), 5).tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 5]


def test_the_skewed_view_takes_a_step_to_the_left_for_each_row():
    x = torch.arange(2 * 3 * 5).view(1, 2, 3, 5)
    assert skewed(x)[0, 0].tolist() == [[2, 3, 4], [6, 7, 8], [10, 11, 12]]
    assert skewed(x)[0, 1].tolist() == [[17, 18, 19], [21, 22, 23], [25, 26, 27]]
    assert skewed(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert skewed(torch.ones(2, 3, 1, 1)).shape == (2, 3, 1, 1)


def test_the_scores_of_the_worked_case():
    config = replace(V3, d_model=1, n_heads=1)
    layer = Attention(config).double()
    layer.k, layer.q = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    layer.k.weight.data, layer.q.weight.data = torch.tensor([[1., 0]]), torch.tensor([[0, 1.]])
    layer.double()
    q = k = torch.tensor([1., 2]).view(1, 1, 2, 1).double()
    rows = torch.tensor([[5., 0], [6, 1], [7, 2]]).double()         # K and Q of three distances
    found = layer.scores(q, k, rows, torch.tensor([0, 1, 2]))[0, 0] * math.sqrt(3)
    # (0, 0): 1 + 1 * 6 + 1 * 1; (0, 1): 2 + 1 * 5 + 2 * 0; (1, 0): 2 + 2 * 7 + 1 * 2;
    # (1, 1): 4 + 2 * 6 + 2 * 1
    assert torch.allclose(found, torch.tensor([[8., 7], [18, 18]]).double())


def numpy_attention(layer, x, mask, rows_of_table, config):
    """Computes DeBERTa's attention from its formula, one pair of tokens at a time."""
    def linear(module, y):
        bias = 0 if module.bias is None else module.bias.detach().numpy()
        return y @ module.weight.detach().numpy().T + bias
    H, D = config.n_heads, config.d_model // config.n_heads
    span = config.buckets or config.reach
    K_r = linear(layer.pos_k or layer.k, rows_of_table).reshape(-1, H, D)
    Q_r = linear(layer.pos_q or layer.q, rows_of_table).reshape(-1, H, D)
    out = np.zeros_like(x)
    for b, (text, real) in enumerate(zip(x, mask)):
        q, k, v = (linear(m, text).reshape(-1, H, D) for m in (layer.q, layer.k, layer.v))
        T = len(text)
        for h in range(H):
            scores = np.full((T, T), -np.inf)
            for i in range(T):
                for j in range(T):
                    r, mid = i - j, config.buckets // 2
                    if config.buckets and abs(r) > mid:
                        far = math.log(abs(r) / mid) / math.log((config.reach - 1) / mid)
                        r = int(np.sign(r)) * (mid + math.ceil(far * (mid - 1)))
                    row = min(max(r + span, 0), 2 * span - 1)
                    total = (q[i, h] @ k[j, h] + q[i, h] @ K_r[row, h] + k[j, h] @ Q_r[row, h])
                    if real[j]:
                        scores[i, j] = total / math.sqrt(3 * D)
            share = np.exp(scores - scores.max(1, keepdims=True))
            out[b, :, h * D:(h + 1) * D] = share / share.sum(1, keepdims=True) @ v[:, h]
    return linear(layer.o, out)


@pytest.mark.parametrize("T", [1, 2, 14])               # beyond the buckets, and beyond the reach
@pytest.mark.parametrize("kind", ["deberta", "deberta-v3"])
def test_deberta_s_attention_is_its_formula(kind, T):
    model, (tokens, mask) = model_of(KINDS[kind]), texts(T)
    mask[:, 0] = True
    x = model.embed_norm(model.embed(tokens))
    table = model.distances.weight
    table = table if model.distance_norm is None else model.distance_norm(table)
    right = numpy_attention(model.layers[0].attn, x.detach().numpy(), mask.numpy(),
                            table.detach().numpy(), KINDS[kind])
    found = model.layers[0].attn(x, mask[:, None, None], model.distance_rows(T))
    real = mask.numpy()
    assert np.allclose(found.detach().numpy()[real], right[real], rtol=0, atol=1e-12)


@kinds
def test_padding_changes_no_real_token_and_no_label(kind):
    model, (tokens, mask) = model_of(KINDS[kind]), texts()
    alone = tokens[1:2, :4]
    assert torch.allclose(model(tokens, mask)[1:2], model(alone, None), atol=1e-12)
    assert torch.allclose(model.hidden(tokens, mask)[1:2, :4], model.hidden(alone, None),
                          atol=1e-12)
    tokens[1, 4:] = 7                                   # whatever stands there
    assert torch.allclose(model(tokens, mask)[1:2], model(alone, mask[1:2, :4]), atol=1e-12)


def test_types_are_zeros_unless_given_and_count_where_the_model_has_them():
    tokens, mask = texts()
    types = torch.ones_like(tokens)
    bert, roberta = model_of(KINDS["bert"]), model_of(KINDS["roberta"])
    assert torch.equal(bert(tokens, mask), bert(tokens, mask, torch.zeros_like(tokens)))
    assert not torch.allclose(bert(tokens, mask), bert(tokens, mask, types))
    assert torch.equal(roberta(tokens, mask), roberta(tokens, mask, types))


def test_roberta_counts_positions_from_the_padding_token_s_number():
    model = model_of(TINY)
    seen = []
    model.positions.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens, mask = texts(6)
    model.hidden(tokens, mask)
    assert seen[0].tolist() == [[2, 3, 4, 5, 6, 7], [2, 3, 4, 1, 1, 1], [2, 3, 4, 5, 6, 7]]
    assert model.positions.num_embeddings == 32         # 30 usable


@kinds
def test_a_head_keeps_a_pretrained_dense_layer_and_replaces_the_one_for_masked_tokens(kind):
    model = Encoder(replace(KINDS[kind], has_mlm=True, has_pooler=True)).init_weights()
    tokens, mask = texts()
    assert model.mlm(tokens, mask).shape == (3, 9, 20)
    dense = model.head.dense.weight.clone()
    with pytest.raises(UserError, match="no head for labels"):
        model(tokens, mask)
    model.add_head(5)
    assert torch.equal(model.head.dense.weight, dense) and model.mlm_head is None
    assert model(tokens, mask).shape == (3, 5)
    with pytest.raises(UserError, match="no head for masked tokens"):
        model.mlm(tokens, mask)
    assert {name for name, _ in model.named_parameters() if "head" in name} == {
        f"head.{layer}.{part}" for layer in ("dense", "out") for part in ("weight", "bias")}


@kinds
def test_dropout_acts_in_training_alone_and_each_kind_by_its_own_share(kind):
    tokens, mask = texts()
    for name in ("dropout", "attention_dropout", "head_dropout"):
        model = model_of(replace(KINDS[kind], **{name: 0.5}))
        still = model_of(KINDS[kind])(tokens, mask)
        assert torch.equal(model(tokens, mask), still)
        model.train()
        torch.manual_seed(0)
        first = model(tokens, mask)
        torch.manual_seed(0)
        assert torch.equal(model(tokens, mask), first)
        assert not torch.allclose(first, still) and not torch.equal(model(tokens, mask), first)


@pytest.mark.parametrize("target", ["q", "k"])
def test_an_adapter_on_deberta_s_q_or_k_acts_on_tokens_and_on_distances(target):
    model, (tokens, mask) = model_of(V3), texts()
    before = model(tokens, mask)
    inject(model, "lora", [target], rank=2)
    calls = []
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.B)
        layer.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    found = model(tokens, mask)
    assert calls == 2 * [(3, 9, 8), (8, 8)]             # all rows of the table are in reach
    plain = model_of(V3)
    for path, layer in adapters(model).items():
        plain.get_submodule(path).weight.data.copy_(layer.merged_weight())
    assert torch.allclose(found, plain(tokens, mask), atol=1e-12)
    assert not torch.allclose(found, before, atol=1e-3)


@kinds
def test_checkpointing_gives_the_same_gradients(kind):
    tokens, mask = texts()

    def gradients(checkpointing):
        model = model_of(replace(KINDS[kind], dropout=0.3)).train()
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        F.cross_entropy(model(tokens, mask), torch.tensor([0, 1, 1])).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, saved = gradients(False), gradients(True)
    assert len(plain) == len(saved) and all(torch.equal(a, b) for a, b in zip(plain, saved))


def test_deberta_keeps_less_than_two_square_matrices_a_head_for_backward():
    """Those are the softmax's shares, in 4 bytes a number, and which were dropped."""
    config = replace(V3, d_model=16, attention_dropout=0.1, buckets=64, reach=128)
    layer, T, kept = Attention(config).train(), 64, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = Encoder(config)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, T, 16, requires_grad=True), torch.ones(2, 1, 1, T, dtype=torch.bool),
              model.distance_rows(T))
    square = 2 * config.n_heads * T * T * 4
    large = sum(size for size in kept.values() if size >= square / 4)
    assert large < 3.3 * square
