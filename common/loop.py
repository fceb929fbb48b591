"""The bookkeeping of a training loop, driven by the script: what to draw next, when to log, save, stop, resume.

    with Loop.of_epochs(run, args, parts, images, advice="lower --lr") as loop:
        for step in loop:                            # with --resume from the checkpoint on
            rows = loop.rows(images)                 # of this step's batch; each epoch has an order of its own
            noise = loop.generator("noise")          # a function of seed, purpose and step: see devices.generator
            loop.add(update(rows, noise))            # {name: scalar}: summed on the device until the next log line
            if loop.logs():                          # every --log-every steps
                loop.log(**loop.means())             # the only time that the host waits for the device
            if loop.saves():                         # at the end of an epoch, and where Ctrl-C was pressed
                loop.save(evaluate(average))         # refuses nan, then writes; after Ctrl-C leaves by Interrupted

Steps are counted from 1: `step` is how many are done once this one is, and names the same step everywhere.
"""

import math
import signal
import time

import torch
from tqdm import tqdm

from common import devices, pictures, ranks, runs
from common.runs import Interrupted, UserError, number

CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


def add_training_flags(parser, epochs, batch_size, lr):
    """The flags of a training on images, with the script's defaults."""
    add = parser.add_argument
    add("--epochs", type=number(int, 1), default=epochs, help="passes over the training images")
    add("--batch-size", type=number(int, 2), default=batch_size, help="images a step, over all ranks")
    add("--lr", type=number(float, above=0), default=lr, help="peak learning rate")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of convolutions, matmuls")
    add("--log-every", type=number(int, 1), default=20, help="steps between lines of log.jsonl")


def check_batch(batch_size, images):
    """Raises UserError unless a batch gives each rank as many images, at least two, and the images fill one."""
    n = ranks.world_size()
    if batch_size % n or batch_size < 2 * n:  # batch norm needs two
        raise UserError(f"--batch-size {batch_size} does not divide among {n} processes: choose {2 * n} or a multiple")
    if images < batch_size:
        raise UserError(f"{images} training images do not fill a batch of {batch_size}: lower --batch-size")


