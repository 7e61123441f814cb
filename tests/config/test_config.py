"""A resolved configuration has every value, is restored from its file, and every mistake has a clear message."""

import tomllib

import pytest
from torch import nn

from stablefield.config import (
    ConfigError,
    Training,
    describe_target,
    is_unedited,
    override,
    read_toml,
    refuse_other_format,
    resolve,
    split_settings,
    split_targets,
    target_kind,
    target_section,
)
from stablefield.config.classes import _read_numbers, import_name
from stablefield.kinds import KINDS, PROCESS_DEFAULTS, SIGMA_DATA

pytestmark = pytest.mark.usefixtures("unchecked")


class Own(nn.Module):
    """A network outside the package, without labels and with one option of its own."""

    def __init__(self, shape, *, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[-1], shape[-1])

    def forward(self, x, c_noise):
        return self.layer(x)


def test_a_configuration_is_changed_as_if_it_had_been_written_so():
    before = resolve({"target": {"kind": "stf", "size": 64, "references": "recent"}, "training": {"images": 5000}})
    after = before.changed(["training.seed=3"], target={"size": 32})
    assert list(after.differences(before)) == ["target.size", "training.seed"]
    assert (before.sections["target"]["size"], before.training.seed, after.training.seed) == (64, 0, 3)
    assert before.changed(target={"kind": "dsm"}).sections["target"] == {"kind": "dsm"}  # no old key
    assert before.changed() == before
    assert before.changed(["process.kind=flow"]) == resolve(
        {key: before.sections[key] for key in before.sections.keys() - PROCESS_DEFAULTS["ve"].keys()}
        | {"process": {"kind": "flow"}}
    )
    with pytest.raises(ConfigError, match="references"):
        before.changed(target={"kind": "exact", "references": "recent"})


def test_a_resolved_configuration_is_restored_from_its_file():
    for process in KINDS["process"]:
        config = resolve({"process": {"kind": process, **NEEDS.get(process, {})}, "training": {"seed": 3}})
        assert resolve(tomllib.loads(config.toml())) == config


# keys without a default, and other sections that a kind needs
NEEDS = {
    "arrays": {"path": "x.npz"},
    "store": {"path": "x"},
    "images": {"path": "x.zip"},
    "celeba": {"path": "img_align_celeba"},
    "idx": {"path": "train-images-idx3-ubyte.gz"},
    "cifar": {"path": "cifar-10-python.tar.gz"},
    "huggingface": {"path": "mnist"},
    "prediction": {"prediction_type": "v"},
    "tabulated": {"alphas_cumprod": [0.9, 0.1]},
    "tabulated-ve": {"sigmas": [0.1, 10.0]},
    ("preconditioning", "none"): {"prediction_type": "v"},
}
GOES_WITH = {
    ("times", "uniform"): {"process": {"kind": "flow"}},
    ("times", "logitnormal"): {"process": {"kind": "flow"}},
    ("grid", "uniform"): {"process": {"kind": "vp"}},
}


@pytest.mark.parametrize(("section", "kind"), [(s, k) for s, kinds in KINDS.items() for k in kinds if s != k])
def test_every_kind_of_every_section_can_be_configured(section, kind):
    values = {"kind": kind, **NEEDS.get(kind, NEEDS.get((section, kind), {}))}
    config = resolve({section: values, **GOES_WITH.get((section, kind), {})})
    assert config.kind(section) == kind
    assert resolve(tomllib.loads(config.toml())) == config


def test_defaults_are_those_of_the_classes_and_suit_the_process():
    for process, kinds in PROCESS_DEFAULTS.items():
        keys = {"kind": process, **NEEDS.get(process, {})}
        config = resolve({"process": keys, "data": {"kind": "arrays", "path": "x.npz"}})
        for section, kind in kinds.items():
            assert config.kind(section) == kind
            assert config.make(section) == import_name(KINDS[section][kind])()


