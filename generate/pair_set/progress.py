"""How many images all processes have generated."""

from generate.pair_set.plan import PairPlan


class ImageCount:
    """Counts the images that are done, whoever generated them; looks no more at finished blocks."""

    def __init__(self, plan: PairPlan) -> None:
        self._plan = plan
        self._unfinished = list(range(plan.num_blocks))
        self.total = plan.num_images

    def done(self) -> int:
        """Images of finished files, and those that wait in the folders of the others."""
        plan = self._plan
        unfinished = [block for block in self._unfinished if not plan.shard(block).exists()]
        self._unfinished = unfinished
        sizes = {block: len(plan.prompts_of(block)) * plan.spec.images for block in unfinished}
        waiting = sum(min(size, plan.num_done(block)) for block, size in sizes.items())
        return self.total - sum(sizes.values()) + waiting
