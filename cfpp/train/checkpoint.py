"""The checkpoints of a run: its state and the position of its data.

`workdir/checkpoints/<step>/` is written by Orbax in the background and appears, complete, under
that name at once. `cfpp/train/items.py` tells what it holds.
"""

import functools
import itertools

import grain
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from cfpp.data import pipeline
from cfpp.models import shapes
from cfpp.parallel import hosts
from cfpp.train import items
from cfpp.train.items import Tree


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask for itself whether the job is to end.

    JAX counts questions: `hosts.terminated` asks once a step, and one with a number of its own that
    comes between would let a SIGTERM be answered much later, or never.
    """

    def reached_preemption(self, step: int) -> bool:
        """False."""
        return False


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest intact one restored.

    Attributes:
      directory: the folder that holds one folder a step.
    """

    def __init__(self, workdir: epath.PathLike, keep: int):
        """Opens `workdir/checkpoints`, which is made if missing.

        Args:
          workdir: the working directory.
          keep: the newest so many checkpoints are kept.
        """
        self.directory = epath.Path(workdir) / "checkpoints"
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if ocp.utils.is_tmp_checkpoint(path):
                logging.warning("removing %s: its writing was interrupted", path)
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def restore(self, template: Tree, data: grain.DatasetIterator) -> Tree | None:
        """Restores the newest intact checkpoint; damaged newer ones are put aside, saying so.

        Args:
          template: the state as `jax.ShapeDtypeStruct`s with shardings.
          data: the input pipeline, which is set to where it was.

        Returns:
          The state, or None if there is no checkpoint.

        Raises:
          UserError: the checkpoint is of another model, or none is intact.
        """
        restore = functools.partial(_restore, template=template, data=data)
        steps = hosts.from_first(items.steps(self.directory))
        found = items.newest_intact(self.directory, steps, restore)
        if found is None:
            return None
        newest, state = found
        if hosts.is_first():
            for step in items.steps(self.directory):
                if step > newest:
                    _put_aside(self.directory / str(step))
        hosts.meet("restored")
        self._manager.reload()
        return state

    def save(self, step: int, state: Tree, fingerprint: dict[str, int], data) -> None:
        """Starts to save; returns once nothing depends on `state`'s buffers any more.

        Args:
          step: optimizer steps taken.
          state: with fields `ema` and others.
          fingerprint: of it, see `items.inspect`.
          data: the input pipeline.

        Raises:
          UserError: the disk does not take this checkpoint, or did not take the one before.
        """
        with items.saving(self.directory):
            self._manager.wait_until_finished()
            items.check_room(self.directory, state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(state.ema),
                    state=ocp.args.StandardSave(items.without_ema(state)),
                    data=ocp.args.JsonSave(data.get_state()),
                    fingerprint=ocp.args.JsonSave(fingerprint),
                ),
            )

    def wait(self) -> None:
        """Waits until everything is on the disk.

        Raises:
          UserError: the disk did not take it.
        """
        with items.saving(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the background threads; an error of theirs was or is told by `wait`."""
        try:
            self._manager.close()
        except Exception as error:
            logging.info("closing %s: %s", self.directory, error)


def _restore(path: epath.Path, template: Tree, data: grain.DatasetIterator) -> Tree:
    """What `Checkpoints.restore` restores, from one checkpoint."""
    wanted = {items.MODEL: template.ema, items.STATE: items.without_ema(template)}
    with items.damage(together=True):
        for name in (items.MODEL, items.STATE):
            shapes.check(wanted[name], items.shapes_of(path / name), f"checkpoint {path}")
        restored = items.read(
            path,
            model=ocp.args.StandardRestore(wanted[items.MODEL]),
            state=ocp.args.StandardRestore(wanted[items.STATE]),
            data=ocp.args.JsonRestore(),
            fingerprint=ocp.args.JsonRestore(),
        )
    with items.damage():
        state = template.replace(ema=restored[items.MODEL], **restored[items.STATE])
        items.check_fingerprint(items.inspect(state)[1], restored[items.FINGERPRINT])
        if restored[items.DATA] != pipeline.position(int(state.step)):  # a batch a step
            raise items.DamageError(f"its data are at {restored[items.DATA]}, not at its step")
        data.set_state(restored[items.DATA])
    return state


def _put_aside(path: epath.Path) -> None:
    """Renames a damaged checkpoint, so that its step can be saved again and nothing is lost."""
    for number in itertools.count(1):
        aside = path.parent / f"damaged_{path.name}_{number}"
        if not aside.exists():
            path.rename(aside)
            logging.warning("renamed the damaged checkpoint to %s", aside)
            return


def has_begun(workdir: epath.PathLike) -> bool:
    """Whether a run has a checkpoint to go on from. All processes ask together, and agree."""
    hosts.meet("looked for a checkpoint")  # before a collective, which would give up
    return bool(hosts.from_first(items.steps(epath.Path(workdir) / "checkpoints")))


def is_finished(workdir: epath.PathLike, last_step: int) -> bool:
    """Whether the checkpoint of a run's last step is there and its model intact.

    All processes ask together, and get the same answer.
    """
    checkpoints = epath.Path(workdir) / "checkpoints"
    is_intact = last_step in items.steps(checkpoints)
    if is_intact and hosts.is_first():  # one reads for all: a machine may run many
        try:
            items.read_model(checkpoints / str(last_step), items.host_memory())
        except (items.DamageError, items.NotNowError):
            is_intact = False
    hosts.meet("looked for what has finished")  # before a collective, which would give up
    return items.everywhere(is_intact)
