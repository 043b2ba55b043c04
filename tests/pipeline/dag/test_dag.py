from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from cluster.typed_yaml import Section
from pipeline.dag.graph import DagRecipe, Failed, build_graph, load_dag, run_dag, run_graph
from pipeline.dag.stage import Kind, Result


class NoExecutor:
    def refuse_impossible(self, job):
        raise AssertionError("no job is submitted here")


class Toy(Section):
    number: int = 0
    fail: bool = False


ran: Counter[str] = Counter()


def toy(work):
    ran[str(work.recipe.number)] += 1
    if work.recipe.fail:
        raise ValueError("broken on purpose")
    (work.folder / "out").write_text(str(work.recipe.number))
    return Result({"share": 0.25, "count": 3}, ["out"])


ROLES = frozenset(f"r{index}" for index in range(8))
KINDS = {
    "toy": Kind(recipe=Toy, run=toy, optional=ROLES),
    "needy": Kind(recipe=Toy, run=toy, inputs={"data"}),
}


def graph(folder, edges, numbers=None, fail=()):
    """Stage i reads the stages edges[i]."""
    return DagRecipe(
        folder=str(folder),
        stages={
            f"s{index}": {
                "kind": "toy",
                "recipe": {"number": (numbers or {}).get(index, index), "fail": index in fail},
                "inputs": {f"r{slot}": f"s{source}" for slot, source in enumerate(sorted(sources))},
            }
            for index, sources in enumerate(edges)
        },
    )


def run(recipe):
    ran.clear()
    lines = []
    results = run_graph(build_graph(recipe, KINDS), NoExecutor(), say=lines.append)
    return results, lines


def descendants(edges, start):
    found = {start}
    for index, sources in enumerate(edges):
        if found & set(sources):
            found.add(index)
    return found


random_graphs = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*(st.sets(st.integers(0, i - 1)) if i else st.just(set()) for i in range(n)))
)


@settings(max_examples=30, deadline=None)
@given(edges=random_graphs, data=st.data())
def test_C2_a_rerun_executes_nothing_and_a_change_reruns_exactly_its_descendants(
    edges, data, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("graph")
    run(graph(folder, edges))
    assert sum(ran.values()) == len(edges)
    _, lines = run(graph(folder, edges))
    assert not ran
    assert all("reused" in line for line in lines)
    changed = data.draw(st.integers(0, len(edges) - 1))
    run(graph(folder, edges, numbers={changed: 100}))
    expected = {100 if index == changed else index for index in descendants(edges, changed)}
    assert ran == Counter({str(number): 1 for number in expected})
    run(graph(folder, edges))
    assert not ran  # the first results are still there


@settings(max_examples=30, deadline=None)
@given(edges=random_graphs, data=st.data())
def test_after_a_failure_descendants_are_not_run_and_the_others_are(edges, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    broken = data.draw(st.integers(0, len(edges) - 1))
    results, _ = run(graph(folder, edges, fail={broken}))
    failed = {int(name[1:]) for name, result in results.items() if isinstance(result, Failed)}
    assert failed == descendants(edges, broken)
    assert ran == Counter({str(i): 1 for i in range(len(edges)) if i not in failed or i == broken})
    assert results[f"s{broken}"].error.args == ("broken on purpose",)


def test_stages_run_after_their_inputs_whatever_the_order_in_the_file(tmp_path):
    recipe = DagRecipe(
        folder=str(tmp_path),
        stages={
            "last": {"kind": "toy", "inputs": {"r0": "middle/out"}, "recipe": {"number": 3}},
            "first": {"kind": "toy", "recipe": {"number": 1}},
            "middle": {"kind": "toy", "inputs": {"r0": "first"}, "recipe": {"number": 2}},
        },
    )
    assert [stage.name for stage in build_graph(recipe, KINDS)] == ["first", "middle", "last"]


def test_a_circle_is_refused_and_named(tmp_path):
    recipe = DagRecipe(
        folder=str(tmp_path),
        stages={
            "a": {"kind": "toy", "inputs": {"r0": "b"}},
            "b": {"kind": "toy", "inputs": {"r0": "c"}},
            "c": {"kind": "toy", "inputs": {"r0": "a"}},
        },
    )
    with pytest.raises(UserError, match=r"circle: (a -> c -> b -> a|\w -> \w -> \w -> \w)"):
        build_graph(recipe, KINDS)


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ({"a": {"kind": "toi"}}, "stage a: there is no kind 'toi'; did you mean 'toy'?"),
        (
            {"a": {"kind": "toy", "inputs": {"r99": "a"}}},
            "stage a: toy has no input 'r99'; there are: r0, r1",
        ),
        ({"fir": {"kind": "toy"}, "b": {"kind": "toy", "inputs": {"r0": "fit"}}}, "did you mean 'fir'?"),
        ({"a": {"kind": "needy"}}, "stage a: needy needs the input 'data'"),
        ({"a": {"kind": "toy", "recipe": {"numbr": 1}}}, "stage a: 'numbr' is not a key .* 'number'"),
    ],
)
def test_a_wrong_graph_is_one_clear_sentence(tmp_path, stages, sentence):
    with pytest.raises(UserError, match=sentence):
        build_graph(DagRecipe(folder=str(tmp_path), stages=stages), KINDS)


