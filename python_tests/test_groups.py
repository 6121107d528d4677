from __future__ import annotations

import copy
import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from oodkernels.groups import WORDNET_GROUPS, Groups
from oodkernels.ops.mos import as_offsets

IMAGENET = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet1k_groups.csv"

MANY = [
    Groups.from_sizes([1]),
    Groups.from_sizes([3, 1, 2]),
    Groups.from_labels(["b", "a", "b", "c", "a", "b"]),
    Groups([2, 0, 1, 0, 2, 2], index_in_group=[2, 1, 0, 0, 0, 1]),
    Groups.random(37, 5, seed=3),
    Groups.random(64, 64),
    Groups.random(21841, 3000, seed=1),
]


@pytest.fixture(params=MANY, ids=lambda g: f"C{g.num_classes}-K{len(g)}")
def groups(request):
    return request.param


# Layout and mappings


def test_layout_by_hand():
    groups = Groups.from_labels([1, 0, 1, 2, 0])
    assert (groups.num_classes, groups.num_groups, len(groups), groups.width) == (5, 3, 3, 8)
    assert groups.offsets.tolist() == [0, 3, 6, 8]
    assert groups.sizes.tolist() == [2, 2, 1]
    assert groups.classes.tolist() == [1, 4, 0, 2, 3]
    assert groups.class_to_group.tolist() == [1, 0, 1, 2, 0]
    assert groups.names == ("0", "1", "2")
    assert groups.slices().tolist() == [[0, 3], [3, 6], [6, 8]]
    ids = torch.arange(5)
    assert groups.to_grouped(ids).tolist() == [2, 0, 3, 4, 1]
    assert groups.to_column(ids).tolist() == [4, 1, 5, 7, 2]
    assert groups.from_column(torch.arange(8)).tolist() == [-1, 1, 4, -1, 0, 2, -1, 3]
    assert repr(groups) == "Groups(5 classes in 3 groups: 0 2, 1 2, 2 1)"


def test_index_in_group_orders_the_columns_of_a_group():
    groups = Groups([0, 1, 0, 0], index_in_group=[2, 0, 0, 1])
    assert groups.classes.tolist() == [2, 3, 0, 1]
    assert groups.to_column(torch.arange(4)).tolist() == [3, 5, 1, 2]
    assert groups != Groups([0, 1, 0, 0])


def test_layout_holds_together(groups):
    c, k = groups.num_classes, groups.num_groups
    offsets, class_to_group = groups.offsets, groups.class_to_group
    assert groups.width == c + k == offsets[-1]
    assert offsets[0] == 0
    assert torch.equal(offsets.diff() - 1, groups.sizes)
    assert torch.equal(groups.sizes, class_to_group.bincount(minlength=k))
    assert groups.classes.sort().values.equal(torch.arange(c))
    column = groups.to_column(torch.arange(c))
    assert torch.equal(torch.bucketize(column, offsets, right=True) - 1, class_to_group)
    assert not torch.isin(column, offsets).any()
    assert all(t.dtype == torch.int64 for t in (offsets, groups.sizes, groups.classes, column))


def test_mappings_invert_each_other(groups):
    ids = torch.randint(groups.num_classes, (3, 50), generator=torch.Generator().manual_seed(0))
    grouped = groups.to_grouped(ids)
    column = groups.to_column(ids)
    assert torch.equal(groups.to_class(grouped), ids)
    assert torch.equal(groups.from_column(column), ids)
    assert torch.equal(column, grouped + groups.class_to_group[ids] + 1)
    assert (groups.from_column(groups.offsets[:-1]) == -1).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_mappings_take_any_integer(dtype):
    groups = Groups.random(300, 7)
    ids = torch.tensor([0, 7, 100], dtype=dtype)
    for name in ("to_grouped", "to_class", "to_column", "from_column"):
        mapped = getattr(groups, name)(ids)
        assert mapped.dtype == torch.int64
        assert torch.equal(mapped, getattr(groups, name)(ids.long()))


