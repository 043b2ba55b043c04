import re
import textwrap
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from cluster.site import Site
from cluster.typed_yaml import Section, check_recipe
from pipeline.commands.dag import run_on
from pipeline.dag.graph import Failed, build_graph, conclude, run_graph
from pipeline.dag.planned import PLANNED, parse_planned
from pipeline.dag.recipe import DagRecipe, StageSection, load_dag
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


def run_all(recipe):
    """What is said when a graph is run to its end."""
    lines, stages = [], build_graph(recipe, KINDS)
    conclude(recipe, stages, run_graph(stages, NoExecutor(), say=lines.append), say=lines.append)
    return lines


def descendants(edges, start):
    found = {start}
    for index, sources in enumerate(edges):
        if found & set(sources):
            found.add(index)
    return found


def test_a_graph_is_written_down_whole_before_its_first_stage_fails(tmp_path):
    recipe = graph(tmp_path / "runs" / "toys", [set(), {0}, {0, 1}], fail={0})
    stages = build_graph(recipe, KINDS)
    with pytest.raises(UserError, match="broken on purpose"):
        run_on("local", recipe, stages, Site(), jobs=1)
    path = stages[0].root / PLANNED
    assert [(each.name, each.folder, each.inputs) for each in parse_planned(path.read_bytes(), where="")] == [
        (stage.name, stage.folder.name, stage.input_keys) for stage in stages
    ]


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


def scored(work):
    return Result(dict(work.recipe.scores), [])


class Scored(Section):
    scores: dict[str, float]


@pytest.mark.parametrize(
    ("check", "failure"),
    [
        ({"metric": "top1", "at_least": 0.5}, None),
        ({"metric": "top1", "at_least": 0.7}, "check of better: top1 is 0.6, below 0.7"),
        ({"metric": "top1", "above": "worse"}, None),
        (
            {"metric": "top1", "above": "close"},
            r"check of better: top1 0\.6 \(from 0\.55\) is not above that of close, 0",
        ),
        ({"metric": "loss", "above": "worse"}, None),  # without intervals, the numbers themselves
        ({"metric": "top5", "at_least": 0.1}, r"stage better has no metric 'top5'; did you mean 'top1'\?"),
        ({"metric": "top1", "above": "wrose"}, r"a check is above 'wrose', and .* did you mean 'worse'\?"),
        ({"metric": "top1"}, "a check has either at_least, a number, or above, a stage"),
    ],
)
def test_checks_fail_a_graph_that_has_run(tmp_path, check, failure):
    scores = {
        "better": {"top1": 0.6, "top1_low": 0.55, "top1_high": 0.65, "loss": 2.0},
        "worse": {"top1": 0.4, "top1_low": 0.35, "top1_high": 0.45, "loss": 1.0},
        "close": {"top1": 0.59, "top1_low": 0.54, "top1_high": 0.64},
    }
    stages = {name: {"kind": "scored", "recipe": {"scores": found}} for name, found in scores.items()}
    stages["better"]["checks"] = [check]
    kinds = {"scored": Kind(recipe=Scored, run=scored)}

    def run_it():
        recipe = check_recipe(DagRecipe, {"folder": str(tmp_path), "stages": stages}, where="here")
        built = build_graph(recipe, kinds)
        conclude(recipe, built, run_graph(built, NoExecutor(), say=lambda text: None), say=lambda text: None)

    if failure is None:
        run_it()
        return
    with pytest.raises(UserError, match=failure):
        run_it()
    ran_first = failure.startswith("check of") or "has no metric" in failure
    assert (tmp_path / "latest" / "better").exists() == ran_first


def test_a_graph_prints_a_line_per_stage_and_what_is_shown_at_the_end(tmp_path):
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
    lines = run_all(load_dag(str(path), ["stages.two.recipe.number=7"]))
    assert "done" in lines[0]
    assert lines[2:] == [
        "accuracy  25.0 %",
        "things    3",
        f"page      {tmp_path}/out/latest/two/out",
    ]
    assert (tmp_path / "out" / "latest" / "two" / "out").read_text() == "7"
    with pytest.raises(UserError, match="no stage 'tow'; did you mean 'two'"):
        load_dag(str(path), ["stages.tow.recipe.number=7"])
    path.write_text(path.read_text().replace("metric: share", "metric: shaer"))
    with pytest.raises(UserError, match="stage two has no metric 'shaer'; did you mean 'share'"):
        run_all(load_dag(str(path), []))


