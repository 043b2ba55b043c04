"""The evaluations of frozen features, each a row: commands, stages and the report read this table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cluster.errors import UserError
from cluster.job import import_function
from cluster.typed_yaml import Section
from pipeline.recipe.stages import Pooling
from pipeline.recipe.transfer import (
    AudioSvmRecipe,
    FewShotRecipe,
    KnnRecipe,
    LinearRecipe,
    LinearSgdRecipe,
    RetrieveRecipe,
    SvmRecipe,
)

if TYPE_CHECKING:  # to name an evaluation takes no torch
    import torch

    from pipeline.transfer.features import Features
    from pipeline.transfer.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One way to score the features of a trunk. Its name is that of `configs/transfer/{name}.yaml`.

    Attributes:
        recipe: what can be chosen.
        function: "package.module:function", of training and test features, the recipe, and a `device`.
        about: for `submit --help`.
        title, column: what the report calls it, in full and in a table.
        explained: how it works, for the report; a metric of the trained trunk may stand in braces.
        several_labels: whether images may have several labels, and labels to ignore.
        windows: whether it takes a row for each window of a video: never, also, or always, where the command
            extracts them.
        pooling: how the command pools a stage's map for it.
        refusing: "package.module:function", of a recipe and the number of training images, which refuses
            what can be seen to fail without looking at them.
        metric: what it finds out, and with `_low` and `_high` the ends of its interval.
    """

    recipe: type[Section]
    function: str
    about: str
    title: str
    column: str
    explained: str
    several_labels: bool = False
    windows: Literal["never", "also", "always"] = "never"
    pooling: Pooling = "max"
    refusing: str | None = None
    metric: str = "top1"

    def refuse(self, recipe: Section, train_samples: int) -> None:
        """Raise UserError if the recipe cannot be followed with so many training images."""
        if self.refusing is not None:
            import_function(self.refusing)(recipe, train_samples)

    def score(self, train: Features, test: Features, recipe: Section, *, device: torch.device) -> Scores:
        """Score test features by training features.

        Raises:
            UserError: if the recipe does not fit the features, or these have too few labels in common, or
                several rows of a sample.
        """
        from pipeline.transfer.scores import windows_of

        if self.windows == "never" and any(
            len(windows_of(part.keys)[1]) < len(part.keys) for part in (train, test)
        ):
            raise UserError(
                "these features have a row for each window of a video, and this evaluation takes one of each "
                "video: extract their mean, without --each, or videos.each in a graph"
            )
        scores: Scores = import_function(self.function)(train, test, recipe, device=device)
        return scores


EVALUATIONS: dict[str, Evaluation] = {
    "knn": Evaluation(
        recipe=KnnRecipe,
        function="pipeline.transfer.knn:knn",
        about="Score a trunk by weighted nearest neighbours.",
        title="Nearest neighbours",
        column="kNN",
        explained="the {k} most similar training images vote, by cosine similarity",
        refusing="pipeline.transfer.knn:refuse_recipe",
    ),
    "linear": Evaluation(
        recipe=LinearRecipe,
        function="pipeline.transfer.linear:linear_probe",
        about="Score a trunk by a linear classifier on its features.",
        title="Linear probe",
        column="linear",
        explained="logistic regression, its regularisation chosen on a part of the training set",
        windows="also",
    ),
    "linear_sgd": Evaluation(
        recipe=LinearSgdRecipe,
        function="pipeline.transfer.linear_sgd:linear_sgd",
        about="Score a trunk by the best of several linear heads, trained side by side by SGD.",
        title="Linear heads by SGD",
        column="linear, SGD",
        explained="the best of several rates, with and without BatchNorm, on a part of the training set",
    ),
    "few_shot": Evaluation(
        recipe=FewShotRecipe,
        function="pipeline.transfer.few_shot:few_shot",
        about="Score a trunk by a linear classifier from a few labelled samples of each class.",
        title="Few-shot",
        column="few-shot",
        explained="logistic regression on {shots} samples of each label, the mean of {draws} draws of them",
    ),
    "audio_svm": Evaluation(
        recipe=AudioSvmRecipe,
        function="pipeline.transfer.audio_svm:audio_svm",
        about="Score a trunk for sound by support vector machines, as for ESC-50; windows are averaged.",
        title="Support vector machines for recordings",
        column="audio SVM",
        explained="one for each of {classes} labels, averaged over the windows of a recording",
        windows="always",
        pooling="average",
    ),
    "svm": Evaluation(
        recipe=SvmRecipe,
        function="pipeline.transfer.svm:svm",
        about="Score a trunk by a support vector machine for each label; images may have several labels.",
        title="Support vector machines",
        column="SVM",
        explained="one for each of {classes} labels, its cost chosen by cross-validation",
        several_labels=True,
        metric="map",
    ),
    "retrieve": Evaluation(
        recipe=RetrieveRecipe,
        function="pipeline.transfer.retrieve:retrieve",
        about="Score a trunk by retrieval: --test are queries, for images of their label in --train.",
        title="Retrieval",
        column="retrieval",
        explained="{database} images by cosine similarity, for each of {queries} queries",
        metric="map",
    ),
}