def test_mappings_of_scalars_and_nothing():
    groups = Groups.from_labels([1, 0])
    assert groups.to_grouped(torch.tensor(0)).tolist() == 1
    assert groups.to_class(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4)


def test_special_values():
    groups = Groups.from_labels([1, 0, 1])
    ids = torch.tensor([-100, 0, 1])
    assert groups.to_grouped(ids).tolist() == [-100, 1, 0]
    assert groups.to_grouped(torch.tensor([-1, 0]), ignore_index=-1).tolist() == [-1, 1]
    assert groups.to_grouped(torch.tensor([255, 0]), ignore_index=255).tolist() == [255, 1]
    assert groups.to_class(torch.tensor([-1, 1])).tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("method", "ids", "message"),
    [
        ("to_grouped", [0, 3], r"Groups.to_grouped: class_ids must be in 0..2 or -100, got 3 at"),
        ("to_grouped", [0, -1], "got -1 at index 1"),
        ("to_grouped", [[0, 1], [1, 9]], r"got 9 at index \(1, 1\)"),
        ("to_class", [3], "Groups.to_class: grouped must be in 0..2 or -1, got 3 at index 0"),
        ("to_class", [-100], "got -100"),
        ("to_column", [-1], "Groups.to_column: class_ids must be in 0..2, got -1 at index 0"),
        ("from_column", [0, 5], "Groups.from_column: columns must be in 0..4, got 5 at index 1"),
    ],
)
def test_mappings_refuse_what_is_out_of_range(method, ids, message):
    with pytest.raises(ValueError, match=message):
        getattr(Groups.from_labels([1, 0, 1]), method)(torch.tensor(ids))


def test_to_grouped_refuses_a_class_as_ignore_index():
    with pytest.raises(ValueError, match="ignore_index must be no class id, got 2"):
        Groups.from_sizes([3]).to_grouped(torch.tensor([0]), ignore_index=2)


@pytest.mark.parametrize("method", ["to_grouped", "to_class", "to_column", "from_column"])
@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (torch.zeros(2), "torch.float32"),
        (torch.zeros(2, dtype=torch.bool), "torch.bool"),
        ([0, 1], "list"),
        (0, "int"),
    ],
)
def test_mappings_refuse_other_types(method, ids, found):
    with pytest.raises(TypeError, match=f"must be an integer tensor, got {found}"):
        getattr(Groups.from_sizes([2]), method)(ids)


# Constructors


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_from_labels_of_ints(kind):
    assert Groups.from_labels(kind([1, 0, 1])) == Groups([1, 0, 1])


@pytest.mark.parametrize("kind", [list, np.array])
def test_from_labels_of_strings_are_in_first_seen_order(kind):
    groups = Groups.from_labels(kind(["dog", "cat", "dog", "ant"]))
    assert groups.names == ("dog", "cat", "ant")
    assert groups.class_to_group.tolist() == [0, 1, 0, 2]


def test_from_labels_of_strings_in_the_order_of_names():
    groups = Groups.from_labels(["dog", "cat", "dog"], names=["cat", "dog"])
    assert groups.names == ("cat", "dog")
    assert groups.class_to_group.tolist() == [1, 0, 1]