def test_the_end_of_a_graph_names_the_failure_and_what_was_not_run(tmp_path):
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
        run_all(load_dag(str(path), []))
    assert "broken on purpose" in next((tmp_path / "out").glob("toy-*/error.txt")).read_text()


def test_a_recipes_name_is_replaced_by_its_content_and_can_be_overridden(tmp_path):
    (tmp_path / "toy.yaml").write_text("number: 5\n")
    path = tmp_path / "g.yaml"
    path.write_text(f"folder: {tmp_path}\nstages:\n  one: {{kind: toy, recipe: {tmp_path}/toy.yaml}}\n")
    assert load_dag(str(path), []).stages["one"].recipe == {"number": 5}
    override = ["stages.one.recipe.number=6"]
    assert load_dag(str(path), override).stages["one"].recipe == {"number": 6}


def test_a_recipe_may_have_a_base_that_words_do_not_change_in_vain(tmp_path):
    (tmp_path / "own.yaml").write_text("number: 5\nfirst: 1\n")
    path = tmp_path / "g.yaml"
    recipe = f"{{base: {tmp_path}/own.yaml, first: 2}}"
    path.write_text(f"folder: {tmp_path}\nstages:\n  one: {{kind: toy, recipe: {recipe}}}\n")
    assert load_dag(str(path), []).stages["one"].recipe == {"number": 5, "first": 2}
    word = "stages.one.recipe.number=6"
    assert load_dag(str(path), [word]).stages["one"].recipe == {"number": 6, "first": 2}
    with pytest.raises(UserError, match=r"stages\.one\.recipe=pretrain/demo takes that recipe instead"):
        load_dag(str(path), ["stages.one.recipe.base=pretrain/demo"])


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


def graph_file(tmp_path, text):
    path = tmp_path / "g.yaml"
    path.write_text(f"folder: {tmp_path}\n{textwrap.dedent(text)}")
    return str(path)


def test_stages_are_repeated_over_lists_as_if_they_were_written_out(tmp_path):
    short = graph_file(
        tmp_path,
        """
        repeat: {letter: [a, b], digit: [1, 2]}
        stages:
          first: {kind: toy}
          toy_{letter}: {kind: toy, recipe: {number: 2}, inputs: {r0: first}}
          pair_b2: {recipe: {number: 5}}
          pair_{letter}{digit}: {kind: toy, recipe: {number: "{digit}"}, inputs: {r1: "toy_{letter}/out"}}
          toy_b: {recipe: {number: 3}}
          last: {kind: toy, inputs: {r2: first, "r{digit}": "pair_b{digit}", r3: first}}
        """,
    )
    assert list(load_dag(short, []).stages.items()) == [
        (name, StageSection.model_validate(section))
        for name, section in {
            "first": {"kind": "toy"},
            "toy_a": {"kind": "toy", "recipe": {"number": 2}, "inputs": {"r0": "first"}},
            "toy_b": {"kind": "toy", "recipe": {"number": 3}, "inputs": {"r0": "first"}},
            "pair_b2": {"kind": "toy", "recipe": {"number": 5}, "inputs": {"r1": "toy_b/out"}},
            "pair_a1": {"kind": "toy", "recipe": {"number": "1"}, "inputs": {"r1": "toy_a/out"}},
            "pair_a2": {"kind": "toy", "recipe": {"number": "2"}, "inputs": {"r1": "toy_a/out"}},
            "pair_b1": {"kind": "toy", "recipe": {"number": "1"}, "inputs": {"r1": "toy_b/out"}},
            "last": {"kind": "toy", "inputs": {"r1": "pair_b1", "r2": "first", "r3": "first"}},
        }.items()
    ]
    numbers = load_dag(short, ["stages.pair_a*.recipe.number=7"]).stages
    assert numbers["pair_a1"].recipe == {"number": 7} and numbers["pair_b1"].recipe == {"number": "1"}
    build_graph(load_dag(short, []), KINDS)