def test_sigma_data_is_the_standard_deviation_of_the_data():
    for data, sigma_data in SIGMA_DATA.items():
        pool = import_name(KINDS["data"][data])().load()
        assert pool.decode(pool.data).std().item() == pytest.approx(sigma_data, rel=0.01)
        config = resolve({"data": {"kind": data}})
        assert config.sections["preconditioning"]["sigma_data"] == config.sections["weight"]["sigma_data"] == sigma_data
        assert resolve({"preconditioning": {"sigma_data": 0.1}}).sigma_data == 0.1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"target": {"sise": 3}}, "target.sise: 'stf' has no such key; did you mean target.size?"),
        ({"targets": {}}, "targets: there is no such section; did you mean target?"),
        ({"process": {"kind": "vpp"}}, "process.kind: 'vpp' is none of .*did you mean vp"),
        ({"training": {"batch_size": "many"}}, "training.batch_size: .*integer.*'many'"),
        ({"training": {"images": 1.5}}, "training.images: .*integer"),
        ({"training": {"images": -5}}, "training: images must be positive, not -5"),
        ({"training": {"kind": "long"}}, "training.kind: .*no such key"),
        ({"target": 3}, "target: must be a section"),
        ({"times": {"kind": "loguniform", "low": 3.0, "high": 2.0}}, "times: .*low=3.0, high=2.0"),
        ({"preconditioning": {"sigma_data": 0.0}}, "preconditioning: sigma_data must be between"),
        ({"process": {"kind": "flow"}, "times": {"kind": "lognormal"}}, "times.kind: 'lognormal' reaches t = .*'flow'"),
        ({"grid": {"kind": "uniform"}}, "grid: a uniform grid for VE.* needs a finite start"),
        ({"network": {"kind": "nowhere:Net"}}, "network.kind: 'nowhere:Net' names code outside this package"),
        ({"data": {"kind": "arrays"}}, "data.path: has no default and must be set, with --data PATH at the terminal"),
        (
            {"data": {"path": "x"}},
            "data.path: 'digits' has no such key; set data.kind too, to one that has it: arrays, store, images",
        ),
    ],
)
def test_the_message_of_a_mistake_names_the_key_and_the_way_out(raw, message):
    with pytest.raises(ConfigError, match=message):
        resolve(raw)


def test_an_allowed_name_that_is_not_a_network_is_refused():
    for name, message in (("nowhere:Net", "cannot be imported"), ("math:pi", "is not a torch.nn.Module")):
        with pytest.raises(ConfigError, match=f"network.kind: '{name}' {message}"):
            resolve({"network": {"kind": name}}, allow=[name])


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as found:
        resolve({"target": {"sise": 3}, "training": {"sed": 1}, "proces": {}})
    assert len(str(found.value).splitlines()) == 3


def test_the_value_of_a_setting_is_toml_or_a_word_without_quotes():
    raw = override({"target": {"size": 7}}, ["target.size=2048", "process.kind=vp", "data.path='a b.npz'"])
    assert raw == {"target": {"size": 2048}, "process": {"kind": "vp"}, "data": {"path": "a b.npz"}}
    assert override({}, ["training.stratified=true"]) == {"training": {"stratified": True}}
    for wrong in ("target", "target.size", "target=3", ".size=3"):
        with pytest.raises(ConfigError, match="settings have the form"):
            override({}, [wrong])


def test_a_new_kind_removes_the_keys_of_the_old_one():
    assert override({"target": {"kind": "stf", "size": 7}}, ["target.kind=dsm"]) == {"target": {"kind": "dsm"}}


def test_the_options_of_a_user_s_own_network_can_be_configured():
    config = resolve({"network": {"kind": f"{__name__}:Own", "width": 16}}, allow=[Own])
    assert config.sections["network"] == {"kind": f"{__name__}:Own", "width": 16}
    assert isinstance(config.make("network", shape=(1, 8, 8)), Own)
    with pytest.raises(ConfigError, match=r"did you mean network.width"):
        resolve({"network": {"kind": f"{__name__}:Own", "widht": 16}}, allow=[Own])


def test_a_missing_or_damaged_toml_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="no configuration"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[target\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not a TOML file"):
        read_toml(tmp_path / "bad.toml")


def test_a_byte_order_mark_is_not_a_part_of_a_text_file(tmp_path):
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf[target]\r\nsize = 16\r\n")
    assert read_toml(tmp_path / "marked.toml") == {"target": {"size": 16}}
    for name, content in (("x.txt", b"0.5\r\n2\r\n"), ("x.json", b"[0.5, 2]")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert _read_numbers(str(tmp_path / name)) == [0.5, 2]


def test_differences_are_the_keys_whose_values_differ():
    one, other = resolve({}), resolve({"target": {"size": 2}, "training": {"seed": 1}})
    assert list(one.differences(other)) == ["target.size", "training.seed"]
    assert one.differences(one) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_dropout": 1.5, "conditional": True}, "label_dropout is a probability between 0 and 1, not 1.5"),
        ({"label_dropout": 0.1}, "label_dropout=0.1 needs labels to drop: set conditional=true"),
        ({"target_prefetch": 0}, "target_prefetch must be between 1 and 65,536, not 0"),
        ({"ema_half_life": (100.0, 100.0)}, "at least one half-life, all different"),
        ({"learning_rate_decay": "inverse-sqrt"}, "inverse-sqrt decay needs decay_start > 0"),
    ],
)
def test_settings_of_training_that_exclude_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Training(**values)


# --- formats