def test_from_labels_of_any_hashable():
    groups = Groups.from_labels([("a", 1), None, ("a", 1)])
    assert groups.names == ("('a', 1)", "None")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Groups([]), ValueError, "Groups: class_to_group must not be empty"),
        (lambda: Groups([0, -1]), ValueError, "must be in 0..1, got -1 at index 1"),
        (lambda: Groups([0, 10**12]), ValueError, "must be in 0..1, got 1000000000000 at index 1"),
        (lambda: Groups([0, 2, 2]), ValueError, "group 1 has none"),
        (lambda: Groups([0, 1], ["a", "b", "c"]), ValueError, "group 2 has none"),
        (lambda: Groups([0, 1], ["a"]), ValueError, "must be in 0..0, got 1 at index 1"),
        (lambda: Groups([0, 1], ["a", "a"]), ValueError, "names must be distinct, got 'a' again"),
        (lambda: Groups([0, 1], ["a", 1]), TypeError, "names must be strings, got 1 at index 1"),
        (lambda: Groups([0.0, 1.0]), TypeError, "must be integers, got float64"),
        (lambda: Groups(torch.zeros(2)), TypeError, "must be integers, got torch.float32"),
        (lambda: Groups([True, False]), TypeError, "must be integers, got bool"),
        (lambda: Groups([[0, 1]]), ValueError, r"must be 1-dimensional, got shape \(1, 2\)"),
        (lambda: Groups([[0], [1, 2]]), ValueError, "must be a regular array"),
        (lambda: Groups([0, 0], None, [0]), ValueError, "index_in_group must have 2 entries"),
        (lambda: Groups([0, 0], None, [0, 0]), ValueError, "from 0, got 0 at index 1"),
        (lambda: Groups([0, 0], None, [1, 2]), ValueError, "index_in_group must number"),
        (lambda: Groups.from_labels("abc"), TypeError, "one label per class, got 'abc'"),
        (lambda: Groups.from_labels([0.5, 1.0]), TypeError, "got floats"),
        (lambda: Groups.from_labels([[0], [1]]), TypeError, "hashable"),
        (lambda: Groups.from_labels([]), ValueError, "must not be empty"),
        (lambda: Groups.from_labels(["a", "b"], ["a"]), ValueError, "got 'b' at index 1"),
        (lambda: Groups.from_labels([1, "1"]), ValueError, "names must be distinct"),
        (
            lambda: Groups.from_sizes([2, 3, 1, 0]),
            ValueError,
            "^Groups.from_sizes: sizes must be >= 1, got 0 at index 3$",
        ),
        (lambda: Groups.from_sizes([]), ValueError, "Groups.from_sizes: sizes must not be empty"),
        (lambda: Groups.from_sizes([1.5]), TypeError, "sizes must be integers, got float64"),
        (lambda: Groups.from_slices([0, 3]), ValueError, "slices must be 2-dimensional"),
        (lambda: Groups.from_slices([[0, 3, 4]]), ValueError, r"shape \(K, 2\), got \(1, 3\)"),
        (lambda: Groups.from_slices([[1, 3]]), ValueError, "must start at 0.*got 1 at index 0"),
        (lambda: Groups.from_slices([[0, 3], [4, 6]]), ValueError, "got 4 at index 1"),
        (lambda: Groups.from_slices([[0, 3], [3, 4]]), ValueError, "wide, got 1 at index 1"),
        (lambda: Groups.from_slices([[0, 3], [3, 1]]), ValueError, "wide, got -2 at index 1"),
        (lambda: Groups.random(0, 1), ValueError, "Groups.random: num_classes must be >= 1, got 0"),
        (lambda: Groups.random(5, 6), ValueError, "k must be in 1..5, got 6"),
        (lambda: Groups.random(5, 0), ValueError, "k must be in 1..5, got 0"),
        (lambda: Groups.random(5, 2, -1), ValueError, "seed must be >= 0, got -1"),
        (lambda: Groups.random(5.0, 2), TypeError, "num_classes must be an int, got 5.0"),
    ],
)
def test_constructors_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_from_sizes():
    groups = Groups.from_sizes([2, 1], ["x", "y"])
    assert groups == Groups([0, 0, 1], ["x", "y"])
    assert groups.to_grouped(torch.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_from_slices(kind):
    assert Groups.from_slices(kind([[0, 3], [3, 5]])) == Groups.from_sizes([2, 1])


def test_slices_round_trip(groups):
    assert torch.equal(Groups.from_slices(groups.slices()).offsets, groups.offsets)


def test_random_is_pinned():
    assert Groups.random(10, 3).class_to_group.tolist() == [2, 2, 1, 0, 1, 2, 1, 0, 0, 0]


@pytest.mark.parametrize(("c", "k"), [(10, 3), (1000, 8), (7, 7), (5, 1)])
def test_random_is_balanced(c, k):
    groups = Groups.random(c, k, seed=5)
    sizes = groups.sizes
    assert (len(groups), sizes.sum()) == (k, c)
    assert sizes.max() - sizes.min() <= 1
    assert groups == Groups.random(c, k, seed=5)
    if 1 < k < c:
        assert groups != Groups.random(c, k, seed=6)


def test_random_interleaves():
    group = Groups.random(1000, 8).class_to_group
    assert abs((group[1:] == group[:-1]).double().mean() - 1 / 8) < 0.05


def _table(tmp_path, text):
    path = tmp_path / "groups.csv"
    path.write_text(text)
    return path


def test_from_table(tmp_path):
    path = _table(tmp_path, "wnid,group,index_in_group\nn1,0,1\nn2,1,0\nn3,0,0\n")
    assert Groups.from_table(path) == Groups(
        [0, 1, 0], index_in_group=[1, 0, 0], class_names=["n1", "n2", "n3"]
    )
    path = _table(tmp_path, "group,class\ncat,0\ndog,1\ncat,2\n")
    assert Groups.from_table(path) == Groups([0, 1, 0], ["cat", "dog"])
    assert Groups.from_table(path, ["dog", "cat"]) == Groups([1, 0, 1], ["dog", "cat"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a header with a column 'group'"),
        ("a,b\n1,2\n", "must have a header with a column 'group'"),
        ("group\n", "must have a header with a column 'group'"),
        ("group,index_in_group\n0,x\n", "index_in_group must hold ints"),
        ("group,index_in_group\n0\n", "index_in_group must hold ints"),
        ("group\n0\n2\n", "must be in 0..1, got 2 at index 1"),
        ("class,group\n0,a\n1\n", "got no group in row 1"),
    ],
)
def test_from_table_refuses(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Groups.from_table(_table(tmp_path, text))


# Order of the classes


def test_matched_gives_each_class_its_columns_by_name():
    groups = Groups([0, 1, 0, 1], ["a", "b"], [1, 0, 0, 1], ["w", "x", "y", "z"])
    wanted = ["z", "y", "x", "w"]
    matched = groups.matched(wanted)
    assert matched.class_names == tuple(wanted)
    assert matched.names == groups.names
    assert torch.equal(matched.offsets, groups.offsets)
    ids = torch.arange(4)
    assert torch.equal(matched.to_column(ids), groups.to_column(ids.flip(0)))
    assert matched != groups
    assert matched.matched(groups.class_names) == groups
    assert groups.matched(groups.class_names) is groups


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (["x", "y"], r"got 2 names for 3 classes: 0 that the groups do not have \[\], 1 missing"),
        (["x", "y", "q"], r"1 that the groups do not have \['q'\], 1 missing \['z'\]"),
        (["x", "y", "z", "q"], "1 that the groups do not have"),
        (["x", "y", "y"], "class_names must be distinct, got 'y' again at index 2"),
    ],
)
def test_matched_refuses_other_classes(class_names, message):
    with pytest.raises(ValueError, match=message):
        Groups([0, 1, 0], class_names=["x", "y", "z"]).matched(class_names)