def test_what_is_repeated_can_be_said_anew_and_is_shown_line_by_line(tmp_path):
    graph = graph_file(
        tmp_path,
        """
        repeat: {seed: [0, 1]}
        stages:
          first: {kind: toy}
          toy_{seed}: {kind: toy, recipe: {number: "{seed}"}, inputs: {r0: first}}
          last: {kind: toy, inputs: {r0: first, "r{seed}": "toy_{seed}"}}
        show:
          - {text: "seed {seed}", stage: "toy_{seed}", metric: number}
          - {text: last, stage: last, metric: number}
        """,
    )
    assert [line.text for line in load_dag(graph, []).show] == ["seed 0", "seed 1", "last"]
    other = load_dag(graph, ["stages.toy_*.recipe.number=9", "repeat.seed=[3]"])
    assert other.stages.keys() == {"first", "toy_3", "last"}
    assert other.stages["toy_3"].recipe == {"number": 9}
    none = load_dag(graph, ["repeat.seed=[]"])
    assert none.stages["last"].inputs == {"r0": "first"}
    assert [(line.text, line.stage) for line in none.show] == [("last", "last")]
    with pytest.raises(UserError, match=r"has no list 'sed' to repeat; did you mean 'seed'\?"):
        load_dag(graph, ["repeat.sed=[1]"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "stages: {'toy_{x}': {kind: toy}}",
            r"g.yaml: stage 'toy_{x}': repeat has no list 'x'; the graph rep",
        ),
        (
            "repeat: {letter: [a]}\nstages: {'t_{leter}': {kind: toy}}",
            r"list 'leter'; did you mean 'letter'?",
        ),
        (
            "repeat: {x: [a]}\nstages: {a: {kind: toy, inputs: {'{y}': a}}}",
            r"stage a: input '{y}': repeat has no list 'y'; there are: x",
        ),
        (
            "repeat: [a]\nstages: {a: {kind: toy}}",
            r"repeat is a mapping of names to lists, such as {method: .*}, not \['a'\]",
        ),
        ("repeat: {x: a}\nstages: {a: {kind: toy}}", r"repeat.x is a list of different names, .* not 'a'"),
        ("repeat: {x: [a, a]}\nstages: {a: {kind: toy}}", r"repeat.x is a list of different names"),
        ("repeat: {x: [A b]}\nstages: {a: {kind: toy}}", r"repeat.x is a list of different names"),
        ("repeat: {x: [a]}\nstages: [a]", r"stages: Input should be a valid dictionary"),
        ("repeat: {x: [a]}\nstages: {'b_{x}': [1]}", r"stages.b_a: "),
    ],
)
def test_a_wrong_repetition_is_one_clear_sentence(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        load_dag(graph_file(tmp_path, text), [])


def test_a_graph_stands_on_another_and_repeats_its_lists(tmp_path):
    graph_file(
        tmp_path,
        """
        repeat: {letter: [a, b]}
        stages:
          toy_{letter}: {kind: toy, recipe: {number: 2}}
          last: {kind: toy, inputs: {"r0": "toy_a"}}
        """,
    )
    (tmp_path / "twin.yaml").write_text(
        """
base: g.yaml
folder: twin
stages:
  toy_{letter}: {recipe: {number: 3}}
  toy_b: {recipe: {fail: true}}
"""
    )
    twin = load_dag(str(tmp_path / "twin.yaml"), [])
    assert twin.folder == "twin"
    assert {name: stage.recipe for name, stage in twin.stages.items()} == {
        "toy_a": {"number": 3},
        "toy_b": {"number": 3, "fail": True},
        "last": {},
    }
    with pytest.raises(UserError, match=r"recipe .*twin.yaml \(base .*g.yaml\): 'fodler' is not a key"):
        load_dag(str(tmp_path / "twin.yaml"), ["fodler=x"])


def test_it_is_told_what_is_left_and_how_long_it_took_the_last_time(tmp_path):
    _, lines = run(graph(tmp_path, [set(), {0}, {1}]))
    assert [line.partition("  (")[2] for line in lines] == ["2 to go; next: s1)", "1 to go; next: s2)", ""]
    _, lines = run(graph(tmp_path, [set(), {0}, {1}], numbers={0: 100}))
    assert re.fullmatch(r"s0 +done .*\(2 to go, about 0\.\d s; next: s1\)", lines[0])
