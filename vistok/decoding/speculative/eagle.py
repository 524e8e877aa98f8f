"""Drafting with an EAGLE network (Li et al. 2024, "EAGLE" and "EAGLE-2"; Jang et al. 2024, "LANTERN").

The network runs on both branches of guidance, with the same tokens; the head of the target turns its predictions into
logits, which are guided and filtered as the target's are. Keys of what the target has read are kept, those of a tree are
forgotten once it is grown: the features in them were predicted, and the target now knows the true ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.decoding.sampling import token_probabilities
from vistok.decoding.speculative.drafter import DraftStart, Outcome, check_same_target, check_same_vocabulary
from vistok.decoding.speculative.dynamic_tree import DynamicTreeParams
from vistok.decoding.speculative.tree import DraftTree, TreeShape
from vistok.decoding.speculative.tree_drafting import (
    DynamicDrafting,
    Level,
    TreeDrafting,
    drafter_sampling,
    static_drafting,
)
from vistok.decoding.streams import UniformSource
from vistok.kernels.attention import CausalMask, TreeMask
from vistok.models.drafters.eagle import EagleDrafter


@dataclass(frozen=True)
class EagleTreeDrafter:
    """Grows a tree with an EAGLE network.

    Args:
        network: trained for the target; on its device.
        tree: a shape, whose tokens are drawn from the network's distributions, or for a greedy target are its most
            probable ones; or the sizes of a dynamic tree, which is for greedy or strongly sharpened sampling.
    """

    network: EagleDrafter
    tree: TreeShape | DynamicTreeParams = TreeShape.chain(4)

    def begin(self, start: DraftStart) -> EagleSession:
        """See `Drafter.begin`."""
        self._check_fit(start)
        if isinstance(self.tree, DynamicTreeParams):
            return EagleSession(self.network, DynamicDrafting(self.tree), start)
        return EagleSession(self.network, static_drafting(self.tree, start.sampling), start)

    def _check_fit(self, start: DraftStart) -> None:
        network, target = self.network, start.target
        check_same_vocabulary(type(network).__name__, network.codebook_size, target)
        prefix, dim = start.reading.features.shape[1:]
        wanted = {
            "width": (network.config["dim"], dim),
            "tokens per image": (network.num_tokens, target.num_tokens),
        }
        for what, (ours, theirs) in wanted.items():
            if ours != theirs:
                raise ValueError(
                    f"the drafter was made for a {what} of {ours}, {type(target).__name__} has {theirs}: "
                    "use the drafter that was trained for this generator"
                )
        check_same_target(type(network).__name__, network.config["target"], target)
        if network.prefix_length >= prefix:
            raise ValueError(
                f"the drafter reads {network.prefix_length} condition positions in front of the last, "
                f"{type(target).__name__} has {prefix - 1}"
            )


class EagleSession:
    """The state of a batch: the keys of what was committed, and what the network predicts after the root.

    Args:
        network: see `EagleTreeDrafter`.
        drafting: how trees are grown.
        start: the batch.
    """

    def __init__(self, network: EagleDrafter, drafting: TreeDrafting, start: DraftStart) -> None:
        self.network = network
        self.drafting = drafting
        self.max_nodes = drafting.max_nodes
        self.start = start
        self.sampling = drafter_sampling(start.sampling)
        self.num_passes = 0
        prefix = start.reading.features[:, -network.prefix_length - 1 :].to(network.dtype)
        self.cache = network.new_cache(len(prefix))
        self._read_prefix(prefix[:, :-1])
        self.cache.split_rows()
        self.features = prefix[:, -1:]  # [r m d], read by the target since the last tree; their tokens follow
        self.tokens: Tensor | None = None  # [b m]; None until the first root is drawn
        self.counts = torch.ones(start.batch_size, dtype=torch.int64, device=prefix.device)
        self.predicted = torch.zeros_like(prefix[:, -1:])  # [r 1 d], the feature after the root

    def propose(self, roots: Tensor, num_committed: Tensor, streams: UniformSource) -> DraftTree:
        """See `DraftSession.propose`."""
        self._catch_up(roots[:, None] if self.tokens is None else self.tokens)
        grower = _Grower(self, num_committed)
        tree = self.drafting.grow(
            roots, grower.probabilities(self.predicted, 0)[:, 0], grower.expand, streams
        )
        self.cache.rollback_rows(self.cache.lengths)
        return tree

    def commit(self, outcome: Outcome) -> None:
        """See `DraftSession.commit`."""
        path = outcome.path.clamp_min(0)  # [b m]
        places = self.start.rows(path)[..., None].expand(-1, -1, outcome.reading.features.shape[2])
        self.features = outcome.reading.features.gather(1, places).to(self.network.dtype)
        # Every feature goes with the token after it: the accepted ones, then the new root.
        following = outcome.tree.tokens.gather(1, path).roll(-1, dims=1)
        last = (outcome.counts - 1).clamp_min(0)[:, None]
        self.tokens = following.scatter(1, last, outcome.new_roots[:, None])
        self.counts = outcome.counts

    def run(self, features: Tensor, tokens: Tensor, positions: Tensor, mask: TreeMask | CausalMask) -> Tensor:
        """One pass: features `[r n d]` and tokens `[b n]` at positions `[r n]` -> the features that follow."""
        self.num_passes += 1
        has_table = self.network.token_embed is not None
        embed = self.network.embed_tokens if has_table else self.start.target.embed_tokens
        token_embeds = self.start.rows(embed(tokens)).to(features.dtype)
        return self.network(features, token_embeds, positions, mask, self.cache)

    def _read_prefix(self, features: Tensor) -> None:
        length = features.shape[1]
        if length:
            zeros = torch.zeros(self.start.batch_size, length, dtype=torch.int64, device=features.device)
            self.run(features, zeros, torch.arange(length, device=features.device), CausalMask())

    def _catch_up(self, tokens: Tensor) -> None:
        """Read what the target has read since the last tree, each feature with the token after it, `[b m]`."""
        count = tokens.shape[1]
        lengths = self.cache.lengths
        steps = torch.arange(count, device=tokens.device)
        earlier = (steps <= steps[:, None]).expand(len(lengths), -1, -1)
        positions = lengths[:, None] + steps
        following = self.run(self.features, tokens, positions, TreeMask(lengths, earlier))
        counts = self.start.rows(self.counts)
        self.cache.commit(steps.expand(len(lengths), -1), counts)
        last = (counts - 1).clamp_min(0)[:, None, None].expand(-1, 1, following.shape[2])
        is_done = (counts == 0)[:, None, None]
        self.predicted = torch.where(is_done, self.predicted, following.gather(1, last))


class _Grower:
    """The predicted features of one tree, as it grows.

    Args:
        session: its keys hold the root.
        num_committed: `[b]`, the position of the root in its image.
    """

    def __init__(self, session: EagleSession, num_committed: Tensor) -> None:
        self.session = session
        self.num_committed = num_committed
        self.features = session.predicted  # [r n d], after the nodes of the level expanded last

    def expand(self, level: Level) -> Tensor:
        """See `tree_drafting.Expand`."""
        session = self.session
        rows = session.start.rows
        places = rows(level.parents)[..., None].expand(-1, -1, self.features.shape[2])
        lengths = session.cache.lengths
        # All nodes of a level share the position behind that of the level above; the root's is the last committed.
        positions = (lengths[:, None] + level.depth - 1).expand(-1, level.tokens.shape[1])
        mask = TreeMask(lengths, rows(level.ancestors))
        self.features = session.run(self.features.gather(1, places), level.tokens, positions, mask)
        return self.probabilities(self.features, level.depth)

    def probabilities(self, features: Tensor, depth: int) -> Tensor:
        """What follows nodes of one depth, `[r n d]` -> `[b n v]` float32."""
        start = self.session.start
        logits = start.target.features_to_logits(features.to(start.reading.features.dtype))
        positions = (self.num_committed + depth + 1)[:, None].expand(-1, features.shape[1])
        return token_probabilities(start.guide(logits, positions), self.session.sampling)
