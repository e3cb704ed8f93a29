"""ModelConfig: its count equals torch's, args.json and back, what does not fit together."""
import json

import pytest
import torch
import yaml

from scgpt.config import Config, shipped_configs, validate
from scgpt.errors import ConfigError
from scgpt.model.build import build_model
from scgpt.model.config import ModelConfig
from scgpt.vocab import PUBLISHED, GeneVocab

VOCAB = GeneVocab(["<pad>", "<cls>", *(f"g{i}" for i in range(40))])
SIZES = {"n_layers": 2, "d_model": 24, "n_heads": 3, "d_hid": 20}
VARIANTS = [
    {}, {"layers": "torch"}, {"layers": "linear"}, {"n_cls": 5, "n_layers_cls": 2}, {"mvc": False}, {"pre_norm": True},
    {"mvc_decoder_style": "concat query"}, {"mvc_decoder_style": "sum query"},
    {"explicit_zero_prob": True, "use_batch_labels": True, "n_batch_labels": 4, "dab": True},
    {"input_emb_style": "category", "n_input_bins": 53}, {"input_emb_style": "scaling"},
    {"domain_spec_batchnorm": "batchnorm", "n_batch_labels": 3}, {"domain_spec_batchnorm": True, "n_batch_labels": 3},
    {"domain_spec_batchnorm": "do_affine", "n_batch_labels": 3},
    {"generative": True}, {"generative": True, "n_cls": 3},
    {"generative": True, "domain_spec_batchnorm": "do_affine", "n_batch_labels": 3},
    {"generative": True, "domain_spec_batchnorm": "batchnorm", "n_batch_labels": 3},
    {"kind": "generator"}, {"kind": "generator", "explicit_zero_prob": True, "decoder_activation": "Softplus"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_count_of_parameters_is_torchs(variant):
    config = ModelConfig(**SIZES, **variant)
    model = build_model(config, VOCAB, device="meta")
    assert config.count_parameters(len(VOCAB)) == sum(p.numel() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())


# Name -> parameters with the published vocabulary, as a transformer and as a generator.
FAMILY = {"scgpt-tiny": (3_964_866, 3_973_443), "scgpt-10m": (8_483_714, 8_517_251),
          "scgpt-base": (51_856_898, 52_384_259), "scgpt-100m": (135_812_354, 136_996_611),
          "scgpt-400m": (371_821_570, 373_924_867), "scgpt-1b": (1_362_302_978, 1_370_703_875),
          "scgpt-3b": (2_718_952_962, 2_732_075_523), "scgpt-7b": (6_810_284_034, 6_843_863_043)}


def test_the_family_has_the_counted_parameters_on_the_meta_device():
    assert shipped_configs("model").keys() == FAMILY.keys()
    vocab = GeneVocab.named(PUBLISHED)
    for name, path in shipped_configs("model").items():
        sizes = yaml.safe_load(path.read_text())["model"]
        assert sizes["name"] == name
        for kind, expected in zip(("transformer", "generator"), FAMILY[name], strict=True):
            config = ModelConfig(**sizes, kind=kind)
            model = build_model(config, vocab, device="meta")
            assert sum(p.numel() for p in model.parameters()) == config.count_parameters(len(vocab)) == expected, name


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_args_json_and_back(variant):
    config = ModelConfig(**SIZES, **variant, dropout=0.1, attention_dropout=0.0)
    assert ModelConfig.from_args(json.loads(json.dumps(config.to_args()))) == config


def test_published_release_is_read_by_upstreams_names():
    config = ModelConfig.from_args({
        "nlayers": 12, "nheads": 8, "embsize": 512, "d_hid": 512, "dropout": 0.2, "n_layers_cls": 3, "lr": 1e-4,
        "input_emb_style": "continuous", "n_bins": 51, "MVC": True, "USE_GENERATIVE_TRAINING": True, "fp16": True})
    assert (config.n_layers, config.n_heads, config.d_model, config.generative, config.mvc) == (12, 8, 512, True, True)
    # 60,697 genes: the size that the paper gives for the whole-human model, 51 million
    assert round(config.count_parameters(60_697) / 1e6) == 51


def test_args_json_without_a_size_is_refused():
    with pytest.raises(ConfigError, match="embsize"):
        ModelConfig.from_args({"nheads": 8, "d_hid": 512, "nlayers": 12})


@pytest.mark.parametrize(("variant", "word"), [
    ({"n_heads": 5}, "n_heads"), ({"input_emb_style": "category"}, "n_input_bins"), ({"dab": True}, "n_batch_labels"),
    ({"generative": True, "layers": "torch"}, "generative"), ({"pre_norm": True, "layers": "torch"}, "pre_norm"),
    ({"dropout": 1.0}, "dropout"), ({"mvc_decoder_style": "sum query", "explicit_zero_prob": True}, "sum query"),
    ({"mvc_decoder_style": "concat query", "use_batch_labels": True, "n_batch_labels": 2}, "concat query")])
def test_what_does_not_fit_together_is_refused(variant, word):
    with pytest.raises(ConfigError, match=word):
        validate(ModelConfig, SIZES | variant)


def test_config_is_one_of_ours_and_decides_the_pad_value():
    assert issubclass(ModelConfig, Config)
    assert ModelConfig().pad_value == -2
    assert ModelConfig(input_emb_style="category", n_input_bins=53).pad_value == 51


def test_same_seed_builds_the_same_model_and_the_device_is_respected():
    config, states = ModelConfig(**SIZES), []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(build_model(config, VOCAB).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(x.is_meta for x in states[0].values())
