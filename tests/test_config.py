"""A configuration says everything, comes back from its file, and explains what is wrong with it."""

import tomllib

import pytest
from torch import nn

from stablefield.config import FAMILIES, PARTS, SPREADS, ConfigError, override, read_toml, resolve

pytestmark = pytest.mark.usefixtures("unchecked")


class Own(nn.Module):
    """A network as a stranger might write it: no labels, one option of its own."""

    def __init__(self, shape, *, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[-1], shape[-1])

    def forward(self, x, noise):
        return self.layer(x)


def test_what_is_resolved_comes_back_from_its_own_file():
    for process in PARTS["process"]:
        config = resolve({"process": {"kind": process}, "training": {"seed": 3}})
        assert resolve(tomllib.loads(config.toml())) == config


# what a kind cannot do without, and what goes with it
NEEDS = {
    "arrays": {"path": "x.npz"},
    "store": {"path": "x"},
    "images": {"path": "x.zip"},
    "celeba": {"path": "img_align_celeba"},
    "idx": {"path": "train-images-idx3-ubyte.gz"},
    "cifar": {"path": "cifar-10-python.tar.gz"},
    "huggingface": {"path": "mnist"},
    "head": {"head": "v"},
    "predicts": {"head": "noise"},
}
GOES_WITH = {
    ("times", "uniform"): {"process": {"kind": "flow"}},
    ("times", "logitnormal"): {"process": {"kind": "flow"}},
    ("grid", "uniform"): {"process": {"kind": "vp"}},
}


@pytest.mark.parametrize(("section", "kind"), [(s, k) for s, kinds in PARTS.items() for k in kinds if s != k])
def test_every_kind_of_every_section_can_be_configured(section, kind):
    said = {"kind": kind, **NEEDS.get(kind, {})}
    config = resolve({section: said, **GOES_WITH.get((section, kind), {})})
    assert config[section]["kind"] == kind
    assert resolve(tomllib.loads(config.toml())) == config


def test_defaults_are_those_of_the_parts_and_suit_the_process():
    for process, family in FAMILIES.items():
        config = resolve({"process": {"kind": process}, "data": {"kind": "arrays", "path": "x.npz"}})
        for section, kind in family.items():
            assert config[section]["kind"] == kind
            assert config.make(section) == PARTS[section][kind]()


def test_what_suits_the_data_is_what_the_data_are():
    for data, spread in SPREADS.items():
        pool = PARTS["data"][data]().load()
        assert pool.decode(pool.data).std().item() == pytest.approx(spread, rel=0.01)
        config = resolve({"data": {"kind": data}})
        assert config["scaling"]["sigma_data"] == config["weight"]["sigma_data"] == spread
        assert resolve({"scaling": {"sigma_data": 0.1}})["scaling"]["sigma_data"] == 0.1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"target": {"sise": 3}}, "target.sise: 'reference' has no such key; did you mean target.size?"),
        ({"targets": {}}, "targets: there is no such section; did you mean target?"),
        ({"process": {"kind": "vpp"}}, "process.kind: 'vpp' is none of .*did you mean vp"),
        ({"training": {"batch_size": "many"}}, "training.batch_size: .*integer.*'many'"),
        ({"training": {"images": 1.5}}, "training.images: .*integer"),
        ({"training": {"images": -5}}, "training: images must be positive, not -5"),
        ({"training": {"kind": "long"}}, "training.kind: .*no such key"),
        ({"target": 3}, "target: must be a section"),
        ({"times": {"kind": "loguniform", "low": 3.0, "high": 2.0}}, "times: .*low=3.0, high=2.0"),
        ({"scaling": {"sigma_data": 0.0}}, "scaling: sigma_data must be positive"),
        ({"process": {"kind": "flow"}, "times": {"kind": "lognormal"}}, "times.kind: 'lognormal' reaches t = .*'flow'"),
        ({"grid": {"kind": "uniform"}}, "grid: a uniform grid for VE.* needs a start"),
        ({"network": {"kind": "nowhere:Net"}}, "network.kind: 'nowhere:Net' names code outside this package"),
        ({"data": {"kind": "arrays"}}, "data.path: has no default"),
        (
            {"data": {"path": "x"}},
            "'digits' has no such key; say also which data.kind it is for: arrays, store, images",
        ),
    ],
)
def test_a_mistake_is_named_with_the_way_out(raw, message):
    with pytest.raises(ConfigError, match=message):
        resolve(raw)


def test_an_allowed_name_that_leads_to_no_network_is_named():
    for name, message in (("nowhere:Net", "cannot be imported"), ("math:pi", "is no torch.nn.Module")):
        with pytest.raises(ConfigError, match=f"network.kind: '{name}' {message}"):
            resolve({"network": {"kind": name}}, allow=[name])


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as found:
        resolve({"target": {"sise": 3}, "training": {"sed": 1}, "proces": {}})
    assert len(str(found.value).splitlines()) == 3


def test_a_setting_is_written_as_in_toml_or_as_a_bare_word():
    raw = override({"target": {"size": 7}}, ["target.size=2048", "process.kind=vp", "data.path='a b.npz'"])
    assert raw == {"target": {"size": 2048}, "process": {"kind": "vp"}, "data": {"path": "a b.npz"}}
    assert override({}, ["training.stratified=true"]) == {"training": {"stratified": True}}
    for wrong in ("target", "target.size", "target=3", ".size=3"):
        with pytest.raises(ConfigError, match="settings look like"):
            override({}, [wrong])


def test_a_new_kind_forgets_the_keys_of_the_old_one():
    assert override({"target": {"kind": "reference", "size": 7}}, ["target.kind=single"]) == {
        "target": {"kind": "single"}
    }


def test_anyones_network_has_its_own_options():
    config = resolve({"network": {"kind": f"{__name__}:Own", "width": 16}}, allow=[Own])
    assert config["network"] == {"kind": f"{__name__}:Own", "width": 16}
    assert isinstance(config.make("network", shape=(1, 8, 8)), Own)
    with pytest.raises(ConfigError, match=r"did you mean network.width"):
        resolve({"network": {"kind": f"{__name__}:Own", "widht": 16}}, allow=[Own])


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no configuration"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[target\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is no TOML"):
        read_toml(tmp_path / "bad.toml")


def test_differences_are_the_keys_that_differ():
    one, other = resolve({}), resolve({"target": {"size": 2}, "training": {"seed": 1}})
    assert one.differences(other) == ["target.size", "training.seed"]
    assert one.differences(one) == []
