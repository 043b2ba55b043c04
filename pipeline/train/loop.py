"""Pretraining: batch → forward → backward → clip → step → after_step → log → checkpoint → stop?"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.hang.watchdog import Watchdog
from cluster.rank.preempt import PreemptionFlag, end_preempted, time_is_short
from cluster.rank.torch_dist import choose_device, distributed, own_place
from cluster.run.folder import RunFolder
from cluster.typed_yaml import check_recipe
from pipeline.data.batch import Batch
from pipeline.distributed.collectives import all_gather_rows
from pipeline.distributed.sharded import norms, own
from pipeline.parallel.precision import DTYPES, arithmetic, sound_convolutions
from pipeline.parallel.whole import whole_trunk
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.classifier import finish_classifier
from pipeline.train.guard import Diverged, Rollback, Suspect, batch_suspect, find_suspects
from pipeline.train.metrics import Stopwatch, embedding_std, rankme
from pipeline.train.optim import drop_all_but_the_head, set_learning_rate
from pipeline.train.schedule import learning_rate, steps_of_head_alone
from pipeline.train.setup import Training, set_up

logger = logging.getLogger(__name__)

SECONDS_TO_PART = 30.0  # from a checkpoint to the end of the last rank


def run_pretrain(recipe: dict[str, Any], folder: str) -> None:
    """The function of a pretraining job: every rank calls it with the same JSON values."""
    checked, run = check_recipe(PretrainRecipe, recipe, where=folder), RunFolder(Path(folder))
    rank, local_rank = own_place()
    seconds, nccl = checked.run.hang_seconds, choose_device(checked.run.device).type == "cuda"
    # Around everything: the ranks may also hang while they meet, or part.
    with Watchdog(run, rank=rank, local_rank=local_rank, seconds=seconds, nccl=nccl) as watchdog:
        pretrain(checked, run.path, watchdog)


def pretrain(recipe: PretrainRecipe, folder: Path, watchdog: Watchdog | None = None) -> None:
    """Train from the run folder's newest checkpoint, or from the start, to the end.

    Args:
        watchdog: of the job; without one nobody ends this process if it hangs.

    Raises:
        UserError: if the recipe does not fit the data, the ranks or the folder, or training diverges.
        Preempted: if a signal asked to stop; everything is saved.
    """
    asked = PreemptionFlag(RunFolder(folder))
    with distributed(recipe.run.device) as world, asked as preemption, ExitStack() as stack:
        training = set_up(recipe, folder, world, watchdog)
        if training.metrics is not None:
            stack.callback(training.metrics.close)
        stack.callback(training.profile.close)
        train(training, preemption)
        if recipe.method.supervised:
            finish_classifier(training)
            if world.is_first:
                training.run.mark_done()


def train(t: Training, preemption: PreemptionFlag) -> None:
    """All steps that are left; where the guard gives up, again from a checkpoint and with other data."""
    with sound_convolutions(t.recipe.train, t.world.device):
        while True:
            try:
                loop(t, preemption)
                return
            except Diverged as failure:
                t = roll_back(t, failure)


def loop(t: Training, preemption: PreemptionFlag) -> None:
    """The steps themselves. `step` counts those that are done; the schedule and the method see it from 0."""
    watch = Stopwatch()
    alone = steps_of_head_alone(t.recipe.optim, total_steps=t.total_steps)
    for step, batches in steps(t, watch):
        if t.positives is not None:
            t.positives.before(step)
        lr = learning_rate(t.recipe.optim, step=step, total_steps=t.total_steps)
        set_learning_rate(t.optimizer, lr)
        t.guard.remember()
        with t.stragglers.computing():
            terms, embeddings = forward_backward(t, batches, step)
        if step < alone:
            drop_all_but_the_head(t.optimizer)
        elif step == alone:
            t.optimizer.state.clear()  # of the head that has learned alone
        loss, norm = read_together(terms["loss"], gradient_norm(t))
        overflowed = t.scale.overflowed(loss, norm)
        accepted = not overflowed and t.guard.accepts(loss, norm)
        if accepted:
            if t.recipe.optim.clip_norm is not None:
                clip(t.method, norm, limit=t.recipe.optim.clip_norm)
            t.optimizer.step()
            t.engine.after_step(step)
        t.optimizer.zero_grad(set_to_none=True)
        done = step + 1
        watch.step()
        if overflowed:
            t.guard.restore()
            logger.info(
                "step %d: the gradient overflowed float16; the loss scale is %g now", done, t.scale.factor
            )
        elif accepted:
            log(t, done, terms, embeddings[-1], grad_norm=norm, lr=lr, watch=watch)
        else:
            report_skip(t, done, batches, embeddings)
        last = done == t.total_steps
        # Not amid steps that are skipped: the weights are the last checkpoint's, or those to go back from.
        due = t.checkpoints.due(done) and t.guard.in_a_row == 0
        due, stop = t.world.any(due, preemption.requested or time_is_up(t, watch))
        if due or stop or last:
            save(t, done, wait=stop or last)
        if last and t.world.is_first and not t.recipe.method.supervised:
            t.run.mark_done()
        tell_saved(t, done)
        t.profile.step(done)
        if stop and done < t.total_steps:
            end_preempted(t.world, t.run, f"stopped as asked, saved at step {done} of {t.total_steps}")
        t.watchdog.beat(done)


def steps(t: Training, watch: Stopwatch) -> Iterator[tuple[int, list[Batch]]]:
    """The steps that are left, each with its micro-batches."""
    accumulate = t.recipe.train.accumulate
    # The last step's batches live until those of the next are there.
    first = t.step + t.guard.steps_passed_over
    batches = t.loader.from_step(first * accumulate, held=2 * accumulate - 1)
    for step in range(t.step, t.total_steps):
        before = time.perf_counter()
        ready = [next(batches)[1] for _ in range(accumulate)]
        watch.waited(time.perf_counter() - before)
        yield step, ready


def forward_backward(t: Training, batches: list[Batch], step: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients of the mean loss over the micro-batches, averaged over the ranks.

    Returns:
        The method's scalars, averaged over the micro-batches, and the embeddings of each; all detached.
    """
    scalars: dict[str, Tensor] = {}
    embeddings = []
    for number, batch in enumerate(batches, start=1):
        with t.engine.micro_batch(last=number == len(batches)):
            with t.stragglers.augmenting():
                inputs = t.loader.augment(batch, dtype=DTYPES[t.recipe.train.precision])
            with arithmetic(t.recipe.train, t.world.device):
                terms = t.engine(inputs, step)
            t.engine.backward(terms["loss"] * (t.scale.factor / len(batches)))
        embeddings.append(terms.pop("embedding"))
        for name, value in terms.items():
            scalars[name] = scalars.get(name, 0) + value.detach() / len(batches)
    return scalars, embeddings


