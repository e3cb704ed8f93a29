"""The examples of the API document, with the corrections that its text needs, run as a user would run them."""
from pathlib import Path

import pytest
import torch
from torch import nn

from scgpt.model import generation_model, model
from scgpt.model.dsbn import DomainSpecificBatchNorm1d, DomainSpecificBatchNorm2d
from scgpt.model.grad_reverse import grad_reverse
from tests.readme import blocks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "model.md"


def test_gene_encoder():
    vocab = {"hello": 0, "world": 1, "goodbye": 2, "earth": 3, "pad": 4}
    encoder = generation_model.GeneEncoder(num_embeddings=len(vocab), embedding_dim=10, padding_idx=vocab["pad"])
    out = encoder(torch.tensor([[0, 1, 4], [2, 1, 4]]))
    assert out.shape == (2, 3, 10)
    assert not out[:, 2].any()


def test_positional_encoding():
    encoder = generation_model.PositionalEncoding(512)
    assert encoder(torch.randn(10, 1, 512)).shape == (10, 1, 512)


def test_similarity():
    out = generation_model.Similarity(temp=0.1)(torch.randn(1, 10), torch.randn(1, 10))
    assert out.shape == (1,)
    assert out.abs() <= 10


def test_transformer_generator():
    vocab = {"<pad>": 0, "<cls>": 1, "gene1": 2, "gene2": 3}
    generator = generation_model.TransformerGenerator(
        ntoken=len(vocab), d_model=512, nhead=8, d_hid=2048, nlayers=2, nlayers_cls=2, n_cls=10, vocab=vocab,
        dropout=0.1, pad_token="<pad>", pad_value=0, pert_pad_id=2, do_mvc=True, domain_spec_batchnorm=False,
        cell_emb_style="cls", mvc_decoder_style="inner product", ecs_threshold=0.3, explicit_zero_prob=False,
        use_fast_transformer=False, pre_norm=True)
    src = torch.randint(1, len(vocab), (10, 50))
    src[:, 0] = vocab["<cls>"]
    values, flags = torch.randn(10, 50), torch.zeros(10, 50, dtype=torch.long)
    out = generator(src, values, flags, src.eq(vocab["<pad>"]), CLS=True, MVC=True, ECS=True)
    assert {key: tuple(x.shape) for key, x in out.items()} == {
        "mlm_output": (10, 50), "cls_output": (10, 10), "mvc_output": (10, 50), "loss_ecs": ()}


@pytest.mark.parametrize("module", [model, generation_model])
def test_generate_square_subsequent_mask(module):
    mask = module.generate_square_subsequent_mask(5)
    assert mask.dtype == torch.float32
    assert torch.equal(mask == 0, torch.ones(5, 5).tril().bool())
    assert (mask[mask != 0] == -torch.inf).all()


def test_adversarial_discriminator():
    torch.manual_seed(0)
    data, labels = torch.randn(100, 3), torch.randint(0, 2, (100,))
    discriminator = model.AdversarialDiscriminator(d_model=3, n_cls=2, activation=nn.LeakyReLU, reverse_grad=True)
    optimizer, criterion, losses = torch.optim.Adam(discriminator.parameters(), lr=0.01), nn.CrossEntropyLoss(), []
    for _ in range(10):
        for part in torch.arange(100).split(10):
            optimizer.zero_grad()
            loss = criterion(discriminator(data[part]), labels[part])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])  # it trains, reversed gradient or not
    assert torch.argmax(discriminator.eval()(torch.randn(20, 3)), dim=1).shape == (20,)


@pytest.mark.parametrize("encoder", [model.BatchLabelEncoder, model.CategoryValueEncoder])
def test_label_and_category_encoders(encoder):
    assert encoder(5, 3)(torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [4, 4, 4, 4]])).shape == (3, 4, 3)


def test_cls_decoder():
    assert model.ClsDecoder(4, 3)(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])).shape == (2, 3)


def test_continuous_value_encoder():
    assert model.ContinuousValueEncoder(4)(torch.tensor([[1.0, 2.5, 3.3], [4.0, 5.1, 6.2]])).shape == (2, 3, 4)


def test_expr_decoder():
    out = model.ExprDecoder(4, explicit_zero_prob=True)(torch.randn(2, 3, 4))
    assert {key: tuple(x.shape) for key, x in out.items()} == {"pred": (2, 3), "zero_probs": (2, 3)}
    assert model.ExprDecoder(4, use_batch_labels=True)(torch.randn(2, 3, 8))["pred"].shape == (2, 3)


def test_fast_transformer_encoder_wrapper():
    wrapper, x = model.FastTransformerEncoderWrapper(4, 2, 8, 2, 0.1), torch.randn(2, 3, 4)
    mask = torch.tensor([[False, False, True], [False, True, True]])  # the document's second row pads in the middle
    assert wrapper(x, mask).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="end of a row"):
        wrapper(x, torch.tensor([[False, False, True], [False, True, False]]))


def test_flash_transformer_encoder_layer_on_a_cpu():
    layer = model.FlashTransformerEncoderLayer(4, 2, 8, 0.1)
    mask = torch.tensor([[False, False, True], [False, True, False]])
    assert layer(torch.randn(2, 3, 4), src_key_padding_mask=mask).shape == (2, 3, 4)


def test_mvc_decoder():
    out = model.MVCDecoder(4, "inner product")(torch.randn(2, 4), torch.randn(2, 3, 4))
    assert out["pred"].shape == (2, 3)


def test_transformer_model():
    transformer = model.TransformerModel(10, 4, 2, 8, 2, vocab={"<pad>": 0})
    src, values = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0.5, 0.8, 0.2], [0.6, 0.7, 0.9]])
    out = transformer(src, values, torch.tensor([[False, False, True], [False, True, False]]))
    assert {key: tuple(x.shape) for key, x in out.items()} == {"mlm_output": (2, 3), "cell_emb": (2, 4)}


def test_domain_specific_batch_norms():
    assert DomainSpecificBatchNorm1d(4, num_domains=2)(torch.randn(5, 4), 1).shape == (5, 4)
    assert DomainSpecificBatchNorm1d(4, num_domains=2)(torch.randn(5, 4, 6), 0).shape == (5, 4, 6)
    assert DomainSpecificBatchNorm2d(4, num_domains=2)(torch.randn(5, 4, 7, 2), 1).shape == (5, 4, 7, 2)


def test_grad_reverse():
    x = torch.randn(3, requires_grad=True)
    grad_reverse(x, lambd=1.0).sum().backward()
    assert torch.equal(x.grad, -torch.ones(3))


@pytest.mark.parametrize("block", blocks(PAGE), ids=["drop-in", "packed", "generation"])
def test_blocks_of_the_model_page_run(block):
    exec(compile(block.code, str(PAGE), "exec"), {})