def test_matched_refuses_an_unknown_order_and_says_how_to_convert():
    with pytest.raises(
        ValueError, match=r"order of the 3 classes .*not known.*oodk convert groups"
    ):
        Groups([0, 1, 0]).matched(["x", "y", "z"])


def test_class_names_are_kept(tmp_path):
    groups = Groups([0, 1, 0], class_names=["x", "y", "z"])
    groups.save(tmp_path / "groups.json")
    assert Groups.load(tmp_path / "groups.json") == groups
    assert pickle.loads(pickle.dumps(groups)).class_names == groups.to("meta").class_names
    assert groups != Groups([0, 1, 0])


@pytest.mark.parametrize(
    ("class_names", "error", "message"),
    [
        (["x"], ValueError, "class_names must have 2 entries, one per class, got 1"),
        (["x", 1], TypeError, "class_names must be strings, got 1 at index 1"),
        ("xy", TypeError, "class_names must be a sequence of strings, got 'xy'"),
    ],
)
def test_class_names_are_checked(class_names, error, message):
    with pytest.raises(error, match=message):
        Groups([0, 0], class_names=class_names)


AUTHORS = np.array([398, 521, 9, 7, 52, 8, 3, 2])


@pytest.mark.parametrize("kind", ["sizes", "slices"])
def test_the_authors_taxonomy_is_not_taken_for_imagenets_class_ids(kind):
    ends = np.cumsum(AUTHORS + 1)
    content = {"sizes": AUTHORS, "slices": np.stack([ends - AUTHORS - 1, ends], 1)}[kind]
    make = getattr(Groups, f"from_{kind}")
    with pytest.raises(ValueError, match=r"authors' columns.*give class_names.*from_image_list"):
        make(content)
    said = make(content, class_names=[str(i) for i in range(1000)])
    assert said.sizes.tolist() == AUTHORS.tolist()