def gradient_norm(t: Training) -> Tensor:
    """Length of the whole gradient, over all ranks' pieces, after the loss scale is taken out of it."""
    parameters = [parameter for parameter in t.method.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    t.scale.unscale([own(gradient) for gradient in gradients])
    length: Tensor = torch.linalg.vector_norm(norms(gradients, parameters))
    return length


def read_together(*numbers: Tensor) -> list[float]:
    """Scalars on the host, which waits for the device: once in a step, and once more where it is logged."""
    device = numbers[0].device
    values: list[float] = torch.stack([number.to(device, torch.float64) for number in numbers]).tolist()
    return values


def clip(method: nn.Module, norm: float, *, limit: float) -> None:
    """Shorten the gradient to `limit` if its length, `norm`, is more."""
    gradients = [own(parameter.grad) for parameter in method.parameters() if parameter.grad is not None]
    torch._foreach_mul_(gradients, min(1.0, limit / (norm + 1e-6)))


def log(
    t: Training,
    done: int,
    terms: dict[str, Tensor],
    embedding: Tensor,
    *,
    grad_norm: float,
    lr: float,
    watch: Stopwatch,
) -> None:
    """Now and then: one row of numbers. Called on all ranks together: some numbers are the global batch's."""
    run, last = t.recipe.run, done == t.total_steps
    probed = t.recipe.probe is not None and (done % t.recipe.probe.every_steps == 0 or last)
    if not (done % run.log_every == 0 or last or probed):
        return
    embeddings = None if t.recipe.method.supervised else all_gather_rows(embedding, t.world.group)
    images = t.recipe.data.batch_size * t.recipe.train.accumulate
    timing = watch.lap(images_per_step=images, device=t.world.device)
    seconds = timing["seconds"]
    t.stragglers.report(step=done, seconds=seconds, waiting=seconds * timing["data_wait_share"])
    trunk = None
    if probed:
        t.watchdog.busy("probing")
        trunk = whole_trunk(t.method.trunk, t.recipe.trunk, keep=t.world.is_first)
    if t.metrics is not None:
        scalars = dict(zip(terms, read_together(*terms.values()), strict=True)) | {"grad_norm": grad_norm}
        values = {
            "epoch": _epoch(t, done),
            **scalars,
            "lr": lr,
        }
        if embeddings is not None:  # who is told the labels may see all images of a class alike
            values |= {} if t.positives is None else t.positives.health
            values |= {"embedding_std": embedding_std(embeddings), "rankme": rankme(embeddings)}
        if t.probe is not None and trunk is not None:
            knn = t.probe.accuracy_or_none(trunk, step=done)
            values |= {} if knn is None else {"knn": knn}
        t.metrics.log(done, values)
        if done > t.recipe.optim.warmup_steps:  # a trunk that has just been drawn sees all images alike
            t.metrics.warn_of_collapse(done, values)
        t.metrics.time(done, timing)
        t.metrics.progress(
            done,
            loss=scalars["loss"],
            lr=lr,
            images_per_second=timing["images_per_second"],
            seconds=seconds,
        )
    if probed:
        t.world.barrier()  # on the host: nothing of the next step may time out while the first rank probes


def report_skip(t: Training, done: int, batches: list[Batch], embeddings: list[Tensor]) -> None:
    """Name the samples behind a step that is skipped; the guard gives up if it goes on."""
    suspects: list[Suspect] = []
    for batch, embedding in zip(batches, embeddings, strict=True):
        if t.guard.spiked:
            suspects.append(batch_suspect(t.world.rank, batch.keys))
            continue
        inputs = t.loader.augment(batch, dtype=DTYPES[t.recipe.train.precision])
        suspects += find_suspects(t.world.rank, keys=batch.keys, inputs=inputs, embedding=embedding)
    everyone = t.guard.skip(done, suspects)
    if t.metrics is not None:
        skipped = [{"rank": s.rank, "what": s.what, "keys": list(s.keys)} for s in everyone]
        t.metrics.log(done, {"epoch": _epoch(t, done), "skipped": skipped})


def roll_back(t: Training, failure: Diverged) -> Training:
    """Go back to the newest checkpoint with no skipped step behind it, and pass over the data since.

    Where to is decided by what the checkpoints hold: a run killed before its next checkpoint decides alike.

    Raises:
        UserError: the failure, if there is no such checkpoint, or going back has not helped before.
    """
    t.watchdog.busy("going back to a checkpoint")
    t.checkpoints.finish()
    to = t.checkpoints.newest(lambda state: state["guard"]["in_a_row"] == 0)
    before = t.guard.rollbacks[t.guard.inherited :]
    if to is None or len(before) >= t.recipe.train.max_rollbacks:
        raise UserError(f"{failure}: {remedies(t.recipe, t.run.path, to, failure)}") from failure
    if any(back.to_step == to for back in before):
        remedy = remedies(t.recipe, t.run.path, to, failure)
        raise UserError(f"other data after step {to} did not help: {failure}: {remedy}") from failure
    t.checkpoints.forget_after(to)
    state = t.checkpoints.load()
    if state is None:
        raise failure
    t.scale.load(state["loss_scale"])
    t.guard.load(state["guard"])
    t.guard.rollbacks.append(Rollback(to_step=state["step"], from_step=failure.step))
    t.method.forget_batches()
    if t.positives is not None:
        t.positives.load(state.get("positives"))  # a branch's first checkpoint may have none
    if t.world.is_first:
        logger.warning("%s; going on from step %d with the data after it", failure, state["step"])
    if t.metrics is not None:
        t.metrics.go_back(state["step"])
        # With the step that follows: a run killed before its next checkpoint goes back, and says so, again.
        t.metrics.log(state["step"] + 1, {"rollback": {"to": state["step"], "from": failure.step}})
    t.stragglers.begin_at(state["step"])
    return replace(t, step=state["step"])


def remedies(recipe: PretrainRecipe, folder: Path, saved: int | None, failure: Diverged) -> str:
    """What may help against a divergence, as commands that are accepted.

    Args:
        saved: the step of the checkpoint to branch from, if there is one.
    """
    changes = [f"optim.lr={recipe.optim.lr / 2:g}", f"optim.clip_norm={(recipe.optim.clip_norm or 2) / 2:g}"]
    if recipe.train.precision in ("bf16", "fp16") and not failure.spiked:
        changes.append("train.precision=fp32")
    choice = f"{', '.join(changes[:-1])} or {changes[-1]}"
    if saved is None:
        begin = "it has saved no step before: begin again, under another --run"
    else:
        checkpoint = shlex.quote(f"{folder}/checkpoints/step-{saved:08d}")
        begin = f"branch off before it, by `submit pretrain --from {checkpoint}`"
    higher = f"train.spike_deviations={2 * recipe.train.spike_deviations:g}"
    spike = f"; or go on with the same command and {higher}, if that is no divergence"
    return f"{begin}, with {choice}{spike if failure.spiked else ''}"


def save(t: Training, done: int, *, wait: bool) -> None:
    """Publish a checkpoint, the metrics up to it first; unless `wait`, while the training goes on."""
    t.watchdog.busy("saving a checkpoint")
    if t.metrics is not None:
        t.run.refuse_if_superseded()
    loose: dict[str, Any] = {"guard": t.guard.state(), "loss_scale": t.scale.state()}
    if t.positives is not None:
        loose["positives"] = t.positives.state()
    first = (lambda: None) if t.metrics is None else t.metrics.sync
    t.checkpoints.save(done, {"loader": t.loader.state(), **loose}, wait=wait, before=first)


def time_is_up(t: Training, watch: Stopwatch) -> bool:
    """Whether the job's time limit leaves just the time to save. When SLURM asks the ranks to was said at
    submission, and nobody knew then how long steps and saves would take.
    """
    needed = 2 * (watch.longest + t.checkpoints.slowest) + SECONDS_TO_PART
    # A job so short that it would do little else waits to be asked.
    return watch.total > needed and time_is_short(needed)


def tell_saved(t: Training, done: int) -> None:
    """What the checkpoint that has just been published cost, into timing.jsonl."""
    saved = t.checkpoints.news()
    if saved is not None and t.metrics is not None:
        t.metrics.time(done, {"checkpoint": saved.step, "stalled": saved.stalled, "written": saved.written})


def _epoch(t: Training, done: int) -> int:
    """The epoch that the last batch of a step belongs to."""
    return ((done + t.guard.steps_passed_over) * t.recipe.train.accumulate - 1) // t.loader.steps_per_epoch