class Loop:
    """An iterator over a training's steps. Entering restores the run (--resume) or begins it; leaving puts the
    signals' handlers back, and TF32 off.

    run: runs.Run; args: has seed, resume, log_every, batch_size; parts: {name: module or optimiser}, what a checkpoint
    holds; device: of the draws; total: steps of the training; save_every: steps between checkpoints; advice: what to
    change when the loss is not finite; per_epoch: steps of an epoch, where there are epochs.
    """

    def __init__(self, run, args, parts, device, total, save_every, advice, per_epoch=None):
        self.run, self.args, self.parts, self.device, self.advice = run, args, parts, device, advice
        self.total, self.save_every, self.per_epoch = total, save_every, per_epoch
        self.step, self.began = 0, {}
        self.names, self.sums = None, None  # of what `add` was given since the last log line
        self.interrupted = False  # by Ctrl-C or SIGTERM
        self.leaves = False  # after this step, because of that
        self.order, self.order_epoch = None, None

    @classmethod
    def of_epochs(cls, run, args, parts, images, advice):
        """args.epochs passes through `images` (N, ...) in batches of args.batch_size, draws on the images' device."""
        per_epoch = len(images) // args.batch_size  # the last, incomplete batch is dropped
        save_every = getattr(args, "save_every", 1) * per_epoch
        return cls(run, args, parts, images.device, args.epochs * per_epoch, save_every, advice, per_epoch)

    # --- beginning and end ---

    def __enter__(self):
        state = dict.fromkeys(CLOCKS, 0.0)
        if self.args.resume:
            state = self.run.restore(self.parts)
            self.step, self.sums = state["step"], state.get("recent")
            if self.step > self.total:
                raise UserError(
                    f"{self.run.folder} is at step {self.step}, past --epochs {self.args.epochs}: "
                    "give more, or --eval-only"
                )
            self.run.rewind_log(self.step)
            self.run.drop_frames(self.step)
            self.run.go_on()
        else:
            self.run.begin()
        self.began = {name: clock() - state[name] for name, clock in CLOCKS.items() if name in state}
        self.handlers = {which: signal.signal(which, self.interrupt) for which in runs.stop_signals()}
        quiet = not ranks.is_main()
        if not quiet:
            where = runs.machine(self.device.type)
            print(f"{self.run.folder}: training from step {self.step} to {self.total} on {where}", flush=True)
        self.bar = tqdm(total=self.total, initial=self.step, unit="step", disable=quiet, dynamic_ncols=True)
        return self

    def __exit__(self, *error):
        self.bar.close()
        for which, handler in self.handlers.items():
            signal.signal(which, handler)
        devices.allow_tf32(False)  # what follows measures: as --eval-only and a later probe do, in float32

    def interrupt(self, which, frame):
        """Ctrl-C, SIGTERM and a terminal that closes: the loop saves and leaves between two steps."""
        self.interrupted = True

    def __iter__(self):
        while self.step < self.total:
            self.step += 1
            yield self.step
            self.bar.update()

    def spent(self):
        """-> {"seconds": by the clock, "cpu_seconds": of processor time} of the training so far.

        Without cpu_seconds where a checkpoint of an earlier version did not hold them.
        """
        return {name: CLOCKS[name]() - began for name, began in self.began.items()}

    # --- what a step needs ---

    def generator(self, purpose):
        """A torch.Generator for this step's draws, on the loop's device."""
        return devices.generator(self.device, self.args.seed, purpose, self.step - 1)

    def epoch(self):
        """Which pass over the images this step belongs to, from 0."""
        return (self.step - 1) // self.per_epoch

    def rows(self, images):
        """The indices (batch_size,) of this step's batch in images (N, ...), on their device.

        Each epoch has an order of its own; the last, incomplete batch is dropped.
        """
        epoch, i = self.epoch(), (self.step - 1) % self.per_epoch
        if self.order_epoch != epoch:
            shuffle = devices.generator("cpu", self.args.seed, "order", epoch)
            self.order, self.order_epoch = torch.randperm(len(images), generator=shuffle).to(images.device), epoch
        return self.order[i * self.args.batch_size : (i + 1) * self.args.batch_size]

    # --- the log ---

    def add(self, numbers):
        """numbers: {name: scalar tensor}, what this step measured of its batch."""
        self.names = list(numbers)
        values = torch.stack(list(numbers.values()))
        if self.sums is None:
            self.sums = torch.zeros_like(values)
        self.sums = self.sums.to(values.device) + values

    def logs(self):
        return self.step % self.args.log_every == 0

    def means(self):
        """The means, over steps and ranks, of what `add` was given since the last call -> {name: float}."""
        ranks.all_reduce_mean(self.sums)
        found = dict(zip(self.names, (self.sums / self.args.log_every).tolist(), strict=True))
        self.sums.zero_()
        return found

    def log(self, **record):
        """A line of log.jsonl, of training batches. Raises UserError where a number is not finite."""
        self.check_finite(record)
        where = {"step": self.step}
        if self.per_epoch:
            where["epoch"] = self.step / self.per_epoch
        self.run.log(**where, **self.spent(), **record)

    def show(self, text):
        """Words beside the progress bar."""
        self.bar.set_postfix_str(text)

    def say(self, text):
        """A line above the progress bar, by the main process alone."""
        if ranks.is_main():
            self.bar.write(f"step {self.step}: {text}")

    def check_finite(self, record):
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                self.refuse(f"{name} became {value}")

    def check_weights(self):
        """Raises UserError where a weight is not finite, which a loss of before the last update does not show."""
        modules = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        finite = [p.isfinite().all() for module in modules for p in module.parameters()]
        if finite and not torch.stack(finite).all():
            self.refuse("the weights became infinite or nan")

    def refuse(self, what):
        raise UserError(
            f"{what} at step {self.step}: {self.advice}, and start anew; an earlier checkpoint is untouched"
        )

    # --- checkpoints ---

    def stopping(self):
        """Whether this step is the last one because of Ctrl-C. Several ranks agree; on GPUs, which would have to wait
        for it, at every 20th step."""
        asked = self.interrupted
        if ranks.world_size() > 1:
            together = self.device.type != "cuda" or self.step % 20 == 0
            asked = together and ranks.any_rank(asked)
        return asked and self.step < self.total

    def complete(self):
        return self.step % self.save_every == 0 or self.step == self.total

    def saves(self):
        """Whether to measure and call `save` now. To be asked once a step, by all ranks."""
        self.leaves = self.stopping()
        return self.complete() or self.leaves

    def save(self, found, frame=None):
        """Write the checkpoint, unless a weight or one of `found`, {name: number} measured of them, is not finite.

        Every `save_every` steps `found` becomes a line of log.jsonl, and `frame`, uint8 images (N, 3, 32, 32) of what
        the weights make, a picture for an animation. Raises Interrupted after Ctrl-C.
        """
        self.check_finite(found)
        self.check_weights()
        sums = None
        if self.sums is not None:
            ranks.all_reduce_mean(self.sums)  # so that every rank may take them as its own when it resumes
            sums = self.sums.cpu()
        if self.complete():  # before the checkpoint: resuming drops lines that are ahead of it, and misses none
            where = {"step": self.step}
            if self.per_epoch:
                where["epoch"] = self.step // self.per_epoch
            self.run.log(**where, **found)
            if frame is not None and ranks.is_main():
                pictures.write_frame(frame, self.run.frame(self.step), f"epoch {where['epoch']}")
        self.run.save(self.step, self.parts, recent=sums, **self.spent())
        if self.leaves:
            raise Interrupted(
                f"stopped at step {self.step} of {self.total} and saved; "
                f"`python {self.run.script} --name {self.run.folder.name} --resume` goes on."
            )