EARLIER = r"was written by an earlier version \(format 1\) and cannot be read; train it again or use the version"


def test_the_last_line_states_the_format_and_shows_every_edit(tmp_path):
    text = resolve({}).toml()
    assert text.splitlines()[-1].startswith("# stablefield 2, SHA-256 of the lines above: ")
    assert is_unedited(text)
    refuse_other_format(text, tmp_path)
    for changed in (
        text[:-1],
        text + "\n",
        text.replace("seed = 0", "seed = 1"),
        text.replace("stablefield 2", "x"),
        "",
    ):
        assert not is_unedited(changed)


@pytest.mark.parametrize(
    "text",
    [
        '[target]\nkind = "reference"\n',
        '[scaling]\nkind = "edm"\n',
        "[scaling]\n",
        "[training]\nseed = 1\n\n# SHA-256 of the lines above: 0123\n",
        "# stablefield 1, SHA-256 of the lines above: 0123\n",
        *(
            f'target = {{ kind = "{kind}" }}\n'
            for kind in ("single", "rolling", "neighbours", "found", "full", "pruned")
        ),
    ],
)
def test_a_configuration_of_an_earlier_format_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.toml {EARLIER}") as found:
        read_toml(tmp_path / "config.toml")
    assert len(str(found.value).splitlines()) == 1


def test_a_configuration_of_a_later_format_asks_for_an_upgrade(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(resolve({}).toml().replace("# stablefield 2,", "# stablefield 3,"))
    with pytest.raises(ConfigError, match=r"later version \(format 3\), and this one reads format 2; upgrade"):
        read_toml(path)


def test_a_configuration_that_a_user_wrote_needs_no_format(tmp_path):
    (tmp_path / "mine.toml").write_text('[target]\nkind = "exact"\n')
    assert read_toml(tmp_path / "mine.toml") == {"target": {"kind": "exact"}}


# --- targets as text


@pytest.mark.parametrize(
    ("text", "section"),
    [
        ("dsm", {"kind": "dsm"}),
        (" stf ", {"kind": "stf"}),
        ("stf:256", {"kind": "stf", "size": 256}),
        ("stf:256, references=recent", {"kind": "stf", "size": 256, "references": "recent"}),
        ("stf,size=8", {"kind": "stf", "size": 8}),
        ("knn:32,search=faiss,index='PCA8'", {"kind": "knn", "neighbours": 32, "search": "faiss", "index": "PCA8"}),
        ("exact", {"kind": "exact"}),
        ("exact,missing_mass=0", {"kind": "exact", "missing_mass": 0}),
    ],
)
def test_a_target_as_text_is_the_section_of_a_configuration(text, section):
    assert target_section(text) == section
    assert target_kind(text) == section["kind"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft:3", "target.kind: 'sft' is none of stf, dsm, knn, exact, stf-published; did you mean stf"),
        ("dsm:3", "'dsm:3' has a size, but 'dsm' has none"),
        ("exact:3", "'exact:3' has a size, but 'exact' has none"),
        ("stf:", "the size in the target 'stf:' is not a whole number; write for example stf:64"),
        ("stf:x", "the size in the target 'stf:x' is not a whole number"),
        ("mine:Target", "names code outside this package"),
        ("stf,recent", "settings have the form section.key=value"),
        ("", "target.kind: '' is none of"),
    ],
)
def test_a_target_of_another_form_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        target_section(text)


def test_settings_follow_a_target_and_a_plus_or_a_comma_in_a_value_does_not_end_it():
    text = "dsm+times.parameters=[0.1, 2.0]+training.learning_rate=1e+1,knn:8,search=faiss + times.kind=adaptive,exact"
    first, second, third = split_targets(text)
    assert split_settings(first) == ("dsm", ["times.parameters=[0.1, 2.0]", "training.learning_rate=1e+1"])
    assert split_settings(second) == ("knn:8,search=faiss", ["times.kind=adaptive"])
    assert split_settings(third) == ("exact", [])
    assert describe_target(second) == "knn:8,search=faiss with adaptive times"


def test_a_list_of_targets_keeps_the_keys_of_each():
    assert split_targets("dsm,stf:256,references=recent, exact,missing_mass=0,knn:8") == [
        *("dsm", "stf:256,references=recent", "exact,missing_mass=0", "knn:8")
    ]


def test_a_value_that_fits_no_alternative_of_its_key_is_one_mistake():
    for setting in ("training.compile=maybe", "training.ema_half_life=x"):
        with pytest.raises(ConfigError) as refused:
            resolve(override({}, [setting]))
        key, _, value = setting.partition("=")
        lines = str(refused.value).splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"{key}: input should be")
        assert lines[0].endswith(f", not {value!r}")