IMAGE_LIST = "val/n2/a.JPEG 0 1\nval/n3/b c.JPEG 1 0\nval/n1/c.JPEG 0 0\nval/n2/d.JPEG 0 1\n"


def test_from_image_list_counts_classes_as_imagenet_does(tmp_path):
    path = _table(tmp_path, IMAGE_LIST)
    groups = Groups.from_image_list(path, ["animal", "rest"])
    assert groups == Groups([0, 0, 1], ["animal", "rest"], [0, 1, 0], ["n1", "n2", "n3"])
    grouped_order = Groups.from_sizes([2, 1], class_names=["n1", "n2", "n3"])
    assert groups.matched(["n3", "n1", "n2"]).to_column(torch.arange(3)).tolist() == [4, 1, 2]
    assert torch.equal(groups.offsets, grouped_order.offsets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must not be empty"),
        ("x.JPEG 0 1\n", "line 1 must be 'folder/image group index', got 'x.JPEG 0 1'"),
        ("n1/x.JPEG 0\n", "line 1 must be"),
        ("n1/x 0 0\nn1/y 0 1\n", r"line 2 must have class n1 in group and index \(0, 0\)"),
        ("n1/x 0 0\nn2/y 0 2\n", "index_in_group must number"),
    ],
)
def test_from_image_list_refuses(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Groups.from_image_list(_table(tmp_path, text))


@pytest.mark.skipif(not IMAGENET.exists(), reason="needs the taxonomy of MOS in ../shared/data")
def test_matching_moves_998_of_imagenets_classes():
    """The authors' sizes alone, taken for class ids as they were, get all but two columns wrong."""
    table = Groups.from_table(IMAGENET)
    in_columns = [table.class_names[c] for c in table.classes]
    authors = Groups.from_sizes(table.sizes, class_names=in_columns)
    ids = torch.arange(1000)
    assert (authors.to_column(ids) != table.to_column(ids)).sum() == 998
    matched = authors.matched(table.class_names)
    assert torch.equal(matched.to_column(ids), table.to_column(ids))


def test_numpy_scalars_are_taken():
    assert Groups.random(np.int64(10), np.int32(3), np.uint8(4)) == Groups.random(10, 3, 4)
    groups = Groups([np.int64(1), np.int32(0)])
    assert groups.to_grouped(torch.tensor([-1, 0]), np.int64(-1)).tolist() == [-1, 1]
    means = np.eye(4, 16)
    assert Groups.from_features(means, np.int64(2), np.int64(1)) == Groups.from_features(
        means, 2, 1
    )


# Feature clustering


def test_from_features_finds_the_clusters():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.arange(60) % 4)
    means = 20 * np.eye(4, 16)[truth] + rng.normal(size=(60, 16))
    expected = Groups([list(dict.fromkeys(truth)).index(t) for t in truth])
    for x in (means, torch.tensor(means, dtype=torch.bfloat16), means.tolist()):
        assert Groups.from_features(x, 4) == expected
    assert Groups.from_features(means, 4, seed=9) == expected


