"""How Ray Train hands the stream's blocks to the training workers.

In a file of its own: the process that does it starts without PyTorch, and so sooner.
"""

from ray.train import DataConfig


class InOrder(DataConfig):
    """Deals blocks to the training workers in turn, all of them: worker r of W gets blocks r, r + W, r + 2 W, ...

    A block holds one worker's shares of k global batches (`deal`), of which `split` makes batches. Ray's default would
    even the shares out by dropping rows.
    """

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **_kwargs):
        """Ray Train's hook: one dictionary of iterators a worker."""
        shares: list[dict] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.context.execution_options.preserve_order = True
            parts = dataset.streaming_split(world_size, equal=False, locality_hints=None)
            for share, part in zip(shares, parts, strict=True):
                share[name] = part
        return shares