def test_run_dag_prints_a_line_per_stage_and_what_is_shown_at_the_end(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text(
        f"""
folder: {tmp_path}/out
stages:
  one: {{kind: toy}}
  two: {{kind: toy, recipe: {{number: 2}}, inputs: {{r0: one/out}}}}
show:
  - {{text: accuracy, stage: two, metric: share}}
  - {{text: things, stage: two, metric: count}}
  - {{text: page, stage: two, file: out}}
"""
    )
    lines = []
    run_dag(str(path), ["stages.two.recipe.number=7"], NoExecutor(), kinds=KINDS, say=lines.append)
    assert "done" in lines[0]
    assert lines[2:] == [
        "accuracy  25.0 %",
        "things    3",
        f"page      {tmp_path}/out/latest/two/out",
    ]
    assert (tmp_path / "out" / "latest" / "two" / "out").read_text() == "7"
    with pytest.raises(UserError, match="no stage 'tow'; did you mean 'two'"):
        load_dag(str(path), ["stages.tow.recipe.number=7"])


def test_run_dag_names_the_failure_and_what_was_not_run(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text(
        f"""
folder: {tmp_path}/out
stages:
  one: {{kind: toy, recipe: {{fail: true}}}}
  two: {{kind: toy, recipe: {{number: 2}}, inputs: {{r0: one}}}}
"""
    )
    with pytest.raises(
        UserError, match=r"stage one failed: ValueError: broken on purpose \(traceback .*error.txt\).*: two"
    ):
        run_dag(str(path), [], NoExecutor(), kinds=KINDS, say=lambda line: None)
    assert "broken on purpose" in next((tmp_path / "out").glob("toy-*/error.txt")).read_text()


def test_a_recipes_name_is_replaced_by_its_content_and_can_be_overridden(tmp_path):
    (tmp_path / "toy.yaml").write_text("number: 5\n")
    path = tmp_path / "g.yaml"
    path.write_text(f"folder: {tmp_path}\nstages:\n  one: {{kind: toy, recipe: {tmp_path}/toy.yaml}}\n")
    assert load_dag(str(path), []).stages["one"].recipe == {"number": 5}
    override = ["stages.one.recipe.number=6"]
    assert load_dag(str(path), override).stages["one"].recipe == {"number": 6}


def test_a_pattern_overrides_every_stage_that_it_fits(tmp_path):
    path = tmp_path / "g.yaml"
    stages = "  toy_a: {kind: toy}\n  toy_b: {kind: toy, recipe: {number: 2}}\n  other: {kind: toy}\n"
    path.write_text(f"folder: {tmp_path}\nstages:\n{stages}")
    made = load_dag(str(path), ["stages.toy_*.recipe.number=5", "stages.toy_b.recipe.number=6"]).stages
    assert [made[name].recipe for name in made] == [{"number": 5}, {"number": 6}, {}]
    with pytest.raises(UserError, match=r"no stage 'toi_\*'; did you mean 'toy_[ab]'"):
        load_dag(str(path), ["stages.toi_*.recipe.number=5"])


def test_latest_follows_the_newest_result(tmp_path):
    run(graph(tmp_path, [set()]))
    run(graph(tmp_path, [set()], numbers={0: 9}))
    assert (tmp_path / "latest" / "s0" / "out").read_text() == "9"