def test_from_features_leaves_no_group_empty():
    means = np.repeat([[0.0, 0.0], [1.0, 1.0]], 5, axis=0)
    groups = Groups.from_features(means, 6)
    assert len(groups) == 6
    assert groups.sizes.min() >= 1
    assert len(Groups.from_features(np.eye(5), 5)) == 5


@pytest.mark.parametrize(
    ("means", "k", "message"),
    [
        (np.zeros(3), 1, r"class_means must have shape \(C, d\), got \(3,\)"),
        (np.zeros((3, 0)), 1, "class_means must have shape"),
        (np.zeros((3, 2)), 4, "k must be in 1..3, got 4"),
        ([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]], 1, "2 classes that are not.* 1$"),
    ],
)
def test_from_features_refuses(means, k, message):
    with pytest.raises(ValueError, match=message):
        Groups.from_features(means, k)


# WordNet

ROOTS = {
    15388: "animal",
    21939: "artifact",
    19128: "natural_object",
    9287968: "geological_formation",
    12992868: "fungus",
    7846: "person",
    17222: "plant",
}
SYNSETS = {
    1740: ("entity", []),
    **{offset: (word, [("@", 1740)]) for offset, word in ROOTS.items()},
    101: ("canine", [("@", 15388)]),
    102: ("dog", [("~", 21939), ("@", 101)]),
    103: ("Rex", [("@i", 102)]),
    104: ("bar", [("@", 9287968), ("@", 19128)]),
    105: ("pizza", [("@", 1740), ("#p", 21939)]),
    106: ("rose", [("@", 17222)]),
}


def _synset(offset, word, pointers):
    shown = " ".join(f"{symbol} {target:08d} n 0000" for symbol, target in pointers)
    return f"{offset:08d} 03 n 02 {word} 0 synonym 1 {len(pointers):03d} {shown} | a | gloss\n"


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    lines = "".join(_synset(offset, *rest) for offset, rest in SYNSETS.items())
    (tmp_path / "data.noun").write_text("  1 This is the licence.\n" + lines)
    return tmp_path


def test_from_wordnet_follows_hypernyms(wordnet, monkeypatch):
    wnids = [f"n{offset:08d}" for offset in (106, 102, 105, 103, 104, 101, 21939)]
    groups = Groups.from_wordnet(wnids, wordnet)
    assert groups.names == ("animal", "artifact", "misc", "natural object", "plant")
    assert [groups.names[k] for k in groups.class_to_group] == [
        *("plant", "animal", "misc", "animal", "natural object", "animal", "artifact")
    ]
    monkeypatch.setenv("WNSEARCHDIR", str(wordnet))
    assert Groups.from_wordnet(wnids) == groups


@pytest.mark.parametrize(
    ("wnids", "error", "message"),
    [
        (["n00000102", "n00000999"], ValueError, "must be nouns of .*, got 'n00000999' at index 1"),
        (["00000102"], ValueError, "must look like 'n01440764', got '00000102' at index 0"),
        ([102], ValueError, "must look like 'n01440764', got 102"),
        ("n00000102", TypeError, "one id per class"),
        ([], ValueError, "must not be empty"),
    ],
)
def test_from_wordnet_refuses_ids(wordnet, wnids, error, message):
    with pytest.raises(error, match=message):
        Groups.from_wordnet(wnids, wordnet)


def test_from_wordnet_refuses_other_files(wordnet):
    path = wordnet / "data.noun"
    path.write_text(path.read_text().replace("animal", "beast"))
    with pytest.raises(ValueError, match=r"must be of WordNet 3\.0.*'animal'"):
        Groups.from_wordnet(["n00000102"], wordnet)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must be a WordNet database"):
        Groups.from_wordnet(["n00000102"], wordnet)
    with pytest.raises(FileNotFoundError, match=r"no data\.noun in .*nowhere.*wordnet-base"):
        Groups.from_wordnet(["n00000102"], wordnet / "nowhere")


def test_from_wordnet_cuts_the_hierarchy(wordnet):
    offsets = (106, 102, 105, 103, 104, 101, 21939)
    wnids = [f"n{offset:08d}" for offset in offsets]
    expected = {
        1: {"entity": offsets},
        2: {"entity": (106, 105, 104, 21939), "canine": (102, 103, 101)},
        3: {"rose": (106,), "entity": (105, 104, 21939), "canine": (102, 103, 101)},
    }
    for k, named in expected.items():
        groups = Groups.from_wordnet(wnids, wordnet, k)
        found = {}
        for offset, group in zip(offsets, groups.class_to_group.tolist(), strict=True):
            found.setdefault(groups.names[group], []).append(offset)
        assert {name: tuple(group) for name, group in found.items()} == named
        assert groups.class_names == tuple(wnids)
    assert len(Groups.from_wordnet(wnids, wordnet, 7)) == 7
    for k in (0, 8):
        with pytest.raises(ValueError, match=f"k must be 1 to 7, one a class, got {k}"):
            Groups.from_wordnet(wnids, wordnet, k)
    with pytest.raises(ValueError, match="once each, got 'n00000102' again"):
        Groups.from_wordnet(["n00000102", "n00000102"], wordnet, 1)


@pytest.mark.skipif(not IMAGENET.exists(), reason="needs the taxonomy of MOS in ../shared/data")
def test_from_wordnet_agrees_with_mos_on_imagenet():
    with IMAGENET.open() as file:
        wnids = [row["wnid"] for row in csv.DictReader(file)]
    table = Groups.from_table(IMAGENET, WORDNET_GROUPS)
    assert table.sizes.tolist() == [398, 521, 9, 7, 52, 8, 3, 2]
    try:
        groups = Groups.from_wordnet(wnids)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert groups.names == WORDNET_GROUPS
    assert (groups.class_to_group == table.class_to_group).sum() >= 985


# Keeping


def test_json_round_trip(groups, tmp_path):
    path = tmp_path / "groups.json"
    groups.save(path)
    loaded = Groups.load(path)
    assert loaded == groups
    assert hash(loaded) == hash(groups)
    assert torch.equal(loaded.offsets, groups.offsets)
    assert torch.equal(loaded.classes, groups.classes)
    assert [p.name for p in tmp_path.iterdir()] == ["groups.json"]


def test_json_is_readable():
    content = json.loads(Groups([1, 0, 1], ["ä", "b"]).to_json())
    assert content == {
        "format": "oodkernels.groups",
        "version": 1,
        "groups": [{"name": "ä", "classes": [1]}, {"name": "b", "classes": [0, 2]}],
    }


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "groups.json"
    Groups.from_sizes([1]).save(path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Groups.from_sizes([2]).save(path)
    assert Groups.load(path) == Groups.from_sizes([1])
    assert [p.name for p in tmp_path.iterdir()] == ["groups.json"]


def _json(**changes):
    content = {"format": "oodkernels.groups", "version": 1}
    content["groups"] = [{"name": "a", "classes": [0, 2]}, {"name": "b", "classes": [1]}]
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text must be JSON"),
        (_json()[:-9], "text must be JSON"),
        ("[]", r"format must be 'oodkernels.groups', got '\[\]'"),
        ('"oodkernels.groups"', "format must be"),
        (_json(format="other"), "format must be 'oodkernels.groups', got 'other'"),
        (_json(version=2), "version must be 1, got 2"),
        (_json(groups=None), "a name and a list"),
        (_json(groups=[]), "a name and a list"),
        (_json(groups=[{"name": "a"}]), "a name and a list"),
        (_json(groups=[{"name": "a", "classes": []}]), "must not be empty"),
        (_json(groups=[{"name": "a", "classes": ["x"]}]), "must be integers"),
        (_json(groups=[{"name": 5, "classes": [0]}]), "names must be strings"),
        (_json(groups=[{"name": "a", "classes": [0, 0]}]), "each of the class ids 0..1 once"),
        (_json(groups=[{"name": "a", "classes": [0, 2]}]), "each of the class ids 0..1 once"),
        (_json(groups=[{"name": "a", "classes": [-1, 0]}]), "each of the class ids 0..1 once"),
    ],
)
def test_load_refuses(tmp_path, text, message):
    path = tmp_path / "groups.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^Groups.load: .*groups\.json: .*" + message):
        Groups.load(path)


def test_load_refuses_binary_and_missing_files(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"^Groups\.load: "):
        Groups.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        Groups.load(tmp_path / "y")


def test_equality_hash_and_copies(groups):
    for other in (copy.copy(groups), copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert other == groups
        assert hash(other) == hash(groups)
    assert len({groups, pickle.loads(pickle.dumps(groups))}) == 1
    assert groups != Groups.random(groups.num_classes + 1, 1)
    assert groups != "groups"


def test_names_and_columns_count_in_equality():
    assert Groups([0, 1]) != Groups([0, 1], ["a", "b"])
    assert Groups([0, 1]) != Groups([1, 0])
    assert Groups([0, 0, 1]) != Groups([0, 1, 1])


# Devices, modes, compilation


def test_to_keeps_one_copy_a_device():
    groups = Groups.random(20, 4)
    meta = groups.to("meta")
    assert meta.device.type == meta.offsets.device.type == "meta"
    assert meta.to_class(torch.empty(3, dtype=torch.int64, device="meta")).shape == (3,)
    assert groups.to("cpu") is groups
    assert groups.to(torch.device("meta")) is meta
    assert meta.to("cpu") is groups
    assert meta == groups
    assert pickle.loads(pickle.dumps(meta)).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(monkeypatch):
    groups = Groups.random(100, 7)
    cuda = groups.to("cuda")
    assert groups.to("cuda:0") is groups.to(0) is cuda
    ids = torch.arange(100, device="cuda")
    assert groups.to_grouped(ids).device == ids.device
    assert torch.equal(groups.to_class(groups.to_grouped(ids)), ids)
    assert as_offsets("f", groups, ids) is cuda.offsets
    assert groups.to_grouped(ids[:1] + 100).item() == 100
    assert groups.to_column(ids[:1] + 100).item() == -1
    monkeypatch.setenv("OODK_VALIDATE", "1")
    with pytest.raises(ValueError, match="got 100"):
        groups.to_grouped(ids + 1)


def test_as_offsets():
    groups = Groups.random(20, 4)
    offsets = groups.offsets
    assert as_offsets("f", groups, torch.zeros(1)) is offsets
    assert as_offsets("f", offsets, torch.zeros(1, device="meta")) is offsets
    assert as_offsets("f", groups, torch.zeros(1, device="meta")) is groups.to("meta").offsets


def test_made_in_inference_mode_still_trains():
    with torch.inference_mode():
        groups = Groups.from_sizes([2, 3])
        meta = groups.to("meta")
    assert not groups.offsets.is_inference()
    assert not meta.offsets.is_inference()
    x = torch.zeros(4, 7, requires_grad=True)
    x[:, groups.offsets[:-1]].sum().backward()
    assert x.grad.sum() == 8


def test_follows_no_default_device():
    with torch.device("meta"):
        assert Groups.random(5, 2).device.type == "cpu"


def test_compiles_in_one_graph():
    groups = Groups.random(20, 4)

    def use(x, ids):
        others = x[:, as_offsets("use", groups, x)[:-1]]
        return others, groups.to_class(groups.to_grouped(ids)), groups.to_column(ids)

    x, ids = torch.randn(3, 24), torch.tensor([0, 7, 19])
    compiled = torch.compile(use, fullgraph=True, backend="eager")
    for expected, got in zip(use(x, ids), compiled(x, ids), strict=True):
        assert torch.equal(expected, got)
    assert compiled(x.to("meta"), ids.to("meta"))[0].shape == (3, 4)
    assert compiled(x, torch.tensor([20, -100, 0]))[2].tolist()[:2] == [-1, -1]
